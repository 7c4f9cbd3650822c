"""Causal attention: checks the arguments, then runs on Triton, torch's fused attention or the reference."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tamingfast.ops import check, reference
from tamingfast.ops.dispatch import Implementation, Op

_WIDEST_TRITON_HEAD = 128
_WIDEST_TORCH_HEAD = 128  # of torch's flash attention and of cuDNN's, in both directions and on every GPU

#: The backends that the automatic choice tries, in this order, by the mask and by whether gradients are wanted. What
#: `benchmarks/test_attention.py` measures should decide. But gradients by torch's kernels differ in their last bits
#: from run to run unless `torch.use_deterministic_algorithms` is on, and a resumed training must repeat an unbroken
#: one.
AUTOMATIC = {
    ("causal", "inference"): ("triton", "sdpa"),
    ("causal", "training"): ("triton", "sdpa"),
    ("prefix", "inference"): ("triton", "sdpa"),
    ("prefix", "training"): ("triton", "sdpa"),
}


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


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_unmasked: int, dropout_p: float, scale: float | None
) -> torch.Tensor:
    """Rows after the prefix see all keys up to their own: a causal mask whose corner is the last query and key."""
    return _in_two_calls(SDPBackend.FLASH_ATTENTION, q, k, v, n_unmasked, dropout_p, scale)


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_unmasked: int, dropout_p: float, scale: float | None
) -> torch.Tensor:
    """torch gives cuDNN no mask with that corner, so the second call computes all rows causally."""
    return _in_two_calls(SDPBackend.CUDNN_ATTENTION, q, k, v, n_unmasked, dropout_p, scale)


def _in_two_calls(
    kernel: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_unmasked: int, dropout_p: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """The rows of the prefix without a mask, and those after it; on a CPU by whatever torch has for it."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    prefix = min(n_unmasked, q.shape[-2])
    with sdpa_kernel(kernel) if q.is_cuda else contextlib.nullcontext():
        if prefix <= 1 or prefix == q.shape[-2]:
            return F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal=prefix <= 1, scale=scale)
        head_q, head_k, head_v = (x[..., :prefix, :] for x in (q, k, v))
        first = F.scaled_dot_product_attention(head_q, head_k, head_v, None, dropout_p, scale=scale)
        if kernel == SDPBackend.FLASH_ATTENTION:
            rest = _causal_to_the_last(q[..., prefix:, :], k, v, dropout_p, scale)
        else:
            rest = F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal=True, scale=scale)
            rest = rest[..., prefix:, :]
    # In the layout (B, T, H, D), in which these kernels write, the parts are joined by whole rows.
    return torch.cat([first.transpose(1, 2), rest.transpose(1, 2)], dim=1).transpose(1, 2)


def _causal_to_the_last(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, scale: float | None
) -> torch.Tensor:
    """Fewer queries than keys, the last query seeing all keys, the one before all but the last, and so on."""
    if q.is_cuda:
        # scaled_dot_product_attention aligns a causal mask with the first key; the operator below it, with the last.
        # `torch.nn.attention.bias.causal_lower_right` calls it too, but torch.compile cannot trace that.
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out: torch.Tensor = flash(q, k, v, dropout_p, True, False, scale=scale)[0]
        return out
    mask = reference.attention_mask(k.shape[-2], 0, q.device)[-q.shape[-2] :]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)


def _torch_kernel_refusal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_unmasked: int, dropout_p: float, scale: float | None
) -> str | None:
    if not q.is_cuda:
        return None
    if q.dtype.itemsize != 2:
        return f"its kernels support float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > _WIDEST_TORCH_HEAD:
        return f"its kernels support heads of 8, 16, ..., {_WIDEST_TORCH_HEAD}, got heads {q.shape[-1]} wide"
    return "its kernels cannot drop all weights" if dropout_p == 1 else None


def _cudnn_refusal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_unmasked: int, dropout_p: float, scale: float | None
) -> str | None:
    if torch.are_deterministic_algorithms_enabled():
        return "its gradients are not deterministic, and torch is set to be"
    return _torch_kernel_refusal(q, k, v, n_unmasked, dropout_p, scale)


def _automatic(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_unmasked: int, dropout_p: float, scale: float | None
) -> tuple[str, ...]:
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return AUTOMATIC["prefix" if n_unmasked > 1 else "causal", "training" if differentiated else "inference"]


CAUSAL_ATTENTION = Op(
    "causal_attention",
    (
        Implementation("triton", _triton, _triton_refusal),
        Implementation("sdpa", _sdpa),
        Implementation("flash", _flash, _torch_kernel_refusal),
        Implementation("cudnn", _cudnn, _cudnn_refusal),
        Implementation("reference", reference.causal_attention),
    ),
    _automatic,
)
