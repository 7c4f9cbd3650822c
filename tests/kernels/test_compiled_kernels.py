"""Kernels compiled for GPUs that need not be present: each launch fits, and registers do not spill."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import pytest
import torch
import triton
from ahead_of_time import SHARED_LIMIT, Binary, compile_launches

from tamingfast.ops import backends

if backends.interpreted():
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
    pytest.skip(f"triton {triton.__version__} is older than these kernels allow", allow_module_level=True)

from tamingfast.kernels import causal_attention, group_norm_silu, nearest_code

MULTIPROCESSORS = 132  # of an H200; decides into how many pieces a large map is cut
# Bytes of local memory per thread: eight spilled registers in the widest tiles of compute capability 8.0; elsewhere the
# 16 bytes that one of the compiler's own fp64 routines needs.
FRAME = {80: 32, 89: 32, 90: 16, 100: 16, 120: 16}
NO_FRAME = ("_forward_kernel", "_scan_kernel", "_elementwise_kernel", "_moments_kernel", "_gradient_sums_kernel")
NO_FRAME += ("_key_gradient_kernel", "_query_gradient_kernel")
# Every compiler version allocates registers anew; the bounds are for the version in constraints.txt.
BOUNDED = triton.__version__.startswith("3.7.")


def attention(width: int, dtype: torch.dtype, dropout: float = 0.0, length: int = 1024) -> None:
    q, k, v = torch.zeros(1, length, 3, 16, width, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    numbers = (seed, 256, dropout, width**-0.5)
    out, lse = causal_attention._forward._init_fn(q, k, v, *numbers)
    causal_attention._backward._init_fn(out, q, k, v, out, lse, *numbers)


def tf32_attention() -> None:
    with mock.patch.object(causal_attention, "float32_precision", return_value="tf32"):
        attention(64, SINGLE)


def codes(k: int, d: int) -> None:
    nearest_code._nearest_code._init_fn(torch.zeros(4096, d), torch.zeros(k, d))


def quantizer(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    z, codebook = torch.zeros(2, 256, 16, 16).contiguous(memory_format=layout), torch.zeros(1024, 256)
    nearest_code._quantize._init_fn(z, codebook)
    index, counts = torch.zeros(512, dtype=torch.int64), torch.zeros(1024, dtype=torch.int64)
    nearest_code._codebook_gradient._init_fn(z, codebook, index, counts, torch.zeros(()))


def norm(channels: int, side: int, dtype: torch.dtype, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.zeros(2, channels, side, side, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.zeros(channels)
    out, mean, rstd = group_norm_silu._forward._init_fn(x, weight, weight, 32, 1e-6, True)
    group_norm_silu._backward._init_fn(out, x, weight, weight, mean, rstd, True)


def single_values() -> None:
    """Sizes and strides of 1, which Triton compiles as constants instead of run-time numbers."""
    q, x = torch.zeros(1, 1, 1, 1, dtype=HALF), torch.zeros(1, 1, 1, 1)
    lse, seed, weight = torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    causal_attention._forward._init_fn(q, q, q, seed, 1, 0.1, 1.0)
    causal_attention._backward._init_fn(q, q, q, q, q, lse, seed, 1, 0.1, 1.0)
    nearest_code._quantize._init_fn(weight[None], weight[None])
    nearest_code._codebook_gradient._init_fn(weight[None], weight[None], seed, seed, torch.zeros(()))
    large = torch.zeros(1, 1, 101, 103)  # too large for one program
    for tensor in (x, large):
        out, mean, rstd = group_norm_silu._forward._init_fn(tensor, weight, weight, 1, 1e-6, True)
        group_norm_silu._backward._init_fn(out, tensor, weight, weight, mean, rstd, True)


HALF, SINGLE = torch.bfloat16, torch.float32
CALLS = {
    "attention, 64 wide": (causal_attention, functools.partial(attention, 64, HALF)),
    "attention, 48 wide, odd length": (causal_attention, functools.partial(attention, 48, HALF, length=1023)),
    "attention, 88 wide": (causal_attention, functools.partial(attention, 88, HALF)),
    "attention, 128 wide": (causal_attention, functools.partial(attention, 128, HALF)),
    "attention, dropout": (causal_attention, functools.partial(attention, 64, HALF, 0.1)),
    "attention, 88 wide, dropout": (causal_attention, functools.partial(attention, 88, HALF, 0.1)),
    "attention, 64 wide, float32": (causal_attention, functools.partial(attention, 64, SINGLE)),
    "attention, 64 wide, tf32": (causal_attention, tf32_attention),
    "attention, 88 wide, float32": (causal_attention, functools.partial(attention, 88, SINGLE)),
    "attention, 128 wide, float32": (causal_attention, functools.partial(attention, 128, SINGLE)),
    "codes of width 256": (nearest_code, functools.partial(codes, 1024, 256)),
    "colours": (nearest_code, functools.partial(codes, 512, 3)),
    "quantizer": (nearest_code, functools.partial(quantizer, False)),
    "quantizer, channels last": (nearest_code, functools.partial(quantizer, True)),
    "norm, 256x256": (group_norm_silu, functools.partial(norm, 128, 256, HALF, False)),
    "norm, 256x256, channels last": (group_norm_silu, functools.partial(norm, 128, 256, HALF, True)),
    "norm, 16x16": (group_norm_silu, functools.partial(norm, 512, 16, SINGLE, False)),
    "norm, 16x16, channels last": (group_norm_silu, functools.partial(norm, 512, 16, HALF, True)),
}
# One of each family, with both directions, and each architecture at least once.
REPRESENTATIVE = {
    ("attention, 64 wide", 90), ("quantizer", 90), ("norm, 256x256", 90), ("norm, 16x16", 90),
    ("attention, 64 wide", 80), ("norm, 256x256, channels last", 100), ("attention, 64 wide", 120),
}  # fmt: skip
TARGETS = [
    pytest.param(
        name,
        target,
        id=f"sm_{target}: {name}",
        marks=() if (name, target) in REPRESENTATIVE else pytest.mark.exhaustive,
    )
    for target in (90, 80, 100, 89, 120)
    for name in CALLS
]


@functools.cache
def binaries(name: str, capability: int) -> list[Binary]:
    module, call = CALLS[name]
    with (
        mock.patch.object(group_norm_silu, "multiprocessors", return_value=MULTIPROCESSORS),
        mock.patch.object(causal_attention, "capability", return_value=divmod(capability, 10)),
        mock.patch.object(nearest_code, "capability", return_value=divmod(capability, 10)),
    ):
        return compile_launches(call, capability, module)


@pytest.mark.parametrize(("name", "capability"), TARGETS)
def test_every_configuration_fits_and_does_not_spill(name, capability):
    compiled = binaries(name, capability)
    assert compiled
    for binary in compiled:
        print(f"sm_{capability} {name}: {binary}")
        assert binary.shared <= SHARED_LIMIT[capability], binary
        assert 0 < binary.registers <= 255, binary
        no_frame = binary.name in (NO_FRAME if capability == 90 else NO_FRAME[:1] if capability != 89 else ())
        assert binary.local <= (0 if no_frame else FRAME[capability]) or not BOUNDED, binary
    # While a graph is captured, and with TAMINGFAST_TUNE=0, nothing is tuned: the first configuration runs.
    first = next((b for b in compiled if b.name == "_forward_kernel"), compiled[0])
    assert first.shared <= min(SHARED_LIMIT.values())


@pytest.mark.parametrize("name", sorted(name for name, target in REPRESENTATIVE if target == 90))
def test_the_assembler_keeps_every_product(name):
    """CUDA 12.8's drops all of them from some loops that it unrolls, without a word."""
    for binary in binaries(name, 90):
        assert binary.products_kept() >= binary.products, binary


@pytest.mark.parametrize(
    ("name", "kernel"), [("attention, 64 wide", "_forward_kernel"), ("quantizer", "_scan_kernel")], ids=str
)
@pytest.mark.parametrize(
    ("capability", "instruction"), [pytest.param(80, "HMMA", marks=pytest.mark.exhaustive), (90, "HGMMA")]
)
def test_half_precision_attention_and_the_scan_use_the_matrix_units(name, kernel, capability, instruction):
    found = [binary for binary in binaries(name, capability) if binary.name == kernel]
    assert found
    assert all(binary.uses(instruction) for binary in found)


@pytest.mark.parametrize(
    "module",
    [pytest.param(causal_attention, marks=pytest.mark.exhaustive), nearest_code, group_norm_silu],
    ids=lambda m: m.__name__.rpartition(".")[2],
)
def test_sizes_of_one_compile(module):
    others = [m for m in (causal_attention, nearest_code, group_norm_silu) if m is not module]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(causal_attention, "capability", return_value=(9, 0)))
        for other in others:
            stack.enter_context(mock.patch.object(other, "launch"))
        assert compile_launches(single_values, 90, module)


def test_float32_attention_is_exact_unless_tf32_is_allowed():
    from tamingfast.kernels import common

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert common.float32_precision() == "ieee"
        torch.set_float32_matmul_precision("high")
        assert common.float32_precision() == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = False
        assert common.float32_precision() == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_tilings_of_a_width_share_the_binaries_of_every_length():
    """If a configuration depended on the length, every length would be tuned and compiled anew."""
    keys = []

    def note(kernel, grid, configs, key, arguments):
        keys.append((kernel.__name__, tuple(map(str, configs)), key))

    with mock.patch.object(causal_attention, "launch", note):
        attention(64, HALF, length=1000)
        attention(64, HALF, length=600)
    assert keys[: len(keys) // 2] == keys[len(keys) // 2 :]
