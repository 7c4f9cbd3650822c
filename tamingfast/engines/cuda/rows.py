"""The rows of a pass, one per token: their slots and positions, and which rows attend together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tamingfast.engines.request import Span

# Bytes of keys and values, if each row reads its own, from which attention in tiles pays: a GPU reads them in about 0.1
# ms, and the host needs as long to queue the launches of the tiles.
_WORTH_TILES = 1 << 28
# Most padding rows per real query row when a span after a cached prefix is tiled.
_MOST_WASTED = 8


@dataclass(frozen=True)
class Group:
    """Rows first .. stop - 1 of a pass, whose attention is computed together.

    Either `alike` spans of `count` tokens each from position `start` on, in tiles of queries that share the keys they
    read; or, if `alike` is 0, any rows, each by itself.
    """

    first: int
    stop: int
    alike: int = 0
    start: int = 0
    count: int = 0


class Rows:
    """The slot and position of each row of a pass, and how the rows' attention is grouped.

    Args:
        spans: of distinct slots.
        n_unmasked: leading positions that attend to each other.
        position_bytes: of the keys and values of one position in one layer.
        device: for the tensors.

    Attributes:
        groups: of all rows, in order.
        slot, position, last: int32 (rows,): each row's slot, its position and the last position that it sees.
        longest: most positions that a row sees.
        ends: int64 (spans,), the last row of each span.
    """

    def __init__(self, spans: list[Span], n_unmasked: int, position_bytes: int, device: torch.device) -> None:
        slot: list[int] = []
        position: list[int] = []
        last: list[int] = []
        self.groups: list[Group] = []
        for (start, count), like in itertools.groupby(spans, lambda span: (span.start, span.count)):
            first, slots = len(slot), [span.slot for span in like]
            positions = range(start, start + count)
            seen = [max(p, min(n_unmasked, positions.stop) - 1) if p < n_unmasked else p for p in positions]
            slot += [one for one in slots for _ in positions]
            position += [*positions] * len(slots)
            last += seen * len(slots)
            by_itself = len(slots) * (sum(seen) + count) * position_bytes
            if by_itself >= _WORTH_TILES and start <= _MOST_WASTED * count:
                self.groups.append(Group(first, len(slot), len(slots), start, count))
            elif self.groups and not self.groups[-1].alike:
                self.groups[-1] = Group(self.groups[-1].first, len(slot))
            else:
                self.groups.append(Group(first, len(slot)))
        ends = [end - 1 for end in itertools.accumulate(span.count for span in spans)]
        self.longest = max(last, default=0) + 1
        self.slot, self.position, self.last = _sent([slot, position, last], torch.int32, device)
        self.ends = _sent(ends, torch.int64, device)


def _sent(values: list[int] | list[list[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on the device, copied without waiting for it."""
    sent = torch.tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda" and sent.numel():
        sent = sent.pin_memory()
    return sent.to(device, non_blocking=True)


def batches(spans: list[Span], most: int) -> Iterator[list[Span]]:
    """The spans in turn, in parts of up to ``most`` tokens; a longer span is a part of its own."""
    part: list[Span] = []
    for span in spans:
        if part and sum(held.count for held in part) + span.count > most:
            yield part
            part = []
        part.append(span)
    if part:
        yield part
