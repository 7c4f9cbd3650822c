"""How many tokens a pass of the transformer chooses, where tokens are guessed and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tamingfast import tasks
from tamingfast.engines import borrowed_engine
from tamingfast.errors import UserError
from tamingfast.models.prior import Net2NetTransformer


def tokens_per_pass(
    model: Net2NetTransformer, widths: Sequence[int], images: int = 16, *, dtype: str = "float32", **options: Any
) -> dict[int, float]:
    """Tokens that a pass chooses on average, for each ``lookahead`` of ``widths``; images are drawn one by one.

    The numbers depend on the weights, not on the machine.

    Args:
        model: an unconditional or class-conditional prior on a CPU; the images cycle through its classes.
        widths: each at least 1.
        images: how many are drawn, of the size of the training images.
        dtype: of the weights in the native engine, which counts its passes.
        options: of `tamingfast.sampling.sample_grid`: temperature, top_k, top_p, greedy, seed.

    Raises:
        UserError: the native engine cannot run the model, or an argument is out of range.
        RuntimeError: an image is not that of ``lookahead=1``.
    """
    if model.device.type != "cpu":
        raise UserError(f"device: got {model.device}, expected cpu, as only that engine counts its passes")
    drawn = {width: _drawn(model, width, images, dtype, options) for width in (1, *widths)}
    for width, (grids, _) in drawn.items():
        if not torch.equal(grids, drawn[1][0]):
            raise RuntimeError(f"lookahead {width} draws other images than lookahead 1")
    return {width: drawn[width][0].numel() / drawn[width][1] for width in widths}


def _drawn(
    model: Net2NetTransformer, width: int, images: int, dtype: str, options: dict[str, Any]
) -> tuple[Tensor, int]:
    """The images' tokens (images, rows, columns), and the passes that they took."""
    canvas = model.canvas_size(*tasks.grid_size(model, *tasks.image_size(model)))
    before = _passes(model, dtype)
    grids = tasks.draw(
        model, tasks.conditions(model, images), *canvas, batch=1, engine="native", dtype=dtype, lookahead=width,
        **options,
    )  # fmt: skip
    return torch.cat(list(grids)), _passes(model, dtype) - before


def _passes(model: Net2NetTransformer, dtype: str) -> int:
    with borrowed_engine(model.transformer, dtype, slots=1, length=1) as engine:
        return engine.info()["passes"]
