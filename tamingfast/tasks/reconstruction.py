"""Encoding images with the first stage and decoding them again: `reconstruct`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tamingfast.engines.first_stage import check_name, using
from tamingfast.images import to_uint8
from tamingfast.models.base import FirstStage
from tamingfast.progress import Bars, silent
from tamingfast.tasks.figures import l1, psnr
from tamingfast.tasks.models import Model, first_stage_of, unread
from tamingfast.tasks.pictures import Pictures, batches, sized


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Images and their reconstructions by the first stage, float32 (3, H, W) each, in [-1, 1] on the CPU.

    Attributes:
        images: the input, as it was encoded.
        reconstructed: decoded from the tokens of ``images``.
        tokens: int64 (h, w) of each image; see `token_pictures`.
        l1: mean absolute difference, the mean over images.
        psnr: in dB on 8-bit pixels, the mean over images; infinite if an image is reproduced exactly.
        codes: number of different codes among the tokens.
    """

    images: list[Tensor]
    reconstructed: list[Tensor]
    tokens: list[Tensor]
    l1: float
    psnr: float
    codes: int

    @property
    def figures(self) -> dict[str, float]:
        """``l1``, ``psnr`` and ``codes`` by name."""
        return {"l1": self.l1, "psnr": self.psnr, "codes": self.codes}


def reconstruct(
    model: Model,
    images: Pictures,
    *,
    size: tuple[int, int] | None = None,
    engine: str = "auto",
    bars: Bars = silent,
) -> Reconstruction:
    """Encode images with the first stage and decode them again.

    Args:
        model: a first stage or a prior, or the path of its run or checkpoint.
        images: pictures, or directories of them.
        size: (height, width) in pixels, which the images are scaled to cover and then cut to. Default: each image
            whole, cut to multiples of f.
        engine: the implementation that runs the first stage: "auto", "native" (C++ on the CPU) or "torch".
        bars: opens progress counters; see `tamingfast.progress`.

    Raises:
        UserError: the model has no first stage, a picture cannot be read, the pictures do not fit into memory, or
            the engine is "native" and cannot run here.
    """
    check_name(engine)
    source = unread(model)
    pictures = sized(first_stage_of(source.outline), images, size, copies=2)
    stage = first_stage_of(source.model)
    real: list[Tensor] = []
    made: list[Tensor] = []
    grids: list[Tensor] = []
    for _, x in batches(pictures, stage.factor):
        with using(engine):
            tokens, out = _through(stage, x.to(stage.device), bars)
        grids.extend(tokens.cpu())
        real.extend(x)
        made.extend(out.cpu())
    differences = [float(l1(x[None], out[None])) for x, out in zip(real, made, strict=True)]
    ratios = [psnr(to_uint8(x), to_uint8(out)) for x, out in zip(real, made, strict=True)]
    codes = len(torch.cat([grid.flatten() for grid in grids]).unique())
    return Reconstruction(real, made, grids, float(np.mean(differences)), float(np.mean(ratios)), codes)


@torch.no_grad()
def token_pictures(model: nn.Module, tokens: Sequence[Tensor]) -> list[Tensor]:
    """Tokens int64 (h, w) as pictures float32 (3, h, w) in [-1, 1], in which similar codes have similar colours.

    The three channels are the first three principal components of the codes that occur, each scaled to the range.
    """
    stage = first_stage_of(model)
    codes, places = torch.cat([grid.flatten() for grid in tokens]).unique(return_inverse=True)
    entries = stage.quantize.get_codebook_entry(codes.to(stage.device), None).flatten(1).double().cpu()
    centred = entries - entries.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]  # of falling variance
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # which the method leaves open
    along = torch.nn.functional.pad(centred @ axes, (0, 3 - axes.shape[1]))
    colors = (along / along.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny)).float()
    parts = places.split([grid.numel() for grid in tokens])
    return [colors[part].view(*grid.shape, 3).permute(2, 0, 1) for part, grid in zip(parts, tokens, strict=True)]


def reconstructed(model: nn.Module, x: Tensor) -> Tensor:
    """Encode and decode images (B, C, H, W) in [-1, 1] on the first stage's device; returns the same shape.

    Large images are processed in bands of rows; see `tamingfast.engines.bands`.
    """
    return _through(first_stage_of(model), x, silent)[1]


@torch.no_grad()
def _through(stage: FirstStage, x: Tensor, bars: Bars) -> tuple[Tensor, Tensor]:
    with bars("multiply-adds of encoding", None) as counter:
        tokens = stage.encode_grid(x, progress=counter.moved)
    with bars("multiply-adds of decoding", None) as counter:
        return tokens, stage.decode_grid(tokens, progress=counter.moved).clamp(-1, 1)
