"""Which positions of a token grid are decoded in which order, and inside which attention window.

A window is a rectangle of at most `window` x `window` tokens, cut to the grid where the grid is smaller. The
transformer sees it as one sequence; consecutive positions that are decoded in one window form a `Run` and can
share its key/value cache.

Rules, for a position p on an axis of n tokens with a window of w tokens (both axes alike):
    paper    start = p - local, with local = p at the near edge, w - (n - p) at the far edge and w // 2
             between, which is clip(p - w // 2, 0, n - w): the sliding window of Esser et al. 2021, section
             3.3, as their sampling code has it.
    scene    start = clip(p - (w - 1) // 2, 0, n - w): one token less behind; p - 7 when w = 16.
    strided  start = the paper's rule rounded down to a multiple of `stride`, so that up to `stride` tokens of
             a row share a window. Above w - w // 2 only w - stride tokens are asked for behind p, so that p
             stays inside.
    block    windows at multiples of `stride` (the last at n - w) in raster order; each decodes all that is
             still unknown inside it.
`paper`, `scene` and `strided` decode the grid in raster order, `block` in raster order within windows. Under
every rule all tokens that precede a position in its window's sequence are known when it is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tamingfast.errors import UserError

Rule = Literal["paper", "scene", "strided", "block"]
RULES: tuple[str, ...] = get_args(Rule)


@dataclass(frozen=True, eq=False)
class Run:
    """Positions decoded one after the other inside one window.

    Attributes:
        row, column: the window's upper left corner in the grid.
        steps: int64, strictly increasing indices into the window's sequence.
    """

    row: int
    column: int
    steps: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """All runs that fill a height x width grid, in an order in which they can be decoded.

    Attributes:
        height, width: of the grid, in tokens.
        window_height, window_width: of every window, in tokens.
        order: int64 (window tokens,); token k of a window's sequence lies at its raster cell order[k].
        runs: every position of the grid is a step of at most one of them.
    """

    height: int
    width: int
    window_height: int
    window_width: int
    order: NDArray[np.int64]
    runs: tuple[Run, ...]

    @property
    def window_tokens(self) -> int:
        return self.window_height * self.window_width

    @property
    def single_window(self) -> bool:
        """Whether one window covers the grid."""
        return (self.window_height, self.window_width) == (self.height, self.width)

    def cells(self, run: Run) -> NDArray[np.int64]:
        """Raster indices in the grid of the window's sequence: int64 (window_tokens,)."""
        row, column = np.divmod(self.order, self.window_width)
        return (run.row + row) * self.width + run.column + column

    def positions(self) -> NDArray[np.int64]:
        """Raster indices in the grid of all steps, in decoding order: int64 (number of steps,)."""
        return np.concatenate([np.empty(0, np.int64)] + [self.cells(run)[run.steps] for run in self.runs])

    def only(self, wanted: NDArray[np.bool_]) -> Schedule:
        """The schedule without the positions that are False in `wanted` (height, width): they are known."""
        wanted = wanted.reshape(-1)
        runs = (replace(run, steps=run.steps[wanted[self.cells(run)[run.steps]]]) for run in self.runs)
        return replace(self, runs=tuple(run for run in runs if len(run.steps)))


def make_schedule(height: int, width: int, window: int = 16, rule: Rule = "paper", stride: int = 8) -> Schedule:
    """Plans a height x width grid of tokens under one of the rules at the head of this module.

    Args:
        window: the window's side in tokens.
        stride: step of the window's start in tokens, for `strided` and `block`.

    Raises:
        UserError: an unknown rule, a size below 1, or a stride above the window.
    """
    if rule not in RULES:
        raise UserError(f"schedule is {rule!r}, but it must be one of {', '.join(RULES)}")
    for name, value in (("height", height), ("width", width), ("window", window), ("stride", stride)):
        if value < 1:
            raise UserError(f"{name} is {value}, but it must be at least 1 token")
    if rule in ("strided", "block") and stride > window:
        raise UserError(f"stride is {stride}, but schedule {rule!r} needs at most the window's {window} tokens")
    window_height, window_width = min(window, height), min(window, width)
    runs = _block_runs if rule == "block" else _raster_runs
    return Schedule(
        height=height,
        width=width,
        window_height=window_height,
        window_width=window_width,
        order=np.arange(window_height * window_width),
        runs=tuple(runs(height, width, window_height, window_width, rule, stride)),
    )


def one_window(height: int, width: int, order: ArrayLike) -> Schedule:
    """Plans a grid that one window covers; token k of the sequence lies at raster cell order[k].

    Raises:
        ValueError: `order` is no permutation of the grid's cells.
    """
    order = np.asarray(order, dtype=np.int64)
    if not np.array_equal(np.sort(order), np.arange(height * width)):
        raise ValueError(f"order has {order.size} entries, but it must be a permutation of {height * width} grid cells")
    return Schedule(height, width, height, width, order, (Run(0, 0, np.arange(height * width)),))


def window_starts(size: int, window: int, rule: Rule, stride: int) -> NDArray[np.int64]:
    """First token of the window for each position of one axis, int64 (size,); not for `block`."""
    behind = {
        "paper": window // 2,
        "scene": (window - 1) // 2,
        "strided": min(window // 2, max(window - stride, 0)),
    }[rule]
    step = stride if rule == "strided" else 1
    starts = np.maximum(np.arange(size) - behind, 0) // step * step
    return np.minimum(starts, size - window)


def _raster_runs(height: int, width: int, window_height: int, window_width: int, rule: Rule, stride: int) -> list[Run]:
    row, column = np.divmod(np.arange(height * width), width)
    row0 = window_starts(height, window_height, rule, stride)[row]
    column0 = window_starts(width, window_width, rule, stride)[column]
    step = (row - row0) * window_width + column - column0
    moves = np.flatnonzero(np.diff(row0) | np.diff(column0)) + 1
    first = np.concatenate(([0], moves))
    return [Run(int(row0[i]), int(column0[i]), steps) for i, steps in zip(first, np.split(step, moves), strict=True)]


def _block_runs(height: int, width: int, window_height: int, window_width: int, rule: Rule, stride: int) -> list[Run]:
    unknown = np.ones((height, width), dtype=bool)
    runs = []
    for row in _block_starts(height, window_height, stride):
        for column in _block_starts(width, window_width, stride):
            inside = unknown[row : row + window_height, column : column + window_width]
            runs.append(Run(int(row), int(column), np.flatnonzero(inside)))
            inside[:] = False
    return runs


def _block_starts(size: int, window: int, stride: int) -> NDArray[np.int64]:
    return np.minimum(np.arange(0, size - window + stride, stride), size - window)
