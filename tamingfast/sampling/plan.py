"""What sampling needs to know about a model, and how a grid of its tokens is laid out in windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tamingfast.engines.networks import Transformer, kind_of, token_count
from tamingfast.errors import UserError, brief
from tamingfast.sampling.context import Context
from tamingfast.sampling.schedule import Schedule, make_schedule, one_window

#: What is sampled: a GPT, or a prior around one; see `describe`.
Sampled: TypeAlias = Transformer | nn.Module


@dataclass(frozen=True, eq=False)
class SequenceModel:
    """A transformer over image tokens, as sampling sees it.

    Attributes:
        gpt: the transformer itself.
        order: int64 (n,), raster cell of each token of a window's sequence; None for raster order.
        vocab: an image token is one of the first ``vocab`` entries of the vocabulary.
        row_length: tokens of a model that draws all its tokens as a single row (a multiscale prior); else None.
        null: the condition token of no class, for classifier-free guidance; None if the model has none.
    """

    gpt: Transformer
    order: NDArray[np.int64] | None
    vocab: int
    row_length: int | None
    null: int | None


def describe(model: Sampled) -> SequenceModel:
    """What sampling uses of ``model``, a GPT or a prior around one.

    A prior has ``transformer`` and may have ``permuter.forward_shuffle_idx``, ``first_stage_model.quantize.re_embed``
    (the number of codes left after a remap), ``pyramid.tokens`` and ``cond_stage_model.null``.
    """
    gpt = cast(Transformer, getattr(model, "transformer", model))  # a module without one is the GPT itself
    if not isinstance(gpt, nn.Module) or not hasattr(gpt, "config"):
        raise UserError(f"transformer: got {brief(model)}, expected a GPT or a prior; load one with load_model")
    order = getattr(getattr(model, "permuter", None), "forward_shuffle_idx", None)
    quantize = getattr(getattr(model, "first_stage_model", None), "quantize", None)
    codes = getattr(quantize, "re_embed", gpt.config.vocab_size)
    return SequenceModel(
        gpt=gpt,
        order=None if order is None else order.cpu().numpy(),
        vocab=min(codes, gpt.config.vocab_size),
        row_length=getattr(getattr(model, "pyramid", None), "tokens", None),
        null=getattr(getattr(model, "cond_stage_model", None), "null", None),
    )


@dataclass(frozen=True, eq=False)
class GridPlan:
    """A grid of tokens that is to be sampled or scored.

    Attributes:
        gpt: the transformer.
        schedule: the window of every cell.
        context: the condition of every window, on the transformer's device.
        vocab: as in `SequenceModel`.
        batch: number of grids.
        null: as in `SequenceModel`.
    """

    gpt: Transformer
    schedule: Schedule
    context: Context
    vocab: int
    batch: int
    null: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.gpt.parameters()).device

    @property
    def causal(self) -> bool:
        """Whether attention is causal over image tokens, so that a key/value cache is exact."""
        return self.gpt.config.n_unmasked <= self.context.length

    @property
    def length(self) -> int:
        """The number of positions of a window's sequence that are fed: all but its last token."""
        return self.context.length + self.schedule.window_tokens - 1


def plan_grid(
    model: Sampled, cond: Tensor, height: int, width: int, window: int = 16, schedule: str = "paper", stride: int = 8
) -> GridPlan:
    """The plan of a height x width grid; arguments and errors are those of `tamingfast.sampling.sample_grid`."""
    known = describe(model)
    if known.row_length is not None:
        if (height, width) != (1, known.row_length):
            raise UserError(
                f"size: got a grid of {height} x {width}, expected 1 x {known.row_length}, as a multiscale prior draws "
                "the tokens of all its scales as one row; pass what its canvas_size gives"
            )
        window = known.row_length
    layout = make_schedule(height, width, window, schedule, stride)
    side = kind_of(known.gpt.config).side
    if side and (layout.window_width != side or layout.window_height > side):
        raise UserError(
            f"window: got {layout.window_height} x {layout.window_width} tokens, expected up to {side} rows of {side}, "
            "whose places the transformer knows; draw images at least that wide"
        )
    if known.order is not None:
        layout = _permuted(layout, known.order)
    gpt = known.gpt
    cond = checked_tokens("cond", cond, token_count(gpt.config), next(gpt.parameters()).device)
    shape = cond.shape[1:]
    if not shape or shape[-1] < 1 or (len(shape) > 1 and (shape[:2] != (height, width) or len(shape) > 3)):
        raise ValueError(
            f"cond: got shape {tuple(cond.shape)}, expected (B, c) with c of at least 1, (B, {height}, {width}) or "
            f"(B, {height}, {width}, c)"
        )
    plan = GridPlan(gpt, layout, Context(cond, layout), known.vocab, len(cond), known.null)
    if plan.length > gpt.config.block_size:
        raise UserError(
            f"window: got {layout.window_height} x {layout.window_width} tokens after {plan.context.length} "
            f"conditioning tokens, a sequence of {plan.length}, expected at most the transformer's block size of "
            f"{gpt.config.block_size}; use a smaller window"
        )
    return plan


def as_given(name: str, value: Tensor | NDArray | Sequence) -> Tensor:
    """A tensor as it is; an array or nested lists as a tensor on the CPU, whatever the default device is.

    Raises ValueError about ``name`` for what cannot become a tensor.
    """
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: got {brief(value)}, expected a tensor or an array") from error


def checked_tokens(name: str, value: Tensor, vocab: int, device: torch.device) -> Tensor:
    """``value`` as int64 on the device; ValueError unless it holds integers from 0 to vocab - 1."""
    value = as_given(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name}: got dtype {value.dtype}, expected integer tokens")
    if value.numel():
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= vocab:
            raise ValueError(f"{name}: got tokens from {low} to {high}, expected 0 to {vocab - 1}")
    return value.to(device, torch.int64)


def _permuted(schedule: Schedule, order: NDArray[np.int64]) -> Schedule:
    """The schedule of a grid whose only window is read in another order."""
    if np.array_equal(order, np.arange(len(order))):
        return schedule
    if not schedule.single_window or len(order) != schedule.window_tokens:
        raise UserError(
            f"size: got a grid of {schedule.height} x {schedule.width} in windows of {schedule.window_height} x "
            f"{schedule.window_width}, expected one window of the {len(order)} tokens that the permuter orders"
        )
    return one_window(schedule.height, schedule.width, order)
