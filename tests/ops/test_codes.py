"""Nearest codes and the quantizer against formulas in float64, on the CPU's backends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest import assert_nearest, distances, normal

from tamingfast import ops
from tamingfast.ops import backends

NATIVE = backends.status()["native"]


NEAREST_BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not NATIVE.available, reason=NATIVE.reason)),
]


@pytest.fixture(params=NEAREST_BACKENDS)
def backend(request: pytest.FixtureRequest):
    with backends.use(request.param):
        yield request.param


@pytest.mark.parametrize("d", [1, 3, 16, 256])
@pytest.mark.parametrize("k", [1, 3, 512, 1024])
@pytest.mark.parametrize("n", [0, 1, 7, 200])
def test_nearest_code_of_any_shape(backend, rng, n, k, d):
    z, codebook = normal(rng, n, d), normal(rng, k, d)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


def test_nearest_code_over_many_chunks(backend, rng):
    z, codebook = normal(rng, 5000, 8), normal(rng, 700, 8)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
def test_nearest_code_of_near_duplicates(backend, rng, offset):
    """Codes one float32 step apart, whose difference the expanded square loses to cancellation."""
    base = normal(rng, 40, 24) + offset
    codebook = torch.cat([base, torch.nextafter(base, torch.tensor(math.inf)), base])
    codebook[40:80, 1:] = base[:, 1:]
    z = torch.cat([codebook, codebook + 1e-3 * normal(rng, *codebook.shape)])
    index = ops.nearest_code(z, codebook)
    assert_nearest(index, z, codebook)
    assert torch.equal(index[:80], torch.arange(80))  # each code is nearest to itself
    assert torch.equal(index[80:120], torch.arange(40))  # and a copy to its first occurrence


def test_nearest_code_with_more_rivals_than_are_kept(backend, rng):
    """Every code within the rounding error of the scan, the best anywhere among them."""
    center = 100.0 * normal(rng, 1, 64)
    codebook = center + 1e-5 * normal(rng, 333, 64)
    z = torch.cat([codebook.flip(0), center + normal(rng, 50, 64)])
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


def test_nearest_code_of_equal_codes_is_the_first(backend, rng):
    z = normal(rng, 300, 5)
    assert torch.equal(ops.nearest_code(z, normal(rng, 1, 5).repeat(200, 1)), torch.zeros(300, dtype=torch.int64))


def test_nearest_code_on_an_exact_tie_between_different_codes(backend):
    codebook = torch.tensor([[4.0], [1.0], [-1.0]]).repeat(1, 3)
    assert ops.nearest_code(torch.zeros(2, 3), codebook).tolist() == [1, 1]
    assert ops.nearest_code(torch.zeros(2, 3), codebook.flip(0)).tolist() == [0, 0]


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e15, 1e18, 1e30])
def test_nearest_code_where_float32_squares_overflow_or_vanish(backend, rng, size):
    z, codebook = size * normal(rng, 60, 16), size * normal(rng, 90, 16)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nearest_code_of_other_dtypes(rng, dtype):
    z, codebook = normal(rng, 65, 32, dtype=dtype), normal(rng, 100, 32, dtype=dtype)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)
    assert_nearest(ops.nearest_code(z, codebook.float()), z, codebook.float())


def test_nearest_code_of_strided_inputs(backend, rng):
    z, codebook = normal(rng, 12, 40).t(), normal(rng, 70, 24)[:, ::2]
    assert not z.is_contiguous()
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


finite = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nearest_code_of_any_values(data):
    d = data.draw(st.integers(1, 5))
    vectors = st.lists(st.lists(finite, min_size=d, max_size=d), min_size=1, max_size=60)
    z, codebook = torch.tensor(data.draw(vectors)), torch.tensor(data.draw(vectors))
    # Random draws seldom repeat rows or put them close together.
    codebook = torch.cat([codebook, codebook.flip(0), z])
    for name in ("native", "reference") if NATIVE.available else ("reference",):
        with backends.use(name):
            assert_nearest(ops.nearest_code(z, codebook), z, codebook)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["z", "codebook"])
def test_nearest_code_names_the_argument_that_is_not_finite(backend, rng, name, bad):
    values = {"z": normal(rng, 210, 9), "codebook": normal(rng, 130, 9)}
    values[name][107, 4] = bad
    with pytest.raises(ValueError, match=rf"^{name}: got NaN or infinity"):
        ops.nearest_code(**values)


@pytest.mark.parametrize(
    ("z", "codebook", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(2, 3), ValueError, r"^z: got shape \(3,\)"),
        (torch.zeros(3, 0), torch.zeros(2, 0), ValueError, r"^z: got shape \(3, 0\)"),
        (torch.zeros(3, 2), torch.zeros(2, 3), ValueError, r"^codebook: got shape \(2, 3\), expected \(K, 2\)"),
        (torch.zeros(3, 2), torch.zeros(0, 2), ValueError, r"^codebook: got shape \(0, 2\)"),
        (torch.zeros(3, 2).int(), torch.zeros(2, 2), TypeError, r"^z: got dtype torch.int32"),
        (torch.zeros(3, 2), torch.zeros(2, 2).bool(), TypeError, r"^codebook: got dtype torch.bool"),
        ([[1.0]], torch.zeros(2, 1), TypeError, r"^z: got list"),
        (torch.zeros(3, 2), torch.zeros(2, 2, device="meta"), ValueError, r"^codebook: got device meta"),
    ],
)
def test_nearest_code_names_the_argument_that_is_wrong(z, codebook, error, message):
    with pytest.raises(error, match=message):
        ops.nearest_code(z, codebook)


@pytest.mark.parametrize("name", ["nearest_code", "native_nearest_code"])
def test_nearest_code_passes_the_checks_of_a_custom_op(rng, name):
    if name == "native_nearest_code" and not NATIVE.available:
        pytest.skip(NATIVE.reason)
    torch.library.opcheck(getattr(torch.ops.tamingfast, name).default, (normal(rng, 6, 4), normal(rng, 5, 4)))


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (7, 5)], ids=str)
def test_quantize_is_the_formula_of_the_original(backend, rng, shape):
    """Channels to the back, nearest rows, two mean squares, straight through; codes and counts beside."""
    z, codebook = normal(rng, *shape), normal(rng, 9, 5)
    ours, theirs = ([t.clone().requires_grad_() for t in (z, codebook)] for _ in range(2))
    z_q, indices, to_codes, to_latents, counts = ops.quantize(*ours)

    latents = theirs[0].movedim(1, -1)
    flat = latents.reshape(-1, 5)
    expected_indices = distances(flat.detach(), codebook).argmin(1)
    codes = theirs[1][expected_indices].view(latents.shape)
    expected_to_codes = ((codes.detach() - latents) ** 2).mean()
    expected_to_latents = ((codes - latents.detach()) ** 2).mean()
    straight = (latents + (codes - latents).detach()).movedim(-1, 1)

    assert torch.equal(indices, expected_indices)
    assert torch.equal(z_q.movedim(1, -1).reshape(-1, 5), codebook[indices]), "the codes themselves, not nearly"
    assert z_q.is_contiguous()
    torch.testing.assert_close(to_codes, expected_to_codes)
    torch.testing.assert_close(to_latents, expected_to_latents)
    assert torch.equal(counts, torch.bincount(indices, minlength=9))
    weight = normal(rng, *shape)
    actual = torch.autograd.grad((z_q * weight).sum() + to_codes + 0.25 * to_latents, ours)
    expected = torch.autograd.grad((straight * weight).sum() + expected_to_codes + 0.25 * expected_to_latents, theirs)
    for got, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, true)


def test_quantize_names_the_argument_that_is_wrong():
    with pytest.raises(ValueError, match=r"^codebook: got shape \(3, 4\), expected \(K, 5\)"):
        ops.quantize(torch.zeros(2, 5, 3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"^z: got shape \(5,\)"):
        ops.quantize(torch.zeros(5), torch.zeros(3, 5))


def test_the_gradient_of_codes_is_the_same_every_time():
    """Also with several threads: training must be repeatable."""
    z = torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    codebook = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = [torch.autograd.grad(ops.quantize(z, codebook)[3], codebook)[0] for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
