"""The first stage of Open-MAGVIT2: codes are signs, and the quantised latents also steer the decoder's levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.errors import UserError
from tamingfast.models.autoencoder import Decoder
from tamingfast.models.codebooks import LFQ
from tamingfast.models.vqgan import VQModel

_EPS = 1e-6


class AdaptiveNorm(nn.Module):
    """GroupNorm of x, scaled and shifted by projections of the latents' deviations and means over all positions."""

    def __init__(self, latents: int, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.gamma, self.beta = nn.Linear(latents, channels), nn.Linear(latents, channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (B, channels, H, W), z (B, latents, h, w) -> like x."""
        flat = z.flatten(2)
        scale, shift = self.gamma((flat.var(-1) + _EPS).sqrt()), self.beta(flat.mean(-1))
        return F.group_norm(x, self.groups, eps=_EPS) * scale[..., None, None] + shift[..., None, None]


class DepthToSpace(nn.Module):
    """A 3x3 convolution to four times the channels, which become 2x2 pixels.

    Channel (2 dy + dx) C + c becomes channel c of pixel (dy, dx).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, channels, height, width = x.shape
        pixels = x.view(batch, 2, 2, channels // 4, height, width)
        return pixels.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // 4, 2 * height, 2 * width)


class AdaptiveDecoder(Decoder):
    """A `Decoder` with an `AdaptiveNorm` before each level and `DepthToSpace` in place of its upsampling.

    It does not describe its layers, as each depends on its latents, so torch runs it whole.
    """

    layers = None  # type: ignore[assignment]

    def __init__(
        self, *, ch: int, ch_mult: Iterable[float], z_channels: int, num_groups: int = 32, **others: Any
    ) -> None:
        super().__init__(ch=ch, ch_mult=ch_mult, z_channels=z_channels, num_groups=num_groups, **others)
        widths = [round(ch * multiplier) for multiplier in ch_mult]
        self.adaptive = nn.ModuleList(
            AdaptiveNorm(z_channels, width, num_groups) for width in (*widths[1:], widths[-1])
        )
        for level, width in zip(self.up, widths, strict=True):
            if level.upsample is not None:
                level.upsample = DepthToSpace(width)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for norm, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            h = level(norm(h, z))
        return self.conv_out(self.norm_out(h))


class LookupFreeVQModel(VQModel):
    """A `VQModel` without a codebook: a token has one bit per channel of the latents (Open-MAGVIT2: Luo et al. 2024).

    ``embed_dim`` is the number of bits, ``n_embed`` is 2^embed_dim. There are no convolutions around the codes.
    """

    def __init__(
        self, ddconfig: Mapping[str, Any], lossconfig: Mapping[str, Any], n_embed: int, embed_dim: int, **others: Any
    ) -> None:
        if n_embed != 2**embed_dim:
            raise UserError(f"n_embed: got {n_embed}, expected 2^embed_dim, which is {2**embed_dim}")
        super().__init__(ddconfig, lossconfig, n_embed, embed_dim, quant_conv=False, **others)

    def make_decoder(self, ddconfig: Mapping[str, Any]) -> nn.Module:
        return AdaptiveDecoder(**ddconfig)

    def make_quantizer(self, ddconfig: Any, n_embed: int, embed_dim: int, *others: Any) -> LFQ:
        # The entropy of its family's training is of groups of bits: all codes at once are too many.
        return LFQ(n_embed, embed_dim, entropy_weight=0.0, lowest_first=True, table=False)

    def codes_of(self, grid: Tensor) -> Tensor:
        return super().codes_of(grid).to(next(self.parameters()).dtype)
