"""Schedules: the original's formulas, and properties that every schedule has on every grid."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tamingfast.sampling.schedule import RULES, make_schedule, make_waves, one_window, wave_numbers, window_starts

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
    with pytest.raises(ValueError, match="order: got 6 entries"):
        one_window(2, 3, [0, 0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 4), "height: got 0"),
        ((4, -1, 4), "width: got -1"),
        ((4, 4, 0), "window: got 0"),
        ((4, 4, 4, "strided", 0), "stride: got 0"),
        ((4, 4, 4, "strided", 5), "stride: got 5 tokens, expected at most 4"),
        ((4, 4, 4, "block", 5), "stride: got 5 tokens, expected at most 4"),
        ((4, 4, 4, "wave"), "schedule: got 'wave', expected one of paper, scene, strided, block"),
    ],
)
def test_errors_are_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)


# --- waves ----------------------------------------------------------------------------------------


def waves_by_definition(plan) -> np.ndarray:
    """Visits one position after the other and looks at every token before it in its window."""
    numbers = np.full(plan.height * plan.width, -1)
    for run in plan.runs:
        cells = plan.cells(run)
        for step in run.steps:
            numbers[cells[step]] = numbers[cells[:step]].max(initial=-1) + 1
    return numbers.reshape(plan.height, plan.width)


masks = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.5, 0.9, 1.0]))


def drawn_mask(mask, height, width) -> np.ndarray:
    seed, share = mask
    return np.random.default_rng(seed).random((height, width)) < share


@settings(max_examples=150, deadline=None)
@given(grids, masks)
def test_wave_numbers_are_those_of_the_definition(case, mask):
    height, width, *rule = case
    plan = make_schedule(height, width, *rule).only(drawn_mask(mask, height, width))
    numbers = wave_numbers(plan)
    assert (numbers == waves_by_definition(plan)).all()
    assert ((numbers >= 0) == plan.wanted).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("height", "width", "waves"), [(64, 64, 1072), (64, 128, 1136), (256, 256, 4336), (16, 16, 256), (40, 9, 360)]
)
def test_wave_counts(rule, height, width, waves):
    plan = make_schedule(height, width, 16, rule)
    assert wave_numbers(plan).max() + 1 == waves == (height - 1) * min(16, width) + width
    assert len(make_waves(plan)) == waves


def test_waves_of_an_order_go_one_by_one():
    plan = one_window(2, 3, [3, 0, 5, 1, 4, 2]).only(np.array([[True, False, True], [True, False, True]]))
    assert wave_numbers(plan).tolist() == [[1, -1, 3], [0, -1, 2]]
    assert len(make_waves(plan.only(np.zeros((2, 3), dtype=bool)))) == 0


@settings(max_examples=150, deadline=None)
@given(grids, masks, st.sampled_from([1, 2, 5, None]))
def test_slots_hold_what_waves_say(case, mask, slots):
    """Replays the waves on slots that remember what they were fed."""
    height, width, *rule = case
    plan = make_schedule(height, width, *rule).only(drawn_mask(mask, height, width))
    waves = make_waves(plan, slots)
    known = ~plan.wanted.reshape(-1)
    held = {}
    for first, last in zip(waves.bounds[:-1], waves.bounds[1:], strict=True):
        assert first < last
        used = waves.slots[first:last].tolist()
        assert len(set(used)) == len(used), "two entries of a wave share a slot"
        for entry in range(first, last):
            cell, corner, step, slot, fed = (
                int(a[entry]) for a in (waves.cells, waves.corners, waves.steps, waves.slots, waves.fed)
            )
            assert corner + plan.offsets[step] == cell
            assert known[corner + plan.offsets[:step]].all()
            assert fed < step
            if fed >= 0:
                assert held[slot] == (corner, fed)
            held[slot] = (corner, step)
        assert not known[waves.cells[first:last]].any(), "sampled twice"
        known[waves.cells[first:last]] = True
    assert known.all()
    assert waves.slots.max(initial=0) < (slots or height * width)


def test_enough_slots_feed_each_window_of_a_block_once():
    plan = make_schedule(64, 64, 16, "block")
    waves = make_waves(plan)
    assert (waves.fed < 0).sum() == len(plan.runs) == 49
    assert waves.slots.max() + 1 <= 8, "no more windows are open at once than lie side by side"
    last_steps = sum(int(run.steps[-1]) for run in plan.runs)
    assert waves.tokens_fed(256) == 49 * 256 + last_steps
    assert waves.tokens_fed(256) < make_waves(plan, 2).tokens_fed(256) < make_waves(plan, 1).tokens_fed(256)
    with pytest.raises(ValueError, match="slots: got 0"):
        make_waves(plan, 0)


@settings(max_examples=50, deadline=None)
@given(sizes, sizes, windows, windows)
def test_strided_is_block_in_another_order_where_the_stride_is_long(height, width, window, stride):
    stride = max(min(stride, window), window - window // 2)
    strided, block = (make_schedule(height, width, window, rule, stride) for rule in ("strided", "block"))
    assert (strided.corners == block.corners).all()
    assert (strided.steps == block.steps).all()
