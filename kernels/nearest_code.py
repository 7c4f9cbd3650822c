"""Nearest codebook entry in squared Euclidean distance (van den Oord et al. 2017, eq. 1), and its training form.

A fast scan, then an exact comparison where the scan cannot decide. The scan ranks codes by ``|c|²/2 - z·c``, both
relative to the codebook's mean, which removes a common offset. Each float32 factor is split into two bfloat16 values,
``x = hi + lo``, and the product is ``hi·hi + hi·lo + lo·hi`` on the matrix units. The error of a score is at most

    e = (D + 8) 2⁻²¹ (|z| max|c| + max|c|²) + 2⁻¹⁴ |z| max|c| + (D + 8) 2⁻¹²⁴

2⁻²¹ bounds the steps of three float32 sums on matrix units that truncate (Fasi et al. 2021, Numerical behavior of
NVIDIA tensor cores), and the 8 covers centring and the norms; 2⁻¹⁴ bounds what splitting drops, even if conversion
truncates; the last term is underflow. A code whose score is more than 2 e above the best is farther away. The scan
keeps the best two codes and the third score. Between two codes within 2 e the float64 distances decide; where a third
is within 2 e too, or float32 may have overflowed or underflowed, the row is left open, and then searched in float64. So
near-duplicate codes and large offsets cost time, never exactness. Nothing of size N x K is held: the scratch memory is
the split inputs, as large as the inputs themselves, and a few numbers for each row.

Open rows are few, and lie anywhere. The scan lists them, in the order in which its programs end, which influences no
result; the search shares them among a fixed number of programs, and the codes of a row too where there are fewer rows
than programs, so that none takes long; the lists never leave the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common import capability, dot, launch
from .device import multiprocessors

_UNIQUE = tl.constexpr(-1)  # no other code can be the nearest
_MANY = tl.constexpr(-2)  # more than two codes can be; _MANY - i for the i-th row of the list of such rows

_PROGRAMS = 8  # that search open rows, for each multiprocessor
_CODES = 32  # that a program compares at once


@triton.jit
def _address(row, S, stride_b, stride_s):
    """Offset of the vector at index ``row`` of the flattened (B, S), whose axes have strides of their own."""
    return (row // S).to(tl.int64) * stride_b + (row % S).to(tl.int64) * stride_s


@triton.jit
def _split_kernel(
    x, mean, hi, lo, norm, R, S, stride_b, stride_s, stride_d,
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """hi + lo ≈ x - mean, zeros from D to DP, and |x - mean|²."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    m_r = o_r < R
    p_x = x + _address(o_r, S, stride_b, stride_s)
    b_norm = tl.zeros([BR], tl.float32)
    for d in range(0, DP, BD):
        o_d = d + tl.arange(0, BD)
        mask = m_r[:, None] & (o_d < D)[None, :]
        b_mean = tl.load(mean + o_d, mask=o_d < D, other=0.0)
        b_x = tl.load(p_x[:, None] + o_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0)
        if x.dtype.element_ty != tl.float64:
            b_x = b_x.to(tl.float32)
        b_x = tl.where(mask, b_x - b_mean[None, :], 0.0).to(tl.float32)  # [BR, BD]
        b_hi = b_x.to(tl.bfloat16)
        p_out = o_r.to(tl.int64)[:, None] * DP + o_d[None, :]
        tl.store(hi + p_out, b_hi, mask=m_r[:, None])
        tl.store(lo + p_out, (b_x - b_hi.to(tl.float32)).to(tl.bfloat16), mask=m_r[:, None])
        b_norm += tl.sum(b_x * b_x, 1)
    tl.store(norm + o_r, b_norm, mask=m_r)


@triton.jit
def _scan_kernel(
    z_hi, z_lo, z_norm, c_hi, c_lo, c_norm, index, rival, open_rows, open_count, N, K,
    DP, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Best code of each vector, and its rival: another code within the error, _UNIQUE if none, _MANY - i if several.

    Such a vector is the i-th of ``open_rows``, of which there are ``open_count``.
    """
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_m = o_m < N
    p_z = tl.where(m_m, o_m, 0).to(tl.int64)[:, None] * DP + o_d[None, :]  # [BM, BD]
    inf = float("inf")
    best = tl.full([BM], inf, tl.float32)
    second = tl.full([BM], inf, tl.float32)
    third = tl.full([BM], inf, tl.float32)
    i_best = tl.zeros([BM], tl.int32)
    i_second = tl.zeros([BM], tl.int32)
    largest = tl.zeros([BN], tl.float32)
    for n in range(0, K, BN):
        m_n = n + o_n < K
        p_c = tl.where(m_n, n + o_n, 0).to(tl.int64)[None, :] * DP + o_d[:, None]  # [BD, BN]
        b_s = tl.zeros([BM, BN], tl.float32)
        # Not a constant, or the loop would be unrolled, and the assembler of CUDA 12.8 then drops all products (sm_90).
        for d in range(0, DP, BD):
            b_z_hi, b_z_lo = tl.load(z_hi + p_z + d), tl.load(z_lo + p_z + d)
            b_c_hi, b_c_lo = tl.load(c_hi + p_c + d), tl.load(c_lo + p_c + d)
            b_s = dot(b_z_hi, b_c_hi, b_s, "ieee")
            b_s = dot(b_z_hi, b_c_lo, b_s, "ieee")
            b_s = dot(b_z_lo, b_c_hi, b_s, "ieee")
        b_norm = tl.load(c_norm + n + o_n, mask=m_n, other=0.0)
        largest = tl.maximum(largest, b_norm)
        b_s = tl.where(m_n[None, :], 0.5 * b_norm[None, :] - b_s, inf)  # [BM, BN]
        # Merge the three lowest scores of the tile with the three lowest so far.
        t_best, j_best = tl.min(b_s, 1, return_indices=True)
        b_s = tl.where(o_n[None, :] == j_best[:, None], inf, b_s)
        t_second, j_second = tl.min(b_s, 1, return_indices=True)
        t_third = tl.min(tl.where(o_n[None, :] == j_second[:, None], inf, b_s), 1)
        better = t_best < best
        loser, i_loser = tl.where(better, best, t_best), tl.where(better, i_best, n + j_best)
        best, i_best = tl.where(better, t_best, best), tl.where(better, n + j_best, i_best)
        better = t_second < second
        other, i_other = tl.where(better, t_second, second), tl.where(better, n + j_second, i_second)
        third = tl.minimum(tl.minimum(third, t_third), tl.maximum(second, t_second))
        third = tl.minimum(third, tl.maximum(loser, other))
        better = other < loser
        second, i_second = tl.where(better, other, loser), tl.where(better, i_other, i_loser)
    b_z_norm = tl.load(z_norm + o_m, mask=m_m, other=0.0)
    max_norm = tl.max(largest, 0)
    product = tl.sqrt(b_z_norm) * tl.sqrt(max_norm)
    size = tl.where(max_norm > 1e-30, product + max_norm, inf)
    margin = (D + 8) * (2.0**-20 * size + 2.0**-123) + 2.0**-13 * product  # 2 e
    limit = tl.where(size < 1e37, best + margin, inf)
    # The comparisons count NaN, from an overflow, as near.
    b_rival = tl.where(second > limit, _UNIQUE, i_second)
    b_open = m_m & ~(third > limit)
    count = tl.sum(b_open.to(tl.int32), 0)
    if count > 0:
        slot = tl.atomic_add(open_count, count, sem="relaxed") + tl.cumsum(b_open.to(tl.int32), 0) - 1
        tl.store(open_rows + slot, o_m, mask=b_open)
        b_rival = tl.where(b_open, _MANY - slot, b_rival)
    tl.store(index + o_m, i_best.to(tl.int64), mask=m_m)
    tl.store(rival + o_m, b_rival, mask=m_m)


@triton.jit
def _distance(p_z, p_c, mask, stride_d, stride_cd, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Squared distances in float64, summed from the differences, of the rows under ``mask``: [BR]."""
    total = tl.zeros([BR], tl.float64)
    for d in range(0, D, BD):
        o_d = (d + tl.arange(0, BD)).to(tl.int64)
        m_rd = mask[:, None] & (o_d < D)[None, :]
        b_z = tl.load(p_z[:, None] + o_d[None, :] * stride_d, mask=m_rd, other=0.0).to(tl.float64)
        b_c = tl.load(p_c[:, None] + o_d[None, :] * stride_cd, mask=m_rd, other=0.0).to(tl.float64)
        total += tl.sum((b_z - b_c) * (b_z - b_c), 1)
    return total


@triton.jit
def _chunks(count, programs, K, BK: tl.constexpr):
    """Into how many parts the codes are divided, so that ``count`` rows keep the programs busy."""
    return tl.minimum(tl.maximum(programs // tl.maximum(count, 1), 1), tl.cdiv(K, BK))


@triton.jit
def _search_kernel(
    z, codebook, open_rows, open_count, distance, nearest, programs, S, K, stride_b, stride_s, stride_d, stride_ck,
    stride_cd, D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """For each open row and chunk of the codes: the least distance, in float64, and its code; K if all are NaN."""
    count = tl.load(open_count)
    chunks = _chunks(count, programs, K, BK)
    span = tl.cdiv(K, chunks * BK) * BK
    o_k = tl.arange(0, BK)
    for item in range(tl.program_id(0), count * chunks, programs):
        p_z = z + _address(tl.load(open_rows + item // chunks), S, stride_b, stride_s)
        begin = item % chunks * span
        best = tl.full([BK], float("inf"), tl.float64)
        i_best = tl.full([BK], 0, tl.int32) + K
        for k in range(begin, tl.minimum(begin + span, K), BK):
            m_k = k + o_k < K
            p_c = codebook + (k + o_k).to(tl.int64) * stride_ck
            b_d = tl.zeros([BK], tl.float64)
            for d in range(0, D, BD):
                o_d = (d + tl.arange(0, BD)).to(tl.int64)
                m_d = o_d < D
                b_z = tl.load(p_z + o_d * stride_d, mask=m_d, other=0.0).to(tl.float64)  # [BD]
                p_kd = p_c[:, None] + o_d[None, :] * stride_cd
                b_c = tl.load(p_kd, mask=m_k[:, None] & m_d[None, :], other=0.0).to(tl.float64)  # [BK, BD]
                b_d += tl.sum((b_z[None, :] - b_c) * (b_z[None, :] - b_c), 1)
            better = m_k & (b_d < best)
            best, i_best = tl.where(better, b_d, best), tl.where(better, k + o_k, i_best)
        least = tl.min(best, 0)
        tl.store(distance + item, least)
        tl.store(nearest + item, tl.min(tl.where(best == least, i_best, K), 0))


@triton.jit
def _settle_kernel(
    z, codebook, index, rival, open_count, open_distance, open_nearest, z_q, distance, counts, programs, N, S, K,
    stride_b, stride_s, stride_d, stride_ck, stride_cd, stride_qb, stride_qs, stride_qd,
    D: tl.constexpr, FUSED: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Settle what the scan left open; if FUSED, also gather codes, sum distances and count uses."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    m_r = o_r < N
    p_z = z + _address(o_r, S, stride_b, stride_s)
    b_index = tl.load(index + o_r, mask=m_r, other=0)
    b_rival = tl.load(rival + o_r, mask=m_r, other=_UNIQUE)
    if tl.max(b_rival, 0) >= 0:
        pair = b_rival >= 0
        b_other = tl.where(pair, b_rival, 0).to(tl.int64)
        d_index = _distance(p_z, codebook + b_index * stride_ck, pair, stride_d, stride_cd, D, BR, BD)
        d_other = _distance(p_z, codebook + b_other * stride_ck, pair, stride_d, stride_cd, D, BR, BD)
        nearer = (d_other < d_index) | ((d_other == d_index) & (b_other < b_index))
        b_index = tl.where(pair & nearer, b_other, b_index)
    if tl.min(b_rival, 0) <= _MANY:
        many = b_rival <= _MANY
        chunks = _chunks(tl.load(open_count), programs, K, BK)
        first = tl.where(many, _MANY - b_rival, 0).to(tl.int64) * chunks
        best = tl.full([BR], float("inf"), tl.float64)
        i_best = tl.full([BR], 0, tl.int32) + K
        for c in range(0, chunks, BC):
            o_c = c + tl.arange(0, BC)
            mask = many[:, None] & (o_c < chunks)[None, :]
            b_d = tl.load(open_distance + first[:, None] + o_c[None, :], mask=mask, other=float("inf"))  # [BR, BC]
            b_i = tl.load(open_nearest + first[:, None] + o_c[None, :], mask=mask, other=2147483647)
            least = tl.min(b_d, 1)
            lowest = tl.min(tl.where(b_d == least[:, None], b_i, 2147483647), 1)
            better = least < best  # of equal distances the lower index, which an earlier chunk has
            best, i_best = tl.where(better, least, best), tl.where(better, lowest, i_best)
        # K if every distance is NaN or infinite: no code is nearest, but the index must be valid.
        b_index = tl.where(many, tl.where(i_best < K, i_best, 0).to(tl.int64), b_index)
    tl.store(index + o_r, b_index, mask=m_r)
    if FUSED:
        p_q = z_q + _address(o_r, S, stride_qb, stride_qs)
        b_distance = tl.zeros([BR], distance.dtype.element_ty)
        for d in range(0, D, BD):
            o_d = (d + tl.arange(0, BD)).to(tl.int64)
            mask = m_r[:, None] & (o_d < D)[None, :]
            b_c = tl.load(codebook + b_index[:, None] * stride_ck + o_d[None, :] * stride_cd, mask=mask, other=0.0)
            b_z = tl.load(p_z[:, None] + o_d[None, :] * stride_d, mask=mask, other=0.0)
            tl.store(p_q[:, None] + o_d[None, :] * stride_qd, b_c.to(z_q.dtype.element_ty), mask=mask)
            b_difference = b_z.to(distance.dtype.element_ty) - b_c.to(distance.dtype.element_ty)
            b_distance += tl.sum(b_difference * b_difference, 1)
        tl.store(distance + o_r, b_distance, mask=m_r)
        tl.atomic_add(counts + b_index, tl.full([BR], 1, tl.int64), mask=m_r)


@triton.jit
def _codebook_gradient_kernel(
    z, codebook, order, end, counts, scale, out, S, stride_b, stride_s, stride_d, stride_ck, stride_cd,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out_k = scale · Σ (c_k - z_i) over the vectors i of code k; ``order`` lists the vectors code by code."""
    k = tl.program_id(0).to(tl.int64)
    o_d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    b_c = tl.load(codebook + k * stride_ck + o_d * stride_cd, mask=m_d, other=0.0)
    stop = tl.load(end + k)
    begin = stop - tl.load(counts + k)
    b_sum = tl.zeros([BD], scale.dtype.element_ty)
    for i in range(begin, stop, BR):
        o_i = i + tl.arange(0, BR)
        row = tl.load(order + o_i, mask=o_i < stop, other=0)
        mask = (o_i < stop)[:, None] & m_d[None, :]
        p_z = z + _address(row, S, stride_b, stride_s)[:, None] + o_d[None, :] * stride_d
        b_z = tl.load(p_z, mask=mask, other=0.0)
        b_sum += tl.sum(tl.where(mask, b_c.to(b_sum.dtype)[None, :] - b_z.to(b_sum.dtype), 0.0), 0)
    tl.store(out + k * D + o_d, (b_sum * tl.load(scale)).to(out.dtype.element_ty), mask=m_d)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, dict[str, int]]:
    """A view (B, D, S) of x (B, D, *) or (N, D), B·S, S, and its strides; one stride must cover the positions of x."""
    flat = x.flatten(2) if x.ndim > 2 else x.t()[None]  # (B, D, S)
    strides = dict(zip(("stride_b", "stride_d", "stride_s"), flat.stride(), strict=True))
    return flat, flat.shape[0] * flat.shape[2], flat.shape[2], strides


def _split(x: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    flat, rows, positions, strides = _rows(x)
    width = x.shape[1]
    block = _block(width)
    padded = triton.cdiv(width, block) * block
    hi, lo = (torch.empty(rows, padded, dtype=torch.bfloat16, device=x.device) for _ in range(2))
    norm = torch.empty(rows, dtype=torch.float32, device=x.device)
    launch(
        _split_kernel,
        lambda meta: (triton.cdiv(rows, meta["BR"]),),
        [triton.Config({"BR": 32}, num_warps=4)],
        (),
        {
            "x": flat, "mean": mean, "hi": hi, "lo": lo, "norm": norm, "R": rows, "S": positions, "D": width,
            "DP": padded, "BD": block, **strides,
        },
    )  # fmt: skip
    return hi, lo, norm, padded


def _block(width: int) -> int:
    return 16 if width <= 16 else 32


class _Open(NamedTuple):
    """The rows that the scan left open: the first ``number``, int32 (1,), of ``rows``, int32 (N,)."""

    rows: torch.Tensor
    number: torch.Tensor


def _nothing_open(arguments: dict[str, Any]) -> None:
    """Before every run of the scan, of which tuning makes many."""
    arguments["open_count"].zero_()


def _scan(z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, _Open]:
    """(index int64, rival int32) of `_scan_kernel`, rivals not settled yet, and the open rows."""
    mean = codebook.mean(0, dtype=torch.float32)
    z_hi, z_lo, z_norm, padded = _split(z, mean)
    c_hi, c_lo, c_norm, _ = _split(codebook, mean)
    n, k, width = len(z_hi), *codebook.shape
    index = torch.empty(n, dtype=torch.int64, device=z.device)
    rival, rows = (torch.empty(n, dtype=torch.int32, device=z.device) for _ in range(2))
    open_ = _Open(rows, torch.empty(1, dtype=torch.int32, device=z.device))
    tiles = [(64, 64, 4, 3), (128, 64, 4, 3), (64, 128, 4, 3)]
    if capability(z.device)[0] != 12:  # where its registers spill
        tiles.append((128, 128, 8, 3))
    launch(
        _scan_kernel,
        lambda meta: (triton.cdiv(n, meta["BM"]),),
        [
            triton.Config({"BM": bm, "BN": bn}, num_warps=warps, num_stages=stages, pre_hook=_nothing_open)
            for bm, bn, warps, stages in tiles
        ],
        (width, triton.next_power_of_2(k), triton.next_power_of_2(n)),
        {
            "z_hi": z_hi, "z_lo": z_lo, "z_norm": z_norm, "c_hi": c_hi, "c_lo": c_lo, "c_norm": c_norm,
            "index": index, "rival": rival, "open_rows": open_.rows, "open_count": open_.number, "N": n, "K": k,
            "DP": padded, "D": width, "BD": _block(width),
        },
    )  # fmt: skip
    return index, rival, open_


class _Outputs(NamedTuple):
    """What the training form adds to the indices."""

    z_q: torch.Tensor
    distance: torch.Tensor
    counts: torch.Tensor


def _search(z: torch.Tensor, codebook: torch.Tensor, fused: _Outputs | None = None) -> torch.Tensor:
    """Indices int64 (N,) of z (B, D, *); the training form writes ``fused`` too."""
    index, rival, open_ = _scan(z, codebook)
    flat, rows, positions, strides = _rows(z)
    if rows == 0:  # the scan did not run, which counts the open rows
        return index
    programs = _PROGRAMS * multiprocessors(z.device)
    shared = {
        "z": flat, "codebook": codebook, "open_count": open_.number, "programs": programs, "S": positions,
        "K": len(codebook), "D": z.shape[1], "BD": min(64, _power(z.shape[1])), "BK": _CODES,
        "stride_ck": codebook.stride(0), "stride_cd": codebook.stride(1), **strides,
    }  # fmt: skip
    distance = torch.empty(max(rows, programs), dtype=torch.float64, device=z.device)
    nearest = torch.empty(max(rows, programs), dtype=torch.int32, device=z.device)
    launch(
        _search_kernel,
        lambda meta: (programs,),
        [triton.Config({}, num_warps=4)],
        (),
        {"open_rows": open_.rows, "distance": distance, "nearest": nearest, **shared},
    )
    out: dict[str, torch.Tensor | None] = {"z_q": None, "distance": None, "counts": None}
    quantised = strides
    if fused is not None:
        z_q, _, _, quantised = _rows(fused.z_q)
        out = {"z_q": z_q, "distance": fused.distance, "counts": fused.counts}
    launch(
        _settle_kernel,
        lambda meta: (triton.cdiv(rows, meta["BR"]),),
        [triton.Config({"BR": 32, "BC": 32}, num_warps=4)],
        (),
        {
            "index": index, "rival": rival, "open_distance": distance, "open_nearest": nearest, "N": rows,
            "FUSED": fused is not None, **shared,
            **{f"stride_q{axis}": quantised[f"stride_{axis}"] for axis in "bsd"}, **out,
        },
    )  # fmt: skip
    return index


def _power(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@torch.library.custom_op("tamingfast::triton_nearest_code", mutates_args=())
def _nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return _search(z, codebook)


@_nearest_code.register_fake
def _(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)


def nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the entry of codebook (K, D) nearest to each row of z (N, D), ties to the lowest; int64 (N,).

    Any floating dtypes and strides. Finiteness is not checked, because the host would have to wait for the device: a
    row with NaN or infinity gets some index below K.
    """
    return _nearest_code(z.detach(), codebook.detach())


def _outputs(z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """Uninitialised codes in the layout of z, and the dtype in which distances are summed."""
    dtype = torch.promote_types(z.dtype, codebook.dtype)
    return torch.empty_like(z, dtype=dtype), torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("tamingfast::triton_quantize", mutates_args=())
def _quantize(
    z: torch.Tensor, codebook: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z_q, indices, to_codes, to_latents, counts) of `quantize`."""
    z_q, dtype = _outputs(z, codebook)
    distance = torch.empty(z.numel() // z.shape[1], dtype=dtype, device=z.device)
    counts = torch.zeros(len(codebook), dtype=torch.int64, device=z.device)
    index = _search(z, codebook, _Outputs(z_q, distance, counts))
    error = distance.mean() / z.shape[1]
    return z_q, index, error, error.clone(), counts


@_quantize.register_fake
def _(
    z: torch.Tensor, codebook: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    z_q, dtype = _outputs(z, codebook)
    index = z.new_empty(z.numel() // z.shape[1], dtype=torch.int64)
    counts = z.new_empty(len(codebook), dtype=torch.int64)
    return z_q, index, z.new_empty((), dtype=dtype), z.new_empty((), dtype=dtype), counts


@torch.library.custom_op("tamingfast::triton_codebook_gradient", mutates_args=())
def _codebook_gradient(
    z: torch.Tensor, codebook: torch.Tensor, index: torch.Tensor, counts: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """scale · Σ (c_k - z_i) for each code k; vectors are sorted first, which fixes the order and avoids atomics."""
    flat, _, positions, strides = _rows(z)
    width = z.shape[1]
    out = torch.empty(codebook.shape, dtype=codebook.dtype, device=z.device)
    launch(
        _codebook_gradient_kernel,
        lambda meta: (len(codebook), triton.cdiv(width, min(128, _power(width)))),
        [triton.Config({"BR": 16}, num_warps=4)],
        (),
        {
            "z": flat, "codebook": codebook, "order": torch.argsort(index, stable=True), "end": counts.cumsum(0),
            "counts": counts, "scale": scale, "out": out, "S": positions, "D": width, "BD": min(128, _power(width)),
            "stride_ck": codebook.stride(0), "stride_cd": codebook.stride(1), **strides,
        },
    )  # fmt: skip
    return out


@_codebook_gradient.register_fake
def _(
    z: torch.Tensor, codebook: torch.Tensor, index: torch.Tensor, counts: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return codebook.new_empty(codebook.shape)


# ctx is torch's object, to which we add attributes; hence Any.
def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: tuple[torch.Tensor, ...]) -> None:
    z, codebook = inputs
    z_q, index, _, _, counts = output
    ctx.mark_non_differentiable(index, counts)
    ctx.save_for_backward(z, codebook, z_q, index, counts)


def _gradients(
    ctx: Any,
    grad_z_q: torch.Tensor,
    _index: torch.Tensor | None,
    grad_to_codes: torch.Tensor,
    grad_to_latents: torch.Tensor,
    _counts: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    z, codebook, z_q, index, counts = ctx.saved_tensors
    grad_z = grad_codebook = None
    if ctx.needs_input_grad[0]:
        grad_z = (grad_z_q + (z - z_q) * (grad_to_codes * (2 / z.numel()))).to(z.dtype)
    if ctx.needs_input_grad[1]:
        grad_codebook = _codebook_gradient(z, codebook, index, counts, grad_to_latents * (2 / z.numel()))
    return grad_z, grad_codebook


_quantize.register_autograd(_gradients, setup_context=_setup_context)


def quantize(
    z: torch.Tensor, codebook: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors of z (B, D, *) or (N, D) replaced by their nearest codes: search and training terms in one pass.

    Returns ``(z_q, indices, to_codes, to_latents, counts)``: the codes in the shape and layout of z, whose gradient
    passes straight through to z; int64 (N,); the mean squared difference twice, with a gradient for z and with one for
    the codebook; how often each code was chosen, int64 (K,).
    """
    if z.ndim == 4 and z.is_contiguous(memory_format=torch.channels_last):
        return _quantize(z, codebook)
    return _quantize(z if z.ndim < 4 else z.contiguous(), codebook)
