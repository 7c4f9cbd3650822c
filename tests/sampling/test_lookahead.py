"""Lookahead in `sample_grid`: the same tokens for every engine, schedule and width, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_cases import HostEngine
from gpts import SHAPES, VOCAB, prior, tiny_gpt, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tamingfast.engines import lending
from tamingfast.engines.cuda.window import Window
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.sampling import Canvas, guessed_waves, sample_grid
from tamingfast.sampling.lookahead import EXPECTED, SIZES, WIDEST, PassCost, Survival, best_depth
from tamingfast.sampling.schedule import RULES

ENGINES = ("torch", *(["native"] if backends.native()[0] else []))


def predictable_gpt(n_unmasked: int = 0) -> GPT:
    """A transformer of which some tokens can be guessed without their context, others not."""
    gpt = tiny_gpt(n_unmasked=n_unmasked)
    with torch.no_grad():
        gpt.ln_f.weight.mul_(0.3)
        gpt.ln_f.bias.copy_(torch.randn(16, generator=torch.Generator().manual_seed(3)))
    return gpt


MODELS = {"predictable": predictable_gpt(), "random": tiny_gpt(), "prefix": predictable_gpt(3)}


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The number of choices in each pass."""
    counts: list[int] = []
    feed = guessed_waves.GuessedWaves._feed

    def counting(waves, choices):
        counts.append(len(choices))
        return feed(waves, choices)

    monkeypatch.setattr(guessed_waves.GuessedWaves, "_feed", counting)
    return counts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_tokens_are_those_of_one_after_the_other(data):
    draw = data.draw
    gpt, kind = MODELS[draw(st.sampled_from(sorted(MODELS)))], draw(st.sampled_from(sorted(SHAPES)))
    start, mask = tokens(2, 7, 9, seed=draw(st.integers(0, 99))), torch.rand(2, 7, 9) < draw(st.sampled_from([0.5, 2]))
    options = dict(
        window=4, schedule=draw(st.sampled_from(RULES)), stride=draw(st.integers(1, 4)), start=start, mask=mask,
        seed=draw(st.integers(0, 99)), top_k=draw(st.sampled_from([None, 5])), greedy=draw(st.booleans()),
        temperature=draw(st.sampled_from([0.3, 1.0])), engine=draw(st.sampled_from(ENGINES)),
    )  # fmt: skip
    cond = tokens(*SHAPES[kind])
    expected = sample_grid(gpt, cond, 7, 9, lookahead=1, **options)
    counted: list[tuple[int, int]] = []
    for lookahead in (draw(st.integers(2, 40)), None):
        memory = draw(st.sampled_from([0, 10_000, 1 << 30]))
        grid = sample_grid(
            gpt, cond, 7, 9, lookahead=lookahead, memory=memory, callback=lambda *a: counted.append(a), **options
        )
        assert torch.equal(grid, expected)
    halves = [done for done, _ in counted]
    half = len(halves) // 2
    assert halves[:half] == sorted(set(halves[:half])), "progress goes on and never back"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lookahead", [2, 5, 40, None])
@pytest.mark.parametrize("order", [False, True], ids=["raster", "permuted"])
def test_one_window(engine, lookahead, order):
    gpt = predictable_gpt()
    model = prior(gpt, torch.randperm(36, generator=torch.Generator().manual_seed(1)) if order else None, 20)
    cond, options = tokens(3, 4), dict(seed=5, engine=engine)
    for more in (dict(), dict(start=tokens(3, 7).clamp(max=19))):
        expected = sample_grid(model, cond, 6, 6, lookahead=1, **options, **more)
        assert torch.equal(sample_grid(model, cond, 6, 6, lookahead=lookahead, **options, **more), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", ["strided", "block"])
def test_right_guesses_save_passes(engine, rule, passes):
    gpt, cond = predictable_gpt(), tokens(1, 3)
    options = dict(window=4, schedule=rule, stride=2, seed=1, engine=engine, temperature=0.5)
    needed = []
    for lookahead in (2, 6):
        passes.clear()
        sample_grid(gpt, cond, 9, 9, lookahead=lookahead, **options)
        needed.append(len(passes))
    waves = 8 * 4 + 9
    assert needed[1] < needed[0] < waves
    assert needed[1] < waves * 0.6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("window", [16, 4])
def test_the_observer_sees_only_final_tokens(engine, window):
    gpt, cond, seen = predictable_gpt(), tokens(3, 3), []
    options = dict(window=window, schedule="block", stride=2, engine=engine, seed=4)
    grid = sample_grid(
        gpt, cond, 6, 6, lookahead=7, observer=lambda *a: seen.append([part.clone() for part in a]), **options
    )
    assert not seen[-1][1].any()
    left = torch.ones_like(grid, dtype=torch.bool)
    for now, pending in seen:
        assert torch.equal(now[~pending], grid[~pending])
        assert not (pending & ~left).any()
        assert (left & ~pending).any()
        left = pending


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("window", [16, 4])
def test_a_token_that_would_break_everything_may_be_guessed(engine, window):
    """Only what is chosen counts: NaN follows on tokens that may be guessed and, for this seed, are never chosen."""
    gpt, cond, options = predictable_gpt(), tokens(1, 3).clamp(max=9), dict(window=window, schedule="block", stride=2)
    options |= dict(engine=engine, seed=3, temperature=2.0)
    expected = sample_grid(gpt, cond, 6, 6, lookahead=1, **options)
    never = [token for token in range(VOCAB) if token not in expected and token not in cond]
    with torch.no_grad():
        gpt.tok_emb.weight[never] = torch.nan
    assert torch.equal(sample_grid(gpt, cond, 6, 6, lookahead=1, **options), expected)
    assert torch.equal(sample_grid(gpt, cond, 6, 6, lookahead=9, **options), expected)
    with torch.no_grad():
        gpt.tok_emb.weight[int(expected[0, 3, 3])] = torch.nan
    for lookahead in (1, 9):
        with pytest.raises(ValueError, match="logits: got NaN"):
            sample_grid(gpt, cond, 6, 6, lookahead=lookahead, **options)


@pytest.mark.parametrize("window", [16, 4])
def test_the_cuda_engine_guesses_where_a_number_is_given(window, passes, monkeypatch):
    """Here with its kernels built for the host."""
    gpt, cond, options = predictable_gpt(), tokens(2, 3), dict(window=window, schedule="block", stride=2, seed=6)
    expected = sample_grid(gpt, cond, 6, 6, engine="naive", **options)
    monkeypatch.setitem(lending.ENGINES, "cpu", HostEngine)
    windows, advance = [], Window.advance
    monkeypatch.setattr(Window, "advance", lambda own: (windows.append(own), advance(own)))
    for lookahead in (1, None, 5):
        passes.clear()
        grid = sample_grid(gpt, cond, 6, 6, engine="native", dtype="float32", lookahead=lookahead, **options)
        assert torch.equal(grid, expected)
    if window == 16:
        assert not passes
        assert len(windows) < 36, "inside the engine"
    else:
        assert 0 < len(passes) < 5 * 4 + 6


@pytest.mark.skipif("native" not in ENGINES, reason="needs the extension")
@pytest.mark.parametrize(
    "options", [dict(), dict(dtype="bfloat16"), dict(window=4, schedule="block", stride=2)], ids=str
)
def test_drafts_guess_and_are_kept_only_while_they_are_asked_for(options):
    gpt, cond, one_window = predictable_gpt(), tokens(3, 4), "window" not in options
    options = dict(seed=5, temperature=2.0) | options
    expected = sample_grid(gpt, cond, 6, 6, lookahead=1, **options)
    for drafts in (True, False, True):
        for lookahead in (1, None, 9):
            grid = sample_grid(gpt, cond, 6, 6, lookahead=lookahead, drafts=drafts, **options)
            assert torch.equal(grid, expected)
        with lending.borrowed_engine(gpt, options.get("dtype", "float32"), 1, 1, drafts and one_window) as engine:
            assert (engine.info()["draft_bytes"] > 0) is (drafts and one_window)
            assert engine.info()["passes"] > 0 or not one_window, "the engine that drew"


@pytest.mark.skipif("native" not in ENGINES, reason="needs the extension")
def test_a_copy_of_the_model_guesses_most():
    gpt, cond = predictable_gpt(), tokens(1, 4)
    with lending.borrowed_engine(gpt, "float32", 1, 39, drafts=True) as engine:
        before = engine.info()["passes"]
    sample_grid(gpt, cond, 6, 6, lookahead=9, drafts=True)
    with lending.borrowed_engine(gpt, "float32", 1, 39, drafts=True) as engine:
        assert 5 <= engine.info()["passes"] - before < 10, "of 36 tokens"


def test_a_canvas_is_painted_alike_and_does_not_record_it():
    model = nn.Module()
    model.transformer = predictable_gpt()
    blank = Canvas.blank(tokens(2, 3), 6, 7, window=4, schedule="block", stride=2, seed=2)
    painted = [blank.sample(model, lookahead=lookahead) for lookahead in (1, 5)]
    assert torch.equal(painted[0].tokens, painted[1].tokens)
    assert painted[0].settings == painted[1].settings
    assert "lookahead" not in Canvas.SETTINGS


@pytest.mark.parametrize("lookahead", [0, -3, 1.5, "many"])
def test_a_bad_lookahead_is_named(lookahead):
    with pytest.raises(ValueError, match=r"^lookahead: got .*, expected an integer from 1 to 1024, or None"):
        sample_grid(predictable_gpt(), tokens(1, 3), 6, 6, lookahead=lookahead)


# --- how far ------------------------------------------------------------------------------------


def test_the_cost_of_a_pass_is_measured_and_interpolated():
    asked = []
    cost = PassCost.measured(lambda rows: asked.append(rows) or 2.0 + rows + (5.0 if len(asked) <= len(SIZES) else 0))
    assert [cost(rows) for rows in (1, 2, 3, 5, 32, 40)] == pytest.approx([3, 4, 5, 7, 34, 42])
    assert asked.count(1) == 3
    flat = PassCost([3.0, 2.0, 2.5, 4.0, 4.0, 8.0])  # more rows never cost less
    assert [flat(rows) for rows in (1, 2, 4, 6, 8)] == pytest.approx([3, 3, 3, 3.5, 4])


def test_the_cost_in_torch_is_measured_once(monkeypatch):
    """For each type and number of threads, and only if it is needed."""
    asked = []
    monkeypatch.setattr(guessed_waves, "_time_pass", lambda gpt, rows: asked.append(gpt) or 1.0)
    gpt, cond = predictable_gpt(), tokens(1, 3)
    for lookahead in (1, 4):
        sample_grid(gpt, cond, 6, 6, engine="torch", lookahead=lookahead)
    sample_grid(gpt, cond, 2, 6, engine="torch")
    assert not asked
    for _ in range(2):
        sample_grid(gpt, cond, 6, 6, engine="torch")
    assert len(asked) == len(SIZES) * 3
    sample_grid(gpt, cond, 6, 6, engine="torch", dtype="bfloat16")
    assert len(asked) == len(SIZES) * 6


def test_survival_learns_what_it_sees():
    survival = Survival()
    assert survival.share == pytest.approx(EXPECTED)
    assert (np.diff(EXPECTED) < 0).all() and EXPECTED[0] == 1
    for _ in range(400):
        survival.observe([1.0, 1.0, 0.0, 0.0])
    assert survival.share[:4] == pytest.approx([1, 1, 0, 0], abs=0.02)
    assert survival.share[4:].max() < 0.01
    for _ in range(6000):  # no guesses: it returns to what is expected
        survival.observe([1.0])
    assert survival.share == pytest.approx(EXPECTED, abs=0.01)
    for _ in range(400):  # all were right: deeper ones keep their ratio
        survival.observe([1.0, 1.0, 1.0])
    assert survival.share[2] > 0.99
    assert survival.share[3] / survival.share[2] == pytest.approx(EXPECTED[3] / EXPECTED[2], abs=0.02)


def test_the_depth_is_what_pays():
    survival = Survival()
    ones = [1] * WIDEST
    free = PassCost([1.0] * len(SIZES))
    assert best_depth(free, survival, ones, ones) > 8
    dear = PassCost([float(rows) for rows in SIZES])
    assert best_depth(dear, survival, ones, ones) == 1
    assert best_depth(dear, survival, [200, *ones[1:]], ones) > 1, "beside many rows a few more are cheap"
    for _ in range(50):
        survival.observe([1.0, 0.0])
    assert best_depth(PassCost([1.0, 1.3, 1.4, 1.5, 1.6, 1.7]), survival, ones, ones) == 1
