"""Images from coarse to fine: An Image is Worth 16x16 Tokens, section 3, Fig. 3 and 7.

Trains one first stage, and one prior over all scales of its tokens. Then samples held-out images again from their first
s scales, for every s. The distances of the samples to the image and to each other show what each scale determines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast import images, tasks
from tamingfast.checkpoints.run_directory import read_metrics
from tamingfast.data.base import EpochDataset
from tamingfast.errors import UserError
from tamingfast.models.lpips import LPIPS, distance_name
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.pyramid import Pyramid
from tamingfast.reproduce import multiscale_report
from tamingfast.reproduce.study import Study, draw_images, images_at, magnification, sampling_options, spread

VQGAN, PRIOR = "vqgan", "prior"
#: Pairs of images per call of the distance.
_PAIRS = 256


def run(study: Study) -> Path:
    """Train a first stage and a multiscale prior, sample from given scales; returns the path of ``out/report.md``."""
    settings, measured = study.settings, study.settings["measure"]
    if settings["scales"] is None:
        raise UserError("scales: got null, expected all or a list such as [4,2,1]")
    datasets = study.datasets()
    # Made before the training, because weights or images may be missing.
    distance = LPIPS(measured["perceptual_weights"]).to(study.device)
    held_out = _held_out(datasets[1], measured["images"]).to(study.device)
    study.train_first_stage(VQGAN, datasets)
    study.train_prior(PRIOR, VQGAN, datasets, data=settings["data"], prior={"scales": settings["scales"]})
    prior = study.prior(PRIOR)
    assert isinstance(prior, MultiscaleTransformer)  # as its config has scales
    drawn = draw_given(prior, held_out, measured["samples"], settings["sampling"])
    results = study.facts(datasets[0]) | {
        "held_out": datasets[1].description,
        "scales": prior.pyramid.names,
        "seconds": study.seconds([VQGAN, PRIOR]),
        "distance": distance_name(measured["perceptual_weights"]),
        "nll": nll_of_scales(study.out / PRIOR, prior.pyramid),
        "given": [measure(distance, held_out, samples) for samples in drawn],
    }
    _draw_pictures(prior, held_out, drawn, study)
    return multiscale_report.write(results, study.out)


def _held_out(dataset: EpochDataset, count: int) -> Tensor:
    """Images (count, 3, H, W), evenly spread over a data set; UserError if it has fewer."""
    if len(dataset) < count:
        raise UserError(f"measure.images: got {count}, expected at most {len(dataset)}, the number of held-out images")
    return images_at(dataset, spread(len(dataset), count))


@torch.no_grad()
def draw_given(prior: MultiscaleTransformer, x: Tensor, samples: int, sampling: Mapping[str, Any]) -> list[Tensor]:
    """Samples (B, samples, 3, H, W) that start with the first s scales of images x (B, 3, H, W), for s from 0 to all.

    Sample j of image i gets the same noise for every s.
    """
    pyramid = prior.pyramid
    sequence = prior.encode_to_z(x)[1].repeat_interleave(samples, 0)
    canvas = prior.canvas_size(pyramid.height, pyramid.width)
    cond = tasks.conditions(prior, len(sequence))
    options = sampling_options(prior, sampling) | {"batch": sampling["batch"]}
    drawn = []
    for scales in range(len(pyramid.names) + 1):
        pixels = draw_images(prior, cond, *canvas, start=sequence[:, : pyramid.first(scales)], **options)
        drawn.append(pixels.to(x.device).clamp(-1, 1).unflatten(0, (len(x), samples)))
    return drawn


def measure(distance: nn.Module, x: Tensor, samples: Tensor) -> dict[str, float]:
    """Distances of samples (B, n, 3, H, W) that were drawn from given scales of images x (B, 3, H, W).

    ``to_input`` is the mean distance of a sample to its image and ``to_input_error`` its standard error over images,
    ``between`` the mean distance of two samples of the same image (0 for a single sample), ``pixels`` the mean absolute
    difference to the image in [0, 1].
    """
    count = samples.shape[1]
    to_input = _distances(distance, x.repeat_interleave(count, 0), samples.flatten(0, 1)).view(len(x), count).mean(1)
    first, second = torch.triu_indices(count, count, offset=1)
    between = _distances(distance, samples[:, first].flatten(0, 1), samples[:, second].flatten(0, 1))
    return {
        "to_input": float(to_input.mean()),
        "to_input_error": float(to_input.std() / len(x) ** 0.5) if len(x) > 1 else 0.0,
        "between": float(between.mean()) if len(between) else 0.0,
        "pixels": float((samples - x[:, None]).abs().mean()) / 2,
    }


@torch.no_grad()
def _distances(distance: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Distance of each pair of images, double (B,)."""
    parts = zip(a.split(_PAIRS), b.split(_PAIRS), strict=True)
    return torch.cat([distance(*part).flatten().double() for part in parts]) if len(a) else a.new_zeros(0)


def nll_of_scales(run: Path, pyramid: Pyramid) -> list[dict[str, Any]]:
    """Tokens and final validation NLL in nats per token of each scale, coarse to fine."""
    last = read_metrics(run, "validation")[-1]
    shapes = zip(pyramid.names, pyramid.shapes, strict=True)
    return [{"scale": name, "tokens": rows * columns, "nll": last[f"nll_{name}"]} for name, (rows, columns) in shapes]


@torch.no_grad()
def _draw_pictures(prior: MultiscaleTransformer, x: Tensor, drawn: Sequence[Tensor], study: Study) -> None:
    """Write the sheets of `multiscale_report.PICTURES`."""
    sampling, pyramid = study.settings["sampling"], prior.pyramid
    chosen = spread(len(x), min(sampling["shown"], len(x)))
    shown, given = x[chosen], [samples[chosen, 0] for samples in drawn[1:]]
    enlarged = magnification(x.shape[-1])
    names = ["image", *multiscale_report.given_names(pyramid.names)[1:]]
    images.save_rows(study.out / "given.png", [shown, *given], names, enlarged)
    grids = pyramid.split(prior.encode_to_z(shown)[1])
    # Tokens are repeated instead of pixels, because the decoder takes feature maps of the finest scale's size only.
    repeated = [F.interpolate(grid[:, None].float(), grids[-1].shape[1:])[:, 0].long() for grid in grids]
    decoded = [prior.decode_grid(grid) for grid in repeated]
    images.save_rows(study.out / "scales.png", [shown, *decoded], ["image", *pyramid.names], enlarged)
    canvas = prior.canvas_size(pyramid.height, pyramid.width)
    options = sampling_options(prior, sampling) | {"batch": sampling["batch"]}
    pixels = draw_images(prior, tasks.conditions(prior, sampling["images"]), *canvas, **options)
    images.save_png(study.out / "samples.png", images.grid(pixels, columns=min(8, len(pixels))), enlarged)
