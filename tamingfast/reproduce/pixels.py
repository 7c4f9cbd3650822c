"""Sampling from pixels against sampling from latents: Taming Transformers, section 4.4.

Trains one first stage (f = 2), then the same transformer twice with the same number of floating-point operations: on
the first stage's tokens, and on colour-clustered pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from tamingfast import evaluation, images, tasks
from tamingfast.checkpoints.run_directory import progress, read_metrics
from tamingfast.data.base import EpochDataset
from tamingfast.engines.selection import choose_engine
from tamingfast.errors import UserError
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.reproduce import pixels_report
from tamingfast.reproduce.budget import scaled, training_flops
from tamingfast.reproduce.study import Study, draw_images, geometry, images_at, magnification, sampling_options, spread
from tamingfast.reproduce.timing import Timer

logger = logging.getLogger(__name__)

#: Run directories below the output, in the order in which they are made.
VQGAN, COLORS, LATENT_PRIOR, PIXEL_PRIOR = "vqgan", "colors", "prior_latents", "prior_pixels"
_COMPLETIONS = 3


@dataclass(frozen=True)
class TokenSequence:
    """The sequences of a prior: ``tokens`` per image from a ``vocabulary``, and the ``flops`` to train on one image."""

    tokens: int
    vocabulary: int
    flops: float


def run(study: Study) -> Path:
    """Train both stages and the pixel baseline, sample and time them; returns the path of ``out/report.md``.

    A resumed study trains nothing twice, but samples, measures and times again.
    """
    began = time.perf_counter()
    settings, datasets = study.settings, study.datasets()
    size = datasets[0][0]["image"].shape[0]
    sequences = _train(study, datasets, size)
    runs = _runs(study, sequences)
    models = {"latents": study.prior(LATENT_PRIOR), "pixels": study.prior(PIXEL_PRIOR)}
    pictures = _draw_pictures(study, models, datasets[1], size)
    quality = measure_quality(models, datasets, settings["sampling"], size, **settings["quality"])
    speed = measure_speed(models, size, settings["sampling"], **settings["timing"])
    results = study.facts(datasets[0]) | {
        "runs": runs,
        "prior": _prior_facts(settings, sequences),
        "speed": speed,
        "pictures": pictures,
        "quality": quality,
        # Training time is that of the runs, so that a resumed study reports all of it.
        "seconds": sum(run["seconds"] for run in runs) + speed["seconds"] + quality["seconds"],
        "seconds_this_call": time.perf_counter() - began,
    }
    return pixels_report.write(results, study.out)


# --- training -------------------------------------------------------------------------------------------------------


def _train(study: Study, datasets: tuple[EpochDataset, EpochDataset], size: int) -> dict[str, TokenSequence]:
    """Train what is missing; returns the sequences that each prior is trained on."""
    data, training = study.settings["data"], study.settings["prior"]["training"]
    study.train_first_stage(VQGAN, datasets)
    study.fit_colors(COLORS, datasets[0], data)
    latents = study.first_stage(VQGAN)
    shapes = {
        LATENT_PRIOR: ((size // latents.factor) ** 2, latents.n_embed),
        PIXEL_PRIOR: (size**2, study.settings["colors"]["count"]),
    }
    transformer = geometry(study.settings)
    sequences = {name: TokenSequence(*shape, training_flops(transformer, *shape)) for name, shape in shapes.items()}
    share = sequences[LATENT_PRIOR].flops / sequences[PIXEL_PRIOR].flops
    study.train_prior(LATENT_PRIOR, VQGAN, datasets, data=data)
    study.train_prior(PIXEL_PRIOR, COLORS, datasets, data=data, training=scaled(training, share))
    return sequences


def _prior_facts(settings: Mapping[str, Any], sequences: Mapping[str, TokenSequence]) -> dict[str, Any]:
    """Size of the transformer, and the floating-point operations of either prior's training."""
    transformer, training = geometry(settings), settings["prior"]["training"]
    budget = training["steps"] * training["batch_size"] * sequences[LATENT_PRIOR].flops
    parameters = 12 * transformer["n_layer"] * transformer["n_embd"] ** 2
    return {**transformer, "parameters": parameters, "budget_flops": budget}


def _runs(study: Study, sequences: Mapping[str, TokenSequence]) -> list[dict[str, Any]]:
    """A row for each training: its size, its time, and its last validation."""
    latents, pixels = sequences[LATENT_PRIOR], sequences[PIXEL_PRIOR]
    rec_loss, nll = {"train": "rec_loss", "validation": "rec_loss"}, {"train": "loss", "validation": "nll"}
    rows = []
    for directory, label, sequence, curve in (
        (VQGAN, "VQGAN", latents, rec_loss),
        (LATENT_PRIOR, "prior on latents", latents, nll),
        (PIXEL_PRIOR, "prior on pixels", pixels, nll),
    ):
        done, last = progress(study.out / directory), read_metrics(study.out / directory, "validation")[-1]
        shown = ("rec_loss", "codebook_usage", "codebook_perplexity", "nll")
        rows.append({
            "directory": directory,
            "label": label,
            "tokens": sequence.tokens,
            "vocabulary": sequence.vocabulary,
            "curve": curve,
            "steps": done["step"],
            "seconds": done["seconds"],
            "validation": {name: last[name] for name in shown if name in last},
        })  # fmt: skip
    return rows


# --- pictures -------------------------------------------------------------------------------------------------------


def _options(prior: Net2NetTransformer, size: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `sample_grid` for pictures and timing alike; the window is the whole image."""
    return sampling_options(prior, sampling) | {"window": size // prior.first_stage_model.factor}


def _draw_pictures(
    study: Study, models: Mapping[str, Net2NetTransformer], validation: EpochDataset, size: int
) -> dict[str, str]:
    """Write the sheets; returns their file names with captions."""
    sampling = study.settings["sampling"]
    count, columns = sampling["images"], sampling["columns"]
    shown = images_at(validation, spread(len(validation), 2 * columns)).to(models["latents"].device)
    rows = []
    for part in shown.split(columns):
        rows += [part, tasks.reconstructed(models["latents"], part)]
    images.save_rows(
        study.out / "reconstructions.png", rows, ["image", "VQGAN"] * (len(rows) // 2), magnification(size)
    )
    pictures = {"reconstructions.png": "Validation crops above their reconstructions by the VQGAN"}
    for name, prior in models.items():
        side = size // prior.first_stage_model.factor
        options = _options(prior, size, sampling) | {"batch": sampling["batch"]}
        drawn = draw_images(prior, tasks.conditions(prior, count), side, side, **options)
        images.save_png(study.out / f"samples_{name}.png", images.grid(drawn, columns), magnification(size))
        pictures[f"samples_{name}.png"] = f"Samples of the prior on {name}, drawn token by token"
    _draw_completions(study, models["latents"], shown[:columns], size)
    text = "Validation crops, their upper halves, and three completions of each by the prior on latents"
    return pictures | {"completions.png": text}


def _draw_completions(study: Study, prior: Net2NetTransformer, x: Tensor, size: int) -> None:
    options, cond = _options(prior, size, study.settings["sampling"]), tasks.conditions(prior, len(x))
    halves = x.clone()
    halves[:, :, size // 2 :] = 1.0
    completed = [tasks.completed(prior, x, cond, first_image=k * len(x), **options) for k in range(_COMPLETIONS)]
    names = ["image", "kept", *(f"completed, {k + 1}" for k in range(_COMPLETIONS))]
    images.save_rows(study.out / "completions.png", [x, halves, *completed], names, magnification(size))


# --- quality --------------------------------------------------------------------------------------------------------


def measure_quality(
    models: Mapping[str, Net2NetTransformer],
    datasets: tuple[EpochDataset, EpochDataset],
    sampling: Mapping[str, Any],
    size: int,
    images: int,
    features: str,
    weights: str | None,
) -> dict[str, Any]:
    """Distances of ``images`` samples of each prior from as many validation images, in a network's ``features``.

    For comparison, the distances of training images and of each first stage's reconstructions of the validation images
    are included; a prior can hardly beat the reconstructions of its own first stage. If the network or its weights are
    not available, the result is ``missing``, the reason, and no distances.
    """
    began = time.perf_counter()
    try:
        network = evaluation.load_features(features, weights, models["latents"].device)
    except UserError as error:
        return {"missing": str(error), "seconds": 0.0}
    batch, (train, validation) = sampling["batch"], datasets
    made = {}
    for name, prior in models.items():
        options = _options(prior, size, sampling)
        samples = evaluation.samples(prior, validation, images, batch_size=batch, **options)
        made[f"samples of the prior on {name}"] = samples
    shown = {
        "latents": "validation images through the VQGAN",
        "pixels": "validation images in the dictionary's colours",
    }
    for name, label in shown.items():
        made[label] = evaluation.reconstructions(models[name], evaluation.images_of(validation, batch, images))
    made["training images"] = evaluation.images_of(train, batch, images)
    found = evaluation.distances(network, made, evaluation.images_of(validation, batch, images))
    return {"distances": found, "seconds": time.perf_counter() - began}


# --- timing ---------------------------------------------------------------------------------------------------------


def measure_speed(
    models: Mapping[str, Net2NetTransformer],
    size: int,
    sampling: Mapping[str, Any],
    batch: int,
    prefixes: int,
    repeats: int,
    fastest_batches: Sequence[int],
    fastest_dtypes: Sequence[str | None],
) -> dict[str, Any]:
    """Seconds per image of both priors under three protocols, decoding included.

    (a) The paper's: a full forward pass per token. With ``prefixes`` 0 whole runs are timed; otherwise the steps at
    that many evenly spaced prefix lengths are timed, interpolated and summed over all steps, and for latents a whole
    run is timed as a check.
    (b) With a key/value cache. (c) The best of (b) and of the engine with each of ``fastest_batches`` and
    ``fastest_dtypes``.
    """
    began = time.perf_counter()
    timers = {
        name: Timer(prior, prior.first_stage_model.grid(size, size), _options(prior, size, sampling), repeats)
        for name, prior in models.items()
    }
    speed: dict[str, Any] = {"batch": batch, "paper": {}, "cached": {}, "fastest": {}}
    for name, timer in timers.items():
        logger.info("timing %s", name)
        speed["paper"][name] = timer.paper_protocol(batch, prefixes, whole=name == "latents")
        speed["cached"][name] = timer.figures(timer.whole(batch, engine="torch"), batch)
        speed["fastest"][name] = _fastest(timer, speed["cached"][name], fastest_batches, fastest_dtypes)
    speed["seconds"] = time.perf_counter() - began
    return speed


def _fastest(
    timer: Timer, cached: Mapping[str, Any], batches: Sequence[int], dtypes: Sequence[str | None]
) -> dict[str, Any]:
    """The fastest setting: all are tried on the middle row of the token grid, the best two on whole images."""
    tried = [(timer.row(batch, dtype=dtype) / batch, batch, dtype) for batch in batches for dtype in dtypes]
    measured = [{**cached, "engine": "torch", "dtype": None}]
    for _, batch, dtype in sorted(tried, key=itemgetter(0))[:2]:
        figures = timer.figures(timer.whole(batch, engine="auto", dtype=dtype), batch)
        engine, _ = choose_engine("auto", timer.prior.transformer, dtype)
        measured.append({**figures, "engine": engine, "dtype": dtype})
    best = min(measured, key=itemgetter("seconds_per_image"))
    candidates = [{"batch": batch, "dtype": dtype, "row_seconds_per_image": row} for row, batch, dtype in tried]
    return {**best, "measured": measured, "candidates": candidates}
