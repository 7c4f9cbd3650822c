"""Nearest codebook entries, alone or with what training needs, on Triton, the extension or the reference."""

from __future__ import annotations

import torch

from tamingfast.ops import check, machine, reference
from tamingfast.ops.dispatch import Implementation, Op


def nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the codebook entry nearest to each vector in squared Euclidean distance, ties to the lowest index.

    This is the quantizer of VQ-VAE (van den Oord et al. 2017, eq. 1). The answer is the argmin in float64 of the values
    as given, no matter how close codes are to each other or how far from the origin. Memory is O(N + K); no N x K
    matrix is held.

    Args:
        z: (N, D) with D of at least 1.
        codebook: (K, D) with K of at least 1, on the device of z. Any floating dtypes and strides.

    Returns:
        int64 (N,), without gradient.

    Raises:
        TypeError, ValueError: name the argument that has a wrong dtype or shape, or holds NaN or infinity. On a GPU
            values are not checked, because the host would have to wait; such a row gets some valid index.
        RuntimeError: the requested backend cannot run it.
    """
    if isinstance(z, torch.Tensor) and z.ndim != 2:
        raise ValueError(f"z: got shape {tuple(z.shape)}, expected (N, D) with D of at least 1")
    _check(z, codebook)
    return NEAREST_CODE.run(z.device, z.detach(), codebook.detach())


def quantize(z: torch.Tensor, codebook: torch.Tensor) -> reference.Quantized:
    """Vectors replaced by their nearest codes, with what training needs; one pass over z on Triton.

    Definition: :func:`tamingfast.ops.reference.quantize`. Indices are exact, as in :func:`nearest_code`.

    Args:
        z: (B, D, *) or (N, D).
        codebook: (K, D), on the device of z. Any floating dtypes and strides.

    Returns:
        ``(z_q, indices, to_codes, to_latents, counts)``: the codes in the shape of z, whose gradient goes straight
        through to z; int64 (N,) over the vectors in the order (B, *); the mean of ``(sg[z_q] - z)²``, with a gradient
        for z; the mean of ``(z_q - sg[z])²``, with a gradient for the codebook; how often each code was chosen,
        int64 (K,).

    Raises:
        As :func:`nearest_code`.
    """
    _check(z, codebook)
    if not z.numel():  # nothing to launch a kernel for
        return reference.quantize(z, codebook, torch.empty(0, dtype=torch.int64, device=z.device))
    return QUANTIZE.run(z.device, z, codebook)


def _check(z: torch.Tensor, codebook: torch.Tensor) -> None:
    check.floating("z", z)
    check.floating("codebook", codebook)
    if z.ndim < 2 or z.shape[1] == 0:
        raise ValueError(f"z: got shape {tuple(z.shape)}, expected (N, D) or (B, D, ...) with D of at least 1")
    if codebook.ndim != 2 or codebook.shape[0] == 0 or codebook.shape[1] != z.shape[1]:
        raise ValueError(
            f"codebook: got shape {tuple(codebook.shape)}, expected (K, {z.shape[1]}) with K of at least 1, as z is "
            f"{tuple(z.shape)}"
        )
    if codebook.device != z.device:
        raise ValueError(f"codebook: got device {codebook.device}, expected that of z, {z.device}")


def _triton_nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    from tamingfast.kernels import nearest_code as kernel  # Triton is optional and slow to import

    return kernel.nearest_code(z, codebook)


def _triton_quantize(z: torch.Tensor, codebook: torch.Tensor) -> reference.Quantized:
    from tamingfast.kernels import nearest_code as kernel  # as above

    return kernel.quantize(z, codebook)


@torch.library.custom_op("tamingfast::native_nearest_code", mutates_args=())
def _native_nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    module, reason = machine.native()
    if module is None:
        raise RuntimeError(reason)
    # The half types widen exactly.
    z, codebook = (value.to(torch.float32).contiguous().resolve_neg() for value in (z, codebook))
    out = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    module.nearest_code(
        z=check.array("z", z, torch.float32),
        n=z.shape[0],
        codebook=check.array("codebook", codebook, torch.float32),
        k=codebook.shape[0],
        d=z.shape[1],
        out=check.array("out", out, torch.int64),
        threads=torch.get_num_threads(),
        isa=machine.isa(),
    )
    return out


def _native_refusal(z: torch.Tensor, codebook: torch.Tensor) -> str | None:
    return "its kernel supports at most 32 bits, got float64" if torch.float64 in (z.dtype, codebook.dtype) else None


# The definition branches on values, which torch.compile cannot trace.
@torch.library.custom_op("tamingfast::nearest_code", mutates_args=())
def _reference_nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return reference.nearest_code(z, codebook)


@_native_nearest_code.register_fake
@_reference_nearest_code.register_fake
def _(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)


def _native_quantize(z: torch.Tensor, codebook: torch.Tensor) -> reference.Quantized:
    return reference.quantize(z, codebook, _native_nearest_code(_vectors(z), codebook.detach()))


def _reference_quantize(z: torch.Tensor, codebook: torch.Tensor) -> reference.Quantized:
    return reference.quantize(z, codebook, _reference_nearest_code(_vectors(z), codebook.detach()))


def _vectors(z: torch.Tensor) -> torch.Tensor:
    """(B, D, *) or (N, D) -> (N, D), the vectors in the order (B, *)."""
    return z.detach().movedim(1, -1).reshape(-1, z.shape[1])


NEAREST_CODE = Op(
    "nearest_code",
    (
        Implementation("triton", _triton_nearest_code),
        Implementation("native", _native_nearest_code, _native_refusal),
        Implementation("reference", _reference_nearest_code),
    ),
)
QUANTIZE = Op(
    "quantize",
    (
        Implementation("triton", _triton_quantize),
        Implementation("native", _native_quantize, _native_refusal),
        Implementation("reference", _reference_quantize),
    ),
)
