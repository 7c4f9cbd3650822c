"""What a pass feeds: spans of tokens, the rows that they make, how the rows' attention is grouped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tamingfast.engines.request import Span

# Bytes of keys and values, read by each row for itself, that take a GPU about as long as the host takes to queue the
# launches of attention in tiles: a tenth of a millisecond.
_WORTH_TILES = 1 << 28
_MOST_IN_VAIN = 8  # positions before a span, for each of its own, whose queries a tile may hold though nobody asks


@dataclass(frozen=True)
class Group:
    """Rows first .. stop - 1 of a pass, which are attended to together.

    Either `alike` spans, all of `count` tokens from `start` on, in tiles of queries that share what they read of the
    keys; or, where `alike` is 0, any rows, each by itself.
    """

    first: int
    stop: int
    alike: int = 0
    start: int = 0
    count: int = 0


class Rows:
    """Where the rows of a pass stand, and how their attention is grouped; a position has so many bytes of a layer."""

    def __init__(self, spans: list[Span], n_unmasked: int, position_bytes: int, device: torch.device) -> None:
        slot, position, last = [], [], []
        self.groups: list[Group] = []
        for (start, count), like in itertools.groupby(spans, lambda span: (span.start, span.count)):
            first, slots = len(slot), [span.slot for span in like]
            places = range(start, start + count)
            seen = [max(p, min(n_unmasked, places.stop) - 1) if p < n_unmasked else p for p in places]
            slot += [one for one in slots for _ in places]
            position += [*places] * len(slots)
            last += seen * len(slots)
            by_itself = len(slots) * (sum(seen) + count) * position_bytes
            if by_itself >= _WORTH_TILES and start <= _MOST_IN_VAIN * count:
                self.groups.append(Group(first, len(slot), len(slots), start, count))
            elif self.groups and not self.groups[-1].alike:
                self.groups[-1] = Group(self.groups[-1].first, len(slot))
            else:
                self.groups.append(Group(first, len(slot)))
        ends = list(itertools.accumulate(span.count for span in spans))
        self.longest = max(last, default=0) + 1
        self.slot, self.position, self.last = _sent([slot, position, last], torch.int32, device)
        self.ends = _sent(ends, torch.int64, device) - 1


def _sent(values: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values on the device, without waiting until it comes to them."""
    sent = torch.tensor(values, dtype=dtype)
    if device.type == "cuda" and sent.numel():
        sent = sent.pin_memory()
    return sent.to(device, non_blocking=True)


def passes(spans: list[Span], most: int) -> Iterator[list[Span]]:
    part: list[Span] = []
    for span in spans:
        if part and sum(held.count for held in part) + span.count > most:
            yield part
            part = []
        part.append(span)
    if part:
        yield part
