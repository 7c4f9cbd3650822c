"""Sizes of images in pixels, of grids and windows in tokens."""

from __future__ import annotations

import math

from torch import Tensor, nn

from tamingfast.checkpoints.config import trained_side
from tamingfast.errors import UserError
from tamingfast.tasks.models import first_stage_of, is_multiscale


def trained_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) in pixels of the images that the model was trained on, where its config says so."""
    factor = first_stage_of(model).factor
    if is_multiscale(model):
        return model.pyramid.height * factor, model.pyramid.width * factor
    side = trained_side(getattr(model, "config", None))
    if side is not None:
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
        side = "x".join(map(str, trained_size(model)))
        raise UserError(
            f"got a size of {rows * columns} tokens, but a prior on tokens of two levels draws only images of "
            f"{trained}, as it was trained on; give --size {side}, or train one on images of this size"
        )
    if rows * columns <= room:
        return max(rows, columns)
    return min(16, int(room**0.5))


def window_under(model: nn.Module, rows: int, columns: int, cond: Tensor) -> int:
    """`window_of` under tokens (B, c) or (B, rows, columns, c), or a grid of them, which is as large as the window."""
    if cond.ndim != 3:
        return window_of(model, rows, columns, cond.shape[-1])
    room = (model.transformer.config.block_size + 1) // 2
    return max(rows, columns) if rows * columns <= room else min(16, math.isqrt(room))
