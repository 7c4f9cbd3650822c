"""A first stage with two token grids, a coarse and a fine one (VQ-VAE-2: Razavi et al. 2019, section 3.1)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.checkpoints.config import plain
from tamingfast.models.quantize import VectorQuantizer, as_grid
from tamingfast.models.vqgan import Decoder, Encoder, VQModel

#: Tokens of both grids for each token of the coarse one: itself and four of the fine one.
TOKENS_PER_TOP = 5


class TwoLevelQuantizer(nn.Module):
    """A codebook for each level. Tokens of the bottom level are numbered after those of the top level."""

    def __init__(self, n_embed: int, embed_dim: int, beta: float = 0.25):
        super().__init__()
        self.top = VectorQuantizer(n_embed, embed_dim, beta)
        self.bottom = VectorQuantizer(n_embed, embed_dim, beta)

    @property
    def re_embed(self) -> int:
        """Number of token values of both levels."""
        return self.top.re_embed + self.bottom.re_embed

    def forward(self, z: Tensor, level: str):
        """z (B, D, h, w) of "top" or "bottom" -> ``(z_q like z, loss, (None, None, tokens int64 (B*h*w,)))``."""
        z_q, loss, (_, _, indices) = getattr(self, level)(z)
        return z_q, loss, (None, None, indices if level == "top" else indices + self.top.re_embed)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """Entries of flat tokens (N,) of either level; shapes as in `VectorQuantizer.get_codebook_entry`."""
        table = torch.cat((self.top.embedding.weight, self.bottom.embedding.weight))
        return as_grid(F.embedding(indices, table), shape)


class HierarchicalVQModel(VQModel):
    """VQGAN with two codebooks of ``n_embed`` entries each: a top grid of half the bottom grid's resolution.

    ``ddconfig`` describes the bottom level, whose f_b is 2^(len(ch_mult)-1); ``factor`` is the top level's, twice
    that. The image is encoded to the bottom level, that to the top level; what the top tokens decode to is seen by the
    bottom level's quantiser and by the image's decoder beside the bottom tokens, so the bottom level holds what the
    top level has left out. Of VQ-VAE-2 this keeps the levels and their conditioning, with the VQGAN's blocks; where
    that upsamples the top codes a second time for the image's decoder, ours sees what the bottom level has seen.

    The tokens of an image are one sequence, the top grid's (h, w) in raster order, then the bottom grid's (2h, 2w),
    as rows of w: (5h, w) in all. So a prior draws the bottom tokens knowing all of the top, but only in one window.
    """

    levels = 2

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | os.PathLike | None = None,
        ignore_keys: Iterable[str] = (),
        image_key: str = "image",
        monitor: str | None = None,
    ):
        super().__init__(ddconfig, lossconfig, n_embed, embed_dim, image_key=image_key, monitor=monitor)
        bottom = plain(ddconfig)
        z_channels, widest = bottom["z_channels"], bottom["ch_mult"][-1]
        top = bottom | {
            "ch_mult": [widest, widest],
            "in_channels": z_channels,
            "out_ch": z_channels,
            "resolution": bottom["resolution"] // 2 ** (len(bottom["ch_mult"]) - 1),
        }
        self.encoder_top, self.decoder_top = Encoder(**top), Decoder(**top)
        self.quant_conv_top = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv_top = nn.Conv2d(embed_dim, z_channels, 1)
        # Both see the decoded top level beside their own input.
        self.quant_conv = nn.Conv2d(2 * z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(z_channels + embed_dim, z_channels, 1)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def make_quantizer(
        self, ddconfig: Mapping[str, Any], n_embed: int, embed_dim: int, remap: Any, sane_index_shape: bool
    ) -> nn.Module:
        return TwoLevelQuantizer(n_embed, embed_dim)

    @property
    def embed_dim(self) -> int:
        """Width of a codebook entry."""
        return self.post_quant_conv_top.in_channels

    @property
    def factor(self) -> int:
        """Pixels per token of the top level along one side."""
        return 2 * super().factor

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the sequence of both levels' tokens."""
        rows, columns = super().grid(height, width)
        return TOKENS_PER_TOP * rows, columns

    def footprint(self, tokens: Tensor) -> Tensor:
        """The pixels that some tokens of either level stand for: bool (B, 5h, w) -> bool (B, 1, H, W)."""
        top, bottom = _levels(tokens[:, None])
        half = self.factor // 2
        return super().footprint(top[:, 0]) | bottom.repeat_interleave(half, 2).repeat_interleave(half, 3)

    def encode(self, x: Tensor):
        """Images (B, C, H, W) -> ``(quant (B, embed_dim, 5h, w), codebook loss, (None, None, tokens (B, 5h, w)))``."""
        features = self.encoder(x)
        h_top = self.encoder_top(features)
        top, loss_top, (_, _, tokens_top) = self.quantize(self.quant_conv_top(h_top), "top")
        latents = self.quant_conv(torch.cat((self._decoded_top(top), features), 1))
        bottom, loss_bottom, (_, _, tokens_bottom) = self.quantize(latents, "bottom")
        tokens = _sequence(tokens_top.view(-1, 1, *top.shape[2:]), tokens_bottom.view(-1, 1, *bottom.shape[2:]))
        return _sequence(top, bottom), loss_top + loss_bottom, (None, None, tokens[:, 0])

    def decoder_input(self, quant: Tensor) -> Tensor:
        """Quantised latents of both levels (B, embed_dim, 5h, w) -> what the decoder takes: (B, z_channels, 2h, 2w)."""
        top, bottom = _levels(quant)
        return self.post_quant_conv(torch.cat((self._decoded_top(top), bottom), 1))

    def _decoded_top(self, top: Tensor) -> Tensor:
        return self.decoder_top(self.post_quant_conv_top(top))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Tokens (B, 5h, w) -> images. Raises ValueError for other shapes, which do not say where a level ends."""
        if code_b.ndim != 3 or code_b.shape[1] % TOKENS_PER_TOP:
            raise ValueError(f"code_b has shape {tuple(code_b.shape)}; expected (batch, {TOKENS_PER_TOP} * h, w)")
        return super().decode_code(code_b)

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """What the first optimizer trains: all but the discriminator."""
        parts = (self.encoder_top, self.decoder_top, self.quant_conv_top, self.post_quant_conv_top)
        return super().autoencoder_parameters() + [parameter for part in parts for parameter in part.parameters()]


def _sequence(top: Tensor, bottom: Tensor) -> Tensor:
    """Grids (B, C, h, w) and (B, C, 2h, 2w) -> (B, C, 5h, w): the top's rows, then half rows of the bottom."""
    return torch.cat((top, bottom.reshape(*top.shape[:2], -1, top.shape[3])), 2)


def _levels(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, 5h, w) -> grids (B, C, h, w) and (B, C, 2h, 2w)."""
    batch, channels, rows, columns = sequence.shape
    height = rows // TOKENS_PER_TOP
    bottom = sequence[:, :, height:].reshape(batch, channels, 2 * height, 2 * columns)
    return sequence[:, :, :height], bottom
