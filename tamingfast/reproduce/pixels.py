"""Sampling images from pixels against sampling them from latents: the paper's section 4.4."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tamingfast import evaluation, images, tasks
from tamingfast.checkpoints import load_model
from tamingfast.checkpoints.run_directory import begun, progress, read_metrics
from tamingfast.errors import UserError
from tamingfast.ops import backends
from tamingfast.reproduce import pixels_report
from tamingfast.reproduce import settings as presets_of
from tamingfast.reproduce.budget import scaled, training_flops
from tamingfast.reproduce.timing import Timer
from tamingfast.sampling.sampler import choose_backend
from tamingfast.training import prior as prior_training
from tamingfast.training import vqgan as vqgan_training
from tamingfast.training.colors import fit_color_clusters
from tamingfast.training.settings import build_datasets

logger = logging.getLogger(__name__)

EXPERIMENT = "pixels"

#: Run directories below the output, in the order in which they are made.
VQGAN, COLORS, LATENT_PRIOR, PIXEL_PRIOR = "vqgan", "colors", "prior_latents", "prior_pixels"
#: By which sheets of images are magnified.
SCALE = 3


def presets() -> list[str]:
    """Names of the packaged presets."""
    return presets_of.presets(EXPERIMENT)


def run(
    preset: str, out: str | os.PathLike, overrides: Sequence[str] = (), resume: bool = False, device: str | None = None
) -> Path:
    """Train both stages and the pixel baseline, sample them, time them; returns the path of ``out/report.md``.

    One first stage (f = 2), then the same transformer once on its tokens and once on colour-clustered pixels, both with
    the same number of floating-point operations. ``resume`` continues an interrupted run in ``out``. Raises UserError
    for bad settings and when ``out`` holds a run that is not to be resumed.
    """
    settings, out = presets_of.load_preset(EXPERIMENT, preset, overrides), Path(out)
    device = str(backends.pick_device(device))
    began = time.perf_counter()
    datasets = build_datasets({"data": settings["data"]})
    runs, facts = _train_all(settings, datasets, out, resume, device)
    models = {
        "latents": load_model(out / LATENT_PRIOR, device=device),
        "pixels": load_model(out / PIXEL_PRIOR, device=device),
    }
    size = datasets[0][0]["image"].shape[0]
    pictures = _pictures(models, datasets[1], settings["sampling"], size, out)
    quality = measure_quality(models, datasets, settings["sampling"], size, **settings["quality"])
    speed = measure_speed(models, size, settings["sampling"], **settings["timing"])
    results = {
        "preset": preset,
        "data": datasets[0].description,
        "machine": backends.machine(),
        "settings": settings,
        "runs": runs,
        "prior": facts,
        "speed": speed,
        "pictures": pictures,
        "quality": quality,
        # Training time is each run's own, so that a resumed reproduction reports the whole.
        "seconds": sum(run["seconds"] for run in runs) + speed["seconds"] + quality["seconds"],
        "seconds_this_call": time.perf_counter() - began,
    }
    return pixels_report.write(results, out)


# --- training -------------------------------------------------------------------------------------------------------


def _train_all(settings: Mapping[str, Any], datasets: tuple, out: Path, resume: bool, device: str) -> tuple[list, dict]:
    def again(stage: str) -> bool:
        return resume and begun(out / stage)

    data = settings["data"]
    vqgan = {**settings["vqgan"], "data": data}
    vqgan_training.train(vqgan, out / VQGAN, resume=again(VQGAN), device=device, datasets=datasets)
    if not again(COLORS):
        fit_color_clusters(datasets[0], settings["colors"]["count"], settings["colors"]["seed"], out / COLORS, data)

    latent = load_model(out / VQGAN)
    side = datasets[0][0]["image"].shape[0]
    tokens = {LATENT_PRIOR: (side // latent.factor) ** 2, PIXEL_PRIOR: side**2}
    vocabulary = {LATENT_PRIOR: latent.n_embed, PIXEL_PRIOR: settings["colors"]["count"]}
    geometry = settings["prior"]["model"]["params"]["transformer_config"]["params"]
    cost = {name: training_flops(geometry, n, vocabulary[name]) for name, n in tokens.items()}
    steps = settings["prior"]["training"]["steps"]
    budget = steps * settings["prior"]["training"]["batch_size"] * cost[LATENT_PRIOR]
    # The cadence of logs and checkpoints is scaled with the steps, so that both curves have as many points.
    share = cost[LATENT_PRIOR] / cost[PIXEL_PRIOR]
    for name, stage in ((LATENT_PRIOR, VQGAN), (PIXEL_PRIOR, COLORS)):
        config = {**settings["prior"], "data": data}
        if name == PIXEL_PRIOR:
            config["training"] = scaled(config["training"], share)
        prior_training.train(config, out / stage, out / name, resume=again(name), device=device, datasets=datasets)

    nll = {"train": "loss", "validation": "nll"}
    labels = {
        VQGAN: (
            "VQGAN",
            tokens[LATENT_PRIOR],
            vocabulary[LATENT_PRIOR],
            {"train": "rec_loss", "validation": "rec_loss"},
        ),
        LATENT_PRIOR: ("prior on latents", tokens[LATENT_PRIOR], vocabulary[LATENT_PRIOR], nll),
        PIXEL_PRIOR: ("prior on pixels", tokens[PIXEL_PRIOR], vocabulary[PIXEL_PRIOR], nll),
    }
    runs = [_run_facts(out, name, *label) for name, label in labels.items()]
    facts = {**geometry, "parameters": 12 * geometry["n_layer"] * geometry["n_embd"] ** 2, "budget_flops": budget}
    return runs, facts


def _run_facts(
    out: Path, directory: str, label: str, tokens: int, vocabulary: int, curve: Mapping[str, str]
) -> dict[str, Any]:
    done = progress(out / directory)
    last = read_metrics(out / directory, "validation")[-1]
    shown = ("rec_loss", "codebook_usage", "codebook_perplexity", "nll")
    return {
        "directory": directory,
        "label": label,
        "tokens": tokens,
        "vocabulary": vocabulary,
        "curve": curve,
        "steps": done["step"],
        "seconds": done["seconds"],
        "validation": {name: last[name] for name in shown if name in last},
    }


# --- pictures -------------------------------------------------------------------------------------------------------


def _pictures(
    models: Mapping[str, nn.Module], validation: Any, sampling: Mapping[str, Any], size: int, out: Path
) -> dict:
    count, columns = sampling["images"], sampling["columns"]
    chosen = np.linspace(0, len(validation) - 1, 2 * columns).astype(int)
    shown = torch.stack([torch.as_tensor(validation[i]["image"]) for i in chosen.tolist()]).permute(0, 3, 1, 2)
    model = models["latents"]
    pictures = {"reconstructions.png": "Validation crops above their reconstructions by the VQGAN"}
    rows = []
    for part in shown.to(model.device).split(columns):
        rows += [part, tasks.reconstructed(model, part)]
    images.save_rows(out / "reconstructions.png", rows, ["image", "VQGAN"] * (len(rows) // 2), SCALE)
    for name, prior in models.items():
        options = _sampling_options(prior, size, sampling)
        side = size // prior.first_stage_model.factor
        grids = tasks.draw(prior, tasks.conditions(prior, count), side, side, batch=sampling["batch"], **options)
        sheet = images.grid(torch.cat([prior.decode_grid(grid) for grid in grids]), columns)
        images.save_png(out / f"samples_{name}.png", sheet, SCALE)
        pictures[f"samples_{name}.png"] = f"Samples of the prior on {name}, drawn token by token"
    x = shown[:columns].to(model.device)
    halves = x.clone()
    halves[:, :, size // 2 :] = 1.0
    options, cond = _sampling_options(model, size, sampling), tasks.conditions(model, columns)
    completed = [tasks.completed(model, x, cond, first_image=again * columns, **options) for again in range(3)]
    names = ["image", "kept", *(f"completed, {again + 1}" for again in range(len(completed)))]
    images.save_rows(out / "completions.png", [x, halves, *completed], names, SCALE)
    text = "Validation crops, their upper halves, and three completions of each by the prior on latents"
    return pictures | {"completions.png": text}


def _sampling_options(model: nn.Module, size: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The same for pictures and timing; the window is the whole image."""
    return {
        "window": size // model.first_stage_model.factor,
        "temperature": sampling["temperature"],
        "top_k": min(sampling["top_k"], model.transformer.config.vocab_size),
        "seed": sampling["seed"],
    }


# --- quality --------------------------------------------------------------------------------------------------------


def measure_quality(
    models: Mapping[str, nn.Module],
    datasets: tuple,
    sampling: Mapping[str, Any],
    size: int,
    images: int,
    features: str,
    weights: str | None,
) -> dict[str, Any]:
    """How far ``images`` samples of each prior are from as many validation images, in a network's ``features``.

    Beside them what either first stage makes of the validation images, which no prior on it can better by much, and
    training images. Where the network or its weights cannot be had, only ``missing``, the reason.
    """
    began = time.perf_counter()
    try:
        network = evaluation.load_features(features, weights, models["latents"].device)
    except UserError as error:
        return {"missing": str(error), "seconds": 0.0}
    batch, (train, validation) = sampling["batch"], datasets
    made = {}
    for name, model in models.items():
        options = _sampling_options(model, size, sampling)
        made[f"samples of the prior on {name}"] = evaluation.samples(
            model, validation, images, batch_size=batch, **options
        )
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
    models: Mapping[str, nn.Module],
    size: int,
    sampling: Mapping[str, Any],
    batch: int,
    prefixes: int,
    repeats: int,
    fastest_batches: Sequence[int],
    fastest_dtypes: Sequence[str | None],
) -> dict[str, Any]:
    """Seconds per image of both representations under three protocols; every figure is measured here.

    (a) the paper's: a full forward pass per token, decoding included; timed over whole runs when ``prefixes`` is 0,
    else both at as many evenly spaced prefix lengths, interpolated and summed over all steps, and latents over a whole
    run too, as a check of that.
    (b) the same with a key/value cache. (c) the best of (b) and all ``fastest_batches`` and ``fastest_dtypes``.
    """
    began = time.perf_counter()
    timers = {
        name: Timer(model, model.first_stage_model.grid(size, size), _sampling_options(model, size, sampling), repeats)
        for name, model in models.items()
    }
    speed: dict[str, Any] = {"batch": batch, "paper": {}, "cached": {}, "fastest": {}}
    for name, timer in timers.items():
        logger.info("timing %s", name)
        speed["paper"][name] = timer.paper_protocol(batch, prefixes, whole=name == "latents")
        speed["cached"][name] = timer.figures(timer.whole(batch, backend="torch"), batch)
        speed["fastest"][name] = _fastest(timer, speed["cached"][name], fastest_batches, fastest_dtypes)
    speed["seconds"] = time.perf_counter() - began
    return speed


def _fastest(
    timer: Timer, cached: Mapping[str, Any], batches: Sequence[int], dtypes: Sequence[str | None]
) -> dict[str, Any]:
    """Try every setting on one row of tokens in the middle of the image, then the best two over whole images."""
    candidates = [
        {"batch": batch, "dtype": dtype, "row_seconds_per_image": timer.row(batch, dtype=dtype) / batch}
        for batch in batches
        for dtype in dtypes
    ]
    measured = [{**cached, "backend": "torch", "dtype": None}]
    for setting in sorted(candidates, key=lambda candidate: candidate["row_seconds_per_image"])[:2]:
        batch, dtype = setting["batch"], setting["dtype"]
        figures = timer.figures(timer.whole(batch, backend="auto", dtype=dtype), batch)
        backend, _ = choose_backend("auto", timer.model.transformer, dtype)
        measured.append({**figures, "backend": backend, "dtype": dtype})
    best = min(measured, key=lambda figures: figures["seconds_per_image"])
    return {**best, "measured": measured, "candidates": candidates}
