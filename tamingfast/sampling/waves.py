"""Executes a schedule wave by wave: all cells whose context is known in one ragged call.

For each wave and image, the only tokens that pass through the transformer are those that the wanted logits depend on
and that the window's cache slot does not hold yet; see `tamingfast.sampling.schedule.Waves`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Protocol

import torch
from torch import Tensor

from tamingfast.engines import Engine
from tamingfast.engines.networks import Transformer
from tamingfast.engines.request import Span
from tamingfast.errors import UserError
from tamingfast.ops.backends import available_memory
from tamingfast.sampling.context import Context
from tamingfast.sampling.guidance import Guidance
from tamingfast.sampling.schedule import Schedule, Waves, make_waves

NO_GUIDANCE = Guidance()
#: Default number of bytes for keys and values.
MEMORY = 2 << 30
#: Tokens per call: enough to fill any machine, few enough for activations to stay small beside the cache.
TOKENS_PER_CALL = 8192
#: Peak bytes per cell while waves are planned (measured), and bytes per token of each image (estimated).
PLANNING, HOLDING = 300, 50


class WaveEngine(Protocol):
    """Runs the transformer for a wave."""

    def step(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        """Feeds int64 (B, T), the tokens of all spans in turn, into their slots; logits (B, number of spans, V)."""


class TorchWaves:
    """The transformer in torch, with ``slots`` caches of ``batch`` sequences of ``length`` tokens each."""

    def __init__(self, gpt: Transformer, slots: int, batch: int, length: int) -> None:
        self.gpt = gpt
        self.cache = gpt.new_slots(slots, batch, length)

    def step(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        return self.gpt.forward_ragged(tokens, self.cache, spans)


class NativeWaves:
    """A native engine, whose slot ``slot * batch + image`` holds one image's window."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self.engine, self.batch = engine, batch

    def step(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        # Equal spans of the images lie side by side, so that an engine may attend to them together.
        each = [Span(span.slot * self.batch + i, span.start, span.count) for span in spans for i in range(self.batch)]
        flat = torch.cat([part.flatten() for part in tokens.split([span.count for span in spans], 1)])
        return self.engine.feed(flat, each).view(len(spans), self.batch, -1).transpose(0, 1)


def slot_bytes(gpt: Transformer, batch: int, length: int) -> int:
    """Bytes of the keys and values of ``batch`` sequences of ``length`` tokens."""
    return 2 * gpt.config.n_layer * batch * length * gpt.config.n_embd * next(gpt.parameters()).element_size()


def check_room(batch: int, height: int, width: int) -> None:
    """UserError unless the host's memory holds the tokens of ``batch`` such grids and the plan to draw them."""
    needed, free = height * width * (PLANNING + HOLDING * batch), available_memory(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"memory: got {free / 2**30:.1f} GiB free, expected {needed / 2**30:.1f} GiB to plan and hold {batch} x "
            f"{height} x {width} tokens; draw fewer or smaller images"
        )


def plan_waves(gpt: Transformer, schedule: Schedule, batch: int, prefix: int, memory: int = MEMORY) -> Waves:
    """The waves of ``schedule`` with as many cache slots as fit into ``memory`` bytes, at least one.

    Raises UserError as `check_room` does.
    """
    check_room(batch, schedule.height, schedule.width)
    return make_waves(schedule, max(1, memory // slot_bytes(gpt, batch, prefix + schedule.window_tokens - 1)))


def sample_waves(
    engine: WaveEngine,
    schedule: Schedule,
    waves: Waves,
    context: Context,
    canvas: Tensor,
    wanted: Tensor,
    pick: Callable[[Tensor, Tensor | None], Tensor],
    noise: Iterator[Tensor | None],
    n_unmasked: int = 0,
    after_wave: Callable[[Tensor], None] = lambda cells: None,
    guidance: Guidance = NO_GUIDANCE,
) -> None:
    """Samples every entry of ``waves`` into ``canvas``.

    Args:
        engine: must have the slots that ``waves`` names.
        context: the condition of each window.
        canvas: int64 (B, height * width), written where ``wanted``, bool of the same shape, is True.
        pick: tokens (B, n) from logits (B, n, V) and noise of the same shape, or None.
        noise: (B, V), or None, for each entry of ``waves`` in turn.
        n_unmasked: leading tokens that attend to one another, so they are fed together.
        after_wave: called with the raster indices of the cells that were just sampled.
        guidance: with it, the engine's batch is that of all its sequences.
    """
    feeder = _Feeder(engine, schedule, context, canvas, n_unmasked, guidance)
    entries = list(zip(*(a.tolist() for a in (waves.corners, waves.steps, waves.slots, waves.fed)), strict=True))
    for first, last in pairwise(waves.bounds.tolist()):
        cells = torch.from_numpy(waves.cells[first:last]).to(canvas.device)
        logits = guidance.combined(feeder.logits(entries[first:last]), cells)
        drawn = [value for value in islice(noise, last - first) if value is not None]
        chosen = pick(logits, torch.stack(drawn, 1) if drawn else None)
        canvas[:, cells] = torch.where(wanted[:, cells], chosen, canvas[:, cells])
        after_wave(cells)


class _Feeder:
    """Feeds the windows of a wave what their slots lack, in calls of at most `TOKENS_PER_CALL` tokens."""

    def __init__(
        self,
        engine: WaveEngine,
        schedule: Schedule,
        context: Context,
        canvas: Tensor,
        n_unmasked: int,
        guidance: Guidance,
    ) -> None:
        self.guidance = guidance
        self.engine, self.context, self.canvas, self.n_unmasked = engine, context, canvas, n_unmasked
        self.raster = torch.from_numpy(schedule.offsets.copy()).to(canvas.device)
        self.filled: set[int] = set()  # slots that hold the condition, where it is the same in every window

    def logits(self, entries: Sequence[tuple[int, int, int, int]]) -> Tensor:
        """Logits (all sequences, number of entries, V) of entries (corner, step, slot, fed); see `Waves`."""
        found: list[Tensor] = []
        tokens: list[Tensor] = []
        spans: list[Span] = []
        for corner, step, slot, fed in entries:
            span = self._span(step, slot, fed)
            batch = len(self.canvas) * self.guidance.copies
            if spans and batch * (sum(each.count for each in spans) + span.count) > TOKENS_PER_CALL:
                found.append(self.engine.step(torch.cat(tokens, 1), spans))
                tokens, spans = [], []
            tokens.append(self._tokens(corner, step, span.start))
            spans.append(span)
        found.append(self.engine.step(torch.cat(tokens, 1), spans))
        return torch.cat(found, 1)

    def _span(self, step: int, slot: int, fed: int) -> Span:
        """What the slot lacks before the token at ``step`` can be chosen."""
        prefix = self.context.length
        start = prefix + fed if fed >= 0 else 0
        if fed < 0 and self.context.fixed and slot in self.filled and prefix >= self.n_unmasked and step > 0:
            start = prefix
        self.filled.add(slot)
        return Span(slot, start, prefix + step - start)

    def _tokens(self, corner: int, step: int, start: int) -> Tensor:
        prefix = self.context.length
        condition = [self.context.before(corner, start)] if start < prefix else []
        own = self.canvas[:, corner + self.raster[max(start - prefix, 0) : step]]
        return self.guidance.beside(torch.cat((*condition, own), 1), start)
