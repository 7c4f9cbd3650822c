"""Which cells of a token grid are decoded in which order, and inside which attention window.

A window is a rectangle of at most `window` x `window` tokens, cut to the grid where the grid is smaller. The
transformer sees it as one sequence; cells that are decoded one after the other in one window form a `Run` and share
its key/value cache.

Rules, for a cell at coordinate p on an axis of n tokens with a window of w tokens (both axes alike):
    paper    start = p - local, with local = p at the near edge, w - (n - p) at the far edge and w // 2
             between, which is clip(p - w // 2, 0, n - w): the sliding window of Esser et al. 2021, section
             3.3, as their sampling code has it.
    scene    start = clip(p - (w - 1) // 2, 0, n - w): one token fewer before p; p - 7 when w = 16.
    strided  start = the paper's rule rounded down to a multiple of `stride`, so that up to `stride` tokens of
             a row share a window. For strides above w - w // 2 the rule keeps only w - stride tokens before p,
             so that p stays inside.
    block    windows at multiples of `stride` (the last at n - w) in raster order; each decodes everything
             still unknown inside it.
`paper`, `scene` and `strided` decode the grid in raster order, `block` in raster order within windows. Under
every rule all tokens that precede a cell in its window's sequence are known when it is decoded. With
`stride` >= w - w // 2, `strided` and `block` give every cell the same window, hence the same token.

Cells need not be decoded one at a time. Under any rule a cell depends only on tokens before it in its window, so
the grid splits into waves (`make_waves`): a cell's wave is one after the latest of the tokens it depends on. An
unmasked grid wider than the window takes (height - 1) * w + width waves instead of height * width steps.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from tamingfast.errors import UserError, check_count

RULES = ("paper", "scene", "strided", "block")
#: Side of the window in tokens, unless another is given: the paper's.
WINDOW = 16


@dataclass(frozen=True, eq=False)
class Run:
    """Cells decoded one after the other inside one window; with a mask their steps may have gaps.

    Attributes:
        row, column: the window's upper left corner in the grid.
        steps: int64, strictly increasing indices into the window's sequence.
    """

    row: int
    column: int
    steps: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The window in which each cell of a height x width grid is decoded, and which cells are to be decoded.

    Attributes:
        height, width: of the grid, in tokens.
        window_height, window_width: of every window, in tokens.
        order: int64 (window tokens,); step k of a window's sequence is the window's raster cell order[k].
        row_starts: int64 (height,), the first row of the window in which a row's cells are decoded.
        column_starts: int64 (width,), likewise its first column.
        by_window: whether a window is finished before the next is entered; else the grid is decoded in raster order.
        wanted: bool (height, width), the cells to decode; the others are known.
    """

    height: int
    width: int
    window_height: int
    window_width: int
    order: NDArray[np.int64]
    row_starts: NDArray[np.int64]
    column_starts: NDArray[np.int64]
    by_window: bool
    wanted: NDArray[np.bool_]

    @property
    def window_tokens(self) -> int:
        return self.window_height * self.window_width

    @property
    def single_window(self) -> bool:
        """Whether one window covers the grid."""
        return (self.window_height, self.window_width) == (self.height, self.width)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Raster indices in the grid of a window's sequence, less that of its corner: int64 (window_tokens,)."""
        row, column = np.divmod(self.order, self.window_width)
        return row * self.width + column

    @cached_property
    def corners(self) -> NDArray[np.int64]:
        """Raster index of the upper left corner of each cell's window: int64 (height * width,)."""
        return np.add.outer(self.row_starts * self.width, self.column_starts).reshape(-1)

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """Step of each cell in its window's sequence: int64 (height * width,)."""
        row = np.arange(self.height) - self.row_starts
        column = np.arange(self.width) - self.column_starts
        return np.argsort(self.order)[np.add.outer(row * self.window_width, column).reshape(-1)]

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All wanted cells, each in one run, in an order in which they can be decoded."""
        positions = self.positions()
        corner, step = self.corners[positions], self.steps[positions]
        moves = np.flatnonzero(np.diff(corner)) + 1
        parts = zip(np.split(corner, moves), np.split(step, moves), strict=True)
        return tuple(
            Run(row=int(corners[0]) // self.width, column=int(corners[0]) % self.width, steps=steps)
            for corners, steps in parts
            if len(steps)
        )

    def cells(self, run: Run) -> NDArray[np.int64]:
        """Raster indices in the grid of the window's sequence: int64 (window_tokens,)."""
        return run.row * self.width + run.column + self.offsets

    def positions(self) -> NDArray[np.int64]:
        """Raster indices of all wanted cells, in decoding order."""
        keys = (self.steps, self.corners) if self.by_window or self.single_window else (np.arange(self.steps.size),)
        visited = np.lexsort(keys)
        return visited[self.wanted.reshape(-1)[visited]]

    def only(self, wanted: NDArray[np.bool_]) -> Schedule:
        """The schedule without the cells that are False in ``wanted`` (height, width), whose tokens are known."""
        return replace(self, wanted=self.wanted & wanted.reshape(self.wanted.shape))


def check_rule(rule: str, window: int, stride: int) -> None:
    """Raise UserError unless windows of ``window`` tokens can follow one another by this rule; see `make_schedule`."""
    if rule not in RULES:
        raise UserError(f"schedule: got {rule!r}, expected one of {', '.join(RULES)}")
    for name, value in (("window", window), ("stride", stride)):
        if value < 1:
            raise UserError(f"{name}: got {value} tokens, expected at least 1")
    if rule in ("strided", "block") and stride > window:
        raise UserError(
            f"stride: got {stride} tokens, expected at most {window}, the window's side, for schedule {rule!r}"
        )


def make_schedule(height: int, width: int, window: int = WINDOW, rule: str = "paper", stride: int = 8) -> Schedule:
    """Plans a height x width grid of tokens under one of the rules at the head of this module.

    Args:
        window: the window's side in tokens.
        stride: step of the window's start in tokens, for `strided` and `block`.

    Raises:
        UserError: an unknown rule, a size below 1, or a stride above the window.
    """
    check_rule(rule, window, stride)
    for name, value in (("height", height), ("width", width)):
        check_count(name, value)
    window_height, window_width = min(window, height), min(window, width)
    return Schedule(
        height=height,
        width=width,
        window_height=window_height,
        window_width=window_width,
        order=np.arange(window_height * window_width),
        row_starts=window_starts(height, window_height, rule, stride),
        column_starts=window_starts(width, window_width, rule, stride),
        by_window=rule == "block",
        wanted=np.ones((height, width), dtype=bool),
    )


def one_window(height: int, width: int, order: ArrayLike) -> Schedule:
    """Plans a grid that one window covers; token k of the sequence lies at raster cell order[k].

    Raises:
        ValueError: `order` is not a permutation of the grid's cells.
    """
    order = np.asarray(order, dtype=np.int64)
    if not np.array_equal(np.sort(order), np.arange(height * width)):
        raise ValueError(f"order: got {order.size} entries, expected a permutation of the {height * width} grid cells")
    return replace(make_schedule(height, width, max(height, width)), order=order)


def window_starts(size: int, window: int, rule: str, stride: int) -> NDArray[np.int64]:
    """First coordinate of the window for each coordinate of one axis, int64 (size,)."""
    behind = {
        "paper": window // 2,
        "scene": (window - 1) // 2,
        "strided": min(window // 2, max(window - stride, 0)),
        "block": max(window - stride, 0),  # windows overlap by this; a cell belongs to the first that reaches it
    }[rule]
    step = stride if rule in ("strided", "block") else 1
    starts = np.maximum(np.arange(size) - behind, 0) // step * step
    return np.minimum(starts, size - window)


@dataclass(frozen=True, eq=False)
class Waves:
    """Cells in groups that may be sampled at once, each with the cache slot that holds its window's tokens.

    Entry e samples the token of `cells[e]`: steps `fed[e]` to `steps[e]` - 1 of its window's sequence are fed into slot
    `slots[e]`, and the token is chosen from the logits of the last of them. `fed[e]` is -1 where the slot holds nothing
    of this window yet, so that the condition is fed too. Entries of a wave use different slots; a slot keeps its
    content until an entry with `fed` -1 takes it over.

    Attributes:
        bounds: int64 (number of waves + 1,); wave i is the entries bounds[i] to bounds[i + 1].
        cells: int64, raster index in the grid of the sampled token.
        corners: int64, raster index in the grid of its window's upper left corner.
        steps: int64, its step in the window's sequence.
        slots: int64, the cache slot.
        fed: int64, number of this window's image tokens that the slot already holds, or -1 as above.
    """

    bounds: NDArray[np.int64]
    cells: NDArray[np.int64]
    corners: NDArray[np.int64]
    steps: NDArray[np.int64]
    slots: NDArray[np.int64]
    fed: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def tokens_fed(self, prefix: int) -> int:
        """Tokens that pass through the transformer for one image with ``prefix`` condition tokens."""
        return int(np.where(self.fed < 0, prefix + self.steps, self.steps - self.fed).sum())


def wave_numbers(schedule: Schedule) -> NDArray[np.int64]:
    """The wave in which each cell may be sampled, int64 (height, width); -1 where the token is known.

    It is one more than the latest wave among the tokens that precede the cell in its window's sequence.
    """
    numbers = np.full((schedule.height, schedule.width), -1)
    if schedule.single_window:
        positions = schedule.positions()
        numbers.reshape(-1)[positions] = np.arange(len(positions))
        return numbers
    beyond = schedule.height * schedule.width + schedule.width  # above any difference of waves and ranks
    for row, top in enumerate(schedule.row_starts):
        columns = np.flatnonzero(schedule.wanted[row])
        if not len(columns):
            continue
        above = numbers[top:row].max(0, initial=-1)
        earliest = sliding_window_view(above, schedule.window_width).max(-1)[schedule.column_starts[columns]] + 1
        # In a row each cell follows its wanted left neighbour, unless that lies outside its window: then a new chain
        # begins. number = max over the chain so far of (earliest - rank), plus the cell's own rank.
        chain = np.zeros(len(columns), np.int64)
        chain[1:] = np.cumsum(columns[:-1] < schedule.column_starts[columns[1:]])
        rank = np.arange(len(columns))
        shift = chain * beyond - rank
        numbers[row, columns] = np.maximum.accumulate(earliest + shift) - shift
    return numbers


def make_waves(schedule: Schedule, slots: int | None = None) -> Waves:
    """Groups the wanted cells of ``schedule`` into waves and assigns cache slots to their windows.

    Args:
        slots: number of windows that the cache holds at once, at least 1; waves of more cells are cut. When the cache
            is full, the window whose next use is furthest away is evicted (Belady's rule). None: no limit.

    Raises:
        ValueError: slots < 1.
    """
    if slots is not None and slots < 1:
        raise ValueError(f"slots: got {slots}, expected at least 1")
    numbers = wave_numbers(schedule).reshape(-1)
    cells = np.flatnonzero(numbers >= 0)
    cells = cells[np.argsort(numbers[cells], kind="stable")]
    sizes = np.bincount(numbers[cells])
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    if slots is not None and sizes.max(initial=0) > slots:
        cuts = [np.arange(first, last, slots) for first, last in pairwise(bounds)]
        bounds = np.concatenate([*cuts, bounds[-1:]])
    corners, steps = schedule.corners[cells], schedule.steps[cells]
    slot, fed = _assign_slots(bounds.tolist(), corners.tolist(), steps.tolist(), slots or len(cells))
    return Waves(bounds, cells, corners, steps, slot, fed)


def _assign_slots(
    bounds: list[int], corners: list[int], steps: list[int], slots: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(slot, number of image tokens that it already holds or -1) of each entry."""
    never = len(corners)
    following = [never] * len(corners)
    last_seen: dict[int, int] = {}
    for entry in range(len(corners) - 1, -1, -1):
        following[entry] = last_seen.get(corners[entry], never)
        last_seen[corners[entry]] = entry
    slot, fed = [0] * len(corners), [-1] * len(corners)
    resident: dict[int, int] = {}  # window -> the entry that used it last
    free: list[int] = []  # slots given back
    opened = 0  # slots ever used
    latest: list[tuple[int, int]] = []  # heap of (-entry of its next use, window), to evict from
    for first, last in pairwise(bounds):
        for entry in range(first, last):
            previous = resident.get(corners[entry])
            if previous is not None:
                slot[entry], fed[entry] = slot[previous], steps[previous]
            elif free or opened < slots:
                slot[entry] = heapq.heappop(free) if free else opened
                opened = max(opened, slot[entry] + 1)
            else:
                # Windows of this wave are used soonest, so none of them is evicted.
                while True:
                    needed, window = heapq.heappop(latest)
                    if window in resident and following[resident[window]] == -needed:
                        break
                slot[entry] = slot[resident.pop(window)]
        for entry in range(first, last):
            if following[entry] < never:
                resident[corners[entry]] = entry
                heapq.heappush(latest, (-following[entry], corners[entry]))
            else:
                resident.pop(corners[entry], None)
                heapq.heappush(free, slot[entry])
    return np.asarray(slot, np.int64), np.asarray(fed, np.int64)
