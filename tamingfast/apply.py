"""What a trained model is used for: drawing images, reconstructing and completing them, encoding data sets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast.data.scenes import Scene
from tamingfast.errors import UserError
from tamingfast.models import bands
from tamingfast.weights import fingerprint

if TYPE_CHECKING:
    from tamingfast.data.kinds import Kind
    from tamingfast.sampling.canvas import Canvas

TOP_K = 100  # the paper's choice, with temperature 1.0


def first_stage_of(model: nn.Module) -> nn.Module:
    """The first stage of a prior, or the model itself; UserError when there is none."""
    stage = getattr(model, "first_stage_model", model)
    if not hasattr(stage, "factor"):
        raise UserError(f"got a {type(model).__name__}, which is no first stage and has none; give a VQGAN or a prior")
    return stage


def check_prior(model: nn.Module) -> nn.Module:
    """The model itself; UserError when it is no prior."""
    if not hasattr(model, "transformer"):
        raise UserError(
            f"got a {type(model).__name__}, which cannot draw images; give a run of `tamingfast train prior`"
        )
    return model


def check_one_grid(model: nn.Module) -> nn.Module:
    """The model itself; UserError when its tokens are not one grid over the image, of which a part could be kept."""
    if first_stage_of(model).levels > 1:
        raise UserError(
            "the model's tokens are of two levels, of which no part of an image can be kept; use `tamingfast sample` "
            "or `tamingfast reconstruct`"
        )
    return model


def check_windowed(model: nn.Module) -> nn.Module:
    """The model itself; UserError when it is no prior, or one that draws all scales of an image at once."""
    if is_multiscale(check_prior(model)):
        raise UserError(
            "the model is a multiscale prior, whose tokens are no grid of the image that could be masked, extended or "
            "scanned; use `tamingfast sample`, with --from PHOTO --scales N to begin with a photo's coarse scales"
        )
    return model


def is_multiscale(model: nn.Module) -> bool:
    """Whether a prior is a `tamingfast.models.multiscale.MultiscaleTransformer`."""
    return hasattr(model, "pyramid")


def conditions(model: nn.Module, count: int, label: int | None = None) -> Tensor:
    """Condition tokens (count, 1) of an unconditional or class-conditional prior.

    Without ``label`` the classes take turns. Raises UserError for labels that the model does not know and for priors
    whose condition is an image.
    """
    if model.be_unconditional:
        if label is not None:
            raise UserError(f"got class {label}, but the model is unconditional; leave the class out")
        return torch.full((count, 1), model.sos_token, device=model.device)
    classes = getattr(model.cond_stage_model, "n_classes", None)
    if classes is None:
        raise UserError(
            f"the model is conditioned on '{model.cond_stage_key}', which a class cannot stand for; give a --condition "
            "FILE, or tamingfast.sampling.sample_grid the condition's tokens"
        )
    if label is not None and not 0 <= label < classes:
        raise UserError(f"got class {label}; the model knows 0 to {classes - 1}")
    labels = torch.arange(count) % classes if label is None else torch.full((count,), label)
    return labels[:, None].to(model.device)


def is_spatial(model: nn.Module) -> bool:
    """Whether the condition of a prior has a token for each token of the image."""
    return not model.be_unconditional and not hasattr(model.cond_stage_model, "n_classes")


def kind_of(model: nn.Module) -> Kind:
    """The kind of condition that a prior was trained with, from its data settings or, without them, its key.

    Raises UserError for priors without a condition that an image could be, and for conditions that we cannot make.
    """
    from tamingfast.data import kinds

    key = getattr(model, "cond_stage_key", None)
    if not is_spatial(model):
        raise UserError(f"the model is conditioned on {'nothing' if key == 'image' else f'{key!r}'}; give no condition")
    data = (getattr(model, "config", None) or {}).get("data") or {}
    if data.get("kind") is not None:
        return kinds.make(data["kind"], {name: data.get(name) for name in kinds.SETTINGS})
    if key not in kinds.KINDS:
        raise UserError(
            f"the model is conditioned on '{key}', and its config does not say how that is made; call "
            "tamingfast.sampling.sample_grid with the condition's tokens"
        )
    labels = model.cond_stage_model.encoder.conv_in.in_channels if key == "segmentation" else None
    return kinds.make(key, {"labels": labels})


def read_condition(
    model: nn.Module, path: str | os.PathLike, size: tuple[int, int] | None = None
) -> np.ndarray | Scene:
    """The condition (H, W, C) that a file holds, float32, or the scene, whose shape is (H, W).

    Scaled to cover ``size`` (height, width) and cut at the centre, or, without one, as large as it is, cut to multiples
    of f. Raises UserError as `tamingfast.data.kinds.Kind.read`.
    """
    from tamingfast.data.kinds import Objects

    kind = kind_of(model)
    if isinstance(kind, Objects):
        scene = kind.read(path)
        return scene.fitted(*(size or _multiples(model, *scene.shape, path)))
    found = kind.read(path)
    if size is None:
        return _centre(found, *_multiples(model, *found.shape[:2], path))
    scale = max(wanted / side for wanted, side in zip(size, found.shape[:2], strict=True))
    if scale != 1:
        covering = [max(wanted, round(side * scale)) for wanted, side in zip(size, found.shape[:2], strict=True)]
        found = kind.read(path, (covering[1], covering[0]))
    return _centre(found, *size)


def computed_condition(model: nn.Module, photo: str | os.PathLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """The condition (H, W, C) of a photo, float32, for kinds that can be computed; sizes as in `read_condition`."""
    from tamingfast.data.kinds import Computed

    kind = kind_of(model)
    if not isinstance(kind, Computed):
        raise UserError(f"the condition '{kind.key}' cannot be computed from a photo; give a --condition FILE of it")
    image = _read(Path(photo))
    if size is not None:
        return kind.compute(_cover(image, *size))
    pixels = np.asarray(image)
    return kind.compute(np.ascontiguousarray(_centre(pixels, *_multiples(model, *pixels.shape[:2], photo))))


def own_condition(model: nn.Module, size: tuple[int, int], photo: str | os.PathLike | None = None) -> np.ndarray | None:
    """The condition (H, W, C) that nobody needs to give, None for priors without a spatial one.

    It follows from the ``size`` (height, width) alone, or is computed from the ``photo``, cut to that size. Raises
    UserError for conditions that only a file can tell.
    """
    from tamingfast.data.kinds import Computed, Coordinates

    if not is_spatial(model):
        return None
    if model.cond_stage_key == Coordinates.key:
        return Coordinates().whole((size[1], size[0]))
    computable = isinstance(kind_of(model), Computed)
    if computable and photo is not None:
        return computed_condition(model, photo, size)
    photo_too = ", or --condition-of PHOTO to compute it from," if computable else ""
    raise UserError(
        f"the model is conditioned on '{model.cond_stage_key}'; give --condition FILE{photo_too} of "
        f"{size[0]}x{size[1]} pixels"
    )


def condition_tokens(model: nn.Module, condition: np.ndarray | Scene, count: int) -> Tensor:
    """Tokens (count, rows, columns) of a condition (H, W, C), the same for each of ``count`` images.

    Of a scene (count, rows, columns, c): those that stand before the window which begins there.
    """
    rows, columns = grid_size(model, *condition.shape[:2])
    if isinstance(condition, Scene):
        kind = kind_of(model)
        window = window_of(model, rows, columns, kind.rule.length)
        tokens = torch.from_numpy(kind.windows(condition, rows, columns, window)).to(model.device)
        return tokens[None].expand(count, -1, -1, -1)
    c = torch.from_numpy(condition).to(model.device).permute(2, 0, 1)[None].contiguous()
    whole = model.downsample_cond_size > -1
    tokens = (model.encode_to_c(c)[1] if whole else bands.encode_grid(model.cond_stage_model, c)).flatten(1)
    if tokens.shape[1] != rows * columns:
        raise UserError(
            f"the condition has {tokens.shape[1]} tokens and the image {rows * columns}, but windows need as many of "
            "both; call tamingfast.sampling.sample_grid with the condition's tokens"
        )
    return tokens.view(1, rows, columns).expand(count, -1, -1).contiguous()


def condition_picture(model: nn.Module, condition: np.ndarray | Scene) -> Tensor:
    """What to show of a condition (H, W, C) or a scene: (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(kind_of(model).picture(condition)).permute(2, 0, 1)[None]


@torch.no_grad()
def decoded_condition(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the prior sees of a spatial condition, from its tokens (1, rows, columns, ...): (1, 3, H, W) in [-1, 1]."""
    if tokens.ndim == 4:
        factor = first_stage_of(model).factor
        shape = (tokens.shape[1] * factor, tokens.shape[2] * factor)
        picture = kind_of(model).picture_of_tokens(tokens[0].cpu().numpy(), shape)
        return torch.from_numpy(picture).permute(2, 0, 1)[None]
    c = model.decode_condition(tokens.to(model.device))
    return condition_picture(model, c[0].permute(1, 2, 0).cpu().numpy()).clamp(-1, 1)


def _multiples(model: nn.Module, height: int, width: int, path: str | os.PathLike) -> tuple[int, int]:
    factor = first_stage_of(model).factor
    if min(height, width) < factor:
        raise UserError(f"{path} is {height}x{width} pixels, but one token is {factor}: give a larger one, or --size")
    return height // factor * factor, width // factor * factor


def _centre(array: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width]


def trained_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) in pixels of the images that the model was trained on, where its config says so."""
    factor = first_stage_of(model).factor
    if is_multiscale(model):
        return model.pyramid.height * factor, model.pyramid.width * factor
    config = getattr(model, "config", None) or {}
    data = config.get("data") or {}
    if "size" in data:
        side = int(data.get("crop") or data["size"])
        return side, side
    return (16 * factor, 16 * factor) if hasattr(first_stage_of(model), "encoder") else None


def grid_size(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Tokens (rows, columns) of an image of so many pixels; UserError unless both are multiples of f."""
    factor = first_stage_of(model).factor
    if height < 1 or width < 1 or height % factor or width % factor:
        near = [max(1, round(side / factor)) * factor for side in (height, width)]
        raise UserError(
            f"got a size of {height}x{width} pixels; this model needs multiples of {factor}, "
            f"for example {near[0]}x{near[1]}"
        )
    return first_stage_of(model).grid(height, width)


def window_of(model: nn.Module, rows: int, columns: int, condition_tokens: int = 1) -> int:
    """The largest square window that the prior's block size holds, at most 16 unless the grid itself fits.

    Raises UserError for tokens of two levels that are not as many as the prior was trained on, as no window slides
    over two grids at once.
    """
    room = model.transformer.config.block_size - condition_tokens + 1
    trained = room - 1  # the block has a position for the last token, too, which is never an input
    if first_stage_of(model).levels > 1 and rows * columns != trained:
        raise UserError(
            f"got a size of {rows * columns} tokens, but a prior on tokens of two levels draws only images of "
            f"{trained}, as it was trained on; give --size {'x'.join(map(str, trained_size(model)))}, or train one on "
            "images of this size"
        )
    if rows * columns <= room:
        return max(rows, columns)
    return min(16, int(room**0.5))


def _window(model: nn.Module, rows: int, columns: int, cond: Tensor) -> int:
    """`window_of` under tokens (B, c) or (B, rows, columns, c), or a grid of them, which is as large as the window."""
    if cond.ndim != 3:
        return window_of(model, rows, columns, cond.shape[-1])
    room = (model.transformer.config.block_size + 1) // 2
    return max(rows, columns) if rows * columns <= room else min(16, math.isqrt(room))


def draw(
    model: nn.Module,
    cond: Tensor,
    rows: int,
    columns: int,
    batch: int = 16,
    progress: Callable[[int, int], Any] | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Token grids (b, rows, columns) of len(cond) images in batches; the batch size does not change the result.

    ``options`` go to `tamingfast.sampling.sample_grid`; top-k defaults to the paper's 100, and a ``start`` for all
    images is cut along. ``progress(done, total)`` counts sampled tokens over all images.
    """
    from tamingfast.sampling import sample_grid

    vocabulary = model.transformer.config.vocab_size
    options = {"window": _window(model, rows, columns, cond), "top_k": TOP_K} | options
    if options["top_k"] is not None:
        options["top_k"] = min(options["top_k"], vocabulary)
    first_image = options.pop("first_image", 0)
    for first in range(0, len(cond), batch):
        part = slice(first, first + batch)
        cut = {key: options[key][part] for key in ("start",) if options.get(key) is not None}
        count = len(cond[part])

        def count_tokens(done: int, total: int, first: int = first, count: int = count) -> None:
            progress(first * total + done * count, len(cond) * total)

        yield sample_grid(
            model, cond[part], rows, columns, first_image=first_image + first,
            callback=None if progress is None else count_tokens, **(options | cut),
        )  # fmt: skip


def painted(model: nn.Module, canvas: Canvas, top_k: int | None = TOP_K, **settings: Any) -> Canvas:
    """The canvas with settings for `sample_grid`: the window that the model's block size holds, and those given."""
    window = _window(model, *canvas.tokens.shape[1:], canvas.cond)
    top_k = None if top_k is None else min(top_k, model.transformer.config.vocab_size)
    return replace(canvas, settings={"window": window, "top_k": top_k} | settings)


@torch.no_grad()
def photo_tokens(model: nn.Module, x: Tensor, progress: bands.Progress | None = None) -> Tensor:
    """Tokens (B, rows, columns) of images (B, 3, H, W) in [-1, 1]; UserError unless f divides their sides.

    Raises UserError for tokens of two levels, too, as `check_one_grid`.
    """
    grid_size(check_one_grid(model), *x.shape[2:])
    return bands.encode_grid(model.first_stage_model, x, progress=progress)


def photo_canvas(model: nn.Module, x: Tensor, cond: Tensor, progress: bands.Progress | None = None) -> Canvas:
    """A canvas of the tokens of images (B, 3, H, W) in [-1, 1] under condition tokens (B, c) or (B, rows, columns).

    One image may stand for all B, which is then encoded once. ``progress`` as in `tamingfast.models.bands.run`.
    """
    from tamingfast.sampling.canvas import Canvas

    tokens = photo_tokens(model, x, progress)
    return Canvas.of(tokens.expand(len(cond), -1, -1) if len(x) == 1 else tokens, cond)


def begun(model: nn.Module, x: Tensor, scales: int, cond: Tensor) -> Canvas:
    """A canvas of a multiscale prior that begins with the first ``scales`` scales of images (B, 3, H, W).

    One image may stand for all conditions (B, c). Raises UserError for more scales than the model has.
    """
    from tamingfast.sampling.canvas import Canvas

    tokens = model.encode_to_z(x)[1][:, None].expand(len(cond), -1, -1)
    pending = torch.arange(tokens.shape[-1]) >= model.pyramid.first(scales)
    return Canvas.of(tokens, cond).resample(pending[None])


@torch.no_grad()
def decoded(model: nn.Module, canvas: Canvas, batch: int = 16, progress: bands.Progress | None = None) -> Tensor:
    """Images (B, 3, H, W) on the CPU of a canvas, what is still to be sampled gray.

    ``progress`` as in `tamingfast.models.bands.run`, for each batch anew.
    """
    images = []
    whole, unknown = model.image_tokens(canvas.tokens), model.image_tokens(canvas.pending)
    for tokens, pending in zip(whole.split(batch), unknown.split(batch), strict=True):
        known = tokens.masked_fill(pending, 0).to(model.device)
        pixels = model.decode_grid(known, progress=progress).cpu()
        gray = first_stage_of(model).footprint(pending.cpu())
        images.append(pixels.masked_fill(gray, 0.0))
    return torch.cat(images)


def read_photo(path: str | os.PathLike) -> Tensor:
    """An image file as it is: (1, 3, H, W) in [-1, 1]. Raises UserError when it is missing or cannot be read."""
    return _pixels([np.asarray(_read(Path(path)))])


def read_mask(path: str | os.PathLike, height: int, width: int) -> Tensor:
    """An image file of the given size as bool (H, W), True where it is lighter than mid-gray."""
    mask = np.asarray(_read(Path(path)).convert("L")) >= 128
    if mask.shape != (height, width):
        raise UserError(
            f"{path} is {mask.shape[0]}x{mask.shape[1]} pixels, but the photo is {height}x{width}: "
            "give a mask of the photo's size"
        )
    return torch.from_numpy(mask)


def image_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The files, a directory standing for the images in it; UserError for directories without any."""
    from tamingfast.data.folders import EXTENSIONS

    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [path]
        if not inside:
            raise UserError(
                f"{path} holds no images ({', '.join(sorted(EXTENSIONS))}); give image files or their directory"
            )
        files += inside
    return files


def load_images(files: Sequence[str | os.PathLike], height: int, width: int) -> Tensor:
    """Image files, scaled to cover height x width pixels and cut at the centre: (B, 3, height, width) in [-1, 1].

    Raises UserError naming a file that is missing or cannot be read.
    """
    return _pixels([_cover(_read(Path(path)), height, width) for path in files])


def _read(path: Path) -> Any:
    from tamingfast.data.folders import read_rgb

    try:
        return read_rgb(path)
    except FileNotFoundError:
        raise UserError(f"no image at {path}; give the path of an existing file") from None
    except Exception as error:
        raise UserError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error


def _pixels(batch: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _cover(image: Any, height: int, width: int) -> np.ndarray:
    from PIL import ImageOps

    return np.asarray(ImageOps.fit(image, (width, height)))


@torch.no_grad()
def reconstruct(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Images (B, 3, H, W) through the first stage, and how far the result is from them.

    Figures: ``l1`` mean absolute difference (images in [-1, 1]), ``psnr`` in dB, ``codes`` different codes in use.
    """
    stage = first_stage_of(model)
    quant, _, (_, _, indices) = stage.encode(x)
    out = stage.decode(quant).clamp(-1, 1)
    mse = float((out - x).square().mean())
    psnr = 10 * float(np.log10(4 / mse)) if mse > 0 else float("inf")
    return out, {"l1": float((out - x).abs().mean()), "psnr": psnr, "codes": int(indices.unique().numel())}


@torch.no_grad()
def complete(model: nn.Module, x: Tensor, cond: Tensor, **options: Any) -> Tensor:
    """Images whose lower half is drawn anew under the tokens of the upper half: (B, 3, H, W) -> the same shape.

    ``cond`` are condition tokens (B, c) or (B, rows, columns); ``options`` go to `draw`.
    """
    start = photo_tokens(model, x)
    rows, columns = start.shape[1:]
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[rows // 2 :] = True
    grids = torch.cat(list(draw(model, cond, rows, columns, start=start, mask=mask, **options)))
    return model.decode_grid(grids)


@torch.no_grad()
def likelihood(
    model: nn.Module,
    x: Tensor,
    cond: Tensor,
    strides: Sequence[int] = (8,),
    batch: int = 4,
    progress: Callable[[int, int], Any] | None = None,
) -> list[dict[str, Any]]:
    """What each schedule costs on images (B, 3, H, W): a row each with ``name``, ``nats`` and ``tokens_per_token``.

    ``cond`` are condition tokens (B, c) or (B, rows, columns).
    ``nats`` is the mean over tokens and images of `tamingfast.sampling.likelihood.negative_log_likelihood`.
    """
    from tamingfast.sampling.likelihood import negative_log_likelihood, tokens_per_token

    canvas = painted(model, photo_canvas(model, x, cond))
    _, rows, columns = canvas.tokens.shape
    window = canvas.settings["window"]
    prefix = cond.shape[-1] if cond.ndim != 3 else min(window, rows) * min(window, columns)
    rules = [("paper", 1), ("scene", 1), *((rule, stride) for rule in ("strided", "block") for stride in strides)]
    found = []
    for done, (rule, stride) in enumerate(rules):
        options = dict(window=window, schedule=rule, stride=stride)
        parts = zip(cond.split(batch), canvas.tokens.split(batch), strict=True)
        nats = torch.cat([negative_log_likelihood(model, *part, **options) for part in parts])
        work = tokens_per_token(rows, columns, prefix, **options)
        name = rule if rule in ("paper", "scene") else f"{rule} {stride}"
        found.append({"name": name, "nats": float(nats.mean()), "tokens_per_token": work})
        if progress is not None:
            progress(done + 1, len(rules))
    return found


def encode(
    model: nn.Module,
    dataset: Dataset,
    path: str | os.PathLike,
    batch: int = 64,
    progress: Callable[[int], Any] | None = None,
    cond_stage: nn.Module | None = None,
) -> int:
    """Write the tokens of every image of ``dataset`` to a token file that the prior's training reads; returns how many.

    Images are taken as the dataset's epoch 0 gives them, and where it holds spatial conditions their tokens are written
    too: those of ``cond_stage``, by default of the prior ``model``, or coordinates. ``progress(n)`` runs after every n
    images. Raises UserError for conditions without a stage, and for a stage whose conditions the dataset lacks.
    """
    from tamingfast.data import loader
    from tamingfast.data.tokens import smallest, write_tokens

    stage = first_stage_of(model)
    key, cond_stage = _stage_of_conditions(model, dataset, cond_stage)
    classes = getattr(dataset, "classes", None)
    labels: list[int] = []
    conditions: list[np.ndarray] = []
    metadata = {
        "source": getattr(dataset, "description", type(dataset).__name__),
        "first_stage": fingerprint(stage),
    }
    condition = None if key is None else _description_of_conditions(key, cond_stage, dataset)

    @torch.no_grad()
    def grids() -> Iterator[np.ndarray]:
        for items in loader(dataset, batch, seed=0, epoch=0, shuffle=False, drop_last=False):
            x = items["image"].permute(0, 3, 1, 2).to(stage.device)
            quant, _, (_, _, indices) = stage.encode(x)
            grid = quant.shape[2:]
            if classes is not None:
                labels.extend(items["class_label"].tolist())
            if key is not None:
                _, _, (_, _, found) = cond_stage.encode(items[key].permute(0, 3, 1, 2).to(stage.device))
                conditions.append(smallest(found.view(len(x), *grid).cpu().numpy(), condition["vocab_size"]))
            yield indices.view(len(x), *grid).cpu().numpy()
            if progress is not None:
                progress(len(x))

    # The lists are filled while the grids are written.
    return write_tokens(
        path,
        grids(),
        stage.n_embed,
        class_label=None if classes is None else labels,
        metadata=metadata,
        classes=classes,
        conditions=None if key is None else conditions,
        condition=condition,
    )


def _stage_of_conditions(
    model: nn.Module, dataset: Dataset, cond_stage: nn.Module | None
) -> tuple[str | None, nn.Module | None]:
    """The key of the dataset's spatial conditions and what makes tokens of them, both None without."""
    from tamingfast.data.kinds import Coordinates, Objects
    from tamingfast.models.conditioning import CoordStage

    kind = getattr(dataset, "kind", None)
    key = getattr(kind, "key", None)
    if isinstance(kind, Objects):
        raise UserError(
            "token files hold no objects, whose order changes from epoch to epoch; train on data.name=conditions "
            "instead, or give name=folder to write the images alone"
        )
    if cond_stage is None and hasattr(model, "transformer") and is_spatial(model):
        wanted, cond_stage = model.cond_stage_key, model.cond_stage_model
    else:
        wanted = getattr(cond_stage, "image_key", None)
    if wanted is not None and wanted not in dataset[0]:
        raise UserError(
            f"the stage of conditions is for '{wanted}', which the data do not hold; give name=conditions kind=... "
            "path=DIRECTORY"
        )
    if wanted is None and key == Coordinates.key:
        stage = first_stage_of(model)
        return key, CoordStage(stage.n_embed - 1, stage.factor)
    if wanted is None and key is not None:
        raise UserError(
            f"the data hold conditions of '{key}', but no first stage for them is given; give --cond-stage RUN, or "
            "name=folder to write the images alone"
        )
    return wanted, cond_stage


def _description_of_conditions(key: str, cond_stage: nn.Module, dataset: Dataset) -> dict[str, Any]:
    """What a token file says about its conditions: see `tamingfast.data.tokens.write_tokens`."""
    from tamingfast.data.kinds import settings_of

    kind = getattr(dataset, "kind", None)
    return {
        "key": key,
        # A coordinate stage rounds to n_embed itself.
        "vocab_size": cond_stage.n_embed + (0 if hasattr(cond_stage, "quantize") else 1),
        "first_stage": fingerprint(cond_stage),
        "data": {} if kind is None else settings_of(kind),
    }
