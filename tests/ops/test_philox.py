"""The noise generator, against published answers and a scalar definition that shares no code with it."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamingfast.ops import choice
from tamingfast.ops.choice import gumbel_noise, philox4x32

ANSWERS = {  # Random123's known-answer vectors of philox4x32 with 10 rounds: counter, key, result
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}
word = st.integers(0, 2**32 - 1)


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds on Python integers, as the paper prints them."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def scalar_gumbel(seed: int, image: int, row: int, column: int, v: int) -> float:
    x = scalar_philox([v // 4, column, row, image], [seed % 2**32, seed >> 32])[v % 4]
    g = -math.log(-math.log(((x >> 8) + 0.5) / 2**24))
    return struct.unpack("f", struct.pack("f", g))[0]


def tensors(*values: int) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize(("counter", "key", "result"), ANSWERS.values(), ids=ANSWERS)
def test_published_answers(counter, key, result):
    assert [int(w) for w in philox4x32(tensors(*counter), tuple(key))] == result
    assert scalar_philox(counter, key) == result


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_any_counter_and_key(counter, key):
    assert [int(w) for w in philox4x32(tensors(*counter), key)] == scalar_philox(list(counter), list(key))


@settings(max_examples=25)
@given(st.integers(0, 2**64 - 1), word, word, word, st.integers(1, 11))
def test_noise_follows_its_definition(seed, image, row, column, vocab):
    noise = gumbel_noise(seed, *tensors(image, row, column), vocab)
    assert noise.dtype == torch.float32
    assert noise.tolist() == [scalar_gumbel(seed, image, row, column, v) for v in range(vocab)]


def test_places_broadcast_and_do_not_influence_each_other():
    image, row, column = torch.arange(3)[:, None, None], torch.arange(4)[:, None], torch.arange(5)
    noise = gumbel_noise(9, image, row, column, 7)
    assert noise.shape == (3, 4, 5, 7)
    assert torch.equal(noise[2, 1, 3], gumbel_noise(9, *tensors(2, 1, 3), 7))
    assert noise.unique().numel() > 0.99 * noise.numel()


def test_noise_has_the_moments_of_a_standard_gumbel_distribution():
    noise = gumbel_noise(
        1, torch.zeros((), dtype=torch.int64), torch.arange(64)[:, None], torch.arange(64), 64
    ).double()
    n = noise.numel()
    variance = math.pi**2 / 6
    assert abs(noise.mean() - 0.5772156649) < 4 * math.sqrt(variance / n)
    assert abs(noise.var() - variance) < 0.03
    neighbours = torch.stack([noise[..., :-1].flatten(), noise[..., 1:].flatten()])
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize(
    ("extreme", "expected"), [(0, -math.log(25 * math.log(2))), (2**32 - 1, 25 * math.log(2))], ids=["zeros", "ones"]
)
def test_extreme_words_give_finite_noise(monkeypatch, extreme, expected):
    """Were u ever 0 or 1, one of the logarithms would be infinite."""
    monkeypatch.setattr(choice, "philox4x32", lambda counter, key: [torch.full_like(counter[0], extreme)] * 4)
    assert gumbel_noise(0, *tensors(0, 0, 0), 8).tolist() == pytest.approx([expected] * 8)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, None])
def test_seed_outside_the_key_is_refused(seed):
    with pytest.raises(ValueError, match="^seed: got"):
        gumbel_noise(seed, *tensors(0, 0, 0), 4)
