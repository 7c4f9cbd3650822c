"""Tiny random checkpoints of the families that descend from the original, and what their networks compute.

Each network is a plain function that asks for its weights by the names of its family. On the first call the weights
are made, so that one description is both the layout of the file and the reference to compare with; nothing of the
package is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights:
    """Random weights by name, made when they are first asked for."""

    def __init__(self, seed: int) -> None:
        self.state: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(seed)

    def get(self, name: str, *shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        if name not in self.state:
            self.state[name] = around + scale * torch.randn(shape, generator=self.random)
        assert self.state[name].shape == shape, name
        return self.state[name]

    def conv(
        self, x: Tensor, name: str, out: int, kernel: int = 3, stride: int = 1, bias: bool = True, pad: bool = True
    ) -> Tensor:
        inner = x.shape[1]
        weight = self.get(f"{name}.weight", out, inner, kernel, kernel, scale=(inner * kernel**2) ** -0.5)
        offset = self.get(f"{name}.bias", out, scale=0.1) if bias else None
        return F.conv2d(x, weight, offset, stride, kernel // 2 if pad else 0)

    def norm(self, x: Tensor, name: str, groups: int) -> Tensor:
        gain, offset = self.get(f"{name}.weight", x.shape[1], around=1, scale=0.1), self.get(f"{name}.bias", x.shape[1])
        return F.group_norm(x, groups, gain, offset, 1e-6)

    def linear(self, x: Tensor, name: str, out: int) -> Tensor:
        weight = self.get(f"{name}.weight", out, x.shape[-1], scale=x.shape[-1] ** -0.5)
        return F.linear(x, weight, self.get(f"{name}.bias", out, scale=0.1))


@dataclass
class Style:
    """How a family names its parts and what its network does; the defaults are the original's."""

    down: str = "encoder.down.{level}"
    up: str = "decoder.up.{level}"
    reverse: bool = False  # the decoder's levels are numbered in running order
    block: str = "block"
    attn: str = "attn"
    middle: tuple[str, ...] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    downsample: str = "downsample.conv"
    upsample: str = "upsample.conv"
    norm_out: str = "norm_out"
    shortcut: str = "nin_shortcut"
    attention: tuple[str, ...] = ("norm", "q", "k", "v", "proj_out")
    linear: bool = False
    groups: int = 32
    widths: tuple[int, ...] = (32, 64)
    decoder_widths: tuple[int, ...] | None = None
    blocks: int = 1
    more: int = 1  # blocks of a decoder's level beyond the encoder's
    attends: tuple[int, ...] = (1,)
    bias: bool = True
    branch: bool = False
    out_kernel: int = 3
    downsampling: str = "right"
    upsampling: str = "nearest"
    adaptive: bool = False
    tanh: bool = False
    spatial: bool = False  # the decoder's norms are modulated by the codes
    z: int = 6
    embed: int = 4
    codes: int = 20
    quant_conv: bool = True
    rule: str = "l2"
    range01: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


class Reference:
    """The network of a style: ``latents``, ``quantise`` and ``decode``."""

    def __init__(self, style: Style, seed: int) -> None:
        self.style, self.weights = style, Weights(seed)
        side = 4 * 2 ** (len(style.widths) - 1)
        x = torch.zeros(1, 3, side, side)
        self.decode(self.quantise(self.latents(x))[1])  # makes the weights

    @property
    def state(self) -> dict[str, Tensor]:
        return self.weights.state

    def norm(self, x: Tensor, name: str) -> Tensor:
        if not (self.style.spatial and name.startswith("decoder.")):
            return self.weights.norm(x, name, self.style.groups)
        codes = self.codes.repeat_interleave(x.shape[2] // self.codes.shape[2], 2)
        codes = codes.repeat_interleave(x.shape[3] // self.codes.shape[3], 3)
        gain, shift = (self.weights.conv(codes, f"{name}.conv_{part}", x.shape[1], 1) for part in "yb")
        return self.weights.norm(x, f"{name}.norm_layer", 32) * gain + shift

    def residual(self, x: Tensor, name: str, out: int) -> Tensor:
        style, w = self.style, self.weights
        h = w.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", out, bias=style.bias)
        h = w.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2", out, bias=style.bias)
        if x.shape[1] != out:
            source = h if style.branch else x
            x = w.conv(source, f"{name}.{style.shortcut}", out, 1, bias=style.bias)
        return x + h

    def attend(self, x: Tensor, name: str) -> Tensor:
        names, w = [f"{name}.{part}" for part in self.style.attention], self.weights
        batch, channels, height, width = x.shape
        if self.style.spatial and name.startswith("decoder."):
            names[0] = names[0].replace("group_norm", "spatial_norm")
        h = self.norm(x, names[0])

        def project(y: Tensor, part: str) -> Tensor:
            if not self.style.linear:
                return w.conv(y, part, channels, 1)
            return w.linear(y.movedim(1, -1), part, channels).movedim(-1, 1)

        q, k, v = (project(h, part).reshape(batch, channels, -1) for part in names[1:4])
        scores = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * channels**-0.5, dim=-1)
        return x + project(torch.einsum("bij,bcj->bci", scores, v).reshape(x.shape), names[4])

    def middle(self, x: Tensor, side: str) -> Tensor:
        for part in self.style.middle:
            name = f"{side}.{part}"
            attention = part == "mid.attn_1" or "attentions" in part or (part == "mid.1" and not self.style.branch)
            x = self.attend(x, name) if attention else self.residual(x, name, x.shape[1])
        return x

    def level(self, x: Tensor, name: str, width: int, blocks: int, attends: bool) -> Tensor:
        for number in range(blocks):
            x = self.residual(x, f"{name}.{self.style.block}.{number}", width)
            x = self.attend(x, f"{name}.{self.style.attn}.{number}") if attends else x
        return x

    def latents(self, image: Tensor) -> Tensor:
        style, w = self.style, self.weights
        x = w.conv(image, "encoder.conv_in", style.widths[0] if not style.branch else 32, bias=style.bias)
        for level, width in enumerate(style.widths):
            name = style.down.format(level=level)
            x = self.level(x, name, width, style.blocks, level in style.attends)
            if level < len(style.widths) - 1:
                x = self.halved(x, f"{name}.{style.downsample}")
        x = self.middle(x, "encoder")
        x = w.conv(
            F.silu(w.norm(x, f"encoder.{style.norm_out}", style.groups)), "encoder.conv_out", style.z, style.out_kernel
        )
        return w.conv(x, "quant_conv", style.embed, 1) if style.quant_conv else x

    def halved(self, x: Tensor, name: str) -> Tensor:
        if self.style.downsampling == "mean":
            return F.avg_pool2d(x, 2)
        if self.style.downsampling == "both":
            return self.weights.conv(x, name, x.shape[1], stride=2)
        return self.weights.conv(F.pad(x, (0, 1, 0, 1)), name, x.shape[1], stride=2, pad=False)

    def doubled(self, x: Tensor, name: str) -> Tensor:
        if self.style.upsampling == "depth":
            y, channels = self.weights.conv(x, name, 4 * x.shape[1]), x.shape[1]
            out = x.new_zeros(len(x), channels, 2 * x.shape[2], 2 * x.shape[3])
            for dy in (0, 1):
                for dx in (0, 1):
                    first = (2 * dy + dx) * channels
                    out[:, :, dy::2, dx::2] = y[:, first : first + channels]
            return out
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.style.upsampling == "alone" else self.weights.conv(x, name, x.shape[1])

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, h, w) and what the decoder's side gets."""
        style, flat = self.style, z.movedim(1, -1)
        if style.rule == "sign":
            bits = flat > 0
            tokens = (bits * 2 ** torch.arange(style.embed)).sum(-1)
            return tokens, (bits * 2.0 - 1).movedim(-1, 1)
        codebook = self.weights.get("quantize.embedding.weight", style.codes, style.embed)
        if style.rule == "cos":
            flat, codebook = (y / y.norm(dim=-1, keepdim=True) for y in (flat, codebook))
        scores = flat @ codebook.T
        tokens = (scores if style.rule == "dot" else scores - codebook.square().sum(1) / 2).argmax(-1)
        return tokens, codebook[tokens].movedim(-1, 1)

    def decode(self, quant: Tensor) -> Tensor:
        style, w = self.style, self.weights
        widths, self.codes = style.decoder_widths or style.widths, quant
        x = w.conv(quant, "post_quant_conv", style.z, 1) if style.quant_conv else quant
        x = self.middle(w.conv(x, "decoder.conv_in", widths[-1]), "decoder")
        for level in reversed(range(len(widths))):
            number = len(widths) - 1 - level if style.reverse else level
            name = style.up.format(level=number)
            x = self.adapted(x, quant, f"decoder.adaptive.{level}") if style.adaptive else x
            x = self.level(x, name, widths[level], style.blocks + style.more, level in style.attends)
            x = self.doubled(x, f"{name}.{style.upsample}") if level else x
        x = w.conv(F.silu(self.norm(x, f"decoder.{style.norm_out}")), "decoder.conv_out", 3)
        return torch.tanh(x) if style.tanh else x

    def adapted(self, x: Tensor, quant: Tensor, name: str) -> Tensor:
        flat, channels = quant.flatten(2), x.shape[1]
        gain = self.weights.linear((flat.var(-1) + 1e-6).sqrt(), f"{name}.gamma", channels)
        shift = self.weights.linear(flat.mean(-1), f"{name}.beta", channels)
        return F.group_norm(x, self.style.groups, eps=1e-6) * gain[:, :, None, None] + shift[:, :, None, None]


DIFFUSERS = Style(
    down="encoder.down_blocks.{level}", up="decoder.up_blocks.{level}", reverse=True, block="resnets",
    attn="attentions", middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    downsample="downsamplers.0.conv", upsample="upsamplers.0.conv", norm_out="conv_norm_out", shortcut="conv_shortcut",
    attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"), linear=True, groups=8, widths=(16, 24),
)  # fmt: skip
LLAMAGEN = Style(
    down="encoder.conv_blocks.{level}", up="decoder.conv_blocks.{level}", reverse=True, block="res",
    middle=("mid.0", "mid.1", "mid.2"), rule="cos", decoder_widths=(32, 96),
)  # fmt: skip
MASKGIT = Style(
    middle=("mid.0",), upsample="upsample_conv", more=0, attends=(), bias=False, branch=True, out_kernel=1,
    downsampling="mean", quant_conv=False, embed=6, range01=True, widths=(64, 32),
)  # fmt: skip
MAGVIT = Style(
    middle=("mid_block.0",), downsample="downsample", upsample="upsample.conv1", more=0, attends=(), bias=False,
    out_kernel=1, downsampling="both", upsampling="depth", adaptive=True, quant_conv=False, embed=6, rule="sign",
)  # fmt: skip


def ddconfig(style: Style) -> dict[str, Any]:
    """The style's network in the original's form."""
    resolution = 64
    return {
        "double_z": False, "z_channels": style.z, "resolution": resolution, "in_channels": 3, "out_ch": 3,
        "ch": style.widths[0], "ch_mult": [width // style.widths[0] for width in style.widths],
        "num_res_blocks": style.blocks, "attn_resolutions": [resolution // 2**level for level in style.attends],
        "dropout": 0.0, **style.extra,
    }  # fmt: skip


def averages(state: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Lightning's moving averages of the weights: without dots in their names."""
    found = {f"model_ema.{name.replace('.', '')}": change(value) for name, value in state.items()}
    return {**found, "model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(3)}
