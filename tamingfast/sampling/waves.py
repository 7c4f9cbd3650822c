"""Executes a schedule wave by wave: all positions whose context is known in one ragged call.

Per wave and image only tokens that the wanted logits depend on, and that the window's cache slot does not hold
already, pass through the transformer; see `tamingfast.sampling.schedule.Waves`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from tamingfast.engines.cpu import GPTEngine
from tamingfast.engines.cuda import CudaEngine
from tamingfast.engines.request import Span
from tamingfast.errors import UserError
from tamingfast.ops.backends import available_memory
from tamingfast.sampling.context import Context
from tamingfast.sampling.schedule import Schedule, Waves, make_waves

#: Bytes for keys and values unless the caller says otherwise.
MEMORY = 2 << 30
#: Tokens per call: enough to fill any machine, few enough for activations to stay small beside the cache.
TOKENS_PER_CALL = 8192
#: Bytes for each place of a grid while its waves are made, at their most, and, reckoned, for each token of each image.
PLANNING, HOLDING = 300, 50


class Engine(Protocol):
    """What runs the transformer for a wave."""

    def step(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        """Feeds int64 (B, T), the tokens of all spans in turn, into their slots; logits (B, number of spans, V)."""


class TorchEngine:
    """The transformer itself, with `slots` caches of `batch` sequences of `length` tokens each."""

    def __init__(self, gpt: nn.Module, slots: int, batch: int, length: int) -> None:
        self.gpt = gpt
        self.cache = gpt.new_slots(slots, batch, length)

    def step(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        return self.gpt.forward_ragged(tokens, self.cache, spans)


class NativeEngine:
    """The extension's engine, whose slot ``slot * batch + image`` holds one image's window."""

    def __init__(self, engine: GPTEngine | CudaEngine, batch: int) -> None:
        self.engine, self.batch = engine, batch

    def step(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        # The images' like spans lie side by side, so that an engine may attend to them together.
        each = [Span(span.slot * self.batch + i, span.start, span.count) for span in spans for i in range(self.batch)]
        flat = torch.cat([part.flatten() for part in tokens.split([span.count for span in spans], 1)])
        return self.engine.feed(flat, each).view(len(spans), self.batch, -1).transpose(0, 1)


def slot_bytes(gpt: nn.Module, batch: int, length: int) -> int:
    """Bytes of the keys and values of `batch` sequences of `length` tokens."""
    return 2 * len(gpt.blocks) * batch * length * gpt.config.n_embd * gpt.pos_emb.element_size()


def check_room(batch: int, height: int, width: int) -> None:
    """UserError unless the host's memory holds the tokens of so large grids and the plan to draw them."""
    needed, free = height * width * (PLANNING + HOLDING * batch), available_memory(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"{batch} x {height} x {width} tokens need {needed / 2**30:.1f} GiB to be planned and held, but "
            f"{free / 2**30:.1f} are free: draw fewer or smaller images"
        )


def plan_waves(gpt: nn.Module, plan: Schedule, batch: int, prefix: int, memory: int = MEMORY) -> Waves:
    """The waves of `plan` with as many cache slots as `memory` bytes hold, at least one.

    Raises UserError as `check_room`.
    """
    check_room(batch, plan.height, plan.width)
    return make_waves(plan, max(1, memory // slot_bytes(gpt, batch, prefix + plan.window_tokens - 1)))


def sample_waves(
    engine: Engine,
    plan: Schedule,
    waves: Waves,
    context: Context,
    canvas: Tensor,
    wanted: Tensor,
    pick: Callable[[Tensor, Tensor | None], Tensor],
    noise: Iterator[Tensor | None],
    n_unmasked: int = 0,
    after_wave: Callable[[Tensor], None] = lambda cells: None,
) -> None:
    """Samples into `canvas`.

    Args:
        engine: has the slots that `waves` names.
        context: the conditioning of each window.
        canvas: int64 (B, height * width), written where `wanted`, bool of the same shape, is True.
        pick: tokens (B, n) from logits (B, n, V) and the noise of the same shape, or None.
        noise: (B, V), or None, for each entry of `waves` in turn.
        n_unmasked: leading tokens that attend to each other, so they are fed together.
        after_wave: called with the raster indices of the cells that were just sampled.
    """
    prefix = context.length
    raster = torch.from_numpy(plan.offsets.copy()).to(canvas.device)
    filled: set[int] = set()  # slots that hold a conditioning that never changes
    bounds = waves.bounds.tolist()
    entries = list(zip(*(a.tolist() for a in (waves.corners, waves.steps, waves.slots, waves.fed)), strict=True))
    for first, last in pairwise(bounds):
        cells = torch.from_numpy(waves.cells[first:last]).to(canvas.device)
        logits, tokens, spans = [], [], []
        for corner, step, slot, fed in entries[first:last]:
            start = prefix + fed if fed >= 0 else 0
            if fed < 0 and context.fixed and slot in filled and prefix >= n_unmasked and step > 0:
                start = prefix
            filled.add(slot)
            span = Span(slot, start, prefix + step - start)
            if spans and canvas.shape[0] * (sum(each.count for each in spans) + span.count) > TOKENS_PER_CALL:
                logits.append(engine.step(torch.cat(tokens, 1), spans))
                tokens, spans = [], []
            if start < prefix:
                tokens.append(context.before(corner, start))
            tokens.append(canvas[:, corner + raster[max(start - prefix, 0) : step]])
            spans.append(span)
        logits.append(engine.step(torch.cat(tokens, 1), spans))
        drawn = [next(noise) for _ in range(first, last)]
        chosen = pick(torch.cat(logits, 1), None if drawn[0] is None else torch.stack(drawn, 1))
        canvas[:, cells] = torch.where(wanted[:, cells], chosen, canvas[:, cells])
        after_wave(cells)
