"""What a pass feeds: spans of tokens, the rows that they make, how the rows' attention is grouped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one slot."""

    slot: int
    start: int
    count: int


class Rows:
    """Where the rows of a pass stand, and how their attention is grouped."""

    def __init__(self, spans: list[Span], n_unmasked: int, device: torch.device) -> None:
        slot, position, last, self.groups, row = [], [], [], [], 0
        for length, group in itertools.groupby(spans, _prompt_length):
            group = list(group)
            for span in group:
                places = range(span.start, span.start + span.count)
                slot += [span.slot] * span.count
                position += places
                last += [max(p, min(n_unmasked, places.stop) - 1) if p < n_unmasked else p for p in places]
            self.groups.append((row, row := len(slot), len(group) if length else 0))
        ends = list(itertools.accumulate(span.count for span in spans))
        self.longest = max(last, default=0) + 1
        self.position = torch.tensor(position, dtype=torch.int64).to(device)
        self.slot, self.position32, self.last = torch.tensor([slot, position, last], dtype=torch.int32).to(device)
        self.ends = torch.tensor(ends, dtype=torch.int64).to(device) - 1


def _prompt_length(span: Span) -> int:
    """Prompts of one length are attended to together; what continues a sequence (0), row by row."""
    return span.count if span.start == 0 and span.count > 1 else 0


def passes(spans: list[Span], most: int) -> Iterator[list[Span]]:
    part: list[Span] = []
    for span in spans:
        if part and sum(held.count for held in part) + span.count > most:
            yield part
            part = []
        part.append(span)
    if part:
        yield part
