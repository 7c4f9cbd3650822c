"""Drawing token grids with a prior, from scratch or around a given image, and decoding them to images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamingfast import images
from tamingfast.engines.first_stage import Progress
from tamingfast.errors import UserError, check_count
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.ops.backends import available_memory
from tamingfast.ranks import in_turns
from tamingfast.sampling import sample_grid
from tamingfast.sampling.canvas import Canvas
from tamingfast.tasks.models import check_windowed, first_stage_of
from tamingfast.tasks.options import DrawingOptions
from tamingfast.tasks.pictures import save_pictures
from tamingfast.tasks.recipes import Recipe, texts_of
from tamingfast.tasks.sizes import grid_size, window_under

#: The default options, which are the paper's.
PAPER = DrawingOptions()
TOP_K = PAPER.top_k
#: Bytes of memory for each pixel of the drawn images: float32 in three channels, and twice that while they are joined.
_BYTES = 3 * 12


@dataclass(frozen=True, eq=False)
class Drawing:
    """Drawn images.

    Attributes:
        images: float32 (B, 3, H, W) in [-1, 1] on the CPU; gray where nothing is drawn, if the drawing was stopped.
        canvas: their tokens, complete unless it was stopped, with the settings and condition that decided them; `edit`
            and `outpaint` accept it in place of a photo.
        conditions: pictures (1, 3, H, W) of the spatial condition, or of the photo whose coarse scales were given.
        recipe: how they were drawn; None if the task was told to keep none, or to stop.
        accepted: the share of candidates that a classifier kept; None where it kept none from another.
    """

    images: Tensor
    canvas: Canvas
    conditions: tuple[Tensor, ...]
    recipe: Recipe | None = None
    accepted: float | None = None

    def save(self, path: str | os.PathLike[str], separate: bool = False) -> list[Path]:
        """Write the images and pictures of their conditions as PNG, each with its recipe; returns the images' files.

        A single image, or if they are ``separate`` each image, gets a file of its own, with the conditions in files
        beside it; otherwise the conditions and all images are written on one sheet. Raises what
        `tamingfast.files.check_png` raises.
        """
        out, batch = Path(path), self.images
        written = [out]
        if separate:
            written = [out.with_name(f"{out.stem}-{number:04d}.png") for number in range(len(batch))]
            for number, (file, image) in enumerate(zip(written, batch, strict=True)):
                images.save_png(file, images.to_uint8(image), texts=texts_of(self.recipe, number))
        else:
            sheet = batch if len(batch) == 1 else torch.cat([*self.conditions, batch])
            save_pictures(out, sheet, texts_of(self.recipe))
        if separate or len(batch) == 1:
            for picture in self.conditions:
                save_pictures(out.with_name(f"{out.stem}-condition.png"), picture)
        return written

    def only(self, image: int) -> Drawing:
        """The drawing of the image of this number alone; numbers begin with the canvas's first."""
        canvas, first = self.canvas, self.canvas.settings.get("first_image", 0)
        place = slice(image - first, image - first + 1)
        alone = replace(
            canvas, tokens=canvas.tokens[place], pending=canvas.pending[place], cond=canvas.cond[place],
            settings=canvas.settings | {"first_image": image},
        )  # fmt: skip
        recipe = self.recipe and replace(self.recipe, image=image)
        return replace(self, images=self.images[place], canvas=alone, recipe=recipe)


def draw(
    model: Net2NetTransformer,
    cond: Tensor,
    rows: int,
    columns: int,
    batch: int = PAPER.batch,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Yield token grids int64 (b, rows, columns), one per condition in ``cond``, in batches of at most ``batch``.

    The batch size does not change the tokens; several processes draw batches in turns. ``options`` go to
    `tamingfast.sampling.sample_grid`; top-k defaults to the paper's 100, and ``start`` (B, ...) is split like ``cond``.
    ``progress(done, total)`` counts sampled tokens over all images.
    """
    options = {"window": window_under(model, rows, columns, cond), "top_k": TOP_K} | options
    options["top_k"] = _within_vocabulary(model, options["top_k"])
    first_image, start = options.pop("first_image", 0), options.pop("start", None)

    def drawn(first: int) -> Tensor:
        part = slice(first, first + batch)
        count = len(cond[part])

        def count_tokens(done: int, total: int, first: int = first, count: int = count) -> None:
            if progress is not None:
                progress(first * total + done * count, len(cond) * total)

        return sample_grid(
            model, cond[part], rows, columns, first_image=first_image + first,
            start=None if start is None else start[part],
            callback=None if progress is None else count_tokens, **options,
        ).cpu()  # fmt: skip

    for grid in in_turns(drawn, range(0, len(cond), batch)):
        yield grid.to(model.device)


def token_unit(model: Net2NetTransformer, rows: int, columns: int, cond: Tensor) -> str:
    """What a counter of tokens of such a grid counts."""
    slides = window_under(model, rows, columns, cond) < max(rows, columns)
    return "tokens in sliding windows" if slides else "tokens"


def painted(model: Net2NetTransformer, canvas: Canvas, top_k: int | None = TOP_K, **settings: Any) -> Canvas:
    """The canvas with these ``settings`` of `sample_grid` and a window that fits the model's block size."""
    _, rows, columns = canvas.tokens.shape
    window = window_under(model, rows, columns, canvas.cond)
    return replace(canvas, settings={"window": window, "top_k": _within_vocabulary(model, top_k)} | settings)


def _within_vocabulary(model: Net2NetTransformer, top_k: int | None) -> int | None:
    return None if top_k is None else min(top_k, model.transformer.config.vocab_size)


@torch.no_grad()
def photo_tokens(model: Net2NetTransformer, x: Tensor, progress: Progress | None = None) -> Tensor:
    """Tokens int64 (B, rows, columns) of images (B, 3, H, W) in [-1, 1].

    Raises UserError if a side is not a multiple of f, and for models that `check_windowed` refuses.
    """
    grid_size(check_windowed(model), *x.shape[2:])
    return first_stage_of(model).encode_grid(x, progress=progress)


def photo_canvas(model: Net2NetTransformer, x: Tensor, cond: Tensor, progress: Progress | None = None) -> Canvas:
    """A canvas of the tokens of images (B, 3, H, W) in [-1, 1] under condition tokens (B, c) or (B, rows, columns).

    A single image is encoded once and repeated for all B conditions. ``progress`` as in
    `tamingfast.engines.first_stage.run`.
    """
    tokens = photo_tokens(model, x, progress)
    return Canvas.of(tokens.expand(len(cond), -1, -1) if len(x) == 1 else tokens, cond)


def begun(model: MultiscaleTransformer, x: Tensor, scales: int, cond: Tensor) -> Canvas:
    """A canvas of a multiscale prior with the ``scales`` coarsest scales of images (B, 3, H, W) already known.

    A single image is repeated for all conditions (B, c). Raises UserError for more scales than the model has.
    """
    tokens = model.encode_to_z(x)[1][:, None].expand(len(cond), -1, -1)
    pending = torch.arange(tokens.shape[-1]) >= model.pyramid.first(scales)
    return Canvas.of(tokens, cond).resample(pending[None])


def check_memory(model: Net2NetTransformer, canvas: Canvas) -> None:
    """Raise UserError unless the host's memory holds the images that a canvas becomes."""
    shown = first_stage_of(model).footprint(model.image_tokens(canvas.pending[:1]).cpu())
    count, (height, width) = len(canvas.tokens), shown.shape[-2:]
    needed, free = _BYTES * count * height * width, available_memory(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"memory: got {free / 2**30:.1f} GiB free, expected {needed / 2**30:.1f} GiB for {count} images of "
            f"{height}x{width} pixels; draw fewer or smaller images"
        )


def decoded(
    model: Net2NetTransformer,
    canvas: Canvas,
    batch: int = PAPER.batch,
    progress: Progress | None = None,
    share: Callable[..., Iterator[Tensor]] = in_turns,
) -> Tensor:
    """Decode a canvas to images float32 (B, 3, H, W) on the CPU; pending areas are gray.

    ``progress`` as in `tamingfast.engines.first_stage.run`; it restarts with each batch. Several processes decode
    batches in turns, or with ``share=map`` this one decodes all.
    """
    return torch.cat(list(decoded_batches(model, canvas, batch, progress, share)))


def decoded_batches(
    model: Net2NetTransformer,
    canvas: Canvas,
    batch: int = PAPER.batch,
    progress: Progress | None = None,
    share: Callable[..., Iterator[Tensor]] = in_turns,
) -> Iterator[Tensor]:
    """What `decoded` returns, in batches of at most ``batch`` images."""
    grids, unknown = model.image_tokens(canvas.tokens), model.image_tokens(canvas.pending)

    @torch.no_grad()
    def pixels(part: tuple[Tensor, Tensor]) -> Tensor:
        tokens, pending = part
        known = tokens.masked_fill(pending, 0).to(model.device)
        found = model.decode_grid(known, progress=progress).cpu()
        gray = first_stage_of(model).footprint(pending.cpu())
        return found.masked_fill(gray, 0.0)

    yield from share(pixels, zip(grids.split(batch), unknown.split(batch), strict=True))


@torch.no_grad()
def completed(model: Net2NetTransformer, x: Tensor, cond: Tensor, **options: Any) -> Tensor:
    """Redraw the lower half of images (B, 3, H, W) given the tokens of the upper half; returns the same shape.

    ``cond`` are condition tokens (B, c) or (B, rows, columns); ``options`` go to `draw`.
    """
    start = photo_tokens(model, x)
    mask = lower_half(*start.shape[1:])
    grids = torch.cat(list(draw(model, cond, *start.shape[1:], start=start, mask=mask, **options)))
    return model.decode_grid(grids)


def lower_half(rows: int, columns: int) -> Tensor:
    """A mask bool (rows, columns) that is True in the lower half of a grid."""
    mask = torch.zeros(rows, columns, dtype=torch.bool, device="cpu")
    mask[rows // 2 :] = True
    return mask


def at_least_one(value: int, name: str) -> int:
    """``value``; raises UserError about the argument ``name`` unless it is a whole number of at least 1."""
    check_count(name, value)
    return value
