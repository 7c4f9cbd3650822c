"""Images drawn by a prior, from nothing or around what a photo gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tamingfast.engines import bands
from tamingfast.sampling import sample_grid
from tamingfast.sampling.canvas import Canvas
from tamingfast.tasks.models import check_windowed, first_stage_of
from tamingfast.tasks.sizes import grid_size, window_under

TOP_K = 100  # the paper's choice, with temperature 1.0


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
    vocabulary = model.transformer.config.vocab_size
    options = {"window": window_under(model, rows, columns, cond), "top_k": TOP_K} | options
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
    window = window_under(model, *canvas.tokens.shape[1:], canvas.cond)
    top_k = None if top_k is None else min(top_k, model.transformer.config.vocab_size)
    return replace(canvas, settings={"window": window, "top_k": top_k} | settings)


@torch.no_grad()
def photo_tokens(model: nn.Module, x: Tensor, progress: bands.Progress | None = None) -> Tensor:
    """Tokens (B, rows, columns) of images (B, 3, H, W) in [-1, 1].

    Raises UserError unless f divides their sides, and for models that `check_windowed` refuses.
    """
    grid_size(check_windowed(model), *x.shape[2:])
    return bands.encode_grid(model.first_stage_model, x, progress=progress)


def photo_canvas(model: nn.Module, x: Tensor, cond: Tensor, progress: bands.Progress | None = None) -> Canvas:
    """A canvas of the tokens of images (B, 3, H, W) in [-1, 1] under condition tokens (B, c) or (B, rows, columns).

    One image may stand for all B, which is then encoded once. ``progress`` as in `tamingfast.engines.bands.run`.
    """
    tokens = photo_tokens(model, x, progress)
    return Canvas.of(tokens.expand(len(cond), -1, -1) if len(x) == 1 else tokens, cond)


def begun(model: nn.Module, x: Tensor, scales: int, cond: Tensor) -> Canvas:
    """A canvas of a multiscale prior that begins with the first ``scales`` scales of images (B, 3, H, W).

    One image may stand for all conditions (B, c). Raises UserError for more scales than the model has.
    """
    tokens = model.encode_to_z(x)[1][:, None].expand(len(cond), -1, -1)
    pending = torch.arange(tokens.shape[-1]) >= model.pyramid.first(scales)
    return Canvas.of(tokens, cond).resample(pending[None])


@torch.no_grad()
def decoded(model: nn.Module, canvas: Canvas, batch: int = 16, progress: bands.Progress | None = None) -> Tensor:
    """Images (B, 3, H, W) on the CPU of a canvas, what is still to be sampled gray.

    ``progress`` as in `tamingfast.engines.bands.run`, for each batch anew.
    """
    images = []
    whole, unknown = model.image_tokens(canvas.tokens), model.image_tokens(canvas.pending)
    for tokens, pending in zip(whole.split(batch), unknown.split(batch), strict=True):
        known = tokens.masked_fill(pending, 0).to(model.device)
        pixels = model.decode_grid(known, progress=progress).cpu()
        gray = first_stage_of(model).footprint(pending.cpu())
        images.append(pixels.masked_fill(gray, 0.0))
    return torch.cat(images)


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
