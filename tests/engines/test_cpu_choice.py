"""The CPU engine's token choice, compared with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tamingfast.ops import backends, check
from tamingfast.sampling import choose, gumbel_noise

native, reason = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)
INF = float("inf")
#: The device's names of what is in place of a token.
NAN, NOTHING = -1, -2


def chosen(
    logits: Tensor,
    place: tuple[int, int, int],
    *,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> int:
    """The token that C++ chooses from logits (vocab,) for the image, row and column of ``place``."""
    return native.choose(
        check.array("logits", logits, torch.float32), len(logits), greedy, temperature, top_k or 0,
        1.0 if top_p is None else top_p, seed, *place,
    )  # fmt: skip


def noise_of(seed: int, place: tuple[int, int, int], vocab: int) -> Tensor:
    return gumbel_noise(seed, *(torch.tensor(value) for value in place), vocab)


words = st.integers(0, 2**32 - 1)


@settings(max_examples=300, deadline=None)
@given(
    vocab=st.integers(1, 70) | st.sampled_from([300, 1024, 1027]),
    values=st.sampled_from(["few", "many", "normal", "wide", "huge", "holes", "zeros"]),
    temperature=st.sampled_from([1e-30, 0.05, 0.5, 1.0, 1.3, 40.0]),
    top_k=st.none() | st.integers(1, 330),
    top_p=st.none() | st.floats(0.01, 0.99),
    greedy=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    place=st.tuples(words, words, words),
)
def test_choices_equal_the_reference(vocab, values, temperature, top_k, top_p, greedy, seed, place):
    """Also where many logits tie at the thresholds, are infinite, or are zeros of both signs."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    normal = torch.randn(vocab, generator=generator)
    holes = torch.where(torch.rand(vocab, generator=generator) < 0.5, normal, -INF)
    holes[seed % vocab] = 1.0
    logits = {
        "few": (normal * 1.5).round(), "many": (normal * 30).round() / 8, "normal": normal, "wide": normal * 20,
        "huge": (normal * 1e38).clamp(-3.4e38, 3.4e38), "holes": holes, "zeros": normal.sign() * 0.0,
    }[values]  # fmt: skip
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = choose(logits, None if greedy else noise_of(seed, place, vocab), **options)
    assert chosen(logits, place, greedy=greedy, seed=seed, **options) == int(expected)


@pytest.mark.parametrize("top_k", [1, 10, 100, 1000, None])
def test_every_noise_is_the_reference_noise(top_k):
    """Flat logits: the noise alone decides, at many places."""
    logits = torch.zeros(1024)
    logits[::3] = -0.25
    for column in range(200):
        place = (7, 1, column)
        assert chosen(logits, place, top_k=top_k, seed=5) == int(choose(logits, noise_of(5, place, 1024), top_k=top_k))


def test_a_choice_of_the_best_few_out_of_many_goes_through_all_rounds():
    """Where the entry with the most noise is far from the best k, and the next one, too."""
    logits = torch.from_numpy(np.linspace(0, 1e-3, 4096, dtype=np.float32))
    for column in range(50):
        place = (0, 0, column)
        token = chosen(logits, place, top_k=2, seed=1)
        assert token >= 4094
        assert token == int(choose(logits, noise_of(1, place, 4096), top_k=2))


@pytest.mark.parametrize("options", [dict(greedy=True), {}, dict(top_k=2), dict(top_p=0.5)], ids=str)
@pytest.mark.parametrize("vocab", [3, 16, 40])
def test_rows_without_a_token_are_told(options, vocab):
    for at in range(vocab):
        row = torch.arange(vocab).float()
        row[at] = torch.nan
        assert chosen(row, (0, 0, 0), **options) == NAN
        row = torch.full((vocab,), -INF)
        assert chosen(row, (0, 0, 0), **options) == NOTHING
        row[at] = INF
        assert chosen(row, (0, 0, 0), **options) == at
