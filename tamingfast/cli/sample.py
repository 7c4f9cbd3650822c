"""`tamingfast sample`: new images."""

from __future__ import annotations

import argparse
from typing import Any

from tamingfast.cli.conditions import condition_options, condition_pictures, named_conditions, tokens_under
from tamingfast.cli.options import DEVICE, DRAWING, command, load, wanted_size
from tamingfast.cli.painting import PAINTING, count_of, finish, paint
from tamingfast.errors import UserError


def add_to(commands: Any) -> None:
    parents = (DEVICE, DRAWING, condition_options(), PAINTING)
    added = command(commands, "sample", sample, "draw new images", parents)
    added.add_argument("model", help="run directory or checkpoint of a prior")
    added.add_argument("-n", "--count", type=int, help="how many images; default: 16")
    added.add_argument("--size", help="HEIGHTxWIDTH in pixels; default: as trained")
    added.add_argument("--out", default="samples.png", help="PNG with all images (default: %(default)s)")
    added.add_argument(
        "--from", dest="photo", metavar="PHOTO", help="begin with coarse scales of this photo, for multiscale priors"
    )
    added.add_argument("--scales", type=int, metavar="N", help="how many of them, coarsest first")


def sample(arguments: argparse.Namespace) -> None:
    from tamingfast import tasks

    model = tasks.check_prior(load(arguments))
    condition, photo = _condition(arguments, model), _photo(arguments, model)
    told = any(value is not None for value in (condition, photo, arguments.label, arguments.size))
    begun = _blank(arguments, model, condition, photo) if told or not arguments.resume else None
    canvas = paint(arguments, model, begun)
    finish(arguments, model, canvas, condition_pictures(model, canvas, condition) if photo is None else [photo])


def _blank(arguments: argparse.Namespace, model: Any, condition: Any, photo: Any) -> Any:
    from tamingfast import tasks
    from tamingfast.sampling.canvas import Canvas

    cond = tokens_under(arguments, model, condition, count_of(arguments, 16))
    if photo is not None:
        return tasks.begun(model, photo.to(model.device), arguments.scales, cond)
    size = cond.shape[1:3] if condition is not None else tasks.grid_size(model, *wanted_size(arguments.size, model))
    return Canvas.blank(cond, *model.canvas_size(*size))


def _photo(arguments: argparse.Namespace, model: Any) -> Any:
    """The photo (1, 3, H, W) whose scales ``--from`` and ``--scales`` give to a multiscale prior, None without them."""
    from tamingfast import tasks

    if arguments.photo is None and arguments.scales is None:
        return None
    if not tasks.is_multiscale(model):
        raise UserError("got --from or --scales, but the model is no multiscale prior; train one with prior.scales=all")
    scales = f"the {len(model.pyramid.names)} scales {', '.join(model.pyramid.names)}"
    if arguments.photo is None or arguments.scales is None:
        raise UserError(f"--from PHOTO and --scales N go together; N is how many of {scales} are the photo's")
    model.pyramid.first(arguments.scales)
    size = wanted_size(arguments.size, model)
    model.canvas_size(*tasks.grid_size(model, *size))
    return tasks.load_images([arguments.photo], *size)


def _condition(arguments: argparse.Namespace, model: Any) -> Any:
    """The condition (H, W, C) that the options name or that follows from --size, None for models without any."""
    from tamingfast import tasks

    read, named = named_conditions(arguments)
    size = None if arguments.size is None else wanted_size(arguments.size, model)
    if size is not None:
        tasks.grid_size(model, *size)
    if named:
        return read(model, named[0], size)
    if arguments.resume and size is None:
        return None  # the canvas that is resumed knows
    return tasks.own_condition(model, size or wanted_size(arguments.size, model)) if tasks.is_spatial(model) else None
