"""Group normalisation with SiLU: checks its arguments and runs it on Triton or the reference."""

from __future__ import annotations

import torch

from tamingfast.ops import check, reference
from tamingfast.ops.dispatch import Implementation, Op


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
) -> torch.Tensor:
    """Group normalisation, then SiLU (swish) unless ``silu`` is False. Differentiable.

    Definition: :func:`tamingfast.ops.reference.group_norm_silu`. The Triton kernel computes in float32 and returns the
    dtype of x, under autocast too, where torch returns float32.

    Args:
        x: (N, C, H, W), floating; contiguous and channels-last tensors keep their layout.
        weight, bias: (C,), floating.
        groups: a divisor of C.
        eps: added to the variance.

    Raises:
        TypeError, ValueError: an invalid argument, which the message names.
        RuntimeError: the requested backend cannot run it.
    """
    check.floating("x", x)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, H, W)")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of the {x.shape[1]} channels of x")
    for name, value in (("weight", weight), ("bias", bias)):
        check.floating(name, value)
        if value.shape != x.shape[1:2]:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({x.shape[1]},), the channels of x")
    if not x.numel():  # nothing to launch a kernel for
        return reference.group_norm_silu(x, weight, bias, groups, eps, silu)
    return GROUP_NORM_SILU.run(x.device, x, weight, bias, groups, eps, silu)


def _triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    from tamingfast.kernels import group_norm_silu as kernel  # Triton is optional and slow to import

    return kernel.group_norm_silu(x, weight, bias, groups, eps, silu)


def _triton_refusal(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> str | None:
    return "its kernel supports at most 32 bits, got float64" if x.dtype == torch.float64 else None


GROUP_NORM_SILU = Op(
    "group_norm_silu",
    (
        Implementation("triton", _triton, _triton_refusal),
        Implementation("reference", reference.group_norm_silu),
    ),
)
