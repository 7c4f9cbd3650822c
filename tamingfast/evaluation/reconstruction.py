"""How well a first stage reconstructs images: PSNR, SSIM, LPIPS, and the use of its codebook."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast import images, tasks
from tamingfast.errors import UserError
from tamingfast.evaluation.batches import Part, Progress, images_in, parts
from tamingfast.ranks import in_turns
from tamingfast.tasks.figures import l1, psnr
from tamingfast.training.vqgan import codebook_use

#: Side of SSIM's Gaussian window (Wang et al. 2004), and of the smallest image that LPIPS's network takes, in pixels.
SSIM_WINDOW, LPIPS_SIDE = 11, 16


@torch.no_grad()
def reconstruction(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    seed: int = 0,
    perceptual: nn.Module | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, float | None]:
    """Reconstruct the images of ``dataset`` with the first stage of ``model``, or with ``model`` itself, and compare.

    Args:
        limit, seed: measure this many images, drawn by ``seed``; None measures all.
        perceptual: a `tamingfast.models.lpips.LPIPS`; without it there is no ``lpips``.
        device: where to compute; None leaves the model where it is.
        progress: called after each batch with its number of images.

    Returns:
        ``images``, their number; ``l1``, mean absolute difference of images in [-1, 1]; ``psnr`` in dB and ``ssim``,
        means over images of 8-bit pixels, SSIM with the Gaussian window of Wang et al. (2004) over each channel;
        ``lpips``; ``codebook_usage``, the share of codes that occur, and ``codebook_perplexity``, exp of the entropy of
        their frequencies. ``psnr`` is None if an image is reconstructed exactly, ``ssim`` for sides below 11 pixels,
        ``lpips`` for sides below 16.

    Raises:
        UserError: the model neither is nor has a first stage, its inputs are not images of 1 or 3 channels, or their
            sides are not multiples of its factor.
    """
    stage = tasks.first_stage_of(model)
    if device is not None:
        model.to(device)
    if perceptual is not None:
        perceptual = perceptual.to(stage.device)
    sums: dict[str, float] = {}
    counts = torch.zeros(stage.n_embed, dtype=torch.int64)
    total = 0

    def measured(part: Part) -> tuple[dict[str, float], Tensor, int]:
        x = _checked(images_in(dataset, part, stage.image_key)).to(stage.device)
        tasks.grid_size(model, *x.shape[2:])  # refuses sides that are not multiples of the factor
        quant, _, (_, _, indices) = stage.quantised(x)
        out = stage.decode_quantised(quant).clamp(-1, 1)
        used = torch.bincount(indices.flatten().cpu(), minlength=len(counts))
        return _sums(x, out, perceptual), used, len(x)

    for found, used, count in in_turns(measured, parts(dataset, batch_size, limit, seed)):
        counts += used
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
        total += count
        if progress is not None:
            progress(count)
    means = {name: value / total if math.isfinite(value) else None for name, value in sums.items()}
    return {"images": total, **means, **codebook_use(counts)}


def _checked(x: Tensor) -> Tensor:
    if x.shape[1] not in (1, 3):
        raise UserError(
            f"data: got maps of {x.shape[1]} channels, expected images of 1 or 3, for which the measures are defined; "
            "evaluate a first stage of images"
        )
    return x


def _sums(x: Tensor, out: Tensor, perceptual: nn.Module | None) -> dict[str, float]:
    """Each measure summed over the batch; infinite or NaN where it is undefined for an image."""
    real, made = images.to_uint8(x), images.to_uint8(out)
    found = {
        "l1": float(l1(x, out).sum()),
        "psnr": sum(psnr(a, b) for a, b in zip(real, made, strict=True)),
        "ssim": sum(_ssim(a, b) for a, b in zip(real, made, strict=True)),
    }
    if perceptual is not None:
        large = min(x.shape[2:]) >= LPIPS_SIDE
        a, b = (part.expand(-1, 3, -1, -1) for part in (out, x))
        found["lpips"] = float(perceptual(a, b).sum()) if large else math.nan
    return found


def _ssim(real: np.ndarray, made: np.ndarray) -> float:
    """Structural similarity of pixels uint8 (H, W, 3); NaN for sides below `SSIM_WINDOW`."""
    if min(real.shape[:2]) < SSIM_WINDOW:
        return math.nan
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(_metrics().structural_similarity(real, made, data_range=255, channel_axis=-1, **options))


def _metrics() -> ModuleType:
    try:
        from skimage import metrics  # optional package
    except ImportError as error:
        raise UserError(
            f"scikit-image: got '{error}' on importing it, expected the package, which computes SSIM; run "
            "'pip install scikit-image'"
        ) from error
    return metrics
