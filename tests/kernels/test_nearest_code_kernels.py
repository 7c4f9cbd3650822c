"""The nearest-code search on Triton, by float64 distances, and the quantizer for training against its definition."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from nearest import assert_nearest, normal

from tamingfast import ops
from tamingfast.ops import backends, reference

pytestmark = [
    pytest.mark.usefixtures("on_triton", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of overflows that the interpreter is meant to meet
]
if not backends.interpreted():
    pytestmark.append(pytest.mark.gpu)

SHAPES = [(1, 1, 1), (7, 3, 3), (65, 512, 3), (130, 70, 16), (33, 200, 40), (70, 129, 256)]  # N, K, D
if not backends.interpreted():
    SHAPES += [(4096, 1024, 256), (65536, 512, 3), (5000, 16384, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(rng, device, shape):
    n, k, d = shape
    z, codebook = normal(rng, n, d, device=device), normal(rng, k, d, device=device)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


def test_no_rows(device):
    assert ops.nearest_code(torch.zeros(0, 5, device=device), torch.zeros(3, 5, device=device)).shape == (0,)


@pytest.mark.parametrize("offset", [0.0, pytest.param(1e3, marks=pytest.mark.exhaustive), -1e6])
def test_near_duplicates_and_large_offsets(rng, device, offset):
    """Codes one float32 step apart, whose difference the expanded square loses to cancellation."""
    base = normal(rng, 20, 24, device=device) + offset
    codebook = torch.cat([base, torch.nextafter(base, torch.tensor(math.inf, device=device)), base])
    codebook[20:40, 1:] = base[:, 1:]
    z = torch.cat([codebook, codebook + 1e-3 * normal(rng, *codebook.shape, device=device)])
    index = ops.nearest_code(z, codebook)
    assert_nearest(index, z, codebook)
    assert index[:40].tolist() == list(range(40))
    assert index[40:60].tolist() == list(range(20))


def test_the_scan_leaves_both_kinds_of_rivals_open(rng, device):
    """Two near codes are compared with each other, three or more cause a new search; other rows are settled."""
    from tamingfast.kernels import nearest_code as kernel

    codebook = normal(rng, 40, 32, device=device)
    codebook[1] = codebook[0] + 1e-5
    codebook[11], codebook[12] = codebook[10] + 1e-5, codebook[10] - 1e-5
    z = codebook[[0, 10, 30]]
    _, rival, (rows, count) = kernel._scan(z, codebook)
    assert rival[0].item() in (0, 1)
    assert rival[1:].tolist() == [-2, -1]
    assert (count.item(), rows[0].item()) == (1, 1)
    assert ops.nearest_code(z, codebook).tolist() == [0, 10, 30]


CLUSTERED = [
    # Rows, of which some open, codes, programs for each multiprocessor: codes in one chunk, in few, in all there are.
    (70, 70, 200, 8), (70, 1, 333, 8), (40, 3, 100, 1), (5, 2, 31, 50), (33, 33, 64, 1), (9, 9, 97, 9),
]  # fmt: skip


@pytest.mark.parametrize(("n", "near", "k", "programs"), CLUSTERED, ids=str)
def test_open_rows_are_searched_however_they_are_shared(rng, device, monkeypatch, n, near, k, programs):
    """All codes are within float32's error of one another, and so of the rows near them."""
    from tamingfast.kernels import nearest_code as kernel

    monkeypatch.setattr(kernel, "_PROGRAMS", programs)
    codebook = 1 + 1e-7 * normal(rng, k, 24, device=device, dtype=torch.float64)
    codebook[k // 2 :: 7] = codebook[k // 2]  # exact ties, of which the first counts
    codebook[-1] = -50.0
    z = torch.full((n, 24), -50.0, device=device, dtype=torch.float64)
    chosen = torch.randperm(n, generator=rng)[:near].to(device)
    z[chosen] = codebook[torch.randint(k - 1, (near,), generator=rng).to(device)]
    _, rival, (rows, count) = kernel._scan(z, codebook)
    assert sorted(rows[: count.item()].tolist()) == sorted(chosen.tolist())
    index = ops.nearest_code(z, codebook)
    assert_nearest(index, z, codebook)
    assert torch.all(index[rival == -1] == k - 1)
    assert torch.equal(reference.nearest_code(z, codebook), index)


def test_counting_open_rows_survives_tuning(device):
    """Which runs the scan many times: each run counts anew."""
    from tamingfast.kernels import common
    from tamingfast.kernels import nearest_code as kernel

    z = torch.ones(7, 5, device=device)
    codebook = torch.ones(4, 5, device=device)
    runs = []

    def several(launched, grid, configs, key, arguments):
        for config in configs if launched is kernel._scan_kernel else configs[:1]:
            runs.append(config)
            common._run(launched, grid, config, arguments)

    with mock.patch.object(kernel, "launch", several):
        _, _, (_, count) = kernel._scan(z, codebook)
        assert count.item() == 7
        assert ops.nearest_code(z, codebook).tolist() == [0] * 7
    assert len(runs) > 8


def test_exact_ties(device):
    codebook = torch.tensor([[4.0], [1.0], [-1.0]], device=device).repeat(1, 3)
    zero = torch.zeros(2, 3, device=device)
    assert ops.nearest_code(zero, codebook).tolist() == [1, 1]
    assert ops.nearest_code(zero, codebook.flip(0)).tolist() == [0, 0]
    many = normal(torch.Generator().manual_seed(1), 1, 5, device=device).repeat(70, 1)
    assert ops.nearest_code(normal(torch.Generator(), 3, 5, device=device), many).tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
def test_where_float32_squares_overflow_or_vanish(rng, device, size):
    z, codebook = size * normal(rng, 5, 16, device=device), size * normal(rng, 40, 16, device=device)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


@pytest.mark.parametrize(("rows", "codes"), [(1e20, 1e-24), (1e-24, 1e18), (1e30, 1e-37)])
def test_sizes_far_apart(rng, device, rows, codes):
    z, codebook = rows * normal(rng, 5, 16, device=device), codes * normal(rng, 40, 16, device=device)
    from tamingfast.kernels import nearest_code as kernel

    # Even float64 cannot tell the codes apart at this distance; the scan must know that it cannot either.
    _, rival, (open_rows, count) = kernel._scan(z, codebook)
    assert torch.all(rival <= -2) or codes > rows
    assert sorted(open_rows[: count.item()].tolist()) == (rival <= -2).nonzero().flatten().tolist()
    index = ops.nearest_code(z, codebook)
    assert torch.all((index >= 0) & (index < 40))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_get_some_valid_index(rng, device, bad):
    z, codebook = normal(rng, 5, 16, device=device), normal(rng, 40, 16, device=device)
    z[2, 3] = bad
    index = ops.nearest_code(z, codebook)
    keep = [0, 1, 3, 4]
    assert_nearest(index[keep], z[keep], codebook)
    assert 0 <= index[2] < 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(rng, device, dtype):
    z, codebook = normal(rng, 40, 32, device=device, dtype=dtype), normal(rng, 60, 32, device=device, dtype=dtype)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)
    assert_nearest(ops.nearest_code(z, codebook.float()), z, codebook.float())


def test_any_strides(rng, device):
    z, codebook = normal(rng, 12, 40, device=device).t(), normal(rng, 70, 24, device=device)[:, ::2]
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


def test_k_means_learns_its_colours_on_the_kernel(rng, device, monkeypatch):
    from tamingfast.models.color_clusters import KMeans

    centres = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 9.0]], device=device)
    points = (centres[:, None] + 0.1 * normal(rng, 3, 30, 3, device=device)).flatten(0, 1)
    # From one point of each cluster: from those that a device draws with a generator of its own, it may end elsewhere.
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(0, n, n // 3, device=device))
    model = KMeans(3, 3, niter=12).to(device)
    model.initialize(points)
    distance = torch.cdist(points, model.C).min(1).values
    assert distance.max() < 1


LAYOUTS = {
    "rows": lambda x: x.flatten(1)[:, :16],
    "image": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "crop": lambda x: x[:, :, 1:, :-1],
    "sequence": lambda x: x.flatten(2).transpose(1, 2)[:, :16],
}


QUANTIZED = [
    pytest.param(layout, dtype, marks=() if dtype == torch.float32 or layout == "image" else pytest.mark.exhaustive)
    for layout in LAYOUTS
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
]


@pytest.mark.parametrize(("layout", "dtype"), QUANTIZED, ids=str)
def test_quantize_is_its_definition_with_its_gradients(rng, device, layout, dtype):
    z = LAYOUTS[layout](normal(rng, 3, 20, 5, 4, device=device, dtype=dtype)).detach()
    codebook = normal(rng, 11, z.shape[1], device=device, dtype=dtype if dtype == torch.float64 else torch.float32)
    codebook[7] = 1e3  # never chosen: its gradient must be written, as zero
    inputs, copies = ([t.detach().requires_grad_() for t in (z, codebook)] for _ in range(2))
    weight = normal(rng, *z.shape, device=device)

    def loss(z_q, indices, to_codes, to_latents, counts):
        return (z_q.double() * weight).sum() + 3 * to_codes.double() + 0.5 * to_latents.double()

    ours, expected = ops.quantize(*inputs), reference.quantize(*copies)
    for got, true in zip(ours, expected, strict=True):
        assert got.dtype == true.dtype
        assert got.shape == true.shape
        torch.testing.assert_close(got, true, rtol=1e-6, atol=0)
    assert ours[0].stride() == torch.empty_like(z.detach()).stride() or layout == "crop"
    gradients = [torch.autograd.grad(loss(*out), ins) for out, ins in ((ours, inputs), (expected, copies))]
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for got, true in zip(*gradients, strict=True):
        assert got.dtype == true.dtype
        torch.testing.assert_close(got, true, rtol=tolerance, atol=tolerance)


def test_quantize_of_nothing(device):
    z_q, indices, _, _, counts = ops.quantize(torch.zeros(0, 4, 2, 2, device=device), torch.ones(3, 4, device=device))
    assert z_q.shape == (0, 4, 2, 2)
    assert indices.shape == (0,)
    assert counts.tolist() == [0, 0, 0]


def test_registered_as_torch_expects(rng, device):
    from tamingfast.kernels import nearest_code as kernel

    z, codebook = (normal(rng, n, 4, device=device).requires_grad_() for n in (6, 5))
    torch.library.opcheck(kernel._nearest_code, (z.detach(), codebook.detach()))
    torch.library.opcheck(kernel._quantize, (z, codebook))
