"""A first stage with two token grids, a coarse and a fine one (VQ-VAE-2: Razavi et al. 2019, section 3.1)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.checkpoints.config import plain
from tamingfast.engines.first_stage import forward
from tamingfast.models.autoencoder import Decoder, Encoder
from tamingfast.models.base import FirstStage, Progress
from tamingfast.models.quantize import Quantised, Quantizer, VectorQuantizer, as_grid
from tamingfast.models.vqgan import VQModel

#: Tokens of both grids for each token of the coarse one: that token and four of the fine grid.
TOKENS_PER_TOP = 5


class TwoLevelQuantizer(Quantizer):
    """One codebook per level. The tokens of the bottom level are numbered after those of the top level."""

    def __init__(self, n_embed: int, embed_dim: int, beta: float = 0.25):
        super().__init__()
        self.top = VectorQuantizer(n_embed, embed_dim, beta)
        self.bottom = VectorQuantizer(n_embed, embed_dim, beta)
        self.re_embed = self.top.re_embed + self.bottom.re_embed

    def forward(self, z: Tensor, level: str) -> Quantised:
        """Latents z (B, D, h, w) of a ``level`` -> ``(z_q like z, loss, (None, None, tokens int64 (B*h*w,)))``.

        ``level`` is "top" or "bottom".
        """
        z_q, loss, (_, _, indices) = getattr(self, level)(z)
        return z_q, loss, (None, None, indices if level == "top" else indices + self.top.re_embed)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """As `Quantizer.get_codebook_entry`, for tokens of both levels."""
        table = torch.cat((self.top.embedding.weight, self.bottom.embedding.weight))
        return as_grid(F.embedding(indices, table), shape)


class HierarchicalVQModel(VQModel):
    """VQGAN with two codebooks of ``n_embed`` entries each: a top grid of half the bottom grid's resolution.

    ``ddconfig`` describes the bottom level, downsampled by 2^(len(ch_mult)-1); ``factor`` is that of the top level,
    which is twice as large. The image is encoded to bottom features, and these to top features. The decoded top tokens
    are a second input of the bottom level's quantiser and of the image decoder, so the bottom level encodes only what
    the top level lacks. The levels and their conditioning are those of VQ-VAE-2, the blocks those of the VQGAN.
    VQ-VAE-2 upsamples the top codes a second time for the image decoder, which here gets the same decoded top tokens as
    the bottom level.

    The tokens of an image form one sequence: the top grid (h, w) in raster order, then the bottom grid (2h, 2w),
    arranged in rows of w, (5h, w) in total. So a prior samples the bottom tokens given all top tokens, but one window
    must hold the whole sequence.
    """

    levels = 2
    quantize: TwoLevelQuantizer

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
        # Wider than the base class's, because both also take the decoded top level.
        self.quant_conv = nn.Conv2d(2 * z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(z_channels + embed_dim, z_channels, 1)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def make_quantizer(
        self,
        ddconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        remap: str | os.PathLike | None,
        sane_index_shape: bool,
    ) -> Quantizer:
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
        """(rows, columns) of the tokens of both levels."""
        rows, columns = super().grid(height, width)
        return TOKENS_PER_TOP * rows, columns

    def footprint(self, tokens: Tensor) -> Tensor:
        """The pixels that belong to the chosen tokens of either level: bool (B, 5h, w) -> bool (B, 1, H, W)."""
        top, bottom = _levels(tokens[:, None])
        half = self.factor // 2
        return super().footprint(top[:, 0]) | bottom.repeat_interleave(half, 2).repeat_interleave(half, 3)

    def encode(self, x: Tensor) -> Quantised:
        """Images (B, C, H, W) -> ``(quant (B, embed_dim, 5h, w), codebook loss, (None, None, tokens (B, 5h, w)))``."""
        features = forward(self.encoder, x)
        h_top = forward(self.encoder_top, features)
        top, loss_top, (_, _, tokens_top) = self.quantize(self.quant_conv_top(h_top), "top")
        latents = self.quant_conv(torch.cat((self._decoded_top(top), features), 1))
        bottom, loss_bottom, (_, _, tokens_bottom) = self.quantize(latents, "bottom")
        tokens = _sequence(tokens_top.view(-1, 1, *top.shape[2:]), tokens_bottom.view(-1, 1, *bottom.shape[2:]))
        return _sequence(top, bottom), loss_top + loss_bottom, (None, None, tokens[:, 0])

    @torch.no_grad()
    def encode_grid(
        self, x: Tensor, memory: int | None = None, progress: Progress | None = None, engine: str = "auto"
    ) -> Tensor:
        """Images (B, C, H, W) -> tokens int64 (B, 5h, w), never in bands: ``memory`` and ``progress`` are ignored."""
        return FirstStage.encode_grid(self, x, engine=engine)

    def decoder_input(self, quant: Tensor) -> Tensor:
        """Quantised latents of both levels (B, embed_dim, 5h, w) -> the decoder's input (B, z_channels, 2h, 2w)."""
        top, bottom = _levels(quant)
        return self.post_quant_conv(torch.cat((self._decoded_top(top), bottom), 1))

    def _decoded_top(self, top: Tensor) -> Tensor:
        return forward(self.decoder_top, self.post_quant_conv_top(top))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Tokens (B, 5h, w) -> images (B, C, H, W).

        Raises ValueError for any other shape: flat tokens do not show where a level ends.
        """
        if code_b.ndim != 3 or code_b.shape[1] % TOKENS_PER_TOP:
            raise ValueError(
                f"code_b: got shape {tuple(code_b.shape)}, expected (batch, {TOKENS_PER_TOP} * height, width)"
            )
        return super().decode_code(code_b)

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of the first optimizer: all but the discriminator's."""
        parts = (self.encoder_top, self.decoder_top, self.quant_conv_top, self.post_quant_conv_top)
        return super().autoencoder_parameters() + [parameter for part in parts for parameter in part.parameters()]


def _sequence(top: Tensor, bottom: Tensor) -> Tensor:
    """Grids (B, C, h, w) and (B, C, 2h, 2w) -> (B, C, 5h, w): rows of the top grid, then half rows of the bottom's."""
    return torch.cat((top, bottom.reshape(*top.shape[:2], -1, top.shape[3])), 2)


def _levels(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, 5h, w) -> grids (B, C, h, w) and (B, C, 2h, 2w)."""
    batch, channels, rows, columns = sequence.shape
    height = rows // TOKENS_PER_TOP
    bottom = sequence[:, :, height:].reshape(batch, channels, 2 * height, 2 * columns)
    return sequence[:, :, :height], bottom
