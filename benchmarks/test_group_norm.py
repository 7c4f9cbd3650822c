"""GroupNorm with SiLU against torch's two operators, eager and compiled, on the maps of a VQGAN at 256x256."""

from __future__ import annotations

import functools
from unittest import mock

import gpu
import pytest
import torch
import torch.nn.functional as F

from tamingfast import ops
from tamingfast.ops import reference

MAPS = [(12, 128, 256, 256), (12, 128, 128, 128), (12, 256, 64, 64), (12, 512, 32, 32), (12, 512, 16, 16)]


def forward(function, inputs: tuple) -> torch.Tensor:
    with torch.no_grad():
        return function(*inputs[:3])


def step(function, inputs: tuple) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(function(*inputs[:3]), inputs[:3], inputs[3])


def in_chunks(run, function, inputs: tuple):
    """``run(function, inputs)`` with our images in chunks that fill half of the L2 cache, in both passes."""
    from tamingfast.kernels import group_norm_silu as kernel  # Triton is optional

    with mock.patch.object(kernel, "_CACHE_SHARE", 0.5):
        return run(function, inputs)


def torchs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))


@pytest.mark.quick
def test_group_norm_silu_on_a_cpu(compare):
    """Forward in float32: the op has no kernel of its own for a CPU, and this shows what one could gain."""
    x, (weight, bias) = torch.randn(1, 128, 256, 256), torch.randn(2, 128)
    with torch.no_grad():
        ours = functools.partial(ops.group_norm_silu, x, weight, bias)
        rivals = {"torch": functools.partial(torchs, x, weight, bias)}
        torch.testing.assert_close(ours(), rivals["torch"]())
        compare(ours, rivals, "cpu", flop=8 * x.numel(), size=2 * x.nbytes)


@pytest.mark.gpu
@pytest.mark.quick(shape=MAPS[-1], channels_last=False)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_group_norm_silu(shape, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    elements = torch.Size(shape).numel()

    def draw() -> tuple:
        x, grad = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout) for _ in range(2)
        )
        weight, bias = torch.randn(2, shape[1], device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grad

    inputs = [draw() for _ in range(gpu.copies_past_cache(2 * 2 * elements))]
    torch._dynamo.reset()
    compiled = torch.compile(reference.group_norm_silu, dynamic=False)
    true = [t.detach().double().requires_grad_() for t in inputs[0][:3]]
    exact = step(reference.group_norm_silu, (*true, inputs[0][3].double()))
    del true

    def milliseconds(around, run, function) -> float:
        for got, expected in zip(around(step, function, inputs[0]), exact, strict=True):
            error = (got.double() - expected).norm() / expected.norm()
            assert error < 1e-2, f"relative error {error:.1e}"
        return gpu.milliseconds(functools.partial(around, run, function), inputs)

    def plainly(run, function, inputs: tuple):
        return run(function, inputs)

    # Tensors that must move: x in and y out; backward, x and dy in and dx out.
    for name, run, passes in (("forward", forward, 2), ("forward + backward", step, 5)):
        ways = {
            "ours": (plainly, run, ops.group_norm_silu), "ours, in chunks": (in_chunks, run, ops.group_norm_silu),
            "eager": (plainly, run, reference.group_norm_silu), "compiled": (plainly, run, compiled),
        }  # fmt: skip
        host = {key: gpu.host_milliseconds(functools.partial(*ways[key]), inputs) for key in list(ways)[:2]}
        timed = {key: functools.partial(milliseconds, *way) for key, way in ways.items()}
        case = f"{'x'.join(map(str, shape))}{', channels last' if channels_last else ''}, {name}"
        gpu.compare("group_norm_silu", case, timed.pop("ours"), timed, size=2 * passes * elements, host=host)
