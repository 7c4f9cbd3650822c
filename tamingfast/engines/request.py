"""What an engine is asked for: spans of tokens to feed, sequences to decode. Every limit is checked here, once.

The engines differ in how they do the work, never in what they accept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tamingfast.ops.choice import Choice

#: Which rows of logits a step returns: of no token, of the last token of each span, of all tokens.
LOGITS = ("none", "last", "all")
_WORD = (1 << 32) - 1


def check_range(name: str, value: int, least: int, most: int | None = None) -> None:
    """ValueError naming the argument unless ``least <= value <= most``."""
    if value < least or (most is not None and value > most):
        expected = f"{least} to {most}" if most is not None else f"{least} or more"
        raise ValueError(f"{name}: got {value}, expected {expected}")


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one slot, at positions ``start`` to ``stop`` - 1."""

    slot: int
    start: int
    count: int

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.start + self.count


@dataclass(frozen=True)
class Room:
    """What an engine has room for, and what its slots hold.

    Attributes:
        vocab_size: entries of the vocabulary.
        capacity: positions of a slot.
        lengths: valid positions of each slot.
        n_unmasked: leading positions that see one another; 0 for plain causal attention.
    """

    vocab_size: int
    capacity: int
    lengths: Sequence[int]
    n_unmasked: int = 0

    def check_slot(self, name: str, slot: int) -> None:
        """ValueError unless there is such a slot."""
        check_range(name, slot, 0, len(self.lengths) - 1)

    def check_tokens(self, low: int, high: int) -> None:
        """ValueError unless tokens from ``low`` to ``high`` lie in the vocabulary."""
        for token in (low, high):
            check_range("token", token, 0, self.vocab_size - 1)


def check_step(spans: Sequence[Span], logits: str, room: Room) -> None:
    """ValueError naming the slot, start or position of the first span that does not fit, or unknown ``logits``."""
    if logits not in LOGITS:
        raise ValueError(f"logits: got {logits!r}, expected one of {', '.join(LOGITS)}")
    seen: set[int] = set()
    for span in spans:
        room.check_slot("slot", span.slot)
        if span.slot in seen:
            raise ValueError(f"slot: got {span.slot}, expected every slot at most once in a step")
        seen.add(span.slot)
        held = room.lengths[span.slot]
        if span.count < 1:
            raise ValueError(f"tokens of slot {span.slot}: got {span.count}, expected at least one")
        if not 0 <= span.start <= held:
            raise ValueError(f"start: got {span.start}, expected 0 to {held}, the length of slot {span.slot}")
        if span.stop > room.capacity:
            raise ValueError(
                f"position: got {span.stop - 1}, expected at most {room.capacity - 1}, the last that the cache holds"
            )
        if 0 < span.start < room.n_unmasked:
            raise ValueError(
                f"start: got {span.start}, expected 0 or from {room.n_unmasked} on: the unmasked prefix sees itself "
                "whole, so it is fed in one piece"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeRequest:
    """Tokens of several sequences to decode side by side.

    Attributes:
        slots: (B,), one for each sequence, all different.
        sequences: contiguous int64 (B, L), into which the tokens are written; what precedes a step is known or is a
            step itself.
        steps: (S,), rising positions of the tokens to decode, from 1 on.
        wanted: bool (B, S); where False, the token that is there stays. Default: all.
        rows, columns: (S,), where each token stands in its grid, for the noise. Default: row 0, column its step.
        images: (B,), the images' numbers, for the noise. Default: 0 onwards.
        fed: leading positions that all slots hold already, from an earlier call with the same tokens.
        choices: only the first so many entries of the vocabulary may be chosen. Default: all.
        choice: how a token is chosen from its logits.

    Raises:
        ValueError: names the argument that is wrong.
    """

    slots: Sequence[int]
    sequences: Tensor
    steps: Sequence[int]
    wanted: Tensor = None  # type: ignore[assignment]
    rows: Sequence[int] = None  # type: ignore[assignment]
    columns: Sequence[int] = None  # type: ignore[assignment]
    images: Sequence[int] = None  # type: ignore[assignment]
    fed: int = 0
    choices: int | None = None
    choice: Choice = field(default_factory=Choice)

    def __post_init__(self) -> None:
        steps, batch = [int(step) for step in self.steps], len(self.slots)
        defaults = {
            "wanted": torch.ones(batch, len(steps), dtype=torch.bool), "rows": [0] * len(steps), "columns": steps,
            "images": range(batch),
        }  # fmt: skip
        object.__setattr__(self, "slots", list(self.slots))
        object.__setattr__(self, "steps", steps)
        for name, default in defaults.items():
            given = getattr(self, name)
            value = default if given is None else given
            object.__setattr__(self, name, value.bool() if isinstance(value, Tensor) else list(value))
        self._check_shapes()

    def _check_shapes(self) -> None:
        sequences, batch, count = self.sequences, len(self.slots), len(self.steps)
        if sequences.dtype != torch.int64 or sequences.ndim != 2 or not sequences.is_contiguous():
            raise ValueError(
                f"sequences: got {sequences.dtype} {tuple(sequences.shape)}, expected contiguous int64 (B, L)"
            )
        if len(sequences) != batch:
            raise ValueError(f"slots: got {batch}, expected one for each of {len(sequences)} sequences")
        if len(set(self.slots)) != batch:
            raise ValueError(f"slot: got {self.slots}, expected every slot at most once")
        for name, got, expected in (
            ("wanted", self.wanted.numel(), batch * count), ("rows", len(self.rows), count),
            ("columns", len(self.columns), count), ("images", len(self.images), batch),
        ):  # fmt: skip
            if got != expected:
                raise ValueError(f"{name}: got {got} values, expected {expected}")
        for name, values in (("rows", self.rows), ("columns", self.columns), ("images", self.images)):
            for value in values:
                check_range(name, value, 0, _WORD)
        check_range("fed", self.fed, 0)
        least = 1
        for step in self.steps:
            check_range("steps", step, least, sequences.shape[1] - 1)
            least = step + 1

    def check_fits(self, room: Room, device: torch.device) -> None:
        """ValueError where an engine on ``device`` has no such slots, positions or vocabulary entries."""
        if self.sequences.device != device:
            raise ValueError(f"sequences: got a tensor on {self.sequences.device}, expected one on {device}")
        if self.choices is not None:
            check_range("choices", self.choices, 1, room.vocab_size)
        for slot in self.slots:
            room.check_slot("slot", slot)
            if self.fed > room.lengths[slot]:
                raise ValueError(
                    f"fed: got {self.fed}, expected at most {room.lengths[slot]}, the length of slot {slot}"
                )
        if self.steps and self.steps[-1] > room.capacity:
            raise ValueError(
                f"steps: got {self.steps[-1]}, expected at most {room.capacity}, one more than the cache holds"
            )
        if self.slots and self.steps:
            room.check_tokens(*self._given_tokens().aminmax())

    def _given_tokens(self) -> Tensor:
        """The tokens that are fed as they are given, 0 where one is to be decoded. Waits for a GPU."""
        given = torch.ones(len(self.slots), self.steps[-1] + 1, dtype=torch.bool)
        given[:, self.steps] = ~self.wanted.cpu().reshape(len(given), -1)
        return self.sequences[:, : given.shape[1]].masked_fill(~given.to(self.sequences.device), 0)
