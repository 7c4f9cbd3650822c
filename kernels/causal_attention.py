"""Causal attention with a bidirectional prefix, fused: FlashAttention-2 (Dao 2023, algorithms 1 and 2).

Forward, for query block Q_i over its visible key blocks: ``S = Q_i K_jᵀ · scale``, running maximum m and sum l,
``O_i = Σ_j exp(S - m) V_j / l`` and ``LSE_i = m + log l``. Backward, with ``P = exp(S - LSE)`` and
``Δ = rowsum(dO ∘ O)``: ``dV = Pᵀ dO``, ``dS = P ∘ (dO Vᵀ - Δ)``, ``dQ = dS K · scale``, ``dK = dSᵀ Q · scale``.
Exponentials are to the base 2, so scale carries log₂ e and LSE is a base-2 logarithm.

Query r sees key c where ``c <= r``, or both are below n_unmasked. For a query block [m, m + M) the visible keys end at
m + M, or at n_unmasked if that is later and m is below it; tiles beyond that are skipped, and only tiles that the
boundary crosses are masked. Dropout multiplies P by a mask of Philox4x32 (Salmon et al. 2011) bits whose counter is
(row, column / 4, batch · heads + head) and whose key is the seed, so the backward pass redraws it in any tiling.

The backward pass has two kernels, for dK and dV and for dQ, and both compute P and dS: one kernel would have to add up
dQ over its programs, in an order that varies or at a cost above what it saves (docs/triton-kernels.md has the
arithmetic).

Kernels address tensors by the strides of batch, head and position. The last stride must be 1: the launchers copy
tensors with any other. dK and dV are allocated alike and share their strides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any, TypedDict

import torch
import triton
import triton.language as tl

from .common import LOG2_E, Arguments, capability, dot, float32_precision, launch, narrow_memory

_ROUNDS = tl.constexpr(7)  # enough to pass every known statistical test (Salmon et al. 2011, table 2)


@triton.jit
def _dropout_mask(seed, i_bh, o_row, col, threshold, BR: tl.constexpr, BC: tl.constexpr, TRANSPOSED: tl.constexpr):
    """True where a weight is kept: [BR, BC], or [BC, BR] if TRANSPOSED. One Philox call yields four columns."""
    o_quad = col // 4 + tl.arange(0, BC // 4)
    if TRANSPOSED:
        zero = (o_quad[:, None] * 0 + o_row[None, :] * 0).to(tl.uint32)  # [BC / 4, BR]
        row, quad = zero + o_row[None, :].to(tl.uint32), zero + o_quad[:, None].to(tl.uint32)
    else:
        zero = (o_row[:, None] * 0 + o_quad[None, :] * 0).to(tl.uint32)  # [BR, BC / 4]
        row, quad = zero + o_row[:, None].to(tl.uint32), zero + o_quad[None, :].to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, row, quad, zero + i_bh.to(tl.uint32), zero, _ROUNDS)
    # Bits (0, 1, 2, 3) belong to columns (4 q, 4 q + 1, 4 q + 2, 4 q + 3).
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    bits = tl.reshape(tl.permute(bits, (0, 2, 3, 1)), (BC, BR)) if TRANSPOSED else tl.reshape(bits, (BR, BC))
    return bits >= threshold.to(tl.uint32)


@triton.jit
def _head(i_b, i_h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Offset of a head. The compiler itself only tracks divisibility by 16, and heads may be 88 wide."""
    return tl.multiple_of(i_b * stride_b + i_h * stride_h, ALIGN)


@triton.jit
def _tile(first, o_t, o_d, stride_t, ALIGN: tl.constexpr):
    """Offsets of the positions first + o_t: that of the tile in 64 bits, those inside it in 32."""
    start = tl.multiple_of(tl.cast(first, tl.int64) * stride_t, ALIGN)
    return start + (tl.multiple_of(o_t[:, None] * stride_t, [ALIGN, ALIGN]) + o_d[None, :])


@triton.jit
def _key_range(m, T, n_unmasked, BM: tl.constexpr, BN: tl.constexpr):
    """For the query block that starts at m: the end of the fully visible key tiles, and the end of the visible keys."""
    end = tl.maximum(tl.minimum(m + BM, T), tl.where(m < n_unmasked, n_unmasked, 0))
    full = tl.maximum(m + 1, tl.where(m + BM <= n_unmasked, n_unmasked, 0))
    return tl.minimum(full, end) // BN * BN, end


@triton.jit
def _visible(o_row, o_col, n_unmasked):
    return (o_col <= o_row) | (tl.maximum(o_col, o_row) < n_unmasked)


@triton.jit
def _attend(
    b_acc, b_l, b_m, b_q, p_k, p_v, seed, i_bh, o_m, begin, end, n_unmasked, threshold, T,
    stride_kt, stride_vt, scale, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Fold the keys [begin, end) into the running maximum, sum and output of one query block."""
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    m_d = o_d < D
    for n in range(begin, end, BN):
        p_kt, p_vt = p_k + _tile(n, o_n, o_d, stride_kt, ALIGN), p_v + _tile(n, o_n, o_d, stride_vt, ALIGN)
        if MASKED:
            m_kv = (n + o_n < T)[:, None] & m_d[None, :]
            b_k, b_v = tl.load(p_kt, mask=m_kv, other=0.0), tl.load(p_vt, mask=m_kv, other=0.0)  # [BN, BD]
        elif D == BD:
            b_k, b_v = tl.load(p_kt), tl.load(p_vt)
        else:
            b_k, b_v = tl.load(p_kt, mask=m_d[None, :], other=0.0), tl.load(p_vt, mask=m_d[None, :], other=0.0)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BM, BN], tl.float32), PRECISION)  # [BM, BN]
        if MASKED:
            b_s = tl.where(_visible(o_m[:, None], n + o_n[None, :], n_unmasked), b_s, float("-inf"))
        # Every query sees key 0, which is in the first tile, so the maximum is finite from then on.
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_m_new[:, None])
        b_alpha = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        if DROPOUT:
            b_p = tl.where(_dropout_mask(seed, i_bh, o_m, n, threshold, BM, BN, False), b_p, 0.0)
        b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], PRECISION)  # [BM, BD]
        b_m = b_m_new
    return b_acc, b_l, b_m


@triton.jit
def _forward_kernel(
    q, k, v, o, lse, seed, scale, n_unmasked, threshold, kept_scale, H, T,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    D: tl.constexpr, BD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BM)
    i_bh = tl.program_id(0) // blocks
    i_m = blocks - 1 - tl.program_id(0) % blocks  # longest rows first, so that the last wave is short
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    m = i_m * BM
    o_m = m + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_q = (o_m < T)[:, None] & (o_d < D)[None, :]
    o_t = tl.arange(0, BM)
    p_q = q + _head(i_b, i_h, stride_qb, stride_qh, ALIGN) + _tile(m, o_t, o_d, stride_qt, ALIGN)
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [BM, BD]
    p_k = k + _head(i_b, i_h, stride_kb, stride_kh, ALIGN)
    p_v = v + _head(i_b, i_h, stride_vb, stride_vh, ALIGN)
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_seed = tl.load(seed) if DROPOUT else 0
    full, end = _key_range(m, T, n_unmasked, BM, BN)
    b_acc, b_l, b_m = _attend(
        b_acc, b_l, b_m, b_q, p_k, p_v, b_seed, i_bh, o_m, 0, full, n_unmasked, threshold, T,
        stride_kt, stride_vt, scale, D, BD, BM, BN, False, DROPOUT, PRECISION, ALIGN,
    )  # fmt: skip
    b_acc, b_l, b_m = _attend(
        b_acc, b_l, b_m, b_q, p_k, p_v, b_seed, i_bh, o_m, full, end, n_unmasked, threshold, T,
        stride_kt, stride_vt, scale, D, BD, BM, BN, True, DROPOUT, PRECISION, ALIGN,
    )  # fmt: skip
    b_o = b_acc * (kept_scale / b_l)[:, None]
    p_o = o + _head(i_b, i_h, stride_ob, stride_oh, ALIGN) + _tile(m, o_t, o_d, stride_ot, ALIGN)
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_q)
    tl.store(lse + i_bh.to(tl.int64) * T + o_m, b_m + tl.log2(b_l), mask=o_m < T)


@triton.jit
def _delta_kernel(
    o, do, delta, H, T, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta[b, h, t] = Σ_d o · do."""
    blocks = tl.cdiv(T, BM)
    i_bh = tl.program_id(0) // blocks
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    m = tl.program_id(0) % blocks * BM
    o_t, o_d = tl.arange(0, BM), tl.arange(0, BD)
    o_m = m + o_t
    mask = (o_m < T)[:, None] & (o_d < D)[None, :]
    p_o = o + _head(i_b, i_h, stride_ob, stride_oh, ALIGN) + _tile(m, o_t, o_d, stride_ot, ALIGN)
    p_do = do + _head(i_b, i_h, stride_gb, stride_gh, ALIGN) + _tile(m, o_t, o_d, stride_gt, ALIGN)
    b_o, b_do = tl.load(p_o, mask=mask, other=0.0), tl.load(p_do, mask=mask, other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)  # [BM]
    tl.store(delta + i_bh.to(tl.int64) * T + o_m, b_delta, mask=o_m < T)


@triton.jit
def _fold_queries(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, seed, i_bh, o_n, n, begin, end, n_unmasked, threshold, kept_scale,
    T, stride_qt, stride_gt, scale, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the queries [begin, end) to dK and dV of one key block; tiles are keys by queries."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_tile = tl.arange(0, BM)
    for m in range(begin, end, BM):
        o_m = m + o_tile
        m_m = o_m < T
        # Queries past the end load zeros, which add nothing to either product.
        m_q = m_m[:, None] & m_d[None, :]
        b_q = tl.load(p_q + _tile(m, o_tile, o_d, stride_qt, ALIGN), mask=m_q, other=0.0)  # [BM, BD]
        b_do = tl.load(p_do + _tile(m, o_tile, o_d, stride_gt, ALIGN), mask=m_q, other=0.0)
        b_lse = tl.load(p_lse + o_m, m_m, 0.0)
        b_delta = tl.load(p_delta + o_m, m_m, 0.0)
        b_s = dot(b_k, tl.trans(b_q), tl.zeros([BN, BM], tl.float32), PRECISION)  # [BN, BM]
        b_p = tl.exp2(b_s * scale - b_lse[None, :])
        if MASKED:
            b_p = tl.where(_visible(o_m[None, :], o_n[:, None], n_unmasked), b_p, 0.0)
        b_dp = dot(b_v, tl.trans(b_do), tl.zeros([BN, BM], tl.float32), PRECISION)  # [BN, BM]
        if DROPOUT:
            keep = tl.where(_dropout_mask(seed, i_bh, o_m, n, threshold, BM, BN, True), kept_scale, 0.0)
            b_dp *= keep
            b_dv = dot((b_p * keep).to(b_do.dtype), b_do, b_dv, PRECISION)
        else:
            b_dv = dot(b_p.to(b_do.dtype), b_do, b_dv, PRECISION)  # [BN, BD]
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk, PRECISION)  # [BN, BD]
    return b_dk, b_dv


@triton.jit
def _key_gradient_kernel(
    q, k, v, do, lse, delta, dk, dv, seed, scale, grad_scale, n_unmasked, threshold, kept_scale, H, T,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt,
    D: tl.constexpr, BD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BN)
    i_bh = tl.program_id(0) // blocks
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    n = tl.program_id(0) % blocks * BN  # the first keys are seen by the most queries
    o_t, o_d = tl.arange(0, BN), tl.arange(0, BD)
    o_n = n + o_t
    m_kv = (o_n < T)[:, None] & (o_d < D)[None, :]
    p_k = k + _head(i_b, i_h, stride_kb, stride_kh, ALIGN) + _tile(n, o_t, o_d, stride_kt, ALIGN)
    p_v = v + _head(i_b, i_h, stride_vb, stride_vh, ALIGN) + _tile(n, o_t, o_d, stride_vt, ALIGN)
    b_k, b_v = tl.load(p_k, mask=m_kv, other=0.0), tl.load(p_v, mask=m_kv, other=0.0)  # [BN, BD]
    p_q = q + _head(i_b, i_h, stride_qb, stride_qh, ALIGN)
    p_do = do + _head(i_b, i_h, stride_gb, stride_gh, ALIGN)
    p_lse, p_delta = lse + i_bh.to(tl.int64) * T, delta + i_bh.to(tl.int64) * T
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    b_seed = tl.load(seed) if DROPOUT else 0
    # Queries from `full` on see the whole key block; all queries see a block inside the prefix.
    begin = tl.where(n < n_unmasked, 0, n // BM * BM)
    full = tl.minimum((n + BN + BM - 2) // BM * BM, (T + BM - 1) // BM * BM)
    full = tl.where(n + BN <= n_unmasked, 0, full)
    b_dk, b_dv = _fold_queries(
        b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, b_seed, i_bh, o_n, n, begin, full, n_unmasked, threshold,
        kept_scale, T, stride_qt, stride_gt, scale, D, BD, BM, BN, True, DROPOUT, PRECISION, ALIGN,
    )  # fmt: skip
    b_dk, b_dv = _fold_queries(
        b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, b_seed, i_bh, o_n, n, full, T, n_unmasked, threshold,
        kept_scale, T, stride_qt, stride_gt, scale, D, BD, BM, BN, False, DROPOUT, PRECISION, ALIGN,
    )  # fmt: skip
    o_kv = _head(i_b, i_h, stride_dkb, stride_dkh, ALIGN) + _tile(n, o_t, o_d, stride_dkt, ALIGN)
    tl.store(dk + o_kv, (b_dk * grad_scale).to(dk.dtype.element_ty), mask=m_kv)
    tl.store(dv + o_kv, b_dv.to(dv.dtype.element_ty), mask=m_kv)


@triton.jit
def _fold_keys(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, seed, i_bh, o_m, begin, end, n_unmasked, threshold, kept_scale, T,
    stride_kt, stride_vt, scale, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the keys [begin, end) to dQ of one query block."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_tile = tl.arange(0, BN)
    for n in range(begin, end, BN):
        o_n = n + o_tile
        m_kv = (o_n < T)[:, None] & m_d[None, :]
        b_k = tl.load(p_k + _tile(n, o_tile, o_d, stride_kt, ALIGN), mask=m_kv, other=0.0)  # [BN, BD]
        b_v = tl.load(p_v + _tile(n, o_tile, o_d, stride_vt, ALIGN), mask=m_kv, other=0.0)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BM, BN], tl.float32), PRECISION)
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        if MASKED:
            b_p = tl.where(_visible(o_m[:, None], o_n[None, :], n_unmasked), b_p, 0.0)
        b_dp = dot(b_do, tl.trans(b_v), tl.zeros([BM, BN], tl.float32), PRECISION)
        if DROPOUT:
            b_dp *= tl.where(_dropout_mask(seed, i_bh, o_m, n, threshold, BM, BN, False), kept_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq, PRECISION)  # [BM, BD]
    return b_dq


@triton.jit
def _query_gradient_kernel(
    q, k, v, do, lse, delta, dq, seed, scale, grad_scale, n_unmasked, threshold, kept_scale, H, T,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    D: tl.constexpr, BD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BM)
    i_bh = tl.program_id(0) // blocks
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    m = (blocks - 1 - tl.program_id(0) % blocks) * BM
    o_t, o_d = tl.arange(0, BM), tl.arange(0, BD)
    o_m = m + o_t
    m_q = (o_m < T)[:, None] & (o_d < D)[None, :]
    p_q = q + _head(i_b, i_h, stride_qb, stride_qh, ALIGN) + _tile(m, o_t, o_d, stride_qt, ALIGN)
    p_do = do + _head(i_b, i_h, stride_gb, stride_gh, ALIGN) + _tile(m, o_t, o_d, stride_gt, ALIGN)
    b_q, b_do = tl.load(p_q, mask=m_q, other=0.0), tl.load(p_do, mask=m_q, other=0.0)  # [BM, BD]
    b_lse = tl.load(lse + i_bh.to(tl.int64) * T + o_m, o_m < T, 0.0)
    b_delta = tl.load(delta + i_bh.to(tl.int64) * T + o_m, o_m < T, 0.0)
    p_k = k + _head(i_b, i_h, stride_kb, stride_kh, ALIGN)
    p_v = v + _head(i_b, i_h, stride_vb, stride_vh, ALIGN)
    b_dq = tl.zeros([BM, BD], tl.float32)
    b_seed = tl.load(seed) if DROPOUT else 0
    full, end = _key_range(m, T, n_unmasked, BM, BN)
    b_dq = _fold_keys(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, b_seed, i_bh, o_m, 0, full, n_unmasked, threshold,
        kept_scale, T, stride_kt, stride_vt, scale, D, BD, BM, BN, False, DROPOUT, PRECISION, ALIGN,
    )  # fmt: skip
    b_dq = _fold_keys(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, b_seed, i_bh, o_m, full, end, n_unmasked, threshold,
        kept_scale, T, stride_kt, stride_vt, scale, D, BD, BM, BN, True, DROPOUT, PRECISION, ALIGN,
    )  # fmt: skip
    p_dq = dq + _head(i_b, i_h, stride_dqb, stride_dqh, ALIGN) + _tile(m, o_t, o_d, stride_dqt, ALIGN)
    tl.store(p_dq, (b_dq * grad_scale).to(dq.dtype.element_ty), mask=m_q)


@functools.cache
def _configs(
    kernel: str, width: int, dtype: torch.dtype, dropout: bool, capability: tuple[int, int]
) -> list[triton.Config]:
    """The tilings to try for ``width``, the padded head width, on a compute capability; the smallest first.

    Tilings whose registers would spill, or that need more shared memory than a block can have, are left out.
    """
    wide, major = width > 64, capability[0]
    # The matrix units of 9, 10 and 11 read shared memory, which saves registers. Those of 12 do not, as before 9.
    from_registers = major not in (9, 10, 11)
    if dtype == torch.float32:  # exact products run on the CUDA cores, from registers
        tiles = {
            "forward": [(32, 16, 4, 2)] if wide else [(32, 32, 4, 2), (64, 32, 8, 2)],
            "keys": [(16, 32, 8, 2)] if wide else [(32, 32, 8, 2), (16, 32, 4, 2)],
            "queries": [(32, 16, 4, 2)] if wide else [(32, 32, 4, 2), (64, 32, 8, 2)],
        }[kernel]
    elif narrow_memory(capability):
        narrow = wide or dropout
        tiles = {
            "forward": [(64, 32 if narrow else 64, 4, 3), (128, 32 if narrow else 64, 8, 3)],
            "keys": [(32, 64, 8, 2), (32 if narrow else 64, 32, 4, 2)],
            "queries": [(64, 32 if dropout else 64, 8 if wide else 4, 2), (128, 32, 8, 2)],
        }[kernel]
        if wide and dropout and kernel == "queries":
            tiles.pop()
    else:
        narrow_keys = [(32, 64, 8, 2), (32 if wide else 64, 32, 4, 2)]
        tiles = {
            "forward": [(64, 32 if wide else 64, 4, 3), (128, 32 if from_registers and wide else 64, 8, 3)],
            "keys": narrow_keys if from_registers or (wide and dropout) else [(32, 64, 4, 2), (64, 64, 8, 2)],
            "queries": [(64, 64, 8 if wide or dropout else 4, 2), (128, 32 if from_registers else 64, 8, 2)],
        }[kernel]
        if not from_registers and not dropout:
            tiles += {
                "forward": [(64, 64, 4, 3)] if wide else [(128, 64, 4, 3), (128, 128, 8, 2)],
                "keys": [(32, 128, 8, 2)] if wide else [(64, 64, 4, 2), (64, 128, 8, 2)],
                "queries": [],
            }[kernel]
        if major == 9 and not dropout and wide and kernel == "forward":
            tiles.append((128, 128, 8, 2))
    return [triton.Config({"BM": bm, "BN": bn}, num_warps=warps, num_stages=stages) for bm, bn, warps, stages in tiles]


def _layout(**tensors: torch.Tensor) -> dict[str, int]:
    """Strides of (B, H, T, D) tensors except the last, which is 1, and the power of two up to 16 that divides them."""
    arguments, align = {}, 16
    for name, tensor in tensors.items():
        for axis, size, step in zip("bht", tensor.shape, tensor.stride(), strict=False):
            arguments[f"stride_{name}{axis}"] = step
            if size > 1:
                align = math.gcd(align, step)
    return arguments | {"ALIGN": align}


def _unit(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last stride is 1, as the kernels require, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, in the layout of x, or contiguous if the last stride would not be 1."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 or x.shape[-1] <= 1 else x.new_empty(x.shape)


class _Shared(TypedDict):
    """The arguments of all kernels except `_delta_kernel`."""

    scale: float
    n_unmasked: int
    threshold: int
    kept_scale: float
    H: int
    T: int
    D: int
    BD: int
    DROPOUT: bool
    PRECISION: str


def _shared(q: torch.Tensor, n_unmasked: int, dropout_p: float, scale: float) -> _Shared:
    _, heads, length, width = q.shape
    return {
        "scale": scale * LOG2_E,
        "n_unmasked": min(n_unmasked, length) if n_unmasked > 1 else 0,  # one position sees itself anyway
        "threshold": min(max(round(dropout_p * 2**32), 2), 2**32 - 1) if dropout_p > 0 else 0,
        "kept_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0,
        "H": heads,
        "T": length,
        "D": width,
        "BD": max(16, triton.next_power_of_2(width)),
        "DROPOUT": dropout_p > 0,
        "PRECISION": float32_precision() if q.dtype == torch.float32 else "ieee",
    }


def _key(q: torch.Tensor, shared: _Shared) -> tuple[Hashable, ...]:
    """Equal for problems that share a tiling; lengths and numbers of heads are rounded up to powers of two."""
    batch, heads, length, _ = q.shape
    return (
        str(q.dtype), shared["D"], shared["DROPOUT"], shared["PRECISION"], shared["n_unmasked"] > 0,
        triton.next_power_of_2(length), triton.next_power_of_2(batch * heads),
    )  # fmt: skip


def _launch_over_blocks(
    kernel: triton.JITFunction, name: str, block: str, q: torch.Tensor, shared: _Shared, arguments: Arguments
) -> None:
    """One program for each head and block of positions; the meta-parameter ``block`` is the block's size."""
    batch, heads, length, _ = q.shape
    launch(
        kernel,
        lambda meta: (batch * heads * triton.cdiv(length, meta[block]),),
        _configs(name, shared["BD"], q.dtype, shared["DROPOUT"], capability(q.device)),
        _key(q, shared),
        {**arguments, **shared},
    )


@torch.library.custom_op("tamingfast::triton_causal_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    n_unmasked: int,
    dropout_p: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output like q, and the base-2 log-sum-exp, float32 (B, H, T). ``scale`` is positive, seed int64 (1,)."""
    out = _empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = _unit(q), _unit(k), _unit(v)
    shared = _shared(q, n_unmasked, dropout_p, scale)
    arguments = {"q": q, "k": k, "v": v, "o": out, "lse": lse, "seed": seed, **_layout(q=q, k=k, v=v, o=out)}
    _launch_over_blocks(_forward_kernel, "forward", "BM", q, shared, arguments)
    return out, lse


@_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    n_unmasked: int,
    dropout_p: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("tamingfast::triton_causal_attention_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    n_unmasked: int,
    dropout_p: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    batch, heads, length, width = q.shape
    dq, dk, dv = _empty_gradients(q, k)
    grad, q, k, v = _unit(grad), _unit(q), _unit(k), _unit(v)
    delta = torch.empty_like(lse)
    shared = _shared(q, n_unmasked, dropout_p, scale)
    launch(
        _delta_kernel,
        lambda meta: (batch * heads * triton.cdiv(length, meta["BM"]),),
        [triton.Config({"BM": 64}, num_warps=4)],
        (),
        {
            "o": out, "do": grad, "delta": delta, "H": heads, "T": length, "D": width, "BD": shared["BD"],
            **_layout(o=out, g=grad),
        },
    )  # fmt: skip
    inputs = {"q": q, "k": k, "v": v, "do": grad, "lse": lse, "delta": delta, "seed": seed, "grad_scale": scale}
    keys = {**inputs, "dk": dk, "dv": dv, **_layout(q=q, k=k, v=v, g=grad, dk=dk)}
    _launch_over_blocks(_key_gradient_kernel, "keys", "BN", q, shared, keys)
    queries = {**inputs, "dq": dq, **_layout(q=q, k=k, v=v, g=grad, dq=dq)}
    _launch_over_blocks(_query_gradient_kernel, "queries", "BM", q, shared, queries)
    return dq, dk, dv


@_backward.register_fake
def _(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    n_unmasked: int,
    dropout_p: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_gradients(q, k)


def _empty_gradients(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised dq like q, and dk and dv like k."""
    return _empty_like(q), _empty_like(k), _empty_like(k)


# ctx is torch's object, to which we add attributes; hence Any.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, seed, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, seed)


def _gradients(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    n_unmasked: int = 0,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of (B, H, T, D) tensors, all float16, bfloat16 or float32, with D at most 128; returns one like q.

    Any T and any strides; a last stride other than 1 costs a copy. The dropout seed is drawn on the device from torch's
    generator, without synchronising, so a CUDA graph can capture the call. float32 products are exact unless torch
    allows tf32 for its own.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:  # the kernel takes the running maximum before scaling, which a negative scale would invert
        q, scale = q * scale, 1.0
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=q.device) if dropout_p > 0 else None
    return _forward(q, k, v, seed, n_unmasked, dropout_p, scale)[0]
