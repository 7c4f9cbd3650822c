"""`sample_grid`: the tokens of the reference implementation, and the same tokens for every engine and batch size."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from golden import arrays, checkpoint
from gpts import SHAPES, VOCAB, tiny_gpt, tokens

import tamingfast
from tamingfast.engines.selection import log_once
from tamingfast.ops import backends
from tamingfast.ops.choice import choose, gumbel_noise
from tamingfast.sampling import sample_grid
from tamingfast.sampling.schedule import RULES

ENGINES = ("torch", "naive", *(["native"] if backends.native()[0] else []))

# --- the reference implementation -----------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["uncond", "class", "seg", "coord", "unmasked"])
def test_greedy_tokens_of_the_reference(name, engine):
    data = arrays(f"net2net_{name}")
    model = tamingfast.load_model(checkpoint(f"net2net_{name}"))
    cond = torch.from_numpy(data["c_indices"])
    grid = sample_grid(model, cond, 16, 16, greedy=True, engine=engine)
    assert grid.dtype == torch.int64
    assert grid.shape == (2, 16, 16)
    assert grid.flatten(1).tolist() == data["greedy_indices"].tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_sliding_window_of_the_reference(engine):
    data = arrays("sliding_window_seg")
    model = tamingfast.load_model(checkpoint("sliding_window_seg"))
    grid = sample_grid(model, torch.from_numpy(data["c_grid"]), 20, 36, greedy=True, engine=engine)
    assert grid.tolist() == data["greedy_grid"].tolist()


# --- one result, however it is computed -----------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", [what + how for what in SHAPES for how in ("", " bidirectional")])
@pytest.mark.parametrize("rule", RULES)
def test_cached_equals_naive(rule, kind, greedy):
    gpt = tiny_gpt(n_unmasked=(16 if kind.startswith("grid") else 3) if "bidirectional" in kind else 0)
    cond = tokens(*SHAPES[kind.partition(" ")[0]])
    options = dict(window=4, schedule=rule, stride=2, greedy=greedy, seed=3, top_k=20)
    cached = sample_grid(gpt, cond, 7, 9, engine="torch", **options)
    assert torch.equal(cached, sample_grid(gpt, cond, 7, 9, engine="naive", **options))
    assert torch.equal(cached, sample_grid(gpt, cond, 7, 9, **options)), "auto"
    assert cached.unique().numel() > 3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", RULES)
def test_windows_with_the_same_prefix_are_a_fixed_one(gpt, rule, engine):
    cond, options = tokens(2, 3), dict(window=4, schedule=rule, stride=2, seed=3, engine=engine)
    same = cond[:, None, None].expand(-1, 7, 9, -1)
    assert torch.equal(sample_grid(gpt, same, 7, 9, **options), sample_grid(gpt, cond, 7, 9, **options))


@pytest.mark.parametrize("memory", [0, 10_000, 40_000])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_memory_does_not_change_the_tokens(gpt, rule, kind, memory, monkeypatch):
    """Fewer cache slots, and several calls per wave."""
    cond = tokens(*SHAPES[kind])
    options = dict(window=4, schedule=rule, stride=2, seed=3, top_k=20)
    expected = sample_grid(gpt, cond, 7, 9, engine="naive", **options)
    monkeypatch.setattr("tamingfast.sampling.waves.TOKENS_PER_CALL", 40)
    assert torch.equal(sample_grid(gpt, cond, 7, 9, memory=memory, **options), expected)


@pytest.mark.parametrize(("window", "batch"), [(16, 2), (4, 1), (4, 3)])
def test_the_observer_sees_every_token_arrive(gpt, window, batch):
    cond, seen = tokens(batch, 3), []
    start, mask = tokens(batch, 6, 5, seed=9), torch.rand(batch, 6, 5) < 0.7
    grid = sample_grid(
        gpt, cond, 6, 5, start=start, mask=mask, window=window, observer=lambda *a: seen.append([t.clone() for t in a])
    )
    before = mask
    for now, pending in seen:
        assert (before & ~pending).any(), "called for nothing"
        assert not (pending & ~before).any()
        assert torch.equal(now[~pending], grid[~pending]), "what is not pending is final"
        before = pending
    assert not before.any()
    assert len(seen) >= 6


@pytest.mark.parametrize("n_unmasked", [0, 2, 3])
@pytest.mark.parametrize("rule", ["strided", "block"])
def test_cached_equals_naive_where_windows_do_not_overlap(rule, n_unmasked):
    """Each window then starts with its first token, whose logits need the kept prefix once more."""
    gpt, cond = tiny_gpt(n_unmasked=n_unmasked), tokens(2, 3)
    options = dict(window=3, schedule=rule, stride=3, seed=3)
    cached = sample_grid(gpt, cond, 6, 9, engine="torch", **options)
    assert torch.equal(cached, sample_grid(gpt, cond, 6, 9, engine="naive", **options))


@pytest.mark.parametrize("engine", ENGINES)
def test_each_token_is_the_choice_that_its_window_and_noise_imply(gpt, engine):
    """Recomputes a finished grid from the paper's window formula, without the sampler's machinery."""
    height, width, window, options = 6, 7, 4, dict(temperature=1.3, top_k=12, top_p=0.95)
    cond = tokens(2, height, width)
    grid = sample_grid(gpt, cond, height, width, window=window, seed=11, first_image=5, engine=engine, **options)
    images = torch.tensor([5, 6])
    for row in range(height):
        for column in range(width):
            top, left = min(max(row - 2, 0), height - window), min(max(column - 2, 0), width - window)
            crop = (slice(None), slice(top, top + window), slice(left, left + window))
            local = (row - top) * window + column - left
            sequence = torch.cat((cond[crop].flatten(1), grid[crop].flatten(1)[:, :local]), 1)
            noise = gumbel_noise(11, images, torch.tensor(row), torch.tensor(column), VOCAB)
            with torch.no_grad():
                expected = choose(gpt(sequence)[0][:, -1], noise, **options)
            assert grid[:, row, column].tolist() == expected.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_the_gpu_samples_the_same_tokens(gpt, rule):
    cond, options = tokens(2, 6, 7), dict(window=4, schedule=rule, stride=2, seed=8, top_k=20)
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    options |= dict(start=tokens(2, 6, 7, seed=9), mask=mask)
    grid = sample_grid(copy.deepcopy(gpt).cuda(), cond, 6, 7, **options)
    assert grid.is_cuda
    assert torch.equal(grid.cpu(), sample_grid(gpt, cond, 6, 7, **options))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", RULES)
def test_batch_size_does_not_matter(gpt, rule, engine):
    cond = tokens(1, 2).expand(3, 2)
    options = dict(window=4, schedule=rule, stride=2, seed=8, engine=engine)
    together = sample_grid(gpt, cond, 6, 6, **options)
    apart = [sample_grid(gpt, cond[:1], 6, 6, first_image=i, **options) for i in range(3)]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(together[0], together[1]), "images of one batch must differ"


def test_the_seed_decides(gpt):
    cond = tokens(2, 3)
    first = sample_grid(gpt, cond, 4, 5, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, sample_grid(gpt, cond, 4, 5, seed=1)), "torch's own generator plays no part"
    assert not torch.equal(first, sample_grid(gpt, cond, 4, 5, seed=2))
    assert not torch.equal(first, sample_grid(gpt, cond, 4, 5, seed=1 + (1 << 40))), "the seed's upper word counts"


def test_noise_does_not_depend_on_how_much_is_drawn_at_a_time(gpt, monkeypatch):
    cond, options = tokens(2, 3), dict(seed=1, engine="torch")
    expected = sample_grid(gpt, cond, 4, 5, **options)
    for entries in (1, 2 * VOCAB * 3):
        monkeypatch.setattr("tamingfast.sampling.sampler.NOISE_ENTRIES", entries)
        assert torch.equal(sample_grid(gpt, cond, 4, 5, **options), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 6), (6, 1), (1, 1), (3, 20), (20, 3)])
def test_grids_below_the_window_in_some_direction(rule, height, width):
    gpt = tiny_gpt(block_size=100)
    cond = tokens(2, height, width)
    options = dict(schedule=rule, seed=4)
    grid = sample_grid(gpt, cond, height, width, **options)
    assert grid.shape == (2, height, width)
    assert grid.min() >= 0
    assert grid.max() < VOCAB
    assert torch.equal(grid, sample_grid(gpt, cond, height, width, engine="naive", **options))


def test_bidirectional_image_tokens_fall_back_to_full_passes(caplog):
    """Where image tokens see later ones no cache is exact; tokens not sampled yet must not leak in either."""
    gpt, cond = tiny_gpt(n_unmasked=9), tokens(2, 3)
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="tamingfast.sampling.sampler"):
        grids = [sample_grid(gpt, cond, 5, 6, window=4, seed=2, engine="torch") for _ in range(2)]
    assert len(caplog.records) == 1
    assert "full forward pass" in caplog.text
    assert torch.equal(*grids)
    assert torch.equal(grids[0], sample_grid(gpt, cond, 5, 6, window=4, seed=2, engine="naive"))
    for column in range(3):  # the first window's first row
        noise = gumbel_noise(2, torch.arange(2), torch.tensor(0), torch.tensor(column), VOCAB)
        with torch.no_grad():
            logits = gpt(torch.cat((cond, grids[0][:, 0, :column]), 1))[0][:, -1]
        assert grids[0][:, 0, column].tolist() == choose(logits, noise).tolist()
