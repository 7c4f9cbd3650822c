"""Encoder and decoder of the first stage, and their blocks (paper section 3.1).

Module names are the original's state-dict keys. Every network describes itself to the engines as a list of
`tamingfast.engines.layers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast import ops
from tamingfast.engines import layers
from tamingfast.errors import UserError
from tamingfast.models.base import at_least, described, in_turn

GROUPS = 32  # of every norm, unless a relative's network has others


@layers.described
class GroupNorm(nn.GroupNorm):
    """GroupNorm with eps 1e-6, fused with the activation x * sigmoid(x) if ``silu``."""

    def __init__(self, channels: int, silu: bool = False, groups: int = GROUPS):
        super().__init__(num_groups=groups, num_channels=channels, eps=1e-6)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, groups=self.num_groups, eps=self.eps, silu=self.silu)


def Normalize(in_channels: int) -> GroupNorm:
    """`GroupNorm` without the activation, under the original's name."""
    return GroupNorm(in_channels)


@layers.described
class ResnetBlock(nn.Module):
    """Two rounds of `GroupNorm`, SiLU and 3x3 convolution, plus a shortcut: a convolution if the width changes.

    Without ``bias`` no convolution has one. With ``branch_shortcut`` that convolution is applied to the branch h in
    place of the block's input, which is then not added: h + shortcut(h).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 0,
        groups: int = GROUPS,
        bias: bool = True,
        branch_shortcut: bool = False,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.norm1 = GroupNorm(in_channels, True, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = GroupNorm(out_channels, True, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.shortcut, self.branch_shortcut = None, branch_shortcut and in_channels != out_channels
        if in_channels != out_channels:
            self.shortcut = "conv_shortcut" if conv_shortcut else "nin_shortcut"
            kernel, source = 3 if conv_shortcut else 1, out_channels if branch_shortcut else in_channels
            self.add_module(self.shortcut, nn.Conv2d(source, out_channels, kernel, padding=kernel // 2, bias=bias))

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(self.norm2(h)))
        x = h if self.branch_shortcut else x
        return (x if self.shortcut is None else getattr(self, self.shortcut)(x)) + h

    def layer(self) -> layers.Residual | layers.Whole:
        """The block's description for engines."""
        shortcut = None if self.shortcut is None else getattr(self, self.shortcut)
        if self.branch_shortcut and shortcut is not None:
            return layers.Whole(module=self, convolutions=(self.conv1, self.conv2, shortcut))
        return layers.Residual(
            module=self, norm1=self.norm1, conv1=self.conv1, norm2=self.norm2, conv2=self.conv2, shortcut=shortcut
        )


@layers.described
class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with 1x1 convolutions as projections."""

    def __init__(self, in_channels: int, groups: int = GROUPS):
        super().__init__()
        self.norm = GroupNorm(in_channels, groups=groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer().attend(x)

    def layer(self) -> layers.Attention:
        """The block's description for engines."""
        return layers.Attention(
            module=self, norm=self.norm, query=self.q, key=self.k, value=self.v, projection=self.proj_out
        )


@layers.described
class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution if ``with_conv``."""

    def __init__(self, in_channels: int, with_conv: bool = True):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x

    def layer(self) -> layers.Upsample:
        """The block's description for engines."""
        return layers.Upsample(module=self, conv=self.conv if self.with_conv else None)


@layers.described
class Downsample(nn.Module):
    """Downsampling by 2: a strided 3x3 convolution, or an average.

    The convolution's input is padded on the right and at the bottom only, unless ``padding`` (left, right, top, bottom)
    says otherwise.
    """

    def __init__(self, in_channels: int, with_conv: bool = True, padding: layers.Padding = layers.DOWNSAMPLE_PADDING):
        super().__init__()
        self.with_conv, self.padding = with_conv, padding
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding)) if self.with_conv else F.avg_pool2d(x, 2)

    def layer(self) -> layers.Downsample:
        """The block's description for engines."""
        return layers.Downsample(module=self, conv=self.conv if self.with_conv else None, padding=self.padding)


_Part: TypeAlias = ResnetBlock | AttnBlock | Upsample | Downsample


@dataclass(frozen=True)
class Blocks:
    """How the blocks of a network are built: the settings that all of them share."""

    dropout: float = 0.0
    groups: int = GROUPS
    bias: bool = True
    branch_shortcut: bool = False

    def residual(self, channels: int, out: int) -> ResnetBlock:
        """A residual block from ``channels`` to ``out`` channels."""
        return ResnetBlock(
            in_channels=channels, out_channels=out, dropout=self.dropout, groups=self.groups, bias=self.bias,
            branch_shortcut=self.branch_shortcut,
        )  # fmt: skip

    def attention(self, channels: int) -> AttnBlock:
        """Attention over ``channels`` channels."""
        return AttnBlock(channels, self.groups)


@layers.described
class _Level(nn.Module):
    """The blocks of one resolution, each followed by attention if ``attention``, then the change of resolution."""

    checkpointing = False

    def __init__(self, make: Blocks, channels: int, out: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(make.residual(out if i else channels, out) for i in range(blocks))
        self.attn = nn.ModuleList(make.attention(out) for _ in range(blocks if attention else 0))
        self.upsample: Upsample | None = None
        self.downsample: Downsample | None = None

    def parts(self) -> list[_Part]:
        """The modules in the order in which they run."""
        parts: list[nn.Module] = []
        for i, block in enumerate(self.block):
            parts.append(block)
            if self.attn:
                parts.append(self.attn[i])
        parts += [module for module in (self.upsample, self.downsample) if module is not None]
        return cast("list[_Part]", parts)

    def forward(self, x: Tensor) -> Tensor:
        return in_turn(self.parts(), x, self.checkpointing)


@layers.described
class _Middle(nn.Module):
    """The blocks at the lowest resolution, with attention after the first of them if ``attention``."""

    checkpointing = False

    def __init__(self, make: Blocks, channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        for i in range(blocks):
            self.add_module(f"block_{i + 1}", make.residual(channels, channels))
            if i == 0 and attention:
                self.attn_1 = make.attention(channels)

    def parts(self) -> list[_Part]:
        """The modules in the order in which they run."""
        return cast("list[_Part]", list(self.children()))

    def forward(self, x: Tensor) -> Tensor:
        return in_turn(self.parts(), x, self.checkpointing)


@dataclass(frozen=True)
class Shape:
    """What an encoder and a decoder share of a ``ddconfig``."""

    make: Blocks
    widths: list[int]
    attends: list[bool]
    mid_blocks: int
    mid_attention: bool

    @classmethod
    def of(
        cls,
        ch: int,
        ch_mult: Iterable[float],
        resolution: int,
        attn_resolutions: Iterable[int],
        dropout: float,
        *,
        attn_type: str | None = "vanilla",
        use_linear_attn: bool | None = False,
        num_groups: int = GROUPS,
        mid_blocks: int = 2,
        mid_attention: bool = True,
        bias: bool = True,
        branch_shortcut: bool = False,
        **ignored: Any,
    ) -> Shape:
        if use_linear_attn or attn_type not in ("vanilla", "none", None):
            name, value = ("use_linear_attn", use_linear_attn) if use_linear_attn else ("attn_type", attn_type)
            valid = "false" if use_linear_attn else "'vanilla' or 'none'"
            raise UserError(f"ddconfig.{name}: got {value!r}, expected {valid}, as no other attention is built")
        at_least(1, mid_blocks=mid_blocks, num_groups=num_groups)
        widths = [round(ch * multiplier) for multiplier in ch_mult]
        sides, some = set(attn_resolutions), attn_type != "none"
        attends = [some and resolution // 2**level in sides for level in range(len(widths))]
        return cls(
            Blocks(dropout, num_groups, bias, branch_shortcut), widths, attends, mid_blocks, some and mid_attention
        )


@layers.described
class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> latents (B, z_channels, H/f, W/f), f = 2^(len(ch_mult)-1).

    With ``double_z`` there are 2 * z_channels latents. H/f and W/f are rounded down, as in the original.
    ``ch * ch_mult[i]`` is the width at level i. Attention follows every block of the levels whose feature maps have a
    side in ``attn_resolutions``, for square inputs of side ``resolution``.

    The following serve relatives of the original's networks, whose weights are opened here (docs/families.md):
    ``attn_type`` "none" leaves out all attention, ``mid_attention`` False that among the ``mid_blocks`` blocks of the
    lowest resolution; ``num_groups`` is that of every norm; without ``bias`` the first convolution and those of the
    blocks have none; ``branch_shortcut`` is explained at `ResnetBlock`; ``out_kernel`` is the size of the last
    convolution; ``symmetric`` pads all sides before downsampling.

    Other keyword arguments of the shared ``ddconfig`` are ignored.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Iterable[float] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Iterable[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        out_kernel: int = 3,
        symmetric: bool = False,
        **others: Any,
    ):
        super().__init__()
        at_least(1, in_channels=in_channels, z_channels=z_channels, resolution=resolution)
        at_least(0, num_res_blocks=num_res_blocks)
        shape = Shape.of(ch, ch_mult, resolution, attn_resolutions, dropout, **others)
        make, widths = shape.make, shape.widths
        self.ch, self.temb_ch, self.in_channels, self.resolution = ch, 0, in_channels, resolution
        self.num_resolutions, self.num_res_blocks = len(widths), num_res_blocks
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1, bias=make.bias)
        self.down = nn.ModuleList()
        padding = (1, 1, 1, 1) if symmetric else layers.DOWNSAMPLE_PADDING
        for i, width in enumerate(widths):
            level = _Level(make, widths[i - 1] if i else ch, width, num_res_blocks, shape.attends[i])
            if i < len(widths) - 1:
                level.downsample = Downsample(width, resamp_with_conv, padding)
            self.down.append(level)
        self.mid = _Middle(make, widths[-1], shape.mid_blocks, shape.mid_attention)
        self.norm_out = GroupNorm(widths[-1], True, make.groups)
        latents = 2 * z_channels if double_z else z_channels
        self.conv_out = nn.Conv2d(widths[-1], latents, out_kernel, padding=out_kernel // 2)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x has the type, the dtype and the shape of images for this encoder."""
        side, channels, dtype = 2 ** (self.num_resolutions - 1), self.in_channels, self.conv_in.weight.dtype
        if isinstance(x, Tensor):
            # Autocast converts what the convolutions get, but floating point only.
            fits = x.dtype == dtype or (x.is_floating_point() and torch.is_autocast_enabled(x.device.type))
            if fits and x.ndim == 4 and x.shape[1] == channels and min(x.shape[2:]) >= side:
                return
        sides = f", H and W at least {side}" if side > 1 else ""
        raise ValueError(
            f"x: got {described(x)}, expected a {dtype} tensor (B, {channels}, H, W) in [-1, 1]{sides}; from 8-bit "
            "pixels (H, W, C): torch.as_tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1"
        )

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(self.norm_out(self.mid(h)))

    def layers(self) -> list[layers.Layer]:
        """The network's description for engines, in the order of `forward`."""
        parts = [part for level in cast("Iterable[_Level]", self.down) for part in level.parts()]
        blocks = [part.layer() for part in (*parts, *self.mid.parts())]
        return [layers.Convolution(self.conv_in), *blocks, layers.Convolution(self.conv_out, self.norm_out)]


@layers.described
class Decoder(nn.Module):
    """The encoder reversed: latents (B, z_channels, h, w) -> images (B, out_ch, f*h, f*w).

    ``up[i]`` belongs to level i, as in the encoder, so the last entry runs first. ``tanh_out`` ends the network with
    tanh; the other settings are those of `Encoder`.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Iterable[float] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Iterable[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        tanh_out: bool | None = False,
        **others: Any,
    ):
        super().__init__()
        at_least(1, out_ch=out_ch, z_channels=z_channels, resolution=resolution)
        at_least(-1, num_res_blocks=num_res_blocks)
        shape = Shape.of(ch, ch_mult, resolution, attn_resolutions, dropout, **others)
        make, widths = shape.make, shape.widths
        self.give_pre_end, self.tanh_out = give_pre_end, bool(tanh_out)
        self.ch, self.temb_ch, self.resolution = ch, 0, resolution
        self.num_resolutions, self.num_res_blocks = len(widths), num_res_blocks
        lowest = resolution // 2 ** (len(widths) - 1)
        self.z_shape = (1, z_channels, lowest, lowest)
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(make, widths[-1], shape.mid_blocks, shape.mid_attention)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            above = widths[min(i + 1, len(widths) - 1)]
            level = _Level(make, above, width, num_res_blocks + 1, shape.attends[i])
            if i > 0:
                level.upsample = Upsample(width, resamp_with_conv)
            self.up.append(level)
        self.norm_out = GroupNorm(widths[0], True, make.groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(self.norm_out(h))
        return torch.tanh(h) if self.tanh_out else h

    def layers(self) -> list[layers.Layer]:
        """The network's description for engines, in the order of `forward`."""
        parts = [part for level in cast("list[_Level]", list(reversed(self.up))) for part in level.parts()]
        found: list[layers.Layer] = [layers.Convolution(self.conv_in)]
        found += [part.layer() for part in (*self.mid.parts(), *parts)]
        return found if self.give_pre_end else [*found, layers.Convolution(self.conv_out, self.norm_out, self.tanh_out)]
