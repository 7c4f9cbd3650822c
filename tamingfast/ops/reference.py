"""The definition of every op in plain torch: kernels are tested against it, and it runs where no kernel can.

These functions do not check their arguments; call them through :mod:`tamingfast.ops`, which does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

#: What `quantize` returns: (z_q, indices, to_codes, to_latents, counts).
Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_CHUNK_SCORES = 2**21  # per chunk of nearest_code: 16 MiB in float64


def attention_mask(length: int, n_unmasked: int, device: torch.device | None = None) -> torch.Tensor:
    """bool (length, length), True where query i (row) sees key j (column): j <= i, or both below n_unmasked."""
    position = torch.arange(length, dtype=torch.int64, device=device)
    return (position[:, None] >= position) | (torch.maximum(position[:, None], position) < n_unmasked)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    n_unmasked: int = 0,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """``dropout(softmax(q kᵀ · scale + mask)) v`` with (B, H, T, D) tensors; scale is 1/√D unless given.

    The attention of GPT2 (Radford et al. 2019) with the unmasked prefix of Taming Transformers (Esser et al. 2021), see
    :func:`attention_mask`. A prefix longer than T ends at T.
    """
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    visible = attention_mask(q.shape[-2], n_unmasked, q.device)
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    return F.dropout(weights, dropout_p) @ v


@torch.no_grad()
def nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """``argmin_j ‖z_i - c_j‖²`` in float64, ties to the lowest index: (N, D), (K, D) -> int64 (N,).

    Rows are processed in chunks, which bounds memory. The scan expands the square; where a second code is within the
    rounding error of that formula, the row's distances are computed again from the differences.
    ValueError names the argument that holds NaN or infinity.
    """
    for name, values in (("z", z), ("codebook", codebook)):
        if not torch.isfinite(values).all():
            raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
    codes = codebook.double()
    center = codes.mean(0)  # a large common offset would cancel most digits of the expanded square
    centred = codes - center
    half_norms = centred.square().sum(1) / 2
    largest = centred.norm(dim=1).max()
    out = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    chunk = max(1, _CHUNK_SCORES // codes.shape[0])
    for start in range(0, z.shape[0], chunk):
        rows = z[start : start + chunk].double()
        offset = rows - center
        scores = torch.addmm(half_norms, offset, centred.t(), alpha=-1)
        best, index = scores.min(1)
        error = (z.shape[1] + 8) * torch.finfo(torch.float64).eps * (offset.norm(dim=1) * largest + largest**2)
        tied = (scores <= (best + 2 * error)[:, None]).sum(1) > 1
        if tied.any():
            direct = torch.cdist(rows[tied], codes, compute_mode="donot_use_mm_for_euclid_dist")
            index[tied] = direct.argmin(1)
        out[start : start + chunk] = index
    return out


def quantize(z: torch.Tensor, codebook: torch.Tensor, indices: torch.Tensor | None = None) -> Quantized:
    """Vectors replaced by their nearest codes, and the losses that train both (van den Oord et al. 2017, eq. 2 and 3).

    z: (B, D, *) or (N, D), codebook: (K, D). Returns ``(z_q, indices, to_codes, to_latents, counts)``: the codes in
    the shape and layout of z, with the gradient of z (straight-through); int64 (N,) over the vectors in the order
    (B, *); the means of ``(sg[z_q] - z)²`` and ``(z_q - sg[z])²``, in float32 or wider; how often each code was
    chosen, int64 (K,). ``indices`` replaces the search.
    """
    latents = z.movedim(1, -1)
    if indices is None:
        indices = nearest_code(latents.reshape(-1, z.shape[1]), codebook)
    # Not codebook[indices]: CPU threads sum its gradient in an order that varies from run to run.
    codes = F.embedding(indices, codebook).view(latents.shape)
    dtype = torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
    to_codes = (codes.detach().to(dtype) - latents.to(dtype)).square().mean()
    to_latents = (codes.to(dtype) - latents.detach().to(dtype)).square().mean()
    # Exactly the code; z + (codes - z) would differ from it by rounding.
    z_q = codes.detach() + (latents - latents.detach())
    counts = torch.zeros(len(codebook), dtype=torch.int64, device=z.device)
    counts.index_add_(0, indices, torch.ones_like(indices))
    z_q = z_q.movedim(-1, 1)
    return z_q.contiguous() if z.is_contiguous() else z_q, indices, to_codes, to_latents, counts


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
) -> torch.Tensor:
    """GroupNorm (Wu and He 2018) of NCHW ``x``, then ``y · sigmoid(y)`` unless ``silu`` is False."""
    y = torch.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y
