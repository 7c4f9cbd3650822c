"""`sample_grid`: the reference implementation's tokens, and what holds for every backend, rule and batch."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from golden import arrays, checkpoint
from gpts import SHAPES, VOCAB, prior, tiny_gpt, tokens

import tamingfast
from tamingfast.models.gpt import GPT
from tamingfast.models.orderings import SpiralOut
from tamingfast.ops import backends
from tamingfast.ops.choice import choose, gumbel_noise
from tamingfast.sampling import sample_grid
from tamingfast.sampling.sampler import _log_once
from tamingfast.sampling.schedule import RULES

BACKENDS = ("torch", "naive", *(["native"] if backends.native()[0] else []))


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return tiny_gpt()


# --- the reference implementation -----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["uncond", "class", "seg", "coord", "unmasked"])
def test_greedy_tokens_of_the_reference(name, backend):
    data = arrays(f"net2net_{name}")
    model = tamingfast.load_model(checkpoint(f"net2net_{name}"))
    cond = torch.from_numpy(data["c_indices"])
    grid = sample_grid(model, cond, 16, 16, greedy=True, backend=backend)
    assert grid.dtype == torch.int64
    assert grid.shape == (2, 16, 16)
    assert grid.flatten(1).tolist() == data["greedy_indices"].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sliding_window_of_the_reference(backend):
    data = arrays("sliding_window_seg")
    model = tamingfast.load_model(checkpoint("sliding_window_seg"))
    grid = sample_grid(model, torch.from_numpy(data["c_grid"]), 20, 36, greedy=True, backend=backend)
    assert grid.tolist() == data["greedy_grid"].tolist()


# --- one result, however it is computed -----------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", [what + how for what in SHAPES for how in ("", " bidirectional")])
@pytest.mark.parametrize("rule", RULES)
def test_cached_equals_naive(rule, kind, greedy):
    gpt = tiny_gpt(n_unmasked=(16 if kind.startswith("grid") else 3) if "bidirectional" in kind else 0)
    cond = tokens(*SHAPES[kind.partition(" ")[0]])
    options = dict(window=4, schedule=rule, stride=2, greedy=greedy, seed=3, top_k=20)
    cached = sample_grid(gpt, cond, 7, 9, backend="torch", **options)
    assert torch.equal(cached, sample_grid(gpt, cond, 7, 9, backend="naive", **options))
    assert torch.equal(cached, sample_grid(gpt, cond, 7, 9, **options)), "auto"
    assert cached.unique().numel() > 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_windows_with_the_same_prefix_are_a_fixed_one(gpt, rule, backend):
    cond, options = tokens(2, 3), dict(window=4, schedule=rule, stride=2, seed=3, backend=backend)
    same = cond[:, None, None].expand(-1, 7, 9, -1)
    assert torch.equal(sample_grid(gpt, same, 7, 9, **options), sample_grid(gpt, cond, 7, 9, **options))


@pytest.mark.parametrize("memory", [0, 10_000, 40_000])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_memory_does_not_change_the_tokens(gpt, rule, kind, memory, monkeypatch):
    """Fewer cache slots, and several calls per wave."""
    cond = tokens(*SHAPES[kind])
    options = dict(window=4, schedule=rule, stride=2, seed=3, top_k=20)
    expected = sample_grid(gpt, cond, 7, 9, backend="naive", **options)
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
    cached = sample_grid(gpt, cond, 6, 9, backend="torch", **options)
    assert torch.equal(cached, sample_grid(gpt, cond, 6, 9, backend="naive", **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_is_the_choice_that_its_window_and_noise_imply(gpt, backend):
    """Recomputes a finished grid from the paper's window formula, without the sampler's machinery."""
    height, width, window, options = 6, 7, 4, dict(temperature=1.3, top_k=12, top_p=0.95)
    cond = tokens(2, height, width)
    grid = sample_grid(gpt, cond, height, width, window=window, seed=11, first_image=5, backend=backend, **options)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_batch_size_does_not_matter(gpt, rule, backend):
    cond = tokens(1, 2).expand(3, 2)
    options = dict(window=4, schedule=rule, stride=2, seed=8, backend=backend)
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
    cond, options = tokens(2, 3), dict(seed=1, backend="torch")
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
    assert torch.equal(grid, sample_grid(gpt, cond, height, width, backend="naive", **options))


def test_bidirectional_image_tokens_fall_back_to_full_passes(caplog):
    """Where image tokens see later ones no cache is exact; tokens not sampled yet must not leak in either."""
    gpt, cond = tiny_gpt(n_unmasked=9), tokens(2, 3)
    _log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="tamingfast.sampling.sampler"):
        grids = [sample_grid(gpt, cond, 5, 6, window=4, seed=2, backend="torch") for _ in range(2)]
    assert len(caplog.records) == 1
    assert "full forward pass" in caplog.text
    assert torch.equal(*grids)
    assert torch.equal(grids[0], sample_grid(gpt, cond, 5, 6, window=4, seed=2, backend="naive"))
    for column in range(3):  # the first window's first row
        noise = gumbel_noise(2, torch.arange(2), torch.tensor(0), torch.tensor(column), VOCAB)
        with torch.no_grad():
            logits = gpt(torch.cat((cond, grids[0][:, 0, :column]), 1))[0][:, -1]
        assert grids[0][:, 0, column].tolist() == choose(logits, noise).tolist()


# --- given tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_completion_continues_the_given_tokens(gpt, backend):
    cond, start = tokens(2, 3), tokens(2, 11, seed=5)
    options = dict(seed=6, backend=backend)
    grid = sample_grid(gpt, cond, 4, 6, start=start, **options)
    assert torch.equal(grid.flatten(1)[:, :11], start)
    free = sample_grid(gpt, cond, 4, 6, **options)
    assert not torch.equal(grid.flatten(1)[:, 11:], free.flatten(1)[:, 11:]), "the given half must matter"
    again = sample_grid(gpt, cond, 4, 6, start=free.flatten(1)[:, :11], **options)
    assert torch.equal(again, free), "its own first half completes to the same grid"
    whole = sample_grid(gpt, cond, 4, 6, start=tokens(2, 24), **options)
    assert torch.equal(whole.flatten(1), tokens(2, 24))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_mask_keeps_what_it_excludes(gpt, rule, backend):
    cond = tokens(2, 7, 8)
    options = dict(window=4, schedule=rule, stride=2, seed=7, backend=backend)
    start = tokens(2, 7, 8, seed=9)
    mask = torch.zeros(7, 8, dtype=torch.bool)
    mask[2:5, 3:7] = True
    grid = sample_grid(gpt, cond, 7, 8, start=start, mask=mask, **options)
    assert torch.equal(grid[:, ~mask], start[:, ~mask])
    assert not torch.equal(grid[:, mask], start[:, mask])
    junk = start.clone()
    junk[:, mask] = -7
    assert torch.equal(grid, sample_grid(gpt, cond, 7, 8, start=junk, mask=mask, **options)), (
        "what is resampled is not read"
    )
    nothing = sample_grid(gpt, cond, 7, 8, start=start, mask=torch.zeros_like(mask), **options)
    assert torch.equal(nothing, start)
    everything = sample_grid(gpt, cond, 7, 8, start=start, mask=torch.ones_like(mask), **options)
    assert torch.equal(everything, sample_grid(gpt, cond, 7, 8, **options))


@pytest.mark.parametrize("rule", ["paper", "scene", "strided"])
def test_resampling_from_a_grid_gives_that_grid(gpt, rule):
    """Under rules in raster order the window of a position does not depend on the mask."""
    cond, options = tokens(1, 6, 6), dict(window=4, schedule=rule, stride=2, seed=7)
    whole = sample_grid(gpt, cond, 6, 6, **options)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[3, 2:] = mask[5, 0] = True
    assert torch.equal(sample_grid(gpt, cond, 6, 6, start=whole, mask=mask, **options), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_masks_of_one_batch_may_differ(gpt, rule, backend):
    cond, start = tokens(3, 6, 5), tokens(3, 6, 5, seed=9)
    mask = (
        torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(2)) < torch.tensor([0.0, 0.4, 0.9])[:, None, None]
    )
    options = dict(window=4, schedule=rule, stride=2, seed=7, backend=backend)
    together = sample_grid(gpt, cond, 6, 5, start=start, mask=mask, **options)
    for i in range(3):
        alone = sample_grid(gpt, cond[i : i + 1], 6, 5, start=start[i : i + 1], mask=mask[i], first_image=i, **options)
        assert torch.equal(together[i], alone[0])


# --- Net2NetTransformer ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["prefix", "grid"])
def test_permuted_order(gpt, backend, kind):
    """Token k of the sequence lies at cell order[k]; its noise is that of its true row and column."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    cond = tokens(2, 3) if kind == "prefix" else tokens(2, 3, 4)
    grid = sample_grid(prior(gpt, order), cond, 3, 4, seed=5, backend=backend)
    sequence = torch.cat((cond.flatten(1), grid.flatten(1)[:, order]), 1)
    prefix = cond[0].numel()
    with torch.no_grad():
        for k, cell in enumerate(order.tolist()):
            place = torch.tensor(cell // 4), torch.tensor(cell % 4)
            noise = gumbel_noise(5, torch.arange(2), *place, VOCAB)
            expected = choose(gpt(sequence[:, : prefix + k])[0][:, -1], noise)
            assert sequence[:, prefix + k].tolist() == expected.tolist()
    start = tokens(2, 5, seed=8)
    completed = sample_grid(prior(gpt, order), cond, 3, 4, seed=5, backend=backend, start=start)
    assert torch.equal(completed.flatten(1)[:, order[:5]], start)


def test_an_ordering_of_a_real_prior():
    """Equals the drop-in `sample`, whose tokens come in the ordering's sequence."""
    model = tamingfast.load_model(checkpoint("net2net_class"))
    model.permuter = SpiralOut(16, 16)
    cond = torch.from_numpy(arrays("net2net_class")["c_indices"])
    sequence = model.sample(cond[:, :0], cond, 256)
    grid = sample_grid(model, cond, 16, 16, greedy=True)
    assert torch.equal(grid.flatten(1), model.permuter(sequence, reverse=True))
    assert not torch.equal(grid.flatten(1), sequence)


def test_permuter_needs_one_window_of_its_size(gpt):
    model = prior(gpt, torch.arange(12).flip(0))
    for height, width, window in [(3, 5, 16), (3, 4, 3)]:
        with pytest.raises(ValueError, match="permuter orders 12 tokens"):
            sample_grid(model, tokens(1, 2), height, width, window=window)
    rasters = prior(gpt, torch.arange(12))
    assert torch.equal(sample_grid(rasters, tokens(1, 2), 3, 5), sample_grid(gpt, tokens(1, 2), 3, 5))


@pytest.mark.parametrize("greedy", [True, False])
def test_tokens_beyond_the_codebook_are_never_chosen(gpt, greedy):
    cond = tokens(4, 3)
    assert sample_grid(gpt, cond, 5, 5, greedy=greedy).max() >= 6
    limited = sample_grid(prior(gpt, codes=6), cond, 5, 5, greedy=greedy)
    assert limited.max() < 6


# --- the model, the type, the callback ------------------------------------------------------------


def test_the_model_is_left_as_it_was(gpt):
    gpt = copy.deepcopy(gpt).train()
    gpt.blocks[0].eval()
    modes = [module.training for module in gpt.modules()]
    before = {name: value.clone() for name, value in gpt.state_dict().items()}

    def interrupt(done: int, total: int) -> None:
        assert not any(module.training for module in gpt.modules())
        raise KeyboardInterrupt

    sample_grid(gpt, tokens(1, 3), 3, 3)
    with pytest.raises(KeyboardInterrupt):
        sample_grid(gpt, tokens(1, 3), 3, 3, backend="torch", callback=interrupt)
    for backend in BACKENDS:
        sample_grid(gpt, tokens(1, 3), 3, 3, dtype="bfloat16", backend=backend)
    assert [module.training for module in gpt.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in gpt.parameters())
    assert torch.is_grad_enabled()


def test_sampled_tokens_can_be_trained_on(gpt):
    grid = sample_grid(gpt, tokens(1, 3), 3, 3)
    gpt(grid.flatten(1))[0].sum().backward()
    gpt.zero_grad(set_to_none=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_type_of_the_pass(gpt, dtype, backend):
    """Equals a model that was converted by hand; another type really computes something else."""
    if backend == "native" and dtype == "float16":
        with pytest.raises(ValueError, match="'native' cannot run here: it has no float16"):
            sample_grid(gpt, tokens(2, 3), 6, 6, dtype=dtype, backend=backend)
        return
    cond, options = tokens(2, 3), dict(seed=1, backend=backend)
    converted = copy.deepcopy(gpt).to(getattr(torch, dtype))
    grid = sample_grid(gpt, cond, 6, 6, dtype=dtype, **options)
    assert torch.equal(grid, sample_grid(converted, cond, 6, 6, **options))
    assert next(gpt.parameters()).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_callback_counts_positions(gpt, rule, backend):
    calls = []
    options = dict(window=4, schedule=rule, stride=2, greedy=True, backend=backend)
    sample_grid(gpt, tokens(1, 2), 5, 6, callback=lambda *call: calls.append(call), **options)
    assert calls == [(6 * i, 30) for i in range(1, 6)]
    calls.clear()
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1:3, 1:5] = True
    start = tokens(1, 5, 6)
    sample_grid(gpt, tokens(1, 2), 5, 6, start=start, mask=mask, callback=lambda *call: calls.append(call), **options)
    assert calls == [(6, 8), (8, 8)]


# --- mistakes -------------------------------------------------------------------------------------

MASK = torch.ones(4, 4, dtype=torch.bool)
MISTAKES = {
    "block size": (
        dict(cond=tokens(1, 26)),
        "26 conditioning tokens .* 4 x 4 need a block size of 41, .* is 40",
    ),
    "schedule": (dict(schedule="spiral"), "schedule is 'spiral'"),
    "stride": (dict(schedule="strided", window=4), "stride is 8"),
    "height": (dict(height=0), "height is 0"),
    "temperature": (dict(temperature=0.0), "temperature is 0.0, .* greedy"),
    "top_k": (dict(top_k=0), "top_k is 0"),
    "top_p": (dict(top_p=2.0), "top_p is 2.0"),
    "seed": (dict(seed=-1), "seed is -1"),
    "first image": (dict(first_image=-1), "first_image is -1"),
    "backend": (dict(backend="cuda"), "backend is 'cuda', .* auto, native, torch, naive"),
    "dtype": (dict(dtype="float8"), "dtype is 'float8'"),
    "int8": (dict(dtype="int8", backend="torch"), "'int8' needs the native engine"),
    "cond rank": (dict(cond=tokens(1)), "cond has shape"),
    "cond empty": (dict(cond=tokens(1, 0)), "cond has shape"),
    "cond grid": (dict(cond=tokens(1, 4, 5)), r"cond has shape \(1, 4, 5\)"),
    "cond type": (dict(cond=torch.zeros(1, 2)), "cond has dtype torch.float32"),
    "cond range": (dict(cond=torch.tensor([[VOCAB]])), "cond holds tokens from 24 to 24, .* 0 to 23"),
    "mask alone": (dict(mask=MASK), "a mask needs a start"),
    "mask with a prefix": (dict(mask=MASK, start=tokens(1, 3)), "a mask needs a start"),
    "mask type": (dict(mask=MASK.int(), start=tokens(1, 4, 4)), "mask is torch.int32"),
    "mask shape": (dict(mask=MASK[:3], start=tokens(1, 4, 4)), "mask is torch.bool"),
    "start range": (dict(mask=~MASK, start=tokens(1, 4, 4) - 30), "start holds tokens"),
    "start grid without mask": (dict(start=tokens(1, 4, 4)), "without a mask"),
    "start too long": (dict(start=tokens(1, 17)), "first k of 16"),
    "start of another batch": (dict(start=tokens(2, 3)), r"start has shape \(2, 3\)"),
    "start on a sliding window": (dict(start=tokens(1, 3), window=3), "one window covers the grid"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(gpt, options, message):
    options = dict(cond=tokens(1, 2), height=4, width=4) | options
    with pytest.raises(ValueError, match=message):
        sample_grid(gpt, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_weights_are_named(gpt, backend):
    gpt = copy.deepcopy(gpt)
    with torch.no_grad():
        gpt.head.weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="logits.* NaN"):
        sample_grid(gpt, tokens(1, 2), 4, 4, backend=backend)
