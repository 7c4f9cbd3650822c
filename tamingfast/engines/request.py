"""What callers ask of an engine: spans of tokens to feed, sequences to decode. Every limit is checked here, once.

The engines differ in how they work, never in what they accept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from tamingfast.errors import UserError
from tamingfast.ops.choice import WORD, Choice

#: Which rows of logits a step returns: none, those of each span's last token, those of all tokens.
LOGITS = ("none", "last", "all")
#: The same, by name or as a number of last tokens for each span.
Asked = str | Sequence[int]
#: Tokens to feed: (slot, start, tokens) for each slot.
Items = Iterable[tuple[int, int, Iterable[int]]]
#: The greatest number of positions per sequence and pass.
MOST_LOOKAHEAD = 1024
_MOST_SLOTS = 1 << 24


def check_range(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raises ValueError, which names the argument, unless ``least <= value <= most``."""
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
        """One past the last position."""
        return self.start + self.count


@dataclass(frozen=True)
class Room:
    """An engine's vocabulary and key/value cache, and the checks of arguments against them; all raise ValueError.

    Attributes:
        vocab_size: entries of the vocabulary.
        slots: number of slots.
        capacity: positions of a slot.
        length: returns the current number of valid positions of a slot.
        n_unmasked: leading positions that attend to each other; 0 for plain causal attention.
        extra_tokens: tokens behind the vocabulary, which can be fed but not chosen.
    """

    vocab_size: int
    slots: int
    capacity: int
    length: Callable[[int], int]
    n_unmasked: int = 0
    extra_tokens: int = 0

    def check_slot(self, name: str, slot: int) -> None:
        """The slot must exist."""
        if not self.slots:
            raise ValueError(f"{name}: got {slot}, expected a slot of the cache; call reserve() first")
        check_range(name, slot, 0, self.slots - 1)

    def check_length(self, slot: int, length: int) -> None:
        """The slot must hold at least ``length`` positions."""
        check_range("length", length, 0, self.length(slot))

    def check_tokens(self, tokens: Tensor) -> None:
        """All tokens must be ones that can be fed. On a GPU, this makes the host wait."""
        if tokens.numel():
            for token in torch.stack(tokens.aminmax()).tolist():
                check_range("token", token, 0, self.vocab_size + self.extra_tokens - 1)

    def check_step(self, tokens: Tensor, spans: Sequence[Span], logits: Asked) -> None:
        """Spans must fit their slots, ``tokens`` be int64 (T,) of all spans in turn, ``logits`` as in `asked_of`."""
        asked_of(spans, logits)
        count = sum(span.count for span in spans)
        if tokens.dtype != torch.int64 or tokens.shape != (count,):
            raise ValueError(f"tokens: got {tokens.dtype} {tuple(tokens.shape)}, expected int64 ({count},)")
        seen: set[int] = set()
        for span in spans:
            self.check_slot("slot", span.slot)
            if span.slot in seen:
                raise ValueError(f"slot: got {span.slot} twice, expected every slot at most once in a step")
            seen.add(span.slot)
            if span.count < 1:
                raise ValueError(f"tokens: got {span.count} for slot {span.slot}, expected at least one")
            held = self.length(span.slot)
            if not 0 <= span.start <= held:
                raise ValueError(f"start: got {span.start}, expected 0 to {held}, the length of slot {span.slot}")
            if span.stop > self.capacity:
                raise ValueError(
                    f"position: got {span.stop - 1}, expected at most {self.capacity - 1}, the cache's last; "
                    "reserve longer slots"
                )
            if 0 < span.start < self.n_unmasked:
                raise ValueError(
                    f"start: got {span.start}, expected 0, or {self.n_unmasked} or more; positions of the unmasked "
                    "prefix attend to each other, so feed them in one piece"
                )


def asked_of(spans: Sequence[Span], logits: Asked) -> list[int]:
    """The number of last tokens of each span whose logits are wanted.

    Raises ValueError unless ``logits`` is one of `LOGITS`, or gives each span a number from 0 to its count.
    """
    if isinstance(logits, str):
        if logits not in LOGITS:
            raise ValueError(f"logits: got {logits!r}, expected one of {', '.join(LOGITS)}")
        return [{"none": 0, "last": 1, "all": span.count}[logits] for span in spans]
    if len(logits) != len(spans):
        raise ValueError(f"logits: got {len(logits)} numbers of tokens, expected one for each of {len(spans)} spans")
    for span, asked in zip(spans, logits, strict=True):
        check_range("logits", asked, 0, span.count)
    return list(logits)


def check_reserve(slots: int, length: int, block_size: int) -> None:
    """Raises ValueError unless a cache may have that many slots of ``length`` positions."""
    check_range("slots", slots, 1, _MOST_SLOTS)
    check_range("length", length, 1, block_size)


def spans_of(items: Items) -> tuple[Tensor, list[Span]]:
    """The tokens of all items in turn, int64 (T,) on the CPU, and their spans."""
    flat: list[int] = []
    spans = []
    for slot, start, tokens in items:
        before = len(flat)
        flat.extend(_integers("token", tokens))
        spans.append(Span(slot, start, len(flat) - before))
    return torch.tensor(flat, dtype=torch.int64, device="cpu"), spans


def check_lookahead(lookahead: int | None) -> None:
    """Raises UserError unless ``lookahead`` is None or a number of positions from 1 to `MOST_LOOKAHEAD`."""
    if lookahead is not None and not (
        isinstance(lookahead, Integral) and not isinstance(lookahead, bool) and 1 <= lookahead <= MOST_LOOKAHEAD
    ):
        raise UserError(
            f"lookahead: got {lookahead!r}, expected an integer from 1 to {MOST_LOOKAHEAD}, or None for the fastest"
        )


@dataclass(frozen=True)
class Second:
    """The second sequences of classifier-free guidance: a null condition before the same image tokens.

    Attributes:
        slots: (B,), one for each second sequence, all different from the others.
        null: the token at their first positions.
        prefix: how many of them.
        scales: (S,), for each step, of the guidance; see `tamingfast.ops.choice.guided`.
    """

    slots: Sequence[int]
    null: int
    prefix: int
    scales: Sequence[float]


class DecodeRequest:
    """Tokens of several sequences to decode side by side.

    Attributes:
        slots: (B,), one for each sequence, all different.
        sequences: contiguous int64 (B, L), into which the tokens are written. Every token before a step must be known
            already or be a step itself.
        steps: (S,), indices in a sequence of the tokens to decode, strictly increasing, at least 1.
        wanted: bool (B, S); where False, the sequence keeps its token. Default: all True.
        rows, columns: (S,), each token's place in its grid, which keys its noise. Default: row 0, column its step.
        images: (B,), the images' numbers, which key the noise. Default: 0 onwards.
        fed: leading positions that all slots hold already, from an earlier call with the same tokens.
        choices: only the first `choices` entries of the vocabulary may be chosen. Default: all.
        choice: how a token is chosen from its logits.
        lookahead: positions fed per sequence and pass, from the last known token on. 1 decodes one token after the
            other; with more, guessed tokens are fed as well, and checked by what is chosen. None takes what is fastest.
            The tokens are the same.
        second: guides the choice; None chooses from the sequences' own logits.

    Raises:
        ValueError: an argument of the wrong shape, type or range; the message names it.
    """

    def __init__(
        self,
        *,
        slots: Iterable[int],
        sequences: Tensor,
        steps: Iterable[int],
        wanted: Tensor | None = None,
        rows: Iterable[int] | None = None,
        columns: Iterable[int] | None = None,
        images: Iterable[int] | None = None,
        fed: int = 0,
        choices: int | None = None,
        choice: Choice | None = None,
        lookahead: int | None = None,
        second: Second | None = None,
    ) -> None:
        self.second = second
        self.sequences = sequences
        self.slots = _integers("slots", slots)
        self.steps = _integers("steps", steps)
        batch, count = len(self.slots), len(self.steps)
        self.wanted = torch.ones(batch, count, dtype=torch.bool, device="cpu") if wanted is None else wanted.bool()
        self.rows = [0] * count if rows is None else _integers("rows", rows)
        self.columns = self.steps if columns is None else _integers("columns", columns)
        self.images = list(range(batch)) if images is None else _integers("images", images)
        self.fed = _integer("fed", fed)
        self.choices = None if choices is None else _integer("choices", choices)
        self.choice = Choice() if choice is None else choice
        check_lookahead(lookahead)
        self.lookahead = None if lookahead is None else int(lookahead)
        self._check_shapes(batch, count)
        self._check_values()

    def _check_shapes(self, batch: int, count: int) -> None:
        sequences = self.sequences
        if sequences.dtype != torch.int64 or sequences.ndim != 2 or not sequences.is_contiguous():
            layout = "" if sequences.is_contiguous() else "non-contiguous "
            raise ValueError(
                f"sequences: got {layout}{sequences.dtype} {tuple(sequences.shape)}, expected contiguous int64 (B, L)"
            )
        if len(sequences) != batch:
            raise ValueError(f"slots: got {batch}, expected one for each of {len(sequences)} sequences")
        if self.wanted.shape != (batch, count):
            raise ValueError(f"wanted: got shape {tuple(self.wanted.shape)}, expected {(batch, count)}")
        for name, got, expected in (
            ("rows", len(self.rows), count), ("columns", len(self.columns), count), ("images", len(self.images), batch),
            ("second.slots", batch if self.second is None else len(self.second.slots), batch),
            ("second.scales", count if self.second is None else len(self.second.scales), count),
        ):  # fmt: skip
            if got != expected:
                raise ValueError(f"{name}: got {got} values, expected {expected}")

    def _check_values(self) -> None:
        slots = self.all_slots
        if len(set(slots)) != len(slots):
            raise ValueError(f"slot: got {slots}, expected every slot at most once")
        if self.second is not None:
            check_range("second.prefix", self.second.prefix, 0, self.sequences.shape[1])
        for before, step in pairwise(self.steps):
            if step <= before:
                raise ValueError(f"steps: got {step} after {before}, expected increasing steps")
        for step in (*self.steps[:1], *self.steps[-1:]):
            check_range("steps", step, 1, self.sequences.shape[1] - 1)
        for name, values in (("rows", self.rows), ("columns", self.columns), ("images", self.images)):
            if values:
                check_range(name, min(values), 0, WORD)
                check_range(name, max(values), 0, WORD)
        check_range("fed", self.fed, 0)

    def check_fits(self, room: Room, device: torch.device) -> None:
        """Raises ValueError unless an engine on ``device`` has these slots, positions and vocabulary entries.

        On a GPU, this makes the host wait once.
        """
        if self.sequences.device != device:
            raise ValueError(f"sequences: got a tensor on {self.sequences.device}, expected one on {device}")
        if self.choices is not None:
            check_range("choices", self.choices, 1, room.vocab_size)
        if self.second is not None:
            check_range("second.null", self.second.null, 0, room.vocab_size + room.extra_tokens - 1)
        for slot in self.all_slots:
            room.check_slot("slot", slot)
            held = room.length(slot)
            if self.fed > held:
                raise ValueError(f"fed: got {self.fed}, expected at most {held}, the length of slot {slot}")
        if self.steps and self.steps[-1] > room.capacity:
            raise ValueError(
                f"steps: got {self.steps[-1]}, expected at most {room.capacity}, one more than the cache's last "
                "position; reserve longer slots"
            )
        if self.slots and self.steps:
            room.check_tokens(self._given_tokens())

    @property
    def all_slots(self) -> list[int]:
        """The slots of all sequences, the second ones last."""
        return [*self.slots, *(() if self.second is None else self.second.slots)]

    def options(self, vocab_size: int) -> dict[str, float]:
        """The token choice as keyword arguments of the extension, for which top_k 0 and top_p 1 keep all entries."""
        choice = self.choice
        return {
            "choices": vocab_size if self.choices is None else self.choices,
            "greedy": choice.greedy,
            "temperature": choice.temperature,
            "top_k": 0 if choice.top_k is None else min(choice.top_k, vocab_size),
            "top_p": 1.0 if choice.top_p is None else choice.top_p,
            "seed": choice.seed,
        }

    def _given_tokens(self) -> Tensor:
        """The tokens that the caller gives, 0 in place of those to decode: int64 (B, last step + 1)."""
        given = torch.ones(len(self.slots), self.steps[-1] + 1, dtype=torch.bool, device="cpu")
        given[:, self.steps] = ~self.wanted.cpu()
        return self.sequences[:, : given.shape[1]].masked_fill(~given.to(self.sequences.device), 0)


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, expected an integer") from None


def _integers(name: str, values: Iterable[int]) -> list[int]:
    return [_integer(name, value) for value in values]
