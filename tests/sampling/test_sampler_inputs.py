"""`sample_grid`: given tokens, priors with orderings, dtypes of weights, callbacks."""

from __future__ import annotations

import copy

import pytest
import torch
from golden import arrays, checkpoint
from gpts import VOCAB, prior, tokens

import tamingfast
from tamingfast.models.orderings import SpiralOut
from tamingfast.ops import backends
from tamingfast.ops.choice import choose, gumbel_noise
from tamingfast.sampling import sample_grid
from tamingfast.sampling.schedule import RULES

ENGINES = ("torch", "naive", *(["native"] if backends.native()[0] else []))

# --- given tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_completion_continues_the_given_tokens(gpt, engine):
    cond, start = tokens(2, 3), tokens(2, 11, seed=5)
    options = dict(seed=6, engine=engine)
    grid = sample_grid(gpt, cond, 4, 6, start=start, **options)
    assert torch.equal(grid.flatten(1)[:, :11], start)
    free = sample_grid(gpt, cond, 4, 6, **options)
    assert not torch.equal(grid.flatten(1)[:, 11:], free.flatten(1)[:, 11:]), "the given half must matter"
    again = sample_grid(gpt, cond, 4, 6, start=free.flatten(1)[:, :11], **options)
    assert torch.equal(again, free), "its own first half completes to the same grid"
    whole = sample_grid(gpt, cond, 4, 6, start=tokens(2, 24), **options)
    assert torch.equal(whole.flatten(1), tokens(2, 24))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", RULES)
def test_mask_keeps_what_it_excludes(gpt, rule, engine):
    cond = tokens(2, 7, 8)
    options = dict(window=4, schedule=rule, stride=2, seed=7, engine=engine)
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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", RULES)
def test_masks_of_one_batch_may_differ(gpt, rule, engine):
    cond, start = tokens(3, 6, 5), tokens(3, 6, 5, seed=9)
    mask = (
        torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(2)) < torch.tensor([0.0, 0.4, 0.9])[:, None, None]
    )
    options = dict(window=4, schedule=rule, stride=2, seed=7, engine=engine)
    together = sample_grid(gpt, cond, 6, 5, start=start, mask=mask, **options)
    for i in range(3):
        alone = sample_grid(gpt, cond[i : i + 1], 6, 5, start=start[i : i + 1], mask=mask[i], first_image=i, **options)
        assert torch.equal(together[i], alone[0])


# --- Net2NetTransformer ---------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["prefix", "grid"])
def test_permuted_order(gpt, engine, kind):
    """Token k of the sequence lies at cell order[k]; its noise is that of its true row and column."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    cond = tokens(2, 3) if kind == "prefix" else tokens(2, 3, 4)
    grid = sample_grid(prior(gpt, order), cond, 3, 4, seed=5, engine=engine)
    sequence = torch.cat((cond.flatten(1), grid.flatten(1)[:, order]), 1)
    prefix = cond[0].numel()
    with torch.no_grad():
        for k, cell in enumerate(order.tolist()):
            place = torch.tensor(cell // 4), torch.tensor(cell % 4)
            noise = gumbel_noise(5, torch.arange(2), *place, VOCAB)
            expected = choose(gpt(sequence[:, : prefix + k])[0][:, -1], noise)
            assert sequence[:, prefix + k].tolist() == expected.tolist()
    start = tokens(2, 5, seed=8)
    completed = sample_grid(prior(gpt, order), cond, 3, 4, seed=5, engine=engine, start=start)
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
        with pytest.raises(ValueError, match="one window of the 12 tokens that the permuter orders"):
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
        sample_grid(gpt, tokens(1, 3), 3, 3, engine="torch", callback=interrupt)
    for engine in ENGINES:
        sample_grid(gpt, tokens(1, 3), 3, 3, dtype="bfloat16", engine=engine)
    assert [module.training for module in gpt.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in gpt.parameters())
    assert torch.is_grad_enabled()


def test_sampled_tokens_can_be_trained_on(gpt):
    grid = sample_grid(gpt, tokens(1, 3), 3, 3)
    gpt(grid.flatten(1))[0].sum().backward()
    gpt.zero_grad(set_to_none=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_type_of_the_pass(gpt, dtype, engine):
    """Equals a model that was converted by hand; another type really computes something else."""
    if engine == "native" and dtype == "float16":
        with pytest.raises(ValueError, match=r"engine: got 'native', which cannot run here \(it has no float16"):
            sample_grid(gpt, tokens(2, 3), 6, 6, dtype=dtype, engine=engine)
        return
    cond, options = tokens(2, 3), dict(seed=1, engine=engine)
    converted = copy.deepcopy(gpt).to(getattr(torch, dtype))
    grid = sample_grid(gpt, cond, 6, 6, dtype=dtype, **options)
    assert torch.equal(grid, sample_grid(converted, cond, 6, 6, **options))
    assert next(gpt.parameters()).dtype == torch.float32


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", RULES)
def test_callback_counts_positions(gpt, rule, engine):
    calls = []
    options = dict(window=4, schedule=rule, stride=2, greedy=True, engine=engine)
    sample_grid(gpt, tokens(1, 2), 5, 6, callback=lambda *call: calls.append(call), **options)
    assert calls == [(6 * i, 30) for i in range(1, 6)]
    calls.clear()
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1:3, 1:5] = True
    start = tokens(1, 5, 6)
    sample_grid(gpt, tokens(1, 2), 5, 6, start=start, mask=mask, callback=lambda *call: calls.append(call), **options)
    assert calls == [(6, 8), (8, 8)]
