"""The likelihood of real images under a prior."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast import ops, tasks
from tamingfast.data.rgb import to_unit_scale
from tamingfast.errors import UserError
from tamingfast.evaluation.batches import Part, Progress, loaded, parts
from tamingfast.models.color_clusters import ColorClusters
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.ranks import in_turns
from tamingfast.training.prior_stage import perplexity
from tamingfast.training.tokens import grid_of, tokens_of

#: 8-bit colours per call of the nearest-code search.
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
) -> dict[str, float]:
    """Likelihood of the images of ``dataset`` under a prior, each given its own condition.

    Args:
        limit, seed: measure this many images, drawn by ``seed``; None measures all.
        device: where to compute; None leaves the model where it is.
        progress: called after each batch with its number of images.

    Returns:
        - ``images``, and ``tokens`` of each;
        - ``nats_per_token``, the mean cross entropy of the image tokens, and ``perplexity``, its exponential;
        - ``bits_per_token``: the same in bits, that is, bits per dimension of the token grid;
        - ``token_bits_per_image_dimension``: bits of all tokens over 3 x height x width of the images. Unless the first
            stage is lossless this is a rate, the cost of storing the tokens, and not a likelihood of the pixels;
        - ``pixel_bits_per_dimension``, only for priors on clustered colours: the likelihood of the 8-bit pixels under
            the model that draws a colour cluster and then, uniformly, one of the 8-bit colours nearest to it.

    Raises:
        UserError: the model is not a prior, or the images have more tokens than its context holds.
    """
    prior = tasks.check_prior(model)
    if device is not None:
        prior.to(device)
    stage = prior.first_stage_model
    cells = cell_bits(stage) if isinstance(stage, ColorClusters) else None
    pixels = round(math.prod(grid_of(dataset, stage)) * stage.pixels_per_token)
    nats = bits_in_cells = 0.0
    images = tokens = 0

    def measured(part: Part) -> tuple[float, float, int, int]:
        z, c = tokens_of(prior, loaded(dataset, part, prior.device))
        return _nats(prior, z, c), 0.0 if cells is None else float(cells[z.flatten()].sum()), *z.shape

    for own, in_cells, count, tokens in in_turns(measured, parts(dataset, batch_size, limit, seed)):  # noqa: B007
        nats, bits_in_cells, images = nats + own, bits_in_cells + in_cells, images + count
        if progress is not None:
            progress(count)
    per_token = nats / (images * tokens)
    bits = nats / math.log(2) / images
    found = {
        "images": images,
        "tokens": tokens,
        "nats_per_token": per_token,
        "perplexity": perplexity(per_token),
        "bits_per_token": bits / tokens,
        "token_bits_per_image_dimension": bits / (3 * pixels),
    }
    if cells is not None:
        found["pixel_bits_per_dimension"] = (bits + bits_in_cells / images) / (3 * pixels)
    return found


def _nats(prior: Net2NetTransformer, z: Tensor, c: Tensor) -> float:
    """Sum of the cross entropies of image tokens z (B, n) given condition tokens c (B, c)."""
    room = prior.transformer.config.block_size - c.shape[1] + 1
    if z.shape[1] > room:
        raise UserError(
            f"data: got images of {z.shape[1]} tokens, expected at most {room}, the context of the model; evaluate on "
            "images of the trained size, or use `tamingfast likelihood`"
        )
    logits = prior.token_logits(z, c)
    return float(F.cross_entropy(logits.flatten(0, 1).float(), z.flatten(), reduction="sum"))


def cell_bits(clusters: ColorClusters) -> Tensor:
    """log2 of the number of 8-bit colours, out of 2^24, that are nearest to each cluster: float64 (n,)."""
    colors = clusters.kmeans.C
    levels = to_unit_scale(np.arange(256, dtype=np.uint8)).to(colors)
    counts = torch.zeros(len(colors), dtype=torch.int64, device=colors.device)
    for red in levels.split(max(1, _COLORS_PER_CALL >> 16)):
        points = torch.cartesian_prod(red, levels, levels)
        counts += torch.bincount(ops.nearest_code(points, colors), minlength=len(counts))
    return counts.clamp(min=1).double().log2()
