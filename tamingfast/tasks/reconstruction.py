"""Encoding images with the first stage and decoding them again: `reconstruct`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tamingfast.images import to_uint8
from tamingfast.tasks.figures import l1, psnr
from tamingfast.tasks.models import Model, first_stage_of, opened
from tamingfast.tasks.pictures import Pictures, batch_of


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Images and their reconstructions by the first stage, float32 (B, 3, H, W) in [-1, 1] on the CPU.

    Attributes:
        images: the input, scaled and cut to the size.
        reconstructed: decoded from the tokens of ``images``.
        l1: mean absolute difference.
        psnr: in dB on 8-bit pixels, the mean over images; infinite if an image is reproduced exactly.
        codes: number of different codes among the tokens.
    """

    images: Tensor
    reconstructed: Tensor
    l1: float
    psnr: float
    codes: int

    @property
    def figures(self) -> dict[str, float]:
        """``l1``, ``psnr`` and ``codes`` by name."""
        return {"l1": self.l1, "psnr": self.psnr, "codes": self.codes}


def reconstruct(model: Model, images: Pictures, *, size: tuple[int, int] | None = None) -> Reconstruction:
    """Encode images with the first stage and decode them again.

    Args:
        model: a first stage or a prior, or the path of its run or checkpoint.
        images: pictures, or directories of them.
        size: (height, width) in pixels, which the images are scaled to cover and then cut to. Default: a tensor's own
            size; for other pictures, the size that the model was trained on.

    Raises:
        UserError: the model has no first stage, or a picture cannot be read.
    """
    network = opened(model)
    _, x, _ = batch_of(network, images, size)
    tokens, out = _through(network, x.to(first_stage_of(network).device))
    out = out.cpu()
    pairs = zip(to_uint8(x), to_uint8(out), strict=True)
    found = float(np.mean([psnr(real, made) for real, made in pairs]))
    return Reconstruction(x, out, float(l1(x, out).mean()), found, int(tokens.unique().numel()))


def reconstructed(model: nn.Module, x: Tensor) -> Tensor:
    """Encode and decode images (B, C, H, W) in [-1, 1] on the first stage's device; returns the same shape.

    Large images are processed in bands of rows; see `tamingfast.engines.bands`.
    """
    return _through(model, x)[1]


@torch.no_grad()
def _through(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    stage = first_stage_of(model)
    tokens = stage.encode_grid(x)
    return tokens, stage.decode_grid(tokens).clamp(-1, 1)
