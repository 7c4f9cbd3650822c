"""The ``tamingfast`` command."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tamingfast import __version__
from tamingfast.errors import UserError

USAGE_ERROR, INTERRUPTED = 2, 130
CANVAS = ".canvas"  # suffix of files that hold a `tamingfast.sampling.canvas.Canvas`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=os.environ.get("TAMINGFAST_LOG", "WARNING").upper())
    arguments = _parse(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; commands that take --resume continue from their last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`; nothing is left to say and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = _for_people(error)
        if message is None:
            raise
        print(f"tamingfast: error: {message}", file=sys.stderr)
        return INTERRUPTED if type(error).__name__ == "Stopped" else USAGE_ERROR
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    # argparse gives up on positional arguments that follow an option after others came before it, which is how
    # anybody writes overrides: train vqgan CONFIG --out DIR training.steps=100.
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _for_people(error: Exception) -> str | None:
    """One sentence for mistakes that a person can mend, None for our own."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError) and str(error).startswith(("TAMINGFAST_", "CUDA out of memory")):
        return str(error).splitlines()[0]
    return None


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from tamingfast.reproduce import EXPERIMENTS

    top = argparse.ArgumentParser(prog="tamingfast", description="Train and run VQGANs and their transformers, fast.")
    top.add_argument("--version", action="version", version=f"tamingfast {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable, text: str, parents: Sequence = (), to: Any = commands) -> argparse.ArgumentParser:
        added = to.add_parser(name, help=text, description=text, parents=list(parents))
        added.set_defaults(run=run)
        return added

    device = _options(("--device", {"help": "cpu, cuda or cuda:N; default: a GPU if there is one"}))
    resume = _options(("--resume", {"action": "store_true", "help": "continue the run in --out"}))
    drawing = _drawing_options()
    conditioned = _condition_options()
    painting = _options(
        ("--preview", {"metavar": "PNG", "help": "picture of what is drawn so far, renewed while drawing"}),
        ("--canvas", {"metavar": "FILE", "help": "keep the tokens here; default: beside --out until it is written"}),
        ("--resume", {"action": "store_true", "help": "go on with the canvas of an interrupted command"}),
    )

    command = add("reproduce", reproduce, "an experiment of the papers, with a report", (device, resume))
    command.add_argument("--preset", default="cpu", help="smoke, cpu (default) or, for pixels, paper")
    command.add_argument("--out", help="directory of the report; default: runs/reproduce for pixels, runs/EXPERIMENT")
    text = (
        f"one of {', '.join(EXPERIMENTS)} (default: pixels), then settings that win over the preset's; or all, with "
        "settings EXPERIMENT.key=value"
    )
    command.add_argument("overrides", nargs="*", metavar="EXPERIMENT | key=value", help=text)

    training = commands.add_parser("train", help="train a first stage or a prior").add_subparsers(
        required=True, metavar="STAGE"
    )
    for name, run, text in (
        ("vqgan", train_vqgan, "the first stage: images to tokens and back"),
        ("prior", train_prior, "the second stage: a transformer over the tokens"),
    ):
        command = add(name, run, text, (device, resume), to=training)
        command.add_argument("config", help="a preset's name or a YAML file, the original's included")
        command.add_argument("--out", required=True, help="run directory to write")
        command.add_argument("--seed", type=int, help="the same as training.seed=N")
        if name == "prior":
            command.add_argument("--first-stage", help="run or checkpoint of the first stage")
            command.add_argument(
                "--cond-stage", help="run or checkpoint of the condition's first stage, where it has one"
            )
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the config's")

    command = add("sample", sample, "draw new images", (device, drawing, conditioned, painting))
    command.add_argument("model", help="run directory or checkpoint of a prior")
    command.add_argument("-n", "--count", type=int, default=16, help="how many (default: %(default)s)")
    command.add_argument("--size", help="HEIGHTxWIDTH in pixels; default: as trained")
    command.add_argument("--out", default="samples.png", help="PNG with all images (default: %(default)s)")
    command.add_argument("--separate", action="store_true", help="write one PNG per image, numbered, beside --out")
    command.add_argument(
        "--from", dest="photo", metavar="PHOTO", help="begin with coarse scales of this photo, for multiscale priors"
    )
    command.add_argument("--scales", type=int, metavar="N", help="how many of them, coarsest first")

    for name, run, text in (
        ("edit", edit, "draw the masked region of a photo anew"),
        ("outpaint", outpaint, "draw what lies around a photo"),
    ):
        command = add(name, run, text, (device, drawing, conditioned, painting))
        command.add_argument("model", help="run directory or checkpoint of a prior")
        command.add_argument("photo", help="image file, or a canvas kept by --canvas")
        command.add_argument("-n", "--count", type=int, default=1, help="how many versions (default: %(default)s)")
        command.add_argument("--out", default=f"{name}ed.png", help="PNG to write (default: %(default)s)")
        command.add_argument(
            "--reconstruct", action="store_true", help="show the first stage's version of the photo where it is kept"
        )
        if name == "edit":
            command.add_argument(
                "--mask", required=True, help="image of the photo's size, white where it is drawn anew"
            )
        else:
            for side in ("left", "right", "top", "bottom"):
                command.add_argument(f"--{side}", type=int, default=0, metavar="PIXELS", help="default: 0")

    for name, run, text in (
        ("reconstruct", reconstruct, "images above what the first stage makes of them"),
        ("complete", complete, "keep the upper half of images and draw the lower half anew"),
    ):
        options = (drawing, _condition_options(nargs="+")) if name == "complete" else ()
        command = add(name, run, text, (device, *options))
        command.add_argument("model", help="run directory or checkpoint")
        command.add_argument("images", nargs="+", help="image files, or directories of them")
        command.add_argument("--size", help="HEIGHTxWIDTH in pixels to cut them to; default: as trained")
        command.add_argument("--out", default=f"{name}ed.png", help="PNG to write (default: %(default)s)")
        if name == "complete":
            command.add_argument(
                "--times", type=int, default=3, help="completions of each image (default: %(default)s)"
            )

    text = "what each schedule costs: nats per token of real images"
    command = add("likelihood", likelihood, text, (device, _condition_options(nargs="+")))
    command.add_argument("model", help="run directory or checkpoint of a prior")
    command.add_argument("images", nargs="+", help="image files, or directories of them")
    command.add_argument(
        "--size", help="HEIGHTxWIDTH in pixels to cut them to, larger than trained; default: as trained"
    )
    command.add_argument("--strides", type=int, nargs="+", default=[8], help="of strided and block (default: 8)")
    command.add_argument("--batch", type=int, default=4, help="images at a time (default: %(default)s)")
    command.add_argument("--plot", metavar="PNG", help="plot likelihood against work")

    command = add(
        "evaluate",
        evaluate,
        "figures of a model on real images: likelihood, reconstructions, samples",
        (device, drawing),
    )
    command.add_argument("model", help="run directory or checkpoint of a first stage or a prior")
    command.add_argument("--data", metavar="DIR", help="all images below this directory instead of the validation set")
    command.add_argument("--limit", type=int, help="so many images, drawn by --seed; default: all")
    command.add_argument("--samples", type=int, default=256, help="of a prior (default: %(default)s)")
    command.add_argument(
        "--features",
        help="inception (FID, KID, Inception score) or efficientnet-lite0; default: inception where "
        "--inception-weights is given, else efficientnet-lite0 where it is installed",
    )
    command.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's; default: its own download")
    command.add_argument("--perceptual-weights", metavar="FILE", help="VGG16 for LPIPS; default: the lpips package's")
    command.add_argument("--out", metavar="JSON", help="write the report here too")
    text = "the data set, e.g. name=photos size=32; default: what the model was trained on"
    command.add_argument("overrides", nargs="*", metavar="key=value", help=text)

    command = add("encode", encode, "turn a data set into a token file for `train prior`", (device,))
    command.add_argument("model", help="run directory or checkpoint of a first stage")
    command.add_argument("--out", required=True, help="token file to write (.safetensors)")
    command.add_argument("--cond-stage", help="run or checkpoint of the conditions' first stage, where they have one")
    command.add_argument("--split", choices=("train", "validation"), default="train")
    command.add_argument("--batch", type=int, default=64)
    text = "the data set, e.g. name=folder path=DIR size=256; default: what the model was trained on"
    command.add_argument("overrides", nargs="*", metavar="key=value", help=text)

    command = add("inspect", inspect, "what a checkpoint holds")
    command.add_argument("checkpoint")
    command = add("convert", convert, "any checkpoint to one .safetensors file with its config inside")
    command.add_argument("checkpoint")
    command.add_argument("out", help="file to write (.safetensors)")
    command.add_argument("--config", help="YAML of the checkpoint, where it does not lie beside it")
    add("info", info, "what this machine can run, and why not more")
    return top


def _options(*arguments: tuple[str, dict[str, Any]]) -> argparse.ArgumentParser:
    group = argparse.ArgumentParser(add_help=False)
    for name, settings in arguments:
        group.add_argument(name, **settings)
    return group


def _condition_options(**several: str) -> argparse.ArgumentParser:
    text = "label map, depth map, keypoints, edges, objects or small image to draw from"
    return _options(
        ("--class", {"dest": "label", "type": int, "help": "class index of a class-conditional prior"}),
        ("--condition", {"metavar": "FILE", "help": text + (", one for each image" if several else "")} | several),
        (
            "--condition-of",
            {"metavar": "PHOTO", "help": "compute the condition from this photo, where it can be computed"} | several,
        ),
    )


def _drawing_options() -> argparse.ArgumentParser:
    return _options(
        ("--temperature", {"type": float, "default": 1.0}),
        ("--top-k", {"type": int, "default": 100, "help": "0: all tokens (default: %(default)s)"}),
        ("--top-p", {"type": float, "help": "nucleus: the likeliest tokens that hold this probability"}),
        ("--greedy", {"action": "store_true", "help": "always the likeliest token"}),
        ("--seed", {"type": int, "default": 0}),
        (
            "--batch",
            {"type": int, "default": 16, "help": "images at a time; does not change them (default: %(default)s)"},
        ),
        ("--schedule", {"default": "paper", "help": "paper, scene, strided or block, for images beyond the window"}),
        ("--stride", {"type": int, "default": 8, "help": "tokens between windows, for strided and block"}),
        ("--backend", {"default": "auto", "help": "auto, native, torch or naive"}),
        ("--dtype", {"help": "weights while drawing: float32, bfloat16, float16 or int8; default: as stored"}),
    )


# --- commands -------------------------------------------------------------------------------------------------------


def reproduce(arguments: argparse.Namespace) -> None:
    from tamingfast import reproduce as experiments

    # One positional list, as argparse would take the first setting for an experiment that was left out.
    words = list(arguments.overrides)
    experiment = words.pop(0) if words and "=" not in words[0] else experiments.DEFAULT
    out = arguments.out or ("runs/reproduce" if experiment == experiments.DEFAULT else f"runs/{experiment}")
    path = experiments.run(experiment, arguments.preset, out, words, arguments.resume, arguments.device)
    print(path.read_text(encoding="utf-8"))
    print(f"written: {path} and the pictures beside it", file=sys.stderr)


def train_vqgan(arguments: argparse.Namespace) -> None:
    from tamingfast.training import vqgan

    _said(vqgan.train(_config(arguments), arguments.out, arguments.resume, arguments.device))


def train_prior(arguments: argparse.Namespace) -> None:
    from tamingfast.training import prior

    _need_first_stage(arguments)
    where = (arguments.first_stage, arguments.out, arguments.resume, arguments.device)
    _said(prior.train(_config(arguments), *where, cond_stage=arguments.cond_stage))


def _config(arguments: argparse.Namespace) -> Any:
    from tamingfast.training import load_config

    seed = [] if arguments.seed is None else [f"training.seed={arguments.seed}"]
    return load_config(arguments.config, [*arguments.overrides, *seed])


def _need_first_stage(arguments: argparse.Namespace) -> None:
    # Only a config in the original's layout names its first stage itself.
    if arguments.first_stage is None:
        if arguments.cond_stage is not None:
            raise UserError("--cond-stage is given without --first-stage RUN, the one of the images; give both")
        params = (_config(arguments).get("model") or {}).get("params") or {}
        if "first_stage_config" not in params:
            raise UserError(
                "the config names no first stage; give --first-stage RUN, a run of `tamingfast train vqgan`"
            )


def _said(path: Path) -> None:
    print(f"written: {path}")


def sample(arguments: argparse.Namespace) -> None:
    import torch

    from tamingfast import apply, images

    model = apply.check_prior(_load(arguments))
    condition, photo = _condition(arguments, model), _photo(arguments, model)
    told = any(value is not None for value in (condition, photo, arguments.label))
    begun = _blank(arguments, model, condition, photo) if told or not arguments.resume else None
    canvas = _painted(arguments, model, begun)
    batch, out = _decoded(arguments, model, canvas), Path(arguments.out)
    shown = _pictures(model, canvas, condition) if photo is None else [photo]
    if arguments.separate:
        for number, pixels in enumerate(images.to_uint8(batch)):
            images.save_png(out.with_name(f"{out.stem}-{number:04d}.png"), pixels)
        _save_beside(out, shown)
    else:
        images.save_grid(out, torch.cat([*shown, batch]))
    _drawn(arguments)


def _blank(arguments: argparse.Namespace, model: Any, condition: Any, photo: Any) -> Any:
    from tamingfast import apply
    from tamingfast.sampling.canvas import Canvas

    cond = _tokens_under(arguments, model, condition, _at_least_one(arguments.count, "--count"))
    if photo is not None:
        return apply.begun(model, photo.to(model.device), arguments.scales, cond)
    size = cond.shape[1:3] if condition is not None else apply.grid_size(model, *_size(arguments, model))
    return Canvas.blank(cond, *model.canvas_size(*size))


def _photo(arguments: argparse.Namespace, model: Any) -> Any:
    """The photo (1, 3, H, W) whose scales ``--from`` and ``--scales`` give to a multiscale prior, None without them."""
    from tamingfast import apply

    if arguments.photo is None and arguments.scales is None:
        return None
    if not apply.is_multiscale(model):
        raise UserError("got --from or --scales, but the model is no multiscale prior; train one with prior.scales=all")
    scales = f"the {len(model.pyramid.names)} scales {', '.join(model.pyramid.names)}"
    if arguments.photo is None or arguments.scales is None:
        raise UserError(f"--from PHOTO and --scales N go together; N is how many of {scales} are the photo's")
    model.pyramid.first(arguments.scales)
    size = _size(arguments, model)
    model.canvas_size(*apply.grid_size(model, *size))
    return apply.load_images([arguments.photo], *size)


def _condition(arguments: argparse.Namespace, model: Any) -> Any:
    """The condition (H, W, C) that the options name or that follows from --size, None for models without any."""
    from tamingfast import apply

    read, named = _named_conditions(arguments)
    size = None if arguments.size is None else _size(arguments, model)
    if size is not None:
        apply.grid_size(model, *size)
    if named:
        return read(model, named[0], size)
    if arguments.resume and size is None:
        return None  # the canvas that is resumed knows
    return apply.own_condition(model, size or _size(arguments, model)) if apply.is_spatial(model) else None


def _named_conditions(arguments: argparse.Namespace) -> tuple[Callable, list[str]]:
    """How to read the files that --condition or --condition-of name, and these files."""
    from tamingfast import apply

    if arguments.condition and arguments.condition_of:
        raise UserError("got --condition and --condition-of; give one of them")
    read = apply.read_condition if arguments.condition else apply.computed_condition
    named = arguments.condition or arguments.condition_of or []
    return read, [named] if isinstance(named, str) else named


def _tokens_under(arguments: argparse.Namespace, model: Any, condition: Any, count: int) -> Any:
    """Condition tokens of ``count`` images under a condition (H, W, C), or under --class where that is None."""
    from tamingfast import apply

    if condition is None:
        return apply.conditions(model, count, arguments.label)
    if arguments.label is not None:
        raise UserError(
            f"got class {arguments.label}, but the model is conditioned on '{model.cond_stage_key}'; leave --class out"
        )
    return apply.condition_tokens(model, condition, count)


def _pictures(model: Any, canvas: Any, condition: Any) -> list[Any]:
    """What to show of a canvas's condition, of which perhaps only the tokens are known: [(1, 3, H, W)] or nothing."""
    from tamingfast import apply

    if condition is not None:
        return [apply.condition_picture(model, condition)]
    return [apply.decoded_condition(model, canvas.cond[:1])] if canvas.cond.ndim > 2 else []


def _save_beside(out: Path, pictures: list[Any]) -> None:
    from tamingfast import images

    for picture in pictures:
        images.save_png(out.with_name(f"{out.stem}-condition.png"), images.to_uint8(picture[0]))


def edit(arguments: argparse.Namespace) -> None:
    from tamingfast import apply
    from tamingfast.sampling.canvas import token_mask

    model = apply.check_windowed(_load(arguments))
    factor = apply.first_stage_of(model).factor
    canvas, photo, condition = _opened(arguments, model)
    height, width = (side * factor for side in canvas.tokens.shape[1:])
    mask = token_mask(apply.read_mask(arguments.mask, height, width), factor)
    if not mask.any():
        raise UserError(
            f"{arguments.mask} has no white pixel, so nothing would be drawn; paint white what is to change"
        )
    canvas = canvas.resample(mask)
    finished = _painted(arguments, model, canvas)
    _write_edited(arguments, model, finished, photo, canvas.pending, condition)


def outpaint(arguments: argparse.Namespace) -> None:
    import torch.nn.functional as F

    from tamingfast import apply

    model = apply.check_windowed(_load(arguments))
    factor = apply.first_stage_of(model).factor
    sides = {side: getattr(arguments, side) for side in ("left", "right", "top", "bottom")}
    for side, pixels in sides.items():
        if pixels < 0 or pixels % factor:
            raise UserError(f"got --{side} {pixels}; this model needs multiples of {factor} pixels, 0 or more")
    if not any(sides.values()):
        raise UserError("nothing to draw; give --left, --right, --top or --bottom PIXELS")
    canvas, photo, condition = _opened(arguments, model, **{side: pixels // factor for side, pixels in sides.items()})
    finished = _painted(arguments, model, canvas)
    photo = None if photo is None else F.pad(photo, tuple(sides.values()))
    _write_edited(arguments, model, finished, photo, canvas.pending, condition)


def _opened(arguments: argparse.Namespace, model: Any, **sides: int) -> tuple[Any, Any, Any]:
    """The canvas of a photo, or of the file that holds one, ``--count`` times, grown by ``sides`` tokens.

    And the photo, None for a file, and its condition (H, W, C), None where there is none or only its tokens are known.
    """
    from tamingfast import apply

    apply.check_one_grid(model)
    left, right, top, bottom = (sides.get(side, 0) for side in ("left", "right", "top", "bottom"))
    count = _at_least_one(arguments.count, "--count")
    saved = _saved(arguments.photo, count) if Path(arguments.photo).suffix == CANVAS else None
    photo = apply.read_photo(arguments.photo) if saved is None else None
    rows, columns = apply.grid_size(model, *photo.shape[2:]) if saved is None else saved.tokens.shape[1:]
    factor = apply.first_stage_of(model).factor
    size = ((rows + top + bottom) * factor, (columns + left + right) * factor)
    condition = _condition_at(arguments, model, size, saved is not None, not sides)
    if saved is not None:
        keep = condition is None and arguments.label is None
        cond = None if keep else _tokens_under(arguments, model, condition, len(saved.tokens))
        return saved.outpaint(left, right, top, bottom, cond), None, condition
    cond = _tokens_under(arguments, model, condition, count)
    part = cond if cond.ndim == 2 else cond[:, top : top + rows, left : left + columns]
    with _bar("multiply-adds of encoding", unit_scale=True, delay=1) as bar:
        canvas = apply.photo_canvas(model, photo.to(model.device), part, bar.moved)
    return canvas.outpaint(left, right, top, bottom, cond), photo, condition


def _saved(path: str, count: int) -> Any:
    from tamingfast.sampling.canvas import Canvas

    canvas = Canvas.load(path)
    if len(canvas.tokens) > 1 and count > 1:
        raise UserError(f"{path} holds {len(canvas.tokens)} images; leave -n out to work on all of them")
    count, parts = max(count, len(canvas.tokens)), (canvas.tokens, canvas.pending, canvas.cond)
    return Canvas(*(part.expand(count, *part.shape[1:]) for part in parts), model=canvas.model)


def _condition_at(arguments: argparse.Namespace, model: Any, size: tuple[int, int], saved: bool, same: bool) -> Any:
    """The condition (H, W, C) of a canvas of ``size`` pixels that was ``saved``, or of a photo, and is the ``same``.

    It is the one that the options name, else what a photo or the size tells; None without a spatial condition and where
    the saved canvas has its own.
    """
    from tamingfast import apply

    read, named = _named_conditions(arguments)
    if named:
        condition = read(model, named[0])
        if condition.shape[:2] != size:
            got, wanted = ("x".join(map(str, pixels)) for pixels in (condition.shape[:2], size))
            raise UserError(
                f"the condition in {named[0]} is of {got} pixels, but the canvas of {wanted}: give one of its size"
            )
        return condition
    if saved and same:
        return None
    return apply.own_condition(model, size, arguments.photo if same else None)


def _write_edited(
    arguments: argparse.Namespace, model: Any, finished: Any, photo: Any, drawn: Any, condition: Any
) -> None:
    import torch

    from tamingfast import images
    from tamingfast.sampling.canvas import keep_pixels

    batch = _decoded(arguments, model, finished)
    if photo is not None and not arguments.reconstruct:
        batch = keep_pixels(batch, photo, drawn.cpu())
    shown = _pictures(model, finished, condition)
    if len(batch) == 1:
        images.save_png(arguments.out, images.to_uint8(batch[0]))
        _save_beside(Path(arguments.out), shown)
    else:
        images.save_grid(arguments.out, torch.cat([*shown, batch]))
    _drawn(arguments)


def _painted(arguments: argparse.Namespace, model: Any, begun: Any) -> Any:
    """``begun``, finished; with ``--resume`` the canvas of the file, which must have begun so where that is known."""
    from tamingfast import apply, images
    from tamingfast.sampling.canvas import Canvas

    drawing = _drawing(arguments)
    options = {name: drawing.pop(name) for name in ("batch", "backend")}
    path = _canvas_file(arguments)
    canvas = Canvas.load(path) if arguments.resume else apply.painted(model, begun, **drawing)
    if arguments.resume and begun is not None:
        canvas.check_begun_as(begun)

    def preview(now: Any) -> None:
        images.save_grid(arguments.preview, apply.decoded(model, now, arguments.batch))

    with _bar("tokens") as bar:
        return canvas.sample(
            model, path=path, preview=preview if arguments.preview else None, progress=bar.moved, **options
        )


def _decoded(arguments: argparse.Namespace, model: Any, canvas: Any) -> Any:
    from tamingfast import apply

    with _bar("multiply-adds of decoding", unit_scale=True, delay=1) as bar:
        return apply.decoded(model, canvas, arguments.batch, bar.moved)


def _canvas_file(arguments: argparse.Namespace) -> Path:
    out = Path(arguments.out)
    if out.is_dir():  # said before anything is drawn
        raise UserError(f"{out} is a directory; give the name of a file to write")
    return Path(arguments.canvas) if arguments.canvas else out.with_suffix(CANVAS)


def _drawn(arguments: argparse.Namespace) -> None:
    if not arguments.canvas:  # it was there to be resumed, and there is nothing left to do
        _canvas_file(arguments).unlink(missing_ok=True)
    _said(arguments.out)


def reconstruct(arguments: argparse.Namespace) -> None:
    from tamingfast import apply, images

    model = _load(arguments)
    x, _ = _images(arguments, model)
    out, figures = apply.reconstruct(model, x)
    images.save_rows(arguments.out, [x, out])
    print(json.dumps(figures))
    _said(arguments.out)


def complete(arguments: argparse.Namespace) -> None:
    import torch

    from tamingfast import apply, images

    model = apply.check_windowed(_load(arguments))
    x, files = _images(arguments, model)
    conditions = _conditions(arguments, model, files, x.shape[2:])
    cond = _tokens_of_each(arguments, model, conditions, len(x))
    rows = [x]
    if conditions:
        rows.insert(0, torch.cat([apply.condition_picture(model, condition) for condition in conditions]))
    for again in range(_at_least_one(arguments.times, "--times")):
        with _bar("tokens") as bar:
            rows.append(
                apply.complete(model, x, cond, first_image=again * len(x), progress=bar.moved, **_drawing(arguments))
            )
    images.save_rows(arguments.out, rows)
    _said(arguments.out)


def likelihood(arguments: argparse.Namespace) -> None:
    from tamingfast import apply
    from tamingfast.sampling.likelihood import plot

    model = apply.check_windowed(_load(arguments))
    x, files = _images(arguments, model)
    cond = _tokens_of_each(arguments, model, _conditions(arguments, model, files, x.shape[2:]), len(x))
    with _bar("schedules") as bar:
        rows = apply.likelihood(
            model, x, cond, arguments.strides, _at_least_one(arguments.batch, "--batch"), progress=bar.moved
        )
    for row in rows:
        print(json.dumps(row))
    if arguments.plot:
        plot(arguments.plot, rows)
        _said(arguments.plot)


def encode(arguments: argparse.Namespace) -> None:
    from tamingfast import apply
    from tamingfast.checkpoints import load_model
    from tamingfast.training.settings import build_datasets

    model = _load(arguments)
    cond_stage = None
    if arguments.cond_stage is not None:
        cond_stage = apply.first_stage_of(load_model(arguments.cond_stage, device=model.device))
    train, validation = build_datasets({"data": _data_settings(arguments, cond_stage or model)})
    dataset = train if arguments.split == "train" else validation
    with _bar("images", len(dataset)) as bar:
        count = apply.encode(model, dataset, arguments.out, arguments.batch, bar.update, cond_stage)
    print(f"written: {arguments.out}, {count} images")


def evaluate(arguments: argparse.Namespace) -> None:
    from tamingfast import backends, evaluation
    from tamingfast.files import write_json

    for value, name in ((arguments.samples, "--samples"), (arguments.limit, "--limit")):
        _at_least_one(1 if value is None else value, name)
    model = _load(arguments)
    drawing = _drawing(arguments)
    batch = drawing.pop("batch")
    training_set, dataset = _evaluated_data(arguments, model)
    network, perceptual, missing = _networks(arguments, model)
    if network is not None and min(arguments.samples, arguments.limit or len(dataset), len(dataset)) < 2:
        network, missing = None, missing | {"distances of features": "they need at least 2 images"}
    found = {
        "model": str(arguments.model),
        "data": getattr(dataset, "description", type(dataset).__name__),
        "machine": backends.machine(),
        "sampling": drawing,
        "missing": missing,
    } | evaluation.evaluate(
        model, dataset, network=network, perceptual=perceptual, training_set=training_set, count=arguments.samples,
        limit=arguments.limit, batch_size=batch, bar=_bar, **drawing,
    )  # fmt: skip
    print(f"Data: {found['data']}.\n\n{evaluation.table(found)}")
    for name, reason in missing.items():
        print(f"\nNot computed: {name}, as {reason}.")
    if arguments.out:
        write_json(arguments.out, found)
        _said(arguments.out)


def _evaluated_data(arguments: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    """(training set, the images to evaluate on); the former is None for a directory of images."""
    from tamingfast.data import folders
    from tamingfast.training.settings import build_datasets

    if arguments.data is None:
        train, validation = build_datasets({"data": _data_settings(arguments, model)})
        if validation is None:
            raise UserError("the data settings give no validation set; give a directory of images with --data DIR")
        return train, validation
    if arguments.overrides:
        raise UserError(f"got --data and '{arguments.overrides[0]}'; give one of them")
    side = _size(argparse.Namespace(size=None), model)[0]
    dataset = folders.build(arguments.data, side, validation_path=arguments.data)[1]
    classes = getattr(getattr(model, "cond_stage_model", None), "n_classes", None)
    if classes is not None and len(dataset.classes or ()) != classes:
        raise UserError(
            f"the model knows {classes} classes, but {arguments.data} has {len(dataset.classes or ())} class folders; "
            "give a directory with one for each class, in the order of their names"
        )
    return None, dataset


def _networks(arguments: argparse.Namespace, model: Any) -> tuple[Any, Any, dict[str, str]]:
    """(network of features, LPIPS, why any of both is missing); UserError when one that was asked for is."""
    from tamingfast import evaluation
    from tamingfast.perceptual import LPIPS

    name = arguments.features or (evaluation.INCEPTION if arguments.inception_weights else evaluation.EFFICIENTNET)
    if arguments.inception_weights and name != evaluation.INCEPTION:
        raise UserError(f"got --inception-weights for --features {name}; leave one of them out")
    if arguments.perceptual_weights == "random":
        raise UserError("got --perceptual-weights random, whose distance is no LPIPS; give a file of VGG16's weights")
    network = perceptual = None
    missing = {}
    try:
        network = evaluation.load_features(name, arguments.inception_weights, model.device)
    except UserError as error:
        if arguments.features or arguments.inception_weights:
            raise
        missing["distances of features"] = str(error)
    try:
        perceptual = LPIPS(arguments.perceptual_weights)
    except UserError as error:
        if arguments.perceptual_weights:
            raise
        missing["LPIPS"] = f"{str(error).partition(';')[0]}; give --perceptual-weights FILE"
    return network, perceptual, missing


def inspect(arguments: argparse.Namespace) -> None:
    from tamingfast.checkpoints import describe

    print(json.dumps(describe(arguments.checkpoint), indent=2))


def convert(arguments: argparse.Namespace) -> None:
    from tamingfast import checkpoints

    _said(checkpoints.convert(arguments.checkpoint, arguments.out, arguments.config))


def info(arguments: argparse.Namespace) -> None:
    from tamingfast import backends

    print(f"tamingfast {__version__}\n{backends.describe()}")


# --- what commands share --------------------------------------------------------------------------------------------


def _load(arguments: argparse.Namespace) -> Any:
    from tamingfast.backends import pick_device
    from tamingfast.checkpoints import load_model

    return load_model(arguments.model, device=pick_device(arguments.device))


def _size(arguments: argparse.Namespace, model: Any) -> tuple[int, int]:
    from tamingfast import apply

    if arguments.size is None:
        trained = apply.trained_size(model)
        if trained is None:
            raise UserError("the model does not say what size it was trained on; give --size HEIGHTxWIDTH")
        return trained
    height, cross, width = arguments.size.lower().partition("x")
    if not (height.isdigit() and (width.isdigit() or not cross)):
        raise UserError(f"got --size {arguments.size}; expected HEIGHTxWIDTH in pixels, for example 256x512")
    return int(height), int(width or height)


def _data_settings(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The ``data`` section that the overrides make, or, without any, the one that the model was trained with."""
    if not arguments.overrides:
        return (model.config or {}).get("data") or {}
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.from_dotlist(arguments.overrides))


def _images(arguments: argparse.Namespace, model: Any) -> tuple[Any, list[Path]]:
    """The images (B, 3, H, W) that the command names, cut to its size, and their files."""
    from tamingfast import apply

    height, width = _size(arguments, model)
    apply.grid_size(model, height, width)
    files = apply.image_files(arguments.images)
    return apply.load_images(files, height, width).to(model.device), files


def _conditions(arguments: argparse.Namespace, model: Any, files: list[Path], size: Sequence[int]) -> list[Any]:
    """The condition (H, W, C) of each of the images; none for models without spatial ones."""
    from tamingfast import apply

    read, named = _named_conditions(arguments)
    if named and len(named) != len(files):
        raise UserError(f"got {len(named)} conditions for {len(files)} images; give one for each, in their order")
    if named:
        return [read(model, path, tuple(size)) for path in named]
    return [apply.own_condition(model, tuple(size), path) for path in files] if apply.is_spatial(model) else []


def _tokens_of_each(arguments: argparse.Namespace, model: Any, conditions: list[Any], count: int) -> Any:
    import torch

    if not conditions:
        return _tokens_under(arguments, model, None, count)
    return torch.cat([_tokens_under(arguments, model, condition, 1) for condition in conditions])


def _drawing(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.top_k < 0:
        raise UserError(f"got --top-k {arguments.top_k}; expected a number of tokens, or 0 to keep all")
    names = ("temperature", "top_p", "greedy", "seed", "schedule", "stride", "backend", "dtype")
    _at_least_one(arguments.batch, "--batch")
    return {name: getattr(arguments, name) for name in names} | {
        "top_k": arguments.top_k or None,
        "batch": arguments.batch,
    }


def _at_least_one(value: int, name: str) -> int:
    if value < 1:
        raise UserError(f"got {name} {value}; expected at least 1")
    return value


@contextlib.contextmanager
def _bar(unit: str, total: int | None = None, **options: Any) -> Iterator[Any]:
    """A progress bar, on a terminal; ``moved(done, total)`` sets it where ``update(n)`` would add."""
    from tqdm import tqdm

    class Bar(tqdm):
        def moved(self, done: int, total: int) -> None:
            self.total = total
            self.update(done - self.n)

    with Bar(total=total, unit=f" {unit}", disable=None, **options) as bar:
        yield bar


if __name__ == "__main__":
    sys.exit(main())
