"""What a full forward pass per token costs: a model of three rates, fitted to measured steps.

A step over n tokens takes ``overhead + linear(n) / linear_rate + attention(n) / attention_rate`` seconds. Sampling an
image takes a step for every prefix, and one decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tamingfast.reproduce.budget import forward_flops
from tamingfast.reproduce.pixels_report import PAPER_RATIO


@dataclass(frozen=True)
class Sequences:
    """The sequences of one prior: tokens and vocabulary, and seconds and FLOP to decode an image."""

    tokens: int
    vocabulary: int
    decode_seconds: float
    decode_flop: float

    def flop(self, geometry: Mapping[str, int]) -> tuple[float, float]:
        """Linear and attention operations of all steps of an image."""
        steps = [forward_flops(geometry, n + 1, self.vocabulary) for n in range(self.tokens)]
        return sum(linear for linear, _ in steps), sum(attention for _, attention in steps)


@dataclass(frozen=True)
class CostModel:
    """Seconds per step, and seconds per operation of linear layers and of attention."""

    overhead: float
    linear: float
    attention: float

    @classmethod
    def fitted(cls, operations: Sequence[tuple[float, float]], seconds: Sequence[float]) -> CostModel:
        """Least squares of relative errors; a cost that would be negative is none."""
        measured = np.asarray(seconds)
        columns = np.column_stack([np.ones(len(measured)), np.asarray(operations)]) / measured[:, None]
        scale = columns.max(0)
        found, used = np.zeros(3), np.ones(3, bool)
        while used.any():
            found = np.zeros(3)
            found[used] = np.linalg.lstsq((columns / scale)[:, used], np.ones(len(measured)), rcond=None)[0]
            if (found >= 0).all():
                break
            used[int(found.argmin())] = False
        return cls(*(found / scale).tolist())

    def parts(self, geometry: Mapping[str, int], sequences: Sequences) -> dict[str, float]:
        """Seconds of an image: overheads, linear layers, attention, decoding."""
        linear, attention = sequences.flop(geometry)
        return {
            "overheads": sequences.tokens * self.overhead,
            "linear layers": linear * self.linear,
            "attention": attention * self.attention,
            "decoding": sequences.decode_seconds,
        }


def overhead_of_the_paper(geometry: Mapping[str, int], pixels: Sequences, latents: Sequences) -> float:
    """The overhead of a step, in operations that the device could have made meanwhile, that gives the paper's ratio."""
    whole = [sum(sequences.flop(geometry)) + sequences.decode_flop for sequences in (pixels, latents)]
    return (whole[0] - PAPER_RATIO * whole[1]) / (PAPER_RATIO * latents.tokens - pixels.tokens)
