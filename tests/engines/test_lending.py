"""Engines kept with a GPT: which one runs it, when it is packed again, and `sample_grid` on it."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from engine_cases import HostEngine, cpu_engine
from gpts import random_gpt
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tamingfast.engines import GPTEngine, lending
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.ops.choice import choose, gumbel_noise
from tamingfast.sampling import sample_grid

needs_native = pytest.mark.skipif(backends.native()[0] is None, reason=backends.native()[1])


@pytest.fixture
def sampled_here(monkeypatch) -> None:
    """`sample_grid` takes the CUDA engine for a GPT on the CPU."""
    monkeypatch.setitem(lending.ENGINES, "cpu", HostEngine)


@needs_native
def test_weights_are_packed_once_and_again_after_a_change(monkeypatch):
    gpt, cond = random_gpt(), torch.tensor([[3]])
    packed = []

    class Counted(GPTEngine):
        def __init__(self, *args) -> None:
            packed.append(args)
            super().__init__(*args)

    monkeypatch.setitem(lending.ENGINES, "cpu", Counted)
    first = sample_grid(gpt, cond, 4, 4, seed=1)
    assert torch.equal(sample_grid(gpt, cond, 4, 4, seed=1), first)
    sample_grid(gpt, torch.tensor([[3], [4]]), 4, 4, seed=1)
    assert len(packed) == 1
    for change in (
        lambda: gpt.head.weight.data.mul_(-1),
        lambda: gpt.load_state_dict(random_gpt().state_dict()),
        lambda: setattr(gpt.head, "weight", nn.Parameter(gpt.head.weight.detach() + 1)),
        lambda: setattr(gpt.head.weight, "data", gpt.head.weight.data * 2),
        lambda: stepped(gpt, torch.optim.AdamW(gpt.parameters(), lr=0.1, foreach=True)),
        lambda: gpt.blocks[0].mlp[0].bias.data[1:2].add_(5),
        lambda: gpt.head.weight.detach().numpy().__setitem__((3, 1), 9.0),
    ):
        before = len(packed)
        change()
        sampled = sample_grid(gpt, cond, 4, 4, seed=1)
        assert len(packed) == before + 1
        assert torch.equal(sampled, sample_grid(gpt, cond, 4, 4, seed=1, engine="torch"))


def stepped(gpt: GPT, optimizer: torch.optim.Optimizer) -> None:
    for value in gpt.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()


@needs_native
def test_unchanged_weights_are_those_they_were():
    """Also where they hold NaN, and where they count no versions."""
    with torch.inference_mode():
        gpt = random_gpt(vocab=500, width=48)
        gpt.head.weight[3, 3] = float("nan")
    snapshot = lending.Snapshot(list(gpt.parameters()))
    assert len(snapshot.sums) < sum(value.numel() for value in gpt.parameters()) / 10
    assert snapshot == lending.Snapshot(list(gpt.parameters()))
    with torch.inference_mode():
        gpt.pos_emb.mul_(2)
    assert snapshot != lending.Snapshot(list(gpt.parameters()))
    single, double = random_gpt(), random_gpt().double()
    assert lending.Snapshot(list(single.parameters())) != lending.Snapshot(list(double.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (64, 64, 3, 3)], ids=str)
def test_every_bit_of_a_weight_counts(shape, dtype):
    """Also where torch keeps no version of it: writes through `.data`, into a view that begins anywhere."""
    whole = torch.randn(1 + math.prod(shape)).to(dtype)
    weight = whole[1:].view(shape)
    snapshot = lending.Snapshot([weight])
    for place in {0, weight.numel() // 2, weight.numel() - 1}:
        was = weight.data.flatten()[place].item()
        whole.data[1 + place] = was + 1
        assert snapshot != lending.Snapshot([weight])
        whole.data[1 + place] = was
        assert snapshot == lending.Snapshot([weight])
    if weight.ndim == 4:
        weight.data.copy_(weight.data[:, [1, 0, *range(2, 64)]])  # the same values in another order
        assert snapshot != lending.Snapshot([weight])


@needs_native
@pytest.mark.parametrize("change", ["hook", "pre-hook", "hook of all modules", "forward"])
def test_what_a_program_hooks_into_a_transformer_takes_part(change):
    gpt, cond = random_gpt(std=0.3), torch.tensor([[3]])
    before, block = sample_grid(gpt, cond, 4, 4, seed=1), gpt.blocks[0]
    forward = block.forward
    handles = {
        "hook": lambda: block.register_forward_hook(lambda block, given, out: out * -1),
        "pre-hook": lambda: block.register_forward_pre_hook(lambda block, given: (given[0] * -1, *given[1:])),
        "hook of all modules": lambda: register_module_forward_hook(
            lambda module, given, out: out * -1 if module is block else None
        ),
        "forward": lambda: setattr(block, "forward", lambda *given, **named: forward(*given, **named) * -1),
    }
    handle = handles[change]()
    try:
        changed = sample_grid(gpt, cond, 4, 4, seed=1)
        assert torch.equal(changed, sample_grid(gpt, cond, 4, 4, seed=1, engine="torch"))
    finally:
        handle.remove() if handle is not None else block.__dict__.pop("forward")
    assert torch.equal(sample_grid(gpt, cond, 4, 4, seed=1), before)


@needs_native
def test_packed_weights_go_with_the_model():
    gpt = random_gpt()
    sample_grid(gpt, torch.tensor([[3]]), 2, 2)
    count = len(lending._kept)
    del gpt
    gc.collect()
    assert len(lending._kept) == count - 1


@needs_native
def test_sampling_inside_a_callback_of_the_same_model():
    gpt, cond = random_gpt(), torch.tensor([[3]])
    expected, inner = sample_grid(gpt, cond, 4, 4, seed=1), []
    outer = sample_grid(gpt, cond, 4, 4, seed=1, callback=lambda *_: inner.append(sample_grid(gpt, cond, 4, 4, seed=1)))
    assert all(torch.equal(grid, expected) for grid in (outer, *inner))
    assert len(inner) == 4


@needs_native
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_types_sample_their_own_logits(dtype):
    gpt, cond = random_gpt(std=0.3), torch.tensor([[3], [4]])
    grid = sample_grid(gpt, cond, 4, 4, seed=1, dtype=dtype)
    engine = cpu_engine(gpt, dtype)
    sequence = torch.cat([cond, grid.flatten(1)], 1)
    logits = engine.step([(i, 0, row[:-1]) for i, row in enumerate(sequence.tolist())], "all").view(2, 16, -1)
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    noise = gumbel_noise(1, torch.arange(2)[:, None], row, column, 24)
    assert torch.equal(choose(logits, noise), grid.flatten(1))


class NotMade(GPTEngine):
    def __init__(self, *args) -> None:
        raise AssertionError("no engine was asked for")


@needs_native
def test_the_reference_that_was_asked_for_is_taken(monkeypatch):
    monkeypatch.setitem(lending.ENGINES, "cpu", NotMade)
    with backends.use("reference"):
        sample_grid(random_gpt(), torch.tensor([[3]]), 2, 2)
        with pytest.raises(ValueError, match="only the native engine has it .the torch reference was asked for"):
            sample_grid(random_gpt(), torch.tensor([[3]]), 2, 2, dtype="int8")


# --- the CUDA engine ------------------------------------------------------------------------------


@pytest.mark.usefixtures("sampled_here")
@pytest.mark.parametrize("kind", ["prefix", "grid", "bidirectional"])
@pytest.mark.parametrize(
    ("height", "width", "rule"), [(3, 4, "paper"), (5, 6, "paper"), (5, 6, "strided"), (4, 6, "block")]
)
def test_grids_are_those_of_the_torch_backend(kind, height, width, rule):
    gpt = random_gpt(block=40, n_unmasked=3 if kind == "bidirectional" else 0)
    cond = torch.randint(24, (2, height, width) if kind == "grid" else (2, 3))
    start, mask = torch.randint(24, (2, height, width)), torch.rand(height, width) < 0.7
    options = dict(window=4, schedule=rule, stride=2, seed=8, top_k=20, start=start, mask=mask)
    seen = []
    grid = sample_grid(gpt, cond, height, width, engine="native", callback=lambda *a: seen.append(a), **options)
    assert torch.equal(grid, sample_grid(gpt, cond, height, width, engine="torch", **options))
    assert len(seen) > 1


@pytest.mark.usefixtures("sampled_here")
def test_half_width_engines_are_kept_with_the_model():
    gpt, cond = random_gpt(std=0.3), torch.tensor([[3], [4]])
    first = sample_grid(gpt, cond, 3, 3, seed=1, dtype="float16")
    assert torch.equal(sample_grid(gpt, cond, 3, 3, seed=1, dtype="float16"), first)
    assert list(lending._kept[gpt]) == ["float16"]


@pytest.mark.usefixtures("sampled_here")
def test_changed_weights_take_the_place_of_the_old_ones(monkeypatch):
    """Two copies are never there at once."""
    gpt, cond = random_gpt(), torch.tensor([[3], [4]])
    sample_grid(gpt, cond, 3, 3, seed=1)
    before = lending._kept[gpt]["float32"].engine
    with torch.no_grad():
        gpt.head.weight.mul_(-1)
    closed = []

    class Successor(HostEngine):
        def __init__(self, *args) -> None:
            with pytest.raises(ValueError, match="the engine is closed"):
                before.info()
            closed.append(True)
            super().__init__(*args)

    monkeypatch.setitem(lending.ENGINES, "cpu", Successor)
    grid = sample_grid(gpt, cond, 3, 3, seed=1)
    assert closed == [True]
    assert torch.equal(grid, sample_grid(gpt, cond, 3, 3, seed=1, engine="torch"))
