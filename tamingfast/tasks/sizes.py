"""Sizes of images in pixels, of grids and windows in tokens."""

from __future__ import annotations

import math

from torch import Tensor, nn

from tamingfast.checkpoints.config import trained_side
from tamingfast.engines.networks import kind_of
from tamingfast.errors import UserError
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.orderings import Identity
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.models.vqgan import VQModel
from tamingfast.tasks.models import config_of, first_stage_of, is_spatial

#: Side in tokens of the largest window, the paper's; a grid that fits into the block gets one window of its own size.
WINDOW = 16


def trained_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) in pixels of the images that the model was trained on; None if its config does not say."""
    factor = first_stage_of(model).factor
    if isinstance(model, MultiscaleTransformer):
        return model.pyramid.height * factor, model.pyramid.width * factor
    if isinstance(model, Net2NetTransformer) and (tokens := kind_of(model.transformer.config).side):
        return tokens * factor, tokens * factor
    side = trained_side(config_of(model))
    if side is not None:
        return side, side
    room = None
    if isinstance(model, Net2NetTransformer) and not is_spatial(model):
        room = math.isqrt(model.transformer.config.block_size)
    if isinstance(first_stage_of(model), VQModel):
        # The published models were trained on 16 x 16 tokens; a block of a smaller grid has no room for them.
        room = min(WINDOW, room or WINDOW)
    return None if room is None else (room * factor, room * factor)


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) in pixels of the only size that a prior draws; None for one whose window slides over any.

    A window can only slide over a grid that is read row by row.
    """
    slides = not isinstance(model, Net2NetTransformer) or isinstance(model.permuter, Identity)
    return None if slides else image_size(model)


def image_size(model: nn.Module, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """``size``, (height, width) in pixels, or by default the size that the model was trained on.

    Raises UserError for anything else than two integers, if neither is known, or if a side is not a multiple of f.
    """
    size = trained_size(model) if size is None else size
    if size is None:
        raise UserError("size: got none, expected height and width, as the model's config does not state a size")
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise UserError(f"size: got {size!r}, expected (height, width) in pixels, such as (256, 512)")
    grid_size(model, *size)
    return size


def grid_size(model: nn.Module, height: int, width: int, name: str = "size") -> tuple[int, int]:
    """Tokens (rows, columns) of an image of height x width pixels.

    Raises UserError, which begins with ``name``, unless both are multiples of f.
    """
    stage = first_stage_of(model)
    factor = stage.factor
    if height < 1 or width < 1 or height % factor or width % factor:
        near = [max(1, round(side / factor)) * factor for side in (height, width)]
        raise UserError(f"{name}: got {height}x{width} pixels, expected multiples of {factor}; try {near[0]}x{near[1]}")
    return stage.grid(height, width)


def window_of(model: Net2NetTransformer, rows: int, columns: int, condition_tokens: int = 1) -> int:
    """Side of the largest square window that fits into the block: at most `WINDOW`, unless the grid itself fits.

    A prior on tokens of two levels draws only the number of tokens that it was trained on, because no window can slide
    over two grids at once; raises UserError for any other number.
    """
    if side := kind_of(model.transformer.config).side:
        if columns < side:
            raise UserError(
                f"size: got {columns} tokens a row, expected at least {side}, as the transformer knows the places of "
                "that many; draw wider images"
            )
        return side
    room = model.transformer.config.block_size - condition_tokens + 1
    trained = room - 1  # most blocks have a position for the last token, too, which is never an input
    if first_stage_of(model).levels > 1 and rows * columns not in (trained, room):
        raise UserError(
            f"size: got {rows * columns} tokens, expected {trained}, as a prior on tokens of two levels draws only the "
            "size that it was trained on; leave the size out, or train a prior on this size"
        )
    if rows * columns <= room:
        return max(rows, columns)
    return min(WINDOW, math.isqrt(room))


def window_under(model: Net2NetTransformer, rows: int, columns: int, cond: Tensor) -> int:
    """`window_of` for condition tokens (B, c), (B, rows, columns, c), or (B, rows, columns), a grid cropped alike."""
    if cond.ndim != 3:
        return window_of(model, rows, columns, cond.shape[-1])
    room = (model.transformer.config.block_size + 1) // 2
    return max(rows, columns) if rows * columns <= room else min(WINDOW, math.isqrt(room))
