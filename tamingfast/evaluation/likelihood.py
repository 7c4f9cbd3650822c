"""How likely a prior finds real images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast import ops, tasks
from tamingfast.data.rgb import to_unit_scale
from tamingfast.errors import UserError
from tamingfast.evaluation.batches import Progress, batches
from tamingfast.models.color_clusters import ColorClusters
from tamingfast.training.feed import grid_of
from tamingfast.training.prior import tokens_of

#: 8-bit colours per call of the search for the nearest one of a dictionary.
_COLORS_PER_CALL = 1 << 20


@torch.no_grad()
def likelihood(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What a prior makes of ``limit`` images of ``dataset``, drawn by ``seed``, or of all, under their own conditions.

    Returns:
        - ``images``, and ``tokens`` of each;
        - ``nats_per_token``, the mean cross entropy of the image tokens, and ``perplexity``, its exponential;
        - ``bits_per_token``: the same in bits, so bits per dimension of the grid of tokens;
        - ``token_bits_per_image_dimension``: all bits of the tokens over 3 x height x width of the images. Unless the
          first stage is lossless this is a rate, what storing the tokens costs, and no likelihood of the pixels;
        - ``pixel_bits_per_dimension``, for priors on clustered colours alone: the likelihood of the 8-bit pixels under
          the model that draws a colour cluster and then any of the 8-bit colours nearest to it, all alike.

    Raises:
        UserError: the model is no prior, or the images have more tokens than it sees at once.
    """
    tasks.check_prior(model)
    if device is not None:
        model.to(device)
    stage = model.first_stage_model
    cells = cell_bits(stage) if isinstance(stage, ColorClusters) else None
    nats = extra_bits = 0.0
    images = tokens = 0
    pixels = round(math.prod(grid_of(dataset, stage)) * stage.pixels_per_token)
    for batch in batches(dataset, batch_size, limit, seed, device=model.device):
        z, c = tokens_of(model, batch)
        room = model.transformer.config.block_size - c.shape[1] + 1
        if z.shape[1] > room:
            raise UserError(
                f"the images have {z.shape[1]} tokens and the model sees {room} at once; evaluate on images of the "
                "trained size, or use `tamingfast likelihood`"
            )
        logits = model.token_logits(z, c)
        nats += float(F.cross_entropy(logits.flatten(0, 1).float(), z.flatten(), reduction="sum"))
        if cells is not None:
            extra_bits += float(cells[z.flatten()].sum())
        images, tokens = images + len(z), z.shape[1]
        if progress is not None:
            progress(len(z))
    per_token = nats / (images * tokens)
    bits = nats / math.log(2) / images
    found = {
        "images": images,
        "tokens": tokens,
        "nats_per_token": per_token,
        "perplexity": math.exp(min(per_token, 700.0)),
        "bits_per_token": bits / tokens,
        "token_bits_per_image_dimension": bits / (3 * pixels),
    }
    if cells is not None:
        found["pixel_bits_per_dimension"] = (bits + extra_bits / images) / (3 * pixels)
    return found


def cell_bits(clusters: ColorClusters) -> Tensor:
    """float64 (n,): log2 of how many of the 2^24 8-bit colours are nearest to each colour of a dictionary."""
    colors = clusters.kmeans.C
    levels = to_unit_scale(np.arange(256, dtype=np.uint8)).to(colors)
    counts = torch.zeros(len(colors), dtype=torch.int64, device=colors.device)
    for red in levels.split(max(1, _COLORS_PER_CALL >> 16)):
        points = torch.cartesian_prod(red, levels, levels)
        counts += torch.bincount(ops.nearest_code(points, colors), minlength=len(counts))
    return counts.clamp(min=1).double().log2()
