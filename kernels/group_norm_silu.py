"""GroupNorm (Wu and He 2018) and SiLU in one: ``o = y · sigmoid(y)``, ``y = x̂ · w + b``, ``x̂ = (x - mean) · rstd``.

Backward, with ``g = do · sigmoid(y) (1 + y (1 - sigmoid(y)))``: ``dw = Σ g x̂``, ``db = Σ g`` over images and positions,
``dx = rstd (g w - mean(g w) - x̂ mean(g w x̂))`` with means over the group. Statistics and sums are float32.

A tensor is addressed as (image, channel, position) with three strides, so contiguous and channels-last tensors are read
in place. A group that fits into one program is read once. Larger groups take three launches: sums of each channel over
pieces of the positions, with enough pieces to fill the device; their combination for each group; and the element-wise
output. The pieces' moments are combined by Chan et al. 1983 (eq. 2.1), and each piece is summed relative to the mean of
its first tile, so that a large mean does not cancel the variance.

The images of such groups can be taken in chunks that fit `_CACHE_SHARE` of the L2 cache, so that the last launch reads
there what the first one read from memory. Of three passes over memory (x, x again, the output) two are left, of the
five of the backward pass three; but each chunk has three launches of its own, whose starts and ends leave the device
partly idle. On an H100 (3.3 TB/s, 50 MB) a chunk of 20 MB saves 6 us at most, and costs about as much. So it is off
until it has been measured to be faster; `benchmarks/test_group_norm.py` measures both.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import launch
from .device import cache_bytes, multiprocessors

_WHOLE_GROUP = 8192  # elements that one program holds in registers
_TILE = 4096
_MAX_PIECES = 64
_CACHE_SHARE = (
    0.0  # of the L2 cache that a chunk of images may fill; 0 takes all images at once, 0.5 leaves room to write
)


@triton.jit
def _activate(b_y, SILU: tl.constexpr):
    if SILU:
        b_y = b_y * tl.sigmoid(b_y)
    return b_y


@triton.jit
def _through_activation(b_grad, b_y, SILU: tl.constexpr):
    """Gradient of y from the gradient of the output."""
    if SILU:
        b_sigmoid = tl.sigmoid(b_y)
        b_grad = b_grad * b_sigmoid * (1.0 + b_y * (1.0 - b_sigmoid))
    return b_grad


@triton.jit
def _group_tile(C, S, CG: tl.constexpr, stride_n, stride_c, stride_s, BC: tl.constexpr, BS: tl.constexpr):
    """For this program's group: image, channels [BC] and their mask, offsets and mask of the elements [BC, BS]."""
    n, g = tl.program_id(0) // (C // CG), tl.program_id(0) % (C // CG)
    o_c, o_s = tl.arange(0, BC), tl.arange(0, BS)
    mask = (o_c < CG)[:, None] & (o_s < S)[None, :]
    channel = g * CG + o_c  # CG is a constant, so the compiler knows the alignment of channels
    offset = n.to(tl.int64) * stride_n + channel.to(tl.int64)[:, None] * stride_c + o_s[None, :] * stride_s
    return n, tl.where(o_c < CG, channel, 0), o_c < CG, offset, mask


@triton.jit
def _whole_forward_kernel(
    x, weight, bias, out, mean, rstd, C, S, eps, stride_n, stride_c, stride_s,
    SILU: tl.constexpr, CG: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    _, o_c, m_c, offset, mask = _group_tile(C, S, CG, stride_n, stride_c, stride_s, BC, BS)
    b_x = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)  # [BC, BS]
    count = 1.0 * CG * S
    b_mean = tl.sum(tl.sum(b_x, 1), 0) / count
    b_x = tl.where(mask, b_x - b_mean, 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(b_x * b_x, 1), 0) / count + eps)
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_b = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_x * b_rstd * b_w[:, None] + b_b[:, None]
    tl.store(out + offset, _activate(b_y, SILU).to(out.dtype.element_ty), mask=mask)
    tl.store(mean + tl.program_id(0), b_mean)
    tl.store(rstd + tl.program_id(0), b_rstd)


@triton.jit
def _whole_backward_kernel(
    x, grad, weight, bias, mean, rstd, dx, scaled, plain, C, S, stride_n, stride_c, stride_s,
    SILU: tl.constexpr, CG: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dx, and for each image and channel ``scaled`` = Σ g x̂ and ``plain`` = Σ g."""
    n, o_c, m_c, offset, mask = _group_tile(C, S, CG, stride_n, stride_c, stride_s, BC, BS)
    b_mean, b_rstd = tl.load(mean + tl.program_id(0)), tl.load(rstd + tl.program_id(0))
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)[:, None]
    b_b = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[:, None]
    b_x = (tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) - b_mean) * b_rstd  # [BC, BS]
    b_grad = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    b_grad = _through_activation(b_grad, b_x * b_w + b_b, SILU)
    tl.store(scaled + n * C + o_c, tl.sum(b_grad * b_x, 1), mask=m_c)
    tl.store(plain + n * C + o_c, tl.sum(b_grad, 1), mask=m_c)
    b_grad *= b_w
    count = 1.0 * CG * S
    b_scaled = tl.sum(tl.sum(b_grad * b_x, 1), 0) / count
    b_plain = tl.sum(tl.sum(b_grad, 1), 0) / count
    b_dx = b_rstd * (b_grad - b_plain - b_x * b_scaled)
    tl.store(dx + offset, b_dx.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _piece(C, pieces, stride_n, stride_c, BC: tl.constexpr):
    """For this program: image, channels [BC] and their mask, piece, offset [BC, 1] of the first position."""
    i_piece = tl.program_id(0) % pieces
    blocks = tl.cdiv(C, BC)
    i_c = tl.program_id(0) // pieces % blocks
    n = tl.program_id(0) // pieces // blocks
    o_c = i_c * BC + tl.arange(0, BC)
    offset = n.to(tl.int64) * stride_n + o_c.to(tl.int64)[:, None] * stride_c
    return n, o_c, o_c < C, i_piece, offset


@triton.jit
def _moments_kernel(
    x, mean, spread, C, S, span, pieces, stride_n, stride_c, stride_s, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """For each image, piece of ``span`` positions and channel: the mean, and the sum of squared deviations from it."""
    n, o_c, m_c, i_piece, o_x = _piece(C, pieces, stride_n, stride_c, BC)
    begin = i_piece * span
    end = tl.minimum(begin + span, S)
    o_s = begin + tl.arange(0, BS)
    mask = m_c[:, None] & (o_s < end)[None, :]
    b_x = tl.load(x + o_x + o_s.to(tl.int64)[None, :] * stride_s, mask=mask, other=0.0).to(tl.float32)  # [BC, BS]
    b_shift = tl.sum(b_x, 1) / tl.minimum(end - begin, BS).to(tl.float32)  # [BC]
    b_sum = tl.zeros([BC, BS], tl.float32)
    b_square = tl.zeros([BC, BS], tl.float32)
    for s in range(begin, end, BS):
        o_s = s + tl.arange(0, BS)
        mask = m_c[:, None] & (o_s < end)[None, :]
        b_x = tl.load(x + o_x + o_s.to(tl.int64)[None, :] * stride_s, mask=mask, other=0.0).to(tl.float32)
        b_x = tl.where(mask, b_x - b_shift[:, None], 0.0)
        b_sum += b_x
        b_square += b_x * b_x
    count = (end - begin).to(tl.float32)
    b_total = tl.sum(b_sum, 1)
    p_out = (n * pieces + i_piece).to(tl.int64) * C + o_c
    tl.store(mean + p_out, b_shift + b_total / count, mask=m_c)
    tl.store(spread + p_out, tl.sum(b_square, 1) - b_total * b_total / count, mask=m_c)


@triton.jit
def _piece_sums(C, S, CG: tl.constexpr, span, pieces, BP: tl.constexpr, BC: tl.constexpr):
    """For this program's group: image, channels [BC], mask, offsets and mask [BP, BC] of sums, lengths [BP, 1]."""
    n, g = tl.program_id(0) // (C // CG), tl.program_id(0) % (C // CG)
    o_p, o_c = tl.arange(0, BP), tl.arange(0, BC)
    mask = (o_p < pieces)[:, None] & (o_c < CG)[None, :]
    offset = (n * pieces + o_p).to(tl.int64)[:, None] * C + (g * CG + o_c)[None, :]
    length = tl.maximum(tl.minimum(S - o_p * span, span), 0).to(tl.float32)[:, None]
    return n, g * CG + o_c, o_c < CG, offset, mask, length


@triton.jit
def _combine_moments_kernel(
    piece_mean, piece_spread, mean, rstd, C, S, span, pieces, eps, CG: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    _, _, _, offset, mask, length = _piece_sums(C, S, CG, span, pieces, BP, BC)
    count = 1.0 * CG * S
    b_mean = tl.load(piece_mean + offset, mask=mask, other=0.0)  # [BP, BC]
    b_all = tl.sum(tl.sum(b_mean * length, 1), 0) / count
    b_difference = tl.where(mask, b_mean - b_all, 0.0)
    b_spread = tl.load(piece_spread + offset, mask=mask, other=0.0) + b_difference * b_difference * length
    tl.store(mean + tl.program_id(0), b_all)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(tl.sum(b_spread, 1), 0) / count + eps))


@triton.jit
def _gradient_sums_kernel(
    x, grad, weight, bias, mean, rstd, scaled, plain, C, S, span, pieces, stride_n, stride_c, stride_s,
    SILU: tl.constexpr, CG: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """For each image, piece and channel: ``scaled`` = Σ g x̂ and ``plain`` = Σ g."""
    n, o_c, m_c, i_piece, o_x = _piece(C, pieces, stride_n, stride_c, BC)
    begin = i_piece * span
    end = tl.minimum(begin + span, S)
    i_group = n * (C // CG) + o_c // CG
    b_mean = tl.load(mean + i_group, mask=m_c, other=0.0)[:, None]
    b_rstd = tl.load(rstd + i_group, mask=m_c, other=0.0)[:, None]
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)[:, None]
    b_b = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[:, None]
    b_scaled = tl.zeros([BC, BS], tl.float32)
    b_plain = tl.zeros([BC, BS], tl.float32)
    for s in range(begin, end, BS):
        o_s = s + tl.arange(0, BS)
        mask = m_c[:, None] & (o_s < end)[None, :]
        offset = o_x + o_s.to(tl.int64)[None, :] * stride_s
        b_x = (tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) - b_mean) * b_rstd  # [BC, BS]
        b_grad = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        b_grad = _through_activation(b_grad, b_x * b_w + b_b, SILU)
        b_scaled += b_grad * b_x
        b_plain += b_grad
    p_out = (n * pieces + i_piece).to(tl.int64) * C + o_c
    tl.store(scaled + p_out, tl.sum(b_scaled, 1), mask=m_c)
    tl.store(plain + p_out, tl.sum(b_plain, 1), mask=m_c)


@triton.jit
def _combine_gradients_kernel(
    piece_scaled, piece_plain, weight, scaled, plain, group_scaled, group_plain, C, S, span, pieces,
    CG: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sums of each image and channel, and the group's means of g w x̂ and g w."""
    n, o_c, m_c, offset, mask, _ = _piece_sums(C, S, CG, span, pieces, BP, BC)
    b_scaled = tl.sum(tl.load(piece_scaled + offset, mask=mask, other=0.0), 0)  # [BC]
    b_plain = tl.sum(tl.load(piece_plain + offset, mask=mask, other=0.0), 0)
    tl.store(scaled + n * C + o_c, b_scaled, mask=m_c)
    tl.store(plain + n * C + o_c, b_plain, mask=m_c)
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    count = 1.0 * CG * S
    tl.store(group_scaled + tl.program_id(0), tl.sum(b_scaled * b_w, 0) / count)
    tl.store(group_plain + tl.program_id(0), tl.sum(b_plain * b_w, 0) / count)


@triton.jit
def _elementwise_kernel(
    x, grad, weight, bias, mean, rstd, group_scaled, group_plain, out, C, S, tiles, stride_n, stride_c, stride_s,
    BACKWARD: tl.constexpr, SILU: tl.constexpr, CG: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The output from x and the statistics; if BACKWARD, dx from these, grad and the group's means."""
    n, o_c, m_c, i_tile, o_x = _piece(C, tiles, stride_n, stride_c, BC)
    # In reverse, because the cache may still hold the last positions, where the sums ended.
    o_s = (tiles - 1 - i_tile) * BS + tl.arange(0, BS)
    mask = m_c[:, None] & (o_s < S)[None, :]
    offset = o_x + o_s.to(tl.int64)[None, :] * stride_s
    i_group = n * (C // CG) + o_c // CG
    b_mean = tl.load(mean + i_group, mask=m_c, other=0.0)[:, None]
    b_rstd = tl.load(rstd + i_group, mask=m_c, other=0.0)[:, None]
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)[:, None]
    b_b = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[:, None]
    b_x = (tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) - b_mean) * b_rstd  # [BC, BS]
    b_y = b_x * b_w + b_b
    if BACKWARD:
        b_grad = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        b_scaled = tl.load(group_scaled + i_group, mask=m_c, other=0.0)[:, None]
        b_plain = tl.load(group_plain + i_group, mask=m_c, other=0.0)[:, None]
        b_out = b_rstd * (_through_activation(b_grad, b_y, SILU) * b_w - b_plain - b_x * b_scaled)
    else:
        b_out = _activate(b_y, SILU)
    tl.store(out + offset, b_out.to(out.dtype.element_ty), mask=mask)


class _Plan:
    """How the tensor x (N, C, H, W) is split, and a launch method for each kind of split."""

    def __init__(self, x: torch.Tensor, groups: int) -> None:
        self.images, channels, height, width = x.shape
        positions, size = height * width, channels // groups
        self.channels_last = x.stride(1) == 1 and positions > 1
        self.shape = {"C": channels, "S": positions}
        self.size = size
        self.groups = self.images * groups
        # In a dense tensor one stride covers all positions.
        self.strides = {"stride_n": channels * positions, "stride_c": 1, "stride_s": channels}
        if not self.channels_last:
            self.strides = {"stride_n": channels * positions, "stride_c": positions, "stride_s": 1}
        power = triton.next_power_of_2
        self.group_tile = {"CG": size, "BC": power(size), "BS": power(positions)}
        self.fits = power(size) * power(positions) <= _WHOLE_GROUP
        if self.channels_last:
            block_c = min(power(channels), 128)
            self.tile = {"BC": block_c, "BS": min(power(positions), _TILE // block_c)}
        else:
            block_s = min(power(positions), _TILE // 2)
            self.tile = {"BC": min(power(channels), _TILE // block_s), "BS": block_s}
        self.tiles = triton.cdiv(positions, self.tile["BS"])
        self.blocks = self.images * triton.cdiv(channels, self.tile["BC"])
        wanted = triton.cdiv(4 * multiprocessors(x.device), max(self.blocks, 1))
        span = triton.cdiv(self.tiles, min(wanted, _MAX_PIECES, self.tiles)) * self.tile["BS"]
        self.pieces = triton.cdiv(positions, span)
        self.cut = {"span": span, "pieces": self.pieces}
        self.piece_tile = {"CG": size, "BP": power(self.pieces), "BC": power(size)}

    def whole(self, kernel: triton.JITFunction, **arguments: object) -> None:
        """One program for each group, which it holds in registers."""
        self._launch(kernel, self.groups, 4, arguments | self.strides | self.group_tile)

    def over_pieces(self, kernel: triton.JITFunction, **arguments: object) -> None:
        """One program for each image, block of channels and piece of the positions."""
        self._launch(kernel, self.blocks * self.pieces, 4, arguments | self.cut | self.strides | self.tile)

    def over_groups(self, kernel: triton.JITFunction, **arguments: object) -> None:
        """One program for each group, which combines the group's pieces."""
        self._launch(kernel, self.groups, 2, arguments | self.cut | self.piece_tile)

    def over_tiles(self, kernel: triton.JITFunction, **arguments: object) -> None:
        """One program for each image, block of channels and tile of the positions."""
        arguments |= {"tiles": self.tiles, "CG": self.size} | self.strides | self.tile
        self._launch(kernel, self.blocks * self.tiles, 4, arguments)

    def _launch(self, kernel: triton.JITFunction, programs: int, warps: int, arguments: dict[str, object]) -> None:
        config = triton.Config({}, num_warps=warps, num_stages=2)
        launch(kernel, lambda meta: (programs,), [config], (), {**arguments, **self.shape})


def _chunks(x: torch.Tensor, tensors: int) -> list[slice]:
    """The images in equal parts, of which ``tensors`` like x fit the cache; all of them where not even one does."""
    images = x.shape[0]
    at_once = int(_CACHE_SHARE * cache_bytes(x.device)) // (tensors * x[:1].nbytes)
    if not 0 < at_once < images:
        return [slice(0, images)]
    size = triton.cdiv(images, triton.cdiv(images, at_once))
    return [slice(first, first + size) for first in range(0, images, size)]


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if contiguous or channels-last, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


@torch.library.custom_op("tamingfast::triton_group_norm_silu", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output in the layout of x, which is dense; means and reciprocal standard deviations, float32 (N, groups)."""
    weight, bias = weight.contiguous(), bias.contiguous()
    out = torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    plan = _Plan(x, groups)
    shared = {"weight": weight, "bias": bias, "SILU": silu}
    if plan.fits:
        plan.whole(_whole_forward_kernel, x=x, out=out, mean=mean, rstd=rstd, eps=eps, **shared)
        return out, mean, rstd
    for images in _chunks(x, 1):
        _forward_in_pieces(x[images], out[images], mean[images], rstd[images], eps, shared)
    return out, mean, rstd


def _forward_in_pieces(
    x: torch.Tensor, out: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, eps: float, shared: dict[str, object]
) -> None:
    plan = _Plan(x, mean.shape[1])
    means, spreads = (x.new_empty(x.shape[0], plan.pieces, x.shape[1], dtype=torch.float32) for _ in range(2))
    plan.over_pieces(_moments_kernel, x=x, mean=means, spread=spreads)
    plan.over_groups(_combine_moments_kernel, piece_mean=means, piece_spread=spreads, mean=mean, rstd=rstd, eps=eps)
    unused = {"grad": None, "group_scaled": None, "group_plain": None}
    plan.over_tiles(_elementwise_kernel, x=x, out=out, mean=mean, rstd=rstd, BACKWARD=False, **shared, **unused)


@_forward.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


@torch.library.custom_op("tamingfast::triton_group_norm_silu_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias."""
    plan = _Plan(x, mean.shape[1])
    layout = torch.channels_last if plan.channels_last else torch.contiguous_format
    dx, grad = torch.empty_like(x), grad.contiguous(memory_format=layout)
    scaled, plain = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    tensors = {"x": x, "grad": grad, "mean": mean, "rstd": rstd, "dx": dx, "scaled": scaled, "plain": plain}
    shared = {"weight": weight.contiguous(), "bias": bias.contiguous(), "SILU": silu}
    if plan.fits:
        plan.whole(_whole_backward_kernel, **tensors, **shared)
    else:
        for images in _chunks(x, 2):
            _backward_in_pieces(**{name: value[images] for name, value in tensors.items()}, shared=shared)
    return dx, scaled.sum(0).to(weight.dtype), plain.sum(0).to(bias.dtype)


def _backward_in_pieces(
    x: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
    scaled: torch.Tensor,
    plain: torch.Tensor,
    shared: dict[str, object],
) -> None:
    plan = _Plan(x, mean.shape[1])
    inputs = {"x": x, "grad": grad, "mean": mean, "rstd": rstd, **shared}
    pieces = [x.new_empty(x.shape[0], plan.pieces, x.shape[1], dtype=torch.float32) for _ in range(2)]
    plan.over_pieces(_gradient_sums_kernel, scaled=pieces[0], plain=pieces[1], CG=plan.size, **inputs)
    means = {name: torch.empty_like(mean) for name in ("group_scaled", "group_plain")}
    plan.over_groups(
        _combine_gradients_kernel, piece_scaled=pieces[0], piece_plain=pieces[1], weight=shared["weight"],
        scaled=scaled, plain=plain, **means,
    )  # fmt: skip
    plan.over_tiles(_elementwise_kernel, out=dx, BACKWARD=True, **inputs, **means)


@_backward.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


# ctx is torch's object, to which we add attributes; hence Any.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, _, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _gradients(
    ctx: Any, grad: torch.Tensor, _mean: torch.Tensor | None, _rstd: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.silu), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
) -> torch.Tensor:
    """GroupNorm and SiLU of x (N, C, H, W) in float16, bfloat16 or float32; weight and bias (C,) of any floating dtype.

    Contiguous and channels-last tensors keep their layout. Returns the dtype of x even where the weights are wider, as
    mixed-precision training needs it. ``groups`` divides C.
    """
    return _forward(_dense(x), weight, bias, groups, eps, silu)[0]
