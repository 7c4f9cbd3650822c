"""How far to compress before the transformer: Taming Transformers, section 4.3 and, for two levels, section 4.4.

First stages with f = 1 (a dictionary of colours), 2, 4, 8 and 16, and one of two levels, are trained on the same crops.
Then the same transformer is trained on the tokens of each, with the same number of floating-point operations and on
sequences of the same length: its window of w x w tokens sees crops of wf x wf pixels. All priors draw images of the
same size, by sliding the window.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tamingfast import evaluation, images, tasks
from tamingfast.data import crops
from tamingfast.data.base import EpochDataset
from tamingfast.errors import UserError
from tamingfast.models.gpt import GPT
from tamingfast.models.hierarchical import TOKENS_PER_TOP
from tamingfast.models.lpips import LPIPS
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import bar
from tamingfast.reproduce import compression_report
from tamingfast.reproduce.budget import scaled, training_flops
from tamingfast.reproduce.study import (
    Study,
    draw_images,
    geometry,
    images_at,
    magnification,
    sampling_options,
    spread,
)
from tamingfast.reproduce.timing import Timer

HIERARCHICAL = "tamingfast.models.hierarchical.HierarchicalVQModel"
#: Samples of two levels are as small as the crops, so more of them fit on a sheet.
_SMALL_PER_LARGE = 4
#: Images in a row of a sheet, at most.
_COLUMNS = 12


@dataclass(frozen=True)
class Variant:
    """One first stage of the study with f = ``factor`` (of the coarse level, if there are two), and the prior on it.

    ``crop`` is the side in pixels of the crops that the prior is trained on.
    """

    factor: int
    levels: int
    crop: int

    @property
    def stage(self) -> str:
        """Run directory of the first stage."""
        return f"f{self.factor}" if self.levels == 1 else f"f{self.factor}_f{self.factor // 2}"

    @property
    def prior(self) -> str:
        """Run directory of the prior."""
        return f"{self.stage}_prior"

    @property
    def label(self) -> str:
        """Name in tables and plots."""
        return f"f = {self.factor}" if self.levels == 1 else f"f = {self.factor} over {self.factor // 2}"


def run(study: Study) -> Path:
    """Train a first stage and a prior for each f, measure and draw; returns the path of ``out/report.md``.

    A resumed study trains nothing twice, but measures and draws again.
    """
    variants = variants_of(study.settings)
    datasets = study.datasets()
    budget = _train(study, variants, datasets)
    rows = [_measured(study, variant, datasets[1]) for variant in _shown(variants, "measured")]
    results = study.facts(datasets[0]) | {
        "budget_flops": budget,
        "rows": rows,
        "pictures": _draw_pictures(study, variants, datasets[1]),
        "seconds": sum(row["training_seconds"] + row["measuring_seconds"] for row in rows),
    }
    return compression_report.write(results, study.out)


def variants_of(settings: Mapping[str, Any]) -> list[Variant]:
    """The first stages that the settings name; UserError if one does not fit the images, or for fewer than two."""
    stages, size = settings["stages"], settings["data"].get("size")
    if size is None:
        raise UserError("data.size: got null, expected the side of the images in pixels, such as data.size=256")
    window, top = stages["window"], stages["two_levels"]
    variants = [Variant(factor, 1, window * factor) for factor in sorted(stages["factors"])]
    if top is not None:
        # The largest crop whose tokens, of both levels, are no more than those of the window.
        variants.append(Variant(top, 2, math.isqrt(window**2 // TOKENS_PER_TOP) * top))
    for variant in variants:
        _check(variant, settings, size)
    if len(variants) < 2:
        raise UserError(f"stages: got {len(variants)} first stages, expected at least two to compare")
    return variants


def _check(variant: Variant, settings: Mapping[str, Any], size: int) -> None:
    stages, levels = settings["stages"], len(settings["vqgan"]["model"]["params"]["ddconfig"]["ch_mult"])
    factor, window = variant.factor, stages["window"]
    known = [2**level for level in range(levels)][2 if variant.levels > 1 else 0 :]
    if factor not in known:
        name = "factors" if variant.levels == 1 else "two_levels"
        raise UserError(
            f"stages.{name}: got {factor}, expected one of {', '.join(map(str, known))}; vqgan.model.params.ddconfig."
            f"ch_mult has {levels} levels"
        )
    if not variant.crop:
        least = math.isqrt(TOKENS_PER_TOP - 1) + 1
        raise UserError(f"stages.window: got {window}, expected at least {least} for tokens of two levels")
    if variant.crop > size:
        raise UserError(
            f"stages.window: got {window}, which needs crops of {variant.crop} pixels for {variant.label}, expected "
            f"crops of at most data.size={size}; choose a smaller window or larger images"
        )
    for name, side in (("data.size", size), ("stages.crop", stages["crop"])):
        if side % factor:
            raise UserError(f"{name}: got {side}, expected a multiple of {factor} for {variant.label}")


def _shown(variants: Sequence[Variant], doing: str) -> Iterator[Variant]:
    with bar("stage", len(variants), desc=doing) as shown:
        for variant in variants:
            yield variant
            shown.update()


# --- training -------------------------------------------------------------------------------------------------------


def _train(study: Study, variants: Sequence[Variant], datasets: tuple[EpochDataset, EpochDataset]) -> float:
    """Train what is missing; returns the floating-point operations of each prior's training."""
    settings, data = study.settings, study.settings["data"]
    seed, side = data.get("seed", 0), settings["stages"]["crop"]
    small = crops.cut(datasets, side, seed)
    for variant in variants:
        cropped = {**data, "crop": side}
        if variant.factor > 1:
            study.train_first_stage(variant.stage, small, _first_stage(variant, settings) | {"data": cropped})
        else:
            study.fit_colors(variant.stage, small[0], cropped)
    training, n_embed = settings["prior"]["training"], settings["vqgan"]["model"]["params"]["n_embed"]
    reference = training_flops(geometry(settings), settings["stages"]["window"] ** 2, n_embed)
    for variant in variants:
        stage = study.first_stage(variant.stage)
        cost = training_flops(geometry(settings), math.prod(stage.grid(variant.crop, variant.crop)), stage.n_embed)
        study.train_prior(
            variant.prior,
            variant.stage,
            crops.cut(datasets, variant.crop, seed),
            data={**data, "crop": variant.crop},
            training=scaled(training, reference / cost),
        )
    return training["steps"] * training["batch_size"] * reference


def _first_stage(variant: Variant, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``vqgan`` section with the number of resolutions that gives the variant's f."""
    config = copy.deepcopy(dict(settings["vqgan"]))
    described = config["model"]["params"]["ddconfig"]
    described["ch_mult"] = described["ch_mult"][: variant.factor.bit_length() - variant.levels + 1]
    if variant.levels > 1:
        config["model"]["target"] = HIERARCHICAL
    return config


# --- measuring ------------------------------------------------------------------------------------------------------


def _measured(study: Study, variant: Variant, validation: EpochDataset) -> dict[str, Any]:
    """A variant's row of the report. Everything is measured here but the steps and the time of the training."""
    prior = study.prior(variant.prior)
    stage, size, chosen = prior.first_stage_model, study.settings["data"]["size"], study.settings["evaluation"]
    source = chosen["perceptual"]  # "lpips" downloads the weights
    perceptual = LPIPS(None if source == "lpips" else source) if source else None
    squares = crops.Crops(validation, variant.crop, tiles=True)
    grid = stage.grid(size, size)
    began = time.perf_counter()
    row = {
        "name": variant.stage,
        "label": variant.label,
        "levels": variant.levels,
        "crop": variant.crop,
        "tokens": math.prod(grid),
        "tokens_trained": math.prod(stage.grid(variant.crop, variant.crop)),
        "vocabulary": stage.n_embed,
        "pixels_per_token": size**2 / math.prod(grid),
        "steps": study.steps(variant.prior),
        "training_seconds": study.seconds([variant.stage, variant.prior]),
        "reconstruction": evaluation.reconstruction(
            stage, validation, batch_size=1, limit=chosen["images"], perceptual=perceptual
        ),
        "likelihood": evaluation.likelihood(prior, squares, limit=chosen["crops"]),
        "speed": _speed(variant, prior, grid, study.settings),
    }
    return row | {"measuring_seconds": time.perf_counter() - began}


def _options(
    variant: Variant, prior: Net2NetTransformer, grid: tuple[int, int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of `sample_grid`."""
    window = max(grid) if variant.levels > 1 else settings["stages"]["window"]
    return sampling_options(prior, settings["sampling"]) | {"window": window}


def _strided(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"schedule": "strided", "stride": settings["sampling"]["stride"]}


def _speed(
    variant: Variant, prior: Net2NetTransformer, grid: tuple[int, int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Seconds per full-size image by the paper's protocol, by our engine, and by our engine with a strided window.

    Where the window slides, a full forward pass costs the same for every token, so the paper's protocol is timed on a
    grid with one row and column more than the window and scaled up. Two levels need one window over all tokens. An
    untrained transformer with enough positions is timed instead, as the time does not depend on the weights, and the
    paper's protocol is integrated over ``timing.prefixes`` prefix lengths (see `Timer.paper_protocol`).
    """
    batch, repeats = settings["timing"]["batch"], settings["timing"]["repeats"]
    options = _options(variant, prior, grid, settings)
    if variant.levels > 1:
        prior = _with_positions(prior, math.prod(grid))
    timer = Timer(prior, grid, options, repeats)
    if max(grid) > options["window"]:
        side = options["window"] + 1
        nearby = Timer(prior, (side, side), options, repeats)
        seconds = nearby.whole(batch, engine="naive") / nearby.tokens * timer.tokens
        speed = {"paper": timer.figures(seconds, batch) | {"tokens_timed": nearby.tokens}}
        speed["strided"] = timer.figures(timer.whole(batch, **_strided(settings)), batch)
    else:
        prefixes = settings["timing"]["prefixes"] if variant.levels > 1 else 0
        speed = {"paper": timer.paper_protocol(batch, prefixes, whole=False)}
    speed["engine"] = timer.figures(timer.whole(batch), batch)
    # A window that does not slide has no strides.
    return {"strided": speed["engine"]} | speed


def _with_positions(prior: Net2NetTransformer, tokens: int) -> Net2NetTransformer:
    """The prior with an untrained transformer of the same size whose context has room for ``tokens`` tokens."""
    config = prior.transformer.config
    longer = copy.deepcopy(prior)
    torch.manual_seed(0)
    longer.transformer = GPT(
        config.vocab_size, 1 + tokens, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd
    )
    return longer.to(prior.device).eval()


# --- pictures -------------------------------------------------------------------------------------------------------


def _draw_pictures(study: Study, variants: Sequence[Variant], validation: EpochDataset) -> dict[str, str]:
    """Write the sheets; returns their file names with captions."""
    sampling, size = study.settings["sampling"], study.settings["data"]["size"]
    count, columns = sampling["images"], min(sampling["images"], _COLUMNS)
    shown = images_at(validation, spread(len(validation), columns))
    sheet, pictures = {"image": shown}, {}
    for variant in _shown(variants, "drawn"):
        prior = study.prior(variant.prior)
        sheet[variant.label] = torch.cat([tasks.reconstructed(prior, x[None].to(prior.device)).cpu() for x in shown])
        side, number = (size, count) if variant.levels == 1 else (variant.crop, _SMALL_PER_LARGE * count)
        grid = prior.first_stage_model.grid(side, side)
        options = _options(variant, prior, grid, study.settings) | _strided(study.settings)
        cond = tasks.conditions(prior, number)
        parts = draw_images(prior, cond, *grid, batch=sampling["batch"], **options).split(columns)
        name = f"samples_{variant.stage}.png"
        images.save_rows(study.out / name, parts, [variant.label] * len(parts), max(magnification(side), size // side))
        pictures[name] = f"Samples, {variant.label}, {side} x {side} pixels"
    images.save_rows(study.out / "reconstructions.png", list(sheet.values()), list(sheet), magnification(size))
    text = f"Validation images, and their reconstructions with {', '.join(variant.label for variant in variants)}"
    return {"reconstructions.png": text} | pictures
