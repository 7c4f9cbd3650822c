"""One function per op: checks the arguments, chooses Triton, native or reference, and runs it.

The choice goes by device and dtype: Triton for what is on a GPU, native code or torch for the rest. A backend that the
user asked for (:mod:`tamingfast.ops.backends`) and that cannot run the call raises RuntimeError with the reason; the
automatic choice falls back and logs the reason once. Wrong shapes and dtypes raise ValueError or TypeError that name
the argument.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tamingfast.ops import backends, reference

_HALVES_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
_FLOATS = (*_HALVES_AND_SINGLE, torch.float64)
_WIDEST_HEAD = 128  # of the Triton kernel


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    n_unmasked: int = 0,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention whose first ``n_unmasked`` positions see each other in both directions.

    q, k, v: (B, H, T, D) of one floating dtype; returns (B, H, T, D). ``scale`` is 1/√D unless given; attention
    weights are dropped with probability ``dropout_p`` on every call (pass 0 in evaluation). Differentiable. Under
    autocast the inputs are cast as those of torch's attention are.
    Definition and sources: :func:`tamingfast.ops.reference.causal_attention`.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        _check_float(name, value)
        if value.ndim != 4 or value.shape != q.shape or value.dtype != q.dtype or value.device != q.device:
            raise ValueError(
                f"{name}: got {_kind(value)}, expected (B, H, T, D) with the same shape, dtype and device as q "
                f"({_kind(q)})"
            )
    if n_unmasked < 0:
        raise ValueError(f"n_unmasked: got {n_unmasked}, expected 0 or more")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability")
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (value.to(torch.get_autocast_dtype(q.device.type)) for value in (q, k, v))
    if _on_triton("causal_attention", q.device, _triton_attention_refusal(q)):
        from ..kernels import causal_attention as kernel

        return kernel.causal_attention(q, k, v, n_unmasked, dropout_p, scale)
    if _asked_for("causal_attention") == "reference":
        return reference.causal_attention(q, k, v, n_unmasked, dropout_p, scale)
    # torch's fused attention equals the reference; a prefix of one position is the plain causal mask.
    if n_unmasked <= 1:
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal=True, scale=scale)
    mask = reference.attention_mask(q.shape[-2], n_unmasked, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)


def _triton_attention_refusal(q: torch.Tensor) -> str | None:
    if q.dtype not in _HALVES_AND_SINGLE:
        return "its kernel is not for float64, which the tensors are"
    if not 0 < q.shape[-1] <= _WIDEST_HEAD:
        return f"its kernel is for heads up to {_WIDEST_HEAD} wide, and these are {q.shape[-1]} wide"
    return None


def nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest codebook entry of each vector, in squared Euclidean distance, ties to the lowest index.

    z: (N, D), codebook: (K, D) with K, D >= 1, any floating dtypes and strides; returns int64 (N,), which carries
    no gradient. Never holds an N x K matrix. The answer is the argmin in float64 of the values as given, however
    close codes are to each other and however far from the origin. ValueError names the argument that is misshapen
    or holds NaN or an infinity; on a GPU the values are not looked at, as the host would have to wait for them, and
    such a row gets some valid index. This is the quantizer of VQ-VAE (van den Oord et al. 2017, eq. 1).
    """
    if isinstance(z, torch.Tensor) and z.ndim != 2:
        raise ValueError(f"z: got shape {tuple(z.shape)}, expected (N, D) with D of at least 1")
    _check_codes(z, codebook)
    if _on_triton("nearest_code", z.device, None):
        from ..kernels import nearest_code as kernel

        return kernel.nearest_code(z, codebook)
    return _nearest_code(z.detach(), codebook.detach())


def _check_codes(z: torch.Tensor, codebook: torch.Tensor) -> None:
    _check_float("z", z)
    _check_float("codebook", codebook)
    if z.ndim < 2 or z.shape[1] == 0:
        raise ValueError(f"z: got shape {tuple(z.shape)}, expected (N, D) or (B, D, ...) with D of at least 1")
    if codebook.ndim != 2 or codebook.shape[0] == 0 or codebook.shape[1] != z.shape[1]:
        raise ValueError(
            f"codebook: got shape {tuple(codebook.shape)}, expected (K, {z.shape[1]}) with K of at least 1, as z is "
            f"{tuple(z.shape)}"
        )
    if codebook.device != z.device:
        raise ValueError(f"codebook: got device {codebook.device}, expected that of z, {z.device}")


@torch.library.custom_op("tamingfast::nearest_code", mutates_args=())
def _nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    asked = _asked_for("nearest_code")
    if asked == "reference":
        return reference.nearest_code(z, codebook)
    reason = _native_nearest_code_refusal(z, codebook)
    if reason is None:
        return _native_nearest_code(z, codebook)
    if asked == "native":
        raise RuntimeError(f"the native backend was asked for, but cannot run nearest_code: {reason}")
    backends.log_fallback("nearest_code", "native", reason)
    return reference.nearest_code(z, codebook)


@_nearest_code.register_fake
def _(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)


def _native_nearest_code_refusal(z: torch.Tensor, codebook: torch.Tensor) -> str | None:
    if z.device.type != "cpu":
        return f"its kernel is for the CPU, and the tensors are on {z.device.type}"
    if torch.float64 in (z.dtype, codebook.dtype):
        return "its kernel is for float32, and the tensors are float64"
    return backends.refusal("native", "nearest_code")


def _native_nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    module, _ = backends.native()
    z = z.to(torch.float32).contiguous()  # the half types widen exactly
    codebook = codebook.to(torch.float32).contiguous()
    out = torch.empty(z.shape[0], dtype=torch.int64)
    module.nearest_code(
        z=z.data_ptr(),
        n=z.shape[0],
        codebook=codebook.data_ptr(),
        k=codebook.shape[0],
        d=z.shape[1],
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
        isa=backends.isa(),
    )
    return out


def quantize(
    z: torch.Tensor, codebook: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors replaced by their nearest codes, with what training needs, in one pass where a kernel does it.

    z: (B, D, *) or (N, D), codebook: (K, D), any floating dtypes and strides. Returns ``(z_q, indices, to_codes,
    to_latents, counts)``: the codes in the shape of z, whose gradient goes straight through to z; int64 (N,) over the
    vectors in the order (B, *), exact as in `nearest_code`; the mean of ``(sg[z_q] - z)²`` and of ``(z_q - sg[z])²``,
    one value whose gradient is that of z, then that of the codebook; how often each code was chosen, int64 (K,).
    Definition: :func:`tamingfast.ops.reference.quantize`.
    """
    _check_codes(z, codebook)
    if z.numel() and _on_triton("quantize", z.device, None):
        from ..kernels import nearest_code as kernel

        return kernel.quantize(z, codebook)
    indices = nearest_code(z.detach().movedim(1, -1).reshape(-1, z.shape[1]), codebook)
    return reference.quantize(z, codebook, indices)


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
) -> torch.Tensor:
    """Group normalisation, then SiLU (swish) unless ``silu`` is False.

    x: (N, C, H, W) floating, contiguous or channels-last, which the result keeps; weight, bias: (C,); C divides by
    ``groups``. Differentiable. The kernel computes in float32 and returns the type of x, under autocast too, where
    torch returns float32. Definition: :func:`tamingfast.ops.reference.group_norm_silu`.
    """
    _check_float("x", x)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, H, W)")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of the {x.shape[1]} channels of x")
    for name, value in (("weight", weight), ("bias", bias)):
        _check_float(name, value)
        if value.shape != x.shape[1:2]:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({x.shape[1]},), the channels of x")
    refusal = None if x.dtype in _HALVES_AND_SINGLE else "its kernel is not for float64, which x is"
    if x.numel() and _on_triton("group_norm_silu", x.device, refusal):
        from ..kernels import group_norm_silu as kernel

        return kernel.group_norm_silu(x, weight, bias, groups, eps, silu)
    _asked_for("group_norm_silu")
    return reference.group_norm_silu(x, weight, bias, groups, eps, silu)


# Kernel modules are imported where they are called: the import of Triton takes time and may be impossible.
def _on_triton(op: str, device: torch.device, refusal: str | None) -> bool:
    """Whether a Triton kernel is to run ``op`` on tensors of ``device``; ``refusal``: why it cannot take the arguments.

    RuntimeError if Triton was asked for and cannot run.
    """
    asked = backends.requested()
    if asked not in (None, "triton") or (asked is None and device.type != "cuda"):
        return False
    reason = refusal or _triton_refusal(op, device.type)
    if reason is None:
        return True
    if asked == "triton":
        raise RuntimeError(f"the triton backend was asked for, but cannot run {op}: {reason}")
    _log_fallback(op, reason)
    return False


@torch.compiler.assume_constant_result
def _triton_refusal(op: str, device_type: str) -> str | None:
    """Why Triton cannot run ``op`` on this machine or on such a device; a constant, so that it compiles away."""
    if reason := backends.refusal("triton", op):
        return reason
    expected = "cpu" if backends.interpreted() else "cuda"
    if device_type != expected:
        return f"its kernels run on {expected} tensors here, and the tensors are on {device_type}"
    return None


@torch.compiler.assume_constant_result
def _log_fallback(op: str, reason: str) -> None:
    backends.log_fallback(op, "triton", reason)


def _asked_for(op: str) -> str | None:
    """The backend that the user asked for; RuntimeError when it cannot run ``op`` on this machine."""
    backend = backends.requested()
    if backend is not None and (reason := backends.refusal(backend, op)):
        raise RuntimeError(f"the {backend} backend was asked for, but cannot run {op}: {reason}")
    return backend


def _check_float(name: str, value: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point tensor")


def _kind(value: torch.Tensor) -> str:
    return f"{tuple(value.shape)} {value.dtype} on {value.device}"
