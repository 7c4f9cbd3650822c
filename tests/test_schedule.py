"""Window rules: the original's formulas, and what every rule promises for every grid."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tamingfast.sampling.schedule import RULES, make_schedule, one_window, window_starts

sizes, windows = st.integers(1, 40), st.integers(1, 18)
grids = st.tuples(sizes, sizes, windows, st.sampled_from(RULES), windows).map(
    lambda drawn: (*drawn[:4], min(drawn[2], drawn[4]))  # height, width, window, rule, stride <= window
)


def paper_start(p: int, n: int) -> int:
    """The three branches of the original's script, for its window of 16."""
    if p <= 8:
        local = p
    elif n - p < 8:
        local = 16 - (n - p)
    else:
        local = 8
    return p - local


@pytest.mark.parametrize("n", [16, 17, 20, 23, 24, 36, 64])
def test_paper_and_scene_follow_the_originals_formulas(n):
    assert window_starts(n, 16, "paper", 8).tolist() == [paper_start(p, n) for p in range(n)]
    assert window_starts(n, 16, "scene", 8).tolist() == [min(max(p - 7, 0), n - 16) for p in range(n)]


def test_strided_starts_are_multiples_of_the_stride_with_context_behind():
    starts = window_starts(64, 16, "strided", 8)
    assert set(starts.tolist()) == {0, 8, 16, 24, 32, 40, 48}
    behind = np.arange(64) - starts
    assert behind[8:].min() >= 8, "beyond the first tokens half a window of context lies behind"
    assert window_starts(64, 16, "strided", 1).tolist() == window_starts(64, 16, "paper", 1).tolist()
    assert window_starts(64, 16, "strided", 16).tolist() == [p // 16 * 16 for p in range(64)]


@settings(max_examples=300, deadline=None)
@given(grids)
def test_every_position_once_inside_its_window_after_all_it_sees(case):
    height, width, window, rule, stride = case
    plan = make_schedule(height, width, window, rule, stride)
    assert (plan.window_height, plan.window_width) == (min(window, height), min(window, width))
    known = np.zeros((height, width), dtype=bool)
    for run in plan.runs:
        assert 0 <= run.row <= height - plan.window_height
        assert 0 <= run.column <= width - plan.window_width
        assert len(run.steps)
        assert (np.diff(run.steps) > 0).all()
        inside = known[run.row : run.row + plan.window_height, run.column : run.column + plan.window_width]
        for step in run.steps:
            row, column = divmod(int(step), plan.window_width)
            assert not inside[row, column], "decoded twice"
            assert inside.reshape(-1)[:step].all(), "a token before it in the window is not known yet"
            inside[row, column] = True
    assert known.all()


@settings(max_examples=100, deadline=None)
@given(grids)
def test_positions_are_those_of_the_runs(case):
    height, width, window, rule, stride = case
    plan = make_schedule(height, width, window, rule, stride)
    positions = plan.positions()
    assert sorted(positions.tolist()) == list(range(height * width))
    if rule != "block":
        assert positions.tolist() == list(range(height * width)), "raster order"
        windows = [(run.row, run.column) for run in plan.runs]
        assert all(a != b for a, b in pairwise(windows)), "a run ends only where the window moves"
    run = plan.runs[-1]
    corner = plan.cells(run)[[0, -1]].tolist()
    last = (run.row + plan.window_height - 1) * width + run.column + plan.window_width - 1
    assert corner == [run.row * width + run.column, last]


def test_block_visits_windows_in_raster_order():
    plan = make_schedule(20, 36, 16, "block", 8)
    assert [(run.row, run.column) for run in plan.runs] == [(r, c) for r in (0, 4) for c in (0, 8, 16, 20)]
    assert [len(run.steps) for run in plan.runs] == [256, 128, 128, 64, 64, 32, 32, 16]


@pytest.mark.parametrize("rule", RULES)
def test_one_window_is_one_run(rule):
    for height, width in [(16, 16), (5, 7), (1, 1), (16, 3)]:
        plan = make_schedule(height, width, 16, rule, 8)
        assert plan.single_window
        assert [run.steps.tolist() for run in plan.runs] == [list(range(height * width))]
    assert not make_schedule(16, 17, 16, rule, 8).single_window


def test_only_drops_what_is_known():
    plan = make_schedule(4, 6, 3, "paper")
    wanted = np.zeros((4, 6), dtype=bool)
    wanted[1, 2] = wanted[3, 5] = True
    assert plan.only(wanted).positions().tolist() == [8, 23]
    nothing = plan.only(np.zeros((4, 6), dtype=bool))
    assert nothing.runs == ()
    assert nothing.positions().tolist() == []


def test_an_order_says_where_the_tokens_of_a_sequence_lie():
    order = [3, 0, 5, 1, 4, 2]
    plan = one_window(2, 3, order)
    assert plan.positions().tolist() == order
    wanted = np.array([[True, False, False], [True, False, True]])
    assert plan.only(wanted).positions().tolist() == [3, 0, 5]
    with pytest.raises(ValueError, match="order has 6 entries"):
        one_window(2, 3, [0, 0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 4), "height is 0"),
        ((4, -1, 4), "width is -1"),
        ((4, 4, 0), "window is 0"),
        ((4, 4, 4, "strided", 0), "stride is 0"),
        ((4, 4, 4, "strided", 5), "stride is 5, .* window's 4"),
        ((4, 4, 4, "block", 5), "stride is 5, .* window's 4"),
        ((4, 4, 4, "wave"), "schedule is 'wave', .* paper, scene, strided, block"),
    ],
)
def test_errors_are_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)
