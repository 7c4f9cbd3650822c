"""The CUDA engine's token choice, run on the CPU by tests/cuda_on_host, compared with the reference."""

from __future__ import annotations

import on_host
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_host import DTYPES
from torch import Tensor

from tamingfast.ops.choice import scaled
from tamingfast.sampling import choose, gumbel_noise, top_k_top_p


@pytest.fixture(params=on_host.PLACES)
def kernels(request):
    with on_host.kernels_at(request.param) as kernels:
        yield kernels


@pytest.fixture
def rng(kernels) -> torch.Generator:
    return torch.Generator(kernels.device).manual_seed(0)


def run_choose(kernels, logits: Tensor, images: list[int], at: int, place: tuple[int, int] = (0, 0),
               wanted: list[bool] | None = None, choices: int | None = None, **options):  # fmt: skip
    """Chooses one token per row, at position `at` of sequences of length `at` + 3: (sequences, position, x, errors)."""
    rows, vocab = logits.shape
    chosen = dict(greedy=False, temperature=1.0, top_k=0, top_p=1.0, seed=0) | {
        name: value for name, value in options.items() if value is not None
    }
    shared = kernels.options(choices=vocab if choices is None else choices, **chosen)
    length = at + 3
    places = torch.full((2, length), -1)
    places[:, at + 1] = torch.tensor(place)
    keep = torch.ones(rows, length, dtype=torch.bool)
    if wanted is not None:
        keep[:, at + 1] = torch.tensor(wanted)
    sequences, position = torch.full((rows, length), 2), torch.full((rows,), at, dtype=torch.int32)
    tok_emb, pos_emb = torch.arange(vocab).float()[:, None].expand(-1, 3).contiguous(), torch.arange(at + 2).float()
    pos_emb = (pos_emb[:, None] * torch.tensor([0, 1000.0, 0])).contiguous()
    x, errors = on_host.poisoned(rows, 3), torch.zeros(rows, dtype=torch.int32)
    images = torch.tensor(images)
    kernels.choose(
        dtype=next(name for name, value in DTYPES.items() if value == logits.dtype), rows=rows,
        vocab=vocab, logits=logits, ldl=logits.stride(0), options=shared,
        images=images, places=places, wanted=keep, sequence=sequences,
        length=length, position=position, tok_emb=tok_emb, pos_emb=pos_emb,
        positions=len(pos_emb), width=3, x=x, ldx=3, errors=errors,
    )  # fmt: skip
    return sequences, position, x, int(errors.max())


def assert_chosen(tokens: Tensor, logits: Tensor, noise: Tensor | None, *, temperature: float = 1.0,
                  top_k: int | None = None, top_p: float | None = None) -> None:  # fmt: skip
    """The tokens are those of the definition; where top-p's border is within rounding, of either side of it.

    The nucleus is found in float64, because the definition's own sums of float32 are no more exact than the kernel's.
    """
    if noise is None or top_p is None or top_p == 1:
        assert tokens.tolist() == choose(logits, noise, temperature=temperature, top_k=top_k, top_p=top_p).tolist()
        return
    scores = scaled(logits.float(), temperature).double()
    sides = [
        (top_k_top_p(scores, top_k, min(top_p * factor, 1.0)).float() + noise).argmax(-1)
        for factor in (1 - 1e-5, 1.0, 1 + 1e-5)
    ]
    assert torch.stack([tokens == side for side in sides]).any(0).all(), (tokens, sides)


def test_a_chosen_token_becomes_the_next_input(kernels, rng):
    logits = torch.randn(3, 50, generator=rng)
    sequences, position, x, errors = run_choose(kernels, logits, [0, 1, 2], 4, wanted=[True, False, True], greedy=True)
    token = torch.tensor([logits[0].argmax(), 2, logits[2].argmax()])
    assert errors == 0
    assert position.tolist() == [5, 5, 5]
    assert sequences[:, 5].equal(token) and (sequences[:, :5] == 2).all() and (sequences[:, 6:] == 2).all()
    assert x.equal(torch.stack([token, token + 5000, token], 1).float())


choices_of = dict(
    temperature=st.floats(0.05, 5),
    top_k=st.one_of(st.none(), st.integers(1, 330)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1)),
    seed=st.integers(0, 2**64 - 1),
    vocab=st.sampled_from([1, 3, 50, 300]),
    levels=st.sampled_from([2, 7, 100, 10**6]),
    greedy=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**choices_of)
def test_choices_equal_the_reference(kernels, temperature, top_k, top_p, seed, vocab, levels, greedy, dtype):
    """Also if many logits are equal at the thresholds of top-k and top-p."""
    generator = torch.Generator(kernels.device).manual_seed(seed % 2**63)
    logits = torch.randint(levels, (3, vocab), generator=generator) * (8 / levels) - 4
    logits = logits.to(DTYPES[dtype])
    images, choices = [4, 2**32 - 1, 0], max(1, vocab - seed % 3)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    noise = None if greedy else gumbel_noise(seed, torch.tensor(images), torch.tensor(8), torch.tensor(6), choices)
    sequences, _, _, errors = run_choose(
        kernels, logits, images, 1, (8, 6), choices=choices, greedy=greedy, seed=seed, **options
    )
    assert errors == 0
    assert_chosen(sequences[:, 2], logits[:, :choices], noise, **options)


@pytest.mark.parametrize("options", [{}, dict(top_k=100), dict(top_p=0.9), dict(top_k=4000, top_p=0.99)], ids=str)
@pytest.mark.parametrize("vocab", [16384, 50001], ids=["scores in shared memory", "scores recomputed"])
def test_large_vocabularies(kernels, options, vocab, rng):
    logits = torch.randn(2, vocab, generator=rng) * 3
    noise = gumbel_noise(7, torch.tensor([5, 6]), torch.tensor(0), torch.tensor(0), vocab)
    sequences, _, _, errors = run_choose(kernels, logits, [5, 6], 1, seed=7, **options)
    assert errors == 0
    assert_chosen(sequences[:, 2], logits, noise, **options)


@pytest.mark.parametrize("vocab", [1000, 16384])
def test_equal_logits_everywhere(kernels, vocab):
    """Then the nucleus is a prefix of the vocabulary, and the sums of probabilities are as large as they can get."""
    logits = torch.zeros(1, vocab)
    for top_p in (0.001, 0.3, 0.9991):
        noise = gumbel_noise(1, torch.tensor([0]), torch.tensor(0), torch.tensor(0), vocab)
        sequences, _, _, _ = run_choose(kernels, logits, [0], 1, seed=1, top_p=top_p)
        assert_chosen(sequences[:, 2], logits, noise, top_p=top_p)


@pytest.mark.parametrize("options", [dict(greedy=True), {}, dict(top_k=2), dict(top_p=0.5)], ids=str)
def test_rows_without_a_valid_choice_are_reported(kernels, options):
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 2.0], [1.0, 2.0, 3.0]])
    sequences, _, _, errors = run_choose(kernels, logits, [0, 1, 2], 1, **options)
    assert errors == 1 and sequences[1, 2] == 0
    assert run_choose(kernels, logits, [0, 1, 2], 1, wanted=[True, False, True], **options)[3] == 0
    assert run_choose(kernels, logits, [0, 1, 2], 1, choices=1, **options)[3] == 0
    nothing = torch.full((1, 4), float("-inf"))
    assert run_choose(kernels, nothing, [0], 1, **options)[3] == 2
    nothing[0, 3] = float("inf")
    assert run_choose(kernels, nothing, [0], 1, **options)[0][0, 2] == 3
