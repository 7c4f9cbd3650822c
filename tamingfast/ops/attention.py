"""Causal attention: checks the arguments, then runs on Triton, torch's fused attention or the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tamingfast.ops import check, reference
from tamingfast.ops.dispatch import Implementation, Op

_WIDEST_TRITON_HEAD = 128


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    n_unmasked: int = 0,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention in which the first ``n_unmasked`` positions also see one another.

    Definition and sources: :func:`tamingfast.ops.reference.causal_attention`. Differentiable. Under autocast the
    inputs are cast as torch's own attention casts them.

    Args:
        q, k, v: (B, H, T, D) of one floating dtype on one device, any strides.
        n_unmasked: 0 or more; a prefix longer than T ends at T.
        dropout_p: probability of dropping an attention weight, applied on every call; pass 0 in evaluation.
        scale: factor applied to the scores; 1/√D if None.

    Returns:
        (B, H, T, D), of the dtype of q.

    Raises:
        TypeError, ValueError: an invalid argument, which the message names.
        RuntimeError: the requested backend cannot run it.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        check.floating(name, value)
        if value.ndim != 4 or value.shape != q.shape or value.dtype != q.dtype or value.device != q.device:
            raise ValueError(
                f"{name}: got {check.described(value)}, expected (B, H, T, D) with the same shape, dtype and device "
                f"as q ({check.described(q)})"
            )
    if n_unmasked < 0:
        raise ValueError(f"n_unmasked: got {n_unmasked}, expected 0 or more")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability from 0 to 1")
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return CAUSAL_ATTENTION.run(q.device, q, k, v, n_unmasked, dropout_p, scale)


def _triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_unmasked: int, dropout_p: float, scale: float | None
) -> torch.Tensor:
    from tamingfast.kernels import causal_attention as kernel  # Triton is optional and slow to import

    return kernel.causal_attention(q, k, v, n_unmasked, dropout_p, scale)


def _triton_refusal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_unmasked: int, dropout_p: float, scale: float | None
) -> str | None:
    if q.dtype == torch.float64:
        return "its kernel supports at most 32 bits, got float64"
    if not 0 < q.shape[-1] <= _WIDEST_TRITON_HEAD:
        return f"its kernel supports heads up to {_WIDEST_TRITON_HEAD} wide, got heads {q.shape[-1]} wide"
    return None


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_unmasked: int, dropout_p: float, scale: float | None
) -> torch.Tensor:
    if q.device.type == "cpu" and q.dtype.itemsize < 4 and torch.is_grad_enabled() and q.requires_grad:
        # On a CPU torch computes the gradients of its fused attention several times as fast in float32.
        with torch.autocast("cpu", enabled=False):
            return _sdpa(q.float(), k.float(), v.float(), n_unmasked, dropout_p, scale).to(q.dtype)
    if n_unmasked <= 1:  # one position sees itself anyway
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal=True, scale=scale)
    mask = reference.attention_mask(q.shape[-2], n_unmasked, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)


CAUSAL_ATTENTION = Op(
    "causal_attention",
    (
        Implementation("triton", _triton, _triton_refusal),
        Implementation("sdpa", _sdpa),
        Implementation("reference", reference.causal_attention),
    ),
)
