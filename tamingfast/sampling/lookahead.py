"""How far sampling looks ahead: what a pass costs, and how often guesses are right.

Both decide how much is guessed, never what is sampled. `csrc/cpu/lookahead.h` has the same rules for decoding without
Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

#: Waves, and rows of guesses in a pass, that are chosen automatically.
WIDEST = 64
#: With fewer tokens, none are guessed unless asked for.
WORTH_MEASURING = 32
#: Rows of the passes that are timed, and how often each is; the first time warms up.
SIZES, ROUNDS = (1, 2, 4, 8, 16, 32), 3
#: How often d guesses in a row are right, before any was checked (counted on trained priors; deep ones have often been
#: corrected already): float64 (WIDEST,).
EXPECTED = np.concatenate(([1.0], 0.6 * np.arange(1.0, WIDEST) ** -0.7))
#: Weight of the latest pass, in the long run and at first; how fast the share returns to `EXPECTED` without guesses.
SLOWEST, FASTEST, FORGOTTEN = 1 / 64, 1 / 5, 1 / 1024
#: No share is smaller, so that ratios stay defined.
LEAST = 1e-9


class PassCost:
    """Seconds of a pass by its number of rows: measured at `SIZES`, interpolated between, extrapolated above."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds = np.maximum.accumulate(seconds).tolist()

    @classmethod
    def measured(cls, time_pass: Callable[[int], float]) -> PassCost:
        """The least of `ROUNDS` measurements; ``time_pass(rows)`` runs a pass and returns its seconds."""
        return cls(np.min([[time_pass(rows) for rows in SIZES] for _ in range(ROUNDS)], axis=0).tolist())

    def __call__(self, rows: int) -> float:
        above = min(max(int(np.searchsorted(SIZES, rows)), 1), len(SIZES) - 1)
        slope = (self.seconds[above] - self.seconds[above - 1]) / (SIZES[above] - SIZES[above - 1])
        return self.seconds[above - 1] + slope * (rows - SIZES[above - 1])


class Survival:
    """How often lately a choice d waves ahead had only right guesses before it.

    Attributes:
        share: float64 (WIDEST,), by the depth d; 1 at depth 0.
    """

    def __init__(self) -> None:
        self.share = EXPECTED.copy()
        self._passes = 0

    def observe(self, seen: Sequence[float]) -> None:
        """Learn the share of each depth in a pass; deeper choices would have stood as often as before."""
        if len(seen) < 2:
            self.share += FORGOTTEN * (EXPECTED - self.share)
            return
        weight = max(SLOWEST, 1 / (1 / FASTEST + self._passes))
        self._passes += 1
        depths = min(len(seen), WIDEST)
        now = np.asarray(seen[:depths])
        deeper = now[-1] * self.share[depths:] / self.share[depths - 1]
        self.share += weight * (np.concatenate((now, deeper)) - self.share)
        np.maximum(self.share, LEAST, out=self.share)


def best_depth(cost: PassCost, survival: Survival, rows: Sequence[int], choices: Sequence[int]) -> int:
    """The number of waves in a pass that promises the most tokens per second.

    ``rows`` and ``choices`` are what each wave adds to the pass.
    """
    depths = min(len(rows), WIDEST)
    tokens = np.cumsum(survival.share[:depths] * choices[:depths])
    seconds = [cost(int(count)) for count in np.cumsum(rows[:depths])]
    return int(np.argmax(tokens / seconds)) + 1
