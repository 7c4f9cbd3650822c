"""The first stage of MoVQ (Zheng et al. 2022): the quantised latents modulate every norm of the decoder."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.engines import layers
from tamingfast.models.autoencoder import AttnBlock, Decoder, GroupNorm, ResnetBlock
from tamingfast.models.vqgan import VQModelInterface


class SpatialNorm(nn.Module):
    """GroupNorm times a 1x1 convolution of the codes plus another of them, followed by SiLU if ``silu``."""

    def __init__(self, channels: int, codes: int, silu: bool) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(channels)
        self.conv_y, self.conv_b = nn.Conv2d(codes, channels, 1), nn.Conv2d(codes, channels, 1)
        self.silu = silu

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """x (B, channels, H, W) and codes (B, D, h, w), which are enlarged to the pixels of x -> like x."""
        codes = F.interpolate(codes, size=x.shape[-2:], mode="nearest")
        x = self.norm_layer(x) * self.conv_y(codes) + self.conv_b(codes)
        return F.silu(x) if self.silu else x


class SpatialDecoder(Decoder):
    """A `Decoder` whose norms are `SpatialNorm`; its input is (B, 2 * z_channels, h, w): latents, then codes.

    It does not describe its layers, as each depends on the codes, so torch runs it whole.
    """

    layers = None  # type: ignore[assignment]

    def __init__(self, *, z_channels: int, **others: Any) -> None:
        super().__init__(z_channels=z_channels, **others)
        norms = [(name, module) for name, module in self.named_modules() if isinstance(module, GroupNorm)]
        for name, norm in norms:
            self.set_submodule(name, SpatialNorm(norm.num_channels, z_channels, norm.silu))

    def forward(self, z: Tensor) -> Tensor:
        latents, codes = z.chunk(2, dim=1)
        x = self.conv_in(latents)
        levels = cast("Iterable[Any]", reversed(self.up))
        for part in (*self.mid.parts(), *(part for level in levels for part in level.parts())):
            if isinstance(part, ResnetBlock):
                x = _residual(part, x, codes)
            else:
                x = _attention(part, x, codes) if isinstance(part, AttnBlock) else part(x)
        return self.conv_out(self.norm_out(x, codes))


def _residual(block: Any, x: Tensor, codes: Tensor) -> Tensor:
    h = block.conv1(block.norm1(x, codes))
    h = block.conv2(block.dropout(block.norm2(h, codes)))
    return h + (x if block.shortcut is None else getattr(block, block.shortcut)(x))


def _attention(block: Any, x: Tensor, codes: Tensor) -> Tensor:
    norm: Any = functools.partial(block.norm, codes=codes)
    return layers.Attention(
        module=block, norm=norm, query=block.q, key=block.k, value=block.v, projection=block.proj_out
    ).attend(x)


class MoVQ(VQModelInterface):
    """A `VQModelInterface` with a `SpatialDecoder`, as of Kandinsky 2; ``embed_dim`` equals ``z_channels``."""

    def make_decoder(self, ddconfig: Mapping[str, Any]) -> nn.Module:
        return SpatialDecoder(**ddconfig)

    def decoder_input(self, quant: Tensor) -> Tensor:
        """Quantised latents (B, embed_dim, h, w) -> the decoder's input: both its latents and the codes."""
        return torch.cat((self.post_quant_conv(quant), quant), 1)
