"""The CUDA engine's kernels, run on the CPU by tests/cuda_on_host, compared with torch and the CPU engine."""

from __future__ import annotations

import os
import subprocess
import sys

import on_host
import pytest
import torch
import torch.nn.functional as F
from on_host import DTYPES, Kernels
from torch import Tensor

from tamingfast.ops import backends

#: Relative rounding error of outputs; sums are always float32.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}


@pytest.fixture(params=on_host.PLACES)
def kernels(request):
    with on_host.kernels_at(request.param) as kernels:
        yield kernels


@pytest.fixture
def rng(kernels) -> torch.Generator:
    return torch.Generator(kernels.device).manual_seed(0)


def close(got: Tensor, expected: Tensor, dtype: str, magnitude: float = 1.0) -> None:
    """Asserts that elements differ by no more than rounding: of the dtype, and of float32 sums of that magnitude."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=tolerance, atol=max(2e-6, tolerance / 8) * magnitude
    )


# --- linear layers --------------------------------------------------------------------------------


def run_linear(kernels, dtype: str, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, out: Tensor,
               norm: tuple[Tensor, Tensor] | None = None) -> None:  # fmt: skip
    gain, shift = norm if norm else (None, None)
    kernels.linear(
        dtype=dtype, rows=len(x), inner=weight.shape[1], columns=len(weight), x=x, ldx=x.stride(0), gain=gain,
        shift=shift, epsilon=1e-5, weight=weight, bias=bias, epilogue=epilogue, out=out, ldo=out.stride(0),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("inner", "columns"), [(8, 1), (48, 17), (1032, 9), (4096, 3), (4360, 10)])
def test_linear(kernels, dtype, rows, inner, columns, rng):
    """One to eight rows, and inner dimensions below, at and above what a block loads before it multiplies."""
    number = DTYPES[dtype]
    x, weight = (torch.randn(n, inner, generator=rng).to(number) for n in (rows, columns))
    bias = torch.randn(columns, generator=rng)
    expected = F.linear(x.double(), weight.double(), bias.double())
    out = on_host.poisoned(rows + 1, columns + 3, dtype=number)
    run_linear(kernels, dtype, x, weight, bias, "store", out[:, :columns])
    close(out[:rows, :columns], expected, dtype, inner**0.5)
    assert out[rows:].isnan().all() and out[:, columns:].isnan().all(), "memory beside the output is not written"
    activated = on_host.poisoned(rows, columns, dtype=number)
    run_linear(kernels, dtype, x, weight, bias, "gelu", activated)
    close(activated, F.gelu(expected), dtype, inner**0.5)
    logits = on_host.poisoned(rows, columns)
    run_linear(kernels, dtype, x, weight, None, "store_float", logits)
    close(logits, expected - bias, "float32", inner**0.5)
    residual = torch.randn(rows, columns, generator=rng)
    added = residual.clone()
    run_linear(kernels, dtype, x, weight, bias, "add", added)
    close(added, residual + expected, "float32", inner**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 7])
@pytest.mark.parametrize(("inner", "columns"), [(16, 20), (1024, 9), (1544, 11)])
def test_norm_and_linear(kernels, dtype, rows, inner, columns, rng):
    number = DTYPES[dtype]
    x = (
        torch.randn(rows, inner + 8, generator=rng)[:, :inner] * 3 + 100
    )  # a large mean, at which a one-pass variance cancels
    weight = torch.randn(columns, inner, generator=rng).to(number)
    gain, shift = torch.randn(2, inner, generator=rng)
    out = on_host.poisoned(rows, columns)
    run_linear(kernels, dtype, x, weight, None, "store_float", out, (gain, shift))
    normalised = F.layer_norm(x.double(), (inner,), gain.double(), shift.double())
    rounded = F.linear(normalised.to(number).double(), weight.double())
    assert (out - rounded).norm() <= 8 * TOLERANCE[dtype] * rounded.norm()
    assert (out - rounded).abs().max() <= 8 * TOLERANCE[dtype] * rounded.abs().max() * rows**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "columns"), [(264, 3090), (10248, 9)])
def test_large_layers(kernels, dtype, inner, columns, rng):
    """Blocks of several tiles, and rows that do not fit into one block's shared memory together."""
    number = DTYPES[dtype]
    x, weight = (torch.randn(n, inner, generator=rng).to(number) for n in (7, columns))
    bias = torch.randn(columns, generator=rng)
    out = on_host.poisoned(7, columns, dtype=number)
    run_linear(kernels, dtype, x, weight, bias, "store", out)
    close(out, F.linear(x.double(), weight.double(), bias.double()), dtype, inner**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("inner", [72, 1352])
def test_a_row_has_the_same_bits_beside_any_others(kernels, dtype, normed, inner, rng):
    number = DTYPES[dtype]
    x, weight = torch.randn(8, inner, generator=rng), torch.randn(11, inner, generator=rng).to(number)
    x = x if normed else x.to(number)
    norm = tuple(torch.randn(2, inner, generator=rng)) if normed else None

    def result(rows: Tensor) -> Tensor:
        out = on_host.poisoned(len(rows), 11)
        run_linear(kernels, dtype, rows, weight, None, "store_float", out, norm)
        return out

    together = result(x)
    assert not together.isnan().any()
    for rows in range(1, 8):
        assert torch.equal(result(x[:rows]), together[:rows])
        assert torch.equal(result(x[rows:].contiguous()), together[rows:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(kernels, dtype, rng):
    x, weight = (torch.randn(n, 64, generator=rng).to(DTYPES[dtype]) for n in (3, 10))
    x[1, 5] = float("nan")
    out = on_host.poisoned(3, 10, dtype=DTYPES[dtype])
    run_linear(kernels, dtype, x, weight, None, "store", out)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


# --- attention ------------------------------------------------------------------------------------


class Cache:
    """Random keys and values of `slots` sequences; `expected` is the attention that torch computes from them."""

    def __init__(self, dtype: str, slots: int, heads: int, width: int, capacity: int, rng: torch.Generator) -> None:
        self.dtype, self.heads, self.width, self.capacity = dtype, heads, width, capacity
        self.stride = (width + 7) // 8 * 8
        shape = (2, slots, heads, capacity, self.stride)
        self.cache = torch.randn(shape, generator=rng).to(DTYPES[dtype])
        self.cache[..., width:] = 0

    def run(self, kernels, qkv: Tensor, slot: Tensor, position: Tensor, last: Tensor, splits: int, append: bool):
        rows = len(qkv)
        out = on_host.poisoned(rows, self.heads * self.width, dtype=qkv.dtype)
        self.partial = on_host.poisoned(rows, self.heads, splits, self.stride + 2)
        self.arrived = torch.zeros(rows, self.heads, dtype=torch.int32)
        kernels.attention(
            **self.common(qkv, slot, position), last=last, splits=splits, append=append,
            partial=self.partial, arrived=self.arrived, out=out, ldo=out.stride(0),
        )  # fmt: skip
        assert not self.arrived.any(), "counters are zero for the next launch"
        return out

    def common(self, qkv: Tensor, slot: Tensor, position: Tensor) -> dict:
        return dict(
            dtype=self.dtype, rows=len(qkv), heads=self.heads, width=self.width, stride=self.stride,
            capacity=self.capacity, qkv=qkv, ldq=qkv.stride(0), slot=slot,
            position=position, keys=self.cache[0], values=self.cache[1],
        )  # fmt: skip

    def expected(self, qkv: Tensor, slot: Tensor, last: Tensor) -> Tensor:
        outputs = []
        for row, s, end in zip(qkv.double(), slot.tolist(), last.tolist(), strict=True):
            q = row.view(3, self.heads, 1, self.width)[0]
            k, v = self.cache[:, s, :, : end + 1, : self.width].double()
            outputs.append(F.scaled_dot_product_attention(q, k, v).flatten())
        return torch.stack(outputs)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


HEADS = {
    "16 wide": (2, 16),
    "paper's 48": (3, 48),
    "64 wide": (1, 64),
    "88 wide": (2, 88),
    "odd": (2, 11),
    "200": (1, 200),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("beside", [5, 8], ids=["unaligned", "aligned"])
def test_attention_appends_and_attends(kernels, dtype, heads, width, splits, beside, rng):
    """Ragged positions: the first, those around each border between splits, and the last."""
    positions = ints(0, 1, 63, 64, 65, 127, 200, 299)
    rows = len(positions)
    cache = Cache(dtype, rows + 1, heads, width, 300, rng)
    qkv = torch.randn(rows, 3 * heads * width + beside, generator=rng).to(DTYPES[dtype])[:, : 3 * heads * width]
    slots = ints(*reversed(range(1, rows + 1)))
    before = cache.cache.clone()
    out = cache.run(kernels, qkv, slots, positions, positions, splits, True)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        appended = qkv[row].view(3, heads, width)[1:]
        assert torch.equal(cache.cache[:, slot, :, position, :width], appended)
        before[:, slot, :, position, :width] = appended
    assert torch.equal(cache.cache, before), "no other position is written"
    close(out, cache.expected(qkv, slots, positions), dtype)


def test_attention_over_the_unmasked_prefix(kernels, rng):
    """Rows of one slot that also attend to later positions, all of which are appended first."""
    cache = Cache("float32", 2, 2, 24, 100, rng)
    cache.cache[:] = float("nan")
    cache.cache[..., 24:] = 0
    qkv = torch.randn(70, 3 * 48, generator=rng)
    slot, position = torch.ones(70, dtype=torch.int32), torch.arange(70, dtype=torch.int32)
    last = position.clamp(min=40 - 1)
    kernels.append(**cache.common(qkv, slot, position))
    out = cache.run(kernels, qkv, slot, position, last, 2, False)
    close(out, cache.expected(qkv, slot, last), "float32")
    assert cache.cache[:, 0, :, :, :24].isnan().all(), "the other slot is not written"


def test_attention_propagates_nan(kernels, rng):
    cache = Cache("float32", 1, 1, 16, 256, rng)
    qkv, at = torch.randn(1, 48, generator=rng), ints(255)
    cache.cache[0, 0, 0, 130, 3] = float("nan")
    assert cache.run(kernels, qkv, ints(0), at, at, 4, False).isnan().all()


def test_more_splits_than_are_merged_together(kernels, rng):
    cache = Cache("float32", 1, 2, 136, 40 * 64, rng)
    cache.cache[0] *= torch.linspace(0, 3, 40 * 64)[:, None]  # the largest scores come last
    qkv = torch.randn(1, 3 * 272, generator=rng)
    for at in (ints(40 * 64 - 1), ints(17 * 64)):
        close(cache.run(kernels, qkv, ints(0), at, at, 40, False), cache.expected(qkv, ints(0), at), "float32")


def test_large_scores_do_not_overflow(kernels, rng):
    cache = Cache("float32", 1, 1, 16, 256, rng)
    cache.cache[0] *= 100
    qkv, at = torch.randn(1, 48, generator=rng) * 100, ints(255)
    for splits in (1, 4):
        out = cache.run(kernels, qkv, ints(0), at, at, splits, False)
        torch.testing.assert_close(out.double(), cache.expected(qkv, ints(0), at), rtol=1e-3, atol=1e-3)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 768])
def test_residual_and_norm(kernels, dtype, width, rng):
    number = DTYPES[dtype]
    x, y = torch.randn(3, width, generator=rng) * 5 + 20, torch.randn(3, width, generator=rng).to(number)
    bias, gain, shift = torch.randn(3, width, generator=rng)
    for with_y in (True, False):
        after, out = x.clone(), on_host.poisoned(3, width, dtype=number)
        kernels.add_norm(
            dtype=dtype, rows=3, width=width, x=after, ldx=width,
            y=y if with_y else None, ldy=width, bias=bias, gain=gain,
            shift=shift, epsilon=1e-5, out=out, ldo=width,
        )  # fmt: skip
        expected = x.double() + (y.double() + bias if with_y else 0)
        torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-6)
        close(out, F.layer_norm(after.double(), (width,), gain.double(), shift.double()), dtype, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "stride"), [(5, 5), (64, 64), (64, 67), (2056, 2056)])
def test_bias_and_gelu(kernels, dtype, width, stride, rng):
    x, bias = (torch.randn(4, stride, generator=rng) * 3).to(DTYPES[dtype]), torch.randn(width, generator=rng)
    out = x.clone()
    kernels.bias_gelu(dtype=dtype, rows=4, width=width, x=out, ldx=stride, bias=bias)
    close(out[:, :width], F.gelu(x[:, :width].double() + bias), dtype)
    assert torch.equal(out[:, width:], x[:, width:])


@pytest.mark.gpu
def test_more_rows_than_a_grid_is_high():
    x, bias = torch.randn(70000, 8, device="cuda"), torch.randn(8, device="cuda")
    out = x.clone()
    Kernels(backends.native()[0].cuda, "cuda").bias_gelu(dtype="float32", rows=70000, width=8, x=out, ldx=8, bias=bias)
    close(out, F.gelu(x.double() + bias), "float32")


# --- mistakes -------------------------------------------------------------------------------------


def test_wrong_arguments_are_named(kernels, rng):
    x, weight, out = (torch.zeros(2, 16) for _ in range(3))
    with pytest.raises(ValueError, match="^inner: got 15, expected a multiple of 8"):
        run_linear(kernels, "float32", x, weight[:, :15], None, "store", out)
    with pytest.raises(ValueError, match="^x: got .*, expected an address that is a multiple of 16"):
        run_linear(kernels, "float32", x[:, 1:], weight, None, "store", out)
    with pytest.raises(ValueError, match="^rows: got 9, expected 1 to 8"):
        run_linear(kernels, "float32", torch.zeros(9, 16), weight, None, "store", out)
    with pytest.raises(ValueError, match="^dtype: got 'int8', expected one of bfloat16, float16, float32"):
        run_linear(kernels, "int8", x, weight, None, "store", out)
    with pytest.raises(ValueError, match="^epilogue: got 'relu'"):
        run_linear(kernels, "float32", x, weight, None, "relu", out)
    with pytest.raises(ValueError, match="^rows: got nothing, expected an integer"):
        kernels.attention(dtype="float32")


def test_a_refused_launch_names_the_kernel(kernels):
    x, bias = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(RuntimeError, match="kernel .bias and GELU. could not be launched in 2 x 1 x 1 .*: invalid dev"):
        kernels.bias_gelu(dtype="float32", rows=2, width=8, x=x, ldx=8, bias=bias, device=99)
    kernels.bias_gelu(dtype="float32", rows=2, width=8, x=x, ldx=8, bias=bias)


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's library, as on Linux")
def test_kernels_under_sanitizers():
    """The address and undefined-behaviour sanitizers, over tests that reach every kernel."""
    if os.environ.get("TAMINGFAST_SANITIZED"):
        pytest.skip("already running under sanitizers")
    built = on_host.build(on_host.SANITIZE)
    compiler = os.environ.get("CXX", "g++").split()[0]
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("the compiler has no address sanitizer")
    files = [__file__, os.path.join(os.path.dirname(__file__), "test_cuda_choice.py")]
    names = "(test_linear and 48-17-3 or norm_and or appends or gelu or residual or reported) and host and not random"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", names],
        env=os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "TAMINGFAST_SANITIZED": str(built)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
