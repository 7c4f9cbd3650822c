"""Filtering and the token choice, against the reference implementation's output and against brute force."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from golden import arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from tamingfast.errors import UserError
from tamingfast.ops.choice import Choice, choose, gumbel_noise, top_k_top_p

INF = float("inf")


def brute_force(row: list[float], top_k: int | None, top_p: float | None) -> set[int]:
    """The entries that survive, by their definition."""
    kept = set(range(len(row)))
    if top_k is not None:
        kept = {i for i in kept if sum(other > row[i] for other in row) < top_k}
    if top_p is not None:
        total = sum(math.exp(row[i]) for i in kept)
        nucleus, mass = set(), 0.0
        for i in sorted(kept, key=lambda i: (-row[i], i)):
            if mass > top_p:
                break
            nucleus.add(i)
            mass += math.exp(row[i]) / total
        kept = nucleus
    return kept


def noise_for(images: int, vocab: int, seed: int = 0) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    return gumbel_noise(seed, torch.arange(images), zero, zero, vocab)


@pytest.mark.parametrize(
    ("key", "options"), [("top_k10", (10, None)), ("top_p09", (None, 0.9)), ("top_k20_top_p05", (20, 0.5))]
)
def test_equals_the_reference_implementation(key, options):
    data = arrays("top_k_top_p")
    logits = torch.from_numpy(data["logits"].copy())
    assert torch.equal(top_k_top_p(logits, *options), torch.from_numpy(data[key]))
    assert torch.equal(logits, torch.from_numpy(data["logits"])), "the input must stay as it was"


@settings(max_examples=200)
@given(
    st.lists(st.integers(-12, 12), min_size=1, max_size=12),
    st.none() | st.integers(1, 15),
    st.none() | st.sampled_from([0.013, 0.21, 0.47, 0.68, 0.93, 1.0]),
)
def test_equals_brute_force(row, top_k, top_p):
    row = [value / 3 for value in row]  # few distinct values, so ties are frequent
    filtered = top_k_top_p(torch.tensor([row], dtype=torch.float64), top_k, top_p)[0].tolist()
    kept = brute_force(row, top_k, None if top_p == 1.0 else top_p)
    assert filtered == [value if i in kept else -INF for i, value in enumerate(row)]


def test_ties_with_the_kth_entry_stay():
    assert top_k_top_p(torch.tensor([1.0, 3.0, 2.0, 2.0]), top_k=2).tolist() == [-INF, 3.0, 2.0, 2.0]


def test_nucleus_keeps_the_entry_that_crosses_the_threshold():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert top_k_top_p(logits, top_p=0.6).isneginf().tolist() == [False, False, True]
    assert top_k_top_p(logits, top_p=1e-9).isneginf().tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_takes_the_lowest_of_equal_indices(dtype):
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [-1.0, -1.0, -1.0, -INF]], dtype=dtype)
    assert choose(logits).tolist() == [1, 0]


def test_sampled_ties_take_the_lowest_index():
    noise = torch.tensor([0.0, 1.0, 0.5])
    assert choose(torch.tensor([0.0, 0.0, 0.5]), noise).item() == 1


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 2, "top_k": 4}]
)
def test_draws_follow_the_softmax(options):
    """Chi-square over 40 000 draws; filtered entries must never come."""
    logits = torch.tensor([1.2, -0.3, 0.4, 0.0, -2.0, 1.1, 0.7])
    draws = 40_000
    tokens = choose(logits.expand(draws, -1), noise_for(draws, 7, seed=5), **options)
    scaled = logits / options.get("temperature", 1)
    kept = sorted(brute_force(scaled.tolist(), options.get("top_k"), options.get("top_p")))
    expected = torch.zeros(7, dtype=torch.float64)
    expected[kept] = scaled[kept].double().softmax(0) * draws
    counts = tokens.bincount(minlength=7).double()
    assert counts[expected == 0].sum() == 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    critical = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46}[len(kept) - 1]  # p = 0.001
    assert statistic < critical
    if not options:  # the test has teeth: counts that ignore the logits fail it by far
        uniform = torch.full_like(expected, draws / 7)
        assert ((counts - uniform) ** 2 / uniform).sum() > 100 * critical


def test_temperature_comes_before_the_nucleus():
    """At temperature 10 the entries are nearly alike, so a nucleus of 0.6 holds two of them; at 1 one."""
    logits = torch.tensor([3.0, 1.0, 0.0]).expand(500, -1)
    noise = noise_for(500, 3)
    assert choose(logits, noise, temperature=10, top_p=0.6).unique().tolist() == [0, 1]
    assert choose(logits, noise, top_p=0.6).unique().tolist() == [0]


def test_a_low_temperature_approaches_greedy():
    logits = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits, noise_for(200, 16), temperature=1e-6), choose(logits))


def test_excluded_entries_are_never_chosen():
    logits = torch.tensor([-INF, 0.0, -INF, 0.0]).expand(1000, -1)
    assert choose(logits, noise_for(1000, 4)).unique().tolist() == [1, 3]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize("greedy", [True, False])
def test_unusable_logits_are_named(options, greedy):
    noise = None if greedy else noise_for(2, 3)
    with pytest.raises(ValueError, match="^logits: got NaN in a row, expected"):
        choose(torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 1.0]]), noise, **options)
    with pytest.raises(ValueError, match="^logits: got .* in a row, expected"):
        choose(torch.full((2, 3), -INF), noise, **options)


OUTSIDE = {
    "temperature": (0, -1.0, INF, float("nan"), 1e39, 1e-46),  # float32 rounds the last two to infinity and 0
    "top_k": (0, -3, 1.5, True, INF, float("nan")),
    "top_p": (0, -0.1, 1.01, float("nan")),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OUTSIDE.items() for value in values])
def test_options_outside_their_range_are_refused(name, value):
    for use in (lambda **option: choose(torch.zeros(1, 4), noise_for(1, 4), **option), Choice):
        with pytest.raises(UserError, match=re.escape(f"{name}: got {value}, expected ")):
            use(**{name: value})


def test_a_choice_holds_plain_numbers():
    """As the extension takes them, whatever a caller computes with."""
    choice = Choice(temperature=np.float32(0.5), top_k=np.int64(3), top_p=1, seed=np.uint64(2**64 - 1), greedy=np.True_)
    assert choice == Choice(temperature=0.5, top_k=3, top_p=1.0, seed=2**64 - 1, greedy=True)
    assert [type(value) for value in vars(choice).values()] == [float, int, float, bool, int]
    assert type(Choice(top_k=3.0).top_k) is int
