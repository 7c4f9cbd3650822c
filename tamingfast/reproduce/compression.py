"""How far to compress before the transformer: the first source, section 4.3, and its hierarchical codebook (4.4).

First stages with f = 1 (a dictionary of colours), 2, 4, 8, 16 and one of two levels learn from the same crops. Then the
same transformer learns, for the same number of floating-point operations, sequences of as many tokens of each: its
window of w x w tokens sees crops of wf x wf pixels. All draw images of the same size, through a sliding window.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tamingfast import evaluation, images, tasks
from tamingfast.checkpoints import load_model
from tamingfast.checkpoints.run_directory import begun, progress
from tamingfast.data import crops
from tamingfast.errors import UserError
from tamingfast.models.gpt import GPT
from tamingfast.models.hierarchical import TOKENS_PER_TOP
from tamingfast.models.lpips import LPIPS
from tamingfast.ops import backends
from tamingfast.progress import bar
from tamingfast.reproduce import compression_report
from tamingfast.reproduce import settings as presets_of
from tamingfast.reproduce.budget import scaled, training_flops
from tamingfast.reproduce.timing import Timer
from tamingfast.training import prior as prior_training
from tamingfast.training import vqgan as vqgan_training
from tamingfast.training.colors import fit_color_clusters
from tamingfast.training.settings import build_datasets

EXPERIMENT = "compression"
HIERARCHICAL = "tamingfast.models.hierarchical.HierarchicalVQModel"
#: Two-level samples are of small crops, so more of them fit a sheet.
SMALL_PER_LARGE = 4


def presets() -> list[str]:
    """Names of the packaged presets."""
    return presets_of.presets(EXPERIMENT)


@dataclass(frozen=True)
class Row:
    """One first stage of the study, with f = ``factor`` (of the top level, of two), and the prior on it.

    ``crop`` is the side in pixels of what the prior's window sees.
    """

    factor: int
    levels: int
    crop: int

    @property
    def name(self) -> str:
        """Run directory of the first stage; the prior's ends in ``_prior``."""
        return f"f{self.factor}" if self.levels == 1 else f"f{self.factor}_f{self.factor // 2}"

    @property
    def label(self) -> str:
        """Name in tables and plots."""
        return f"f = {self.factor}" if self.levels == 1 else f"f = {self.factor} over {self.factor // 2}"


def run(
    preset: str, out: str | os.PathLike, overrides: Sequence[str] = (), resume: bool = False, device: str | None = None
) -> Path:
    """Train a first stage and a prior for each f, measure and draw them; returns the path of ``out/report.md``.

    ``resume`` trains nothing twice, but measures and draws again. Raises as `tamingfast.reproduce.run`.
    """
    settings, out = presets_of.load_preset(EXPERIMENT, preset, overrides), Path(out)
    rows = _rows(settings)
    device = str(backends.pick_device(device))
    datasets = build_datasets({"data": settings["data"]})
    budget = _train(rows, settings, datasets, out, resume, device)
    results = {
        "preset": preset,
        "data": datasets[0].description,
        "machine": backends.machine(),
        "settings": settings,
        "budget_flops": budget,
        "rows": [_measured(row, settings, datasets[1], out, device) for row in _shown(rows, "measured")],
        "pictures": _pictures(rows, settings, datasets[1], out, device),
    }
    results["seconds"] = sum(row["training_seconds"] + row["measuring_seconds"] for row in results["rows"])
    return compression_report.write(results, out)


def _rows(settings: Mapping[str, Any]) -> list[Row]:
    stages, size = settings["stages"], settings["data"].get("size")
    if size is None:
        raise UserError("data.size is missing; give the side in pixels of the images to compare, e.g. data.size=256")
    window, top = stages["window"], stages["two_levels"]
    widths = settings["vqgan"]["model"]["params"]["ddconfig"]["ch_mult"]
    known = [2**m for m in range(len(widths))]
    # As many tokens of two levels as the window holds at most.
    side = math.isqrt(window**2 // TOKENS_PER_TOP)
    rows = [Row(factor, 1, window * factor) for factor in sorted(stages["factors"])]
    rows += [] if top is None else [Row(top, 2, side * top)]
    for row in rows:
        if row.factor not in known or (row.levels > 1 and row.factor < 4):
            raise UserError(
                f"{row.label} does not fit vqgan.model.params.ddconfig.ch_mult of {len(widths)} levels; expected one "
                f"of {', '.join(map(str, known))}, and at least 4 for stages.two_levels"
            )
        if row.crop > size or size % row.factor or stages["crop"] % row.factor or not side:
            raise UserError(
                f"{row.label} needs crops of {row.crop} pixels for a window of {window} tokens, and data.size ({size}) "
                f"and stages.crop ({stages['crop']}) that it divides; choose larger ones or a smaller stages.window"
            )
    if len(rows) < 2:
        raise UserError("stages.factors and stages.two_levels name less than two first stages; give some to compare")
    return rows


def _shown(rows: Sequence[Row], doing: str) -> Iterator[Row]:
    with bar("stage", len(rows), desc=doing) as shown:
        for row in rows:
            yield row
            shown.update()


# --- training -------------------------------------------------------------------------------------------------------


def _train(
    rows: Sequence[Row], settings: Mapping[str, Any], datasets: tuple, out: Path, resume: bool, device: str
) -> float:
    """Train what is not there yet; returns the floating-point operations of each prior's training."""

    data, seed = settings["data"], settings["data"].get("seed", 0)
    small = crops.cut(datasets, settings["stages"]["crop"], seed)
    for row in rows:
        where, seen = out / row.name, {**data, "crop": settings["stages"]["crop"]}
        if row.factor > 1:
            vqgan_training.train(
                _first_stage(row, settings) | {"data": seen}, where, resume and begun(where), device, small
            )
        elif not (resume and begun(where)):
            fit_color_clusters(small[0], settings["colors"]["count"], settings["colors"]["seed"], where, seen)
    training = settings["prior"]["training"]
    params = settings["vqgan"]["model"]["params"]
    reference = _cost(settings, settings["stages"]["window"] ** 2, params["n_embed"])
    for row in rows:
        where, stage = out / f"{row.name}_prior", load_model(out / row.name)
        share = reference / _cost(settings, math.prod(stage.grid(row.crop, row.crop)), stage.n_embed)
        config = {**settings["prior"], "data": {**data, "crop": row.crop}, "training": scaled(training, share)}
        seen = crops.cut(datasets, row.crop, seed)
        prior_training.train(config, out / row.name, where, resume and begun(where), device, seen)
    return training["steps"] * training["batch_size"] * reference


def _cost(settings: Mapping[str, Any], tokens: int, vocabulary: int) -> float:
    geometry = settings["prior"]["model"]["params"]["transformer_config"]["params"]
    return training_flops(geometry, tokens, vocabulary)


def _first_stage(row: Row, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``vqgan`` section with as many resolutions as the row's f needs."""
    config = copy.deepcopy(dict(settings["vqgan"]))
    described = config["model"]["params"]["ddconfig"]
    described["ch_mult"] = described["ch_mult"][: row.factor.bit_length() - row.levels + 1]
    if row.levels > 1:
        config["model"]["target"] = HIERARCHICAL
    return config


# --- measuring ------------------------------------------------------------------------------------------------------


def _measured(row: Row, settings: Mapping[str, Any], validation: Any, out: Path, device: str) -> dict[str, Any]:
    """What the report says of a row; every figure but the training's is measured here."""
    model = load_model(out / f"{row.name}_prior", device=device)
    stage, size, chosen = model.first_stage_model, settings["data"]["size"], settings["evaluation"]
    perceptual = chosen["perceptual"] and LPIPS(None if chosen["perceptual"] == "lpips" else chosen["perceptual"])
    squares = crops.Crops(validation, row.crop, tiles=True)
    grid, trained = stage.grid(size, size), stage.grid(row.crop, row.crop)
    timing = settings["timing"]
    began = time.perf_counter()
    facts = {
        "name": row.name,
        "label": row.label,
        "levels": row.levels,
        "crop": row.crop,
        "tokens": math.prod(grid),
        "tokens_trained": math.prod(trained),
        "vocabulary": stage.n_embed,
        "pixels_per_token": size**2 / math.prod(grid),
        "steps": progress(out / f"{row.name}_prior")["step"],
        "training_seconds": sum(_seconds(out / name) for name in (row.name, f"{row.name}_prior")),
        "reconstruction": evaluation.reconstruction(
            stage, validation, batch_size=1, limit=chosen["images"], perceptual=perceptual
        ),
        "likelihood": evaluation.likelihood(model, squares, limit=chosen["crops"]),
        "speed": _speed(row, model, grid, settings, **timing),
    }
    return facts | {"measuring_seconds": time.perf_counter() - began}


def _seconds(run: Path) -> float:
    return progress(run)["seconds"] if (run / "state.pt").exists() else 0.0  # colours are not trained step by step


def _drawing(row: Row, model: nn.Module, grid: tuple[int, int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `sample_grid`."""
    sampling = settings["sampling"]
    return {
        "window": max(grid) if row.levels > 1 else settings["stages"]["window"],
        "temperature": sampling["temperature"],
        "top_k": min(sampling["top_k"], model.transformer.config.vocab_size),
        "seed": sampling["seed"],
    }


def _speed(
    row: Row,
    model: nn.Module,
    grid: tuple[int, int],
    settings: Mapping[str, Any],
    batch: int,
    prefixes: int,
    repeats: int,
) -> dict[str, Any]:
    """Seconds per image of the whole size: by the paper's protocol, by our engine, and with a window moving in strides.

    Where the window moves, a full forward pass costs the same for each token, so the paper's protocol is timed on a
    grid of one more row and column than the window, and multiplied. Two levels take one window over all tokens, for
    which the transformer gets as many positions, untrained: time does not depend on the weights. Only there the paper's
    protocol is integrated over ``prefixes`` (see `Timer.paper_protocol`).
    """
    options = _drawing(row, model, grid, settings)
    if row.levels > 1:
        model = _with_positions(model, math.prod(grid))
    timer = Timer(model, grid, options, repeats)
    if max(grid) > options["window"]:
        side = options["window"] + 1
        nearby = Timer(model, (side, side), options, repeats)
        seconds = nearby.whole(batch, backend="naive") / nearby.tokens * timer.tokens
        speed = {"paper": timer.figures(seconds, batch) | {"tokens_timed": nearby.tokens}}
        stride = {"schedule": "strided", "stride": settings["sampling"]["stride"]}
        speed["strided"] = timer.figures(timer.whole(batch, **stride), batch)
    else:
        speed = {"paper": timer.paper_protocol(batch, prefixes if row.levels > 1 else 0, whole=False)}
    speed["engine"] = timer.figures(timer.whole(batch), batch)
    # A window that does not move is the same in strides.
    return {"strided": speed["engine"]} | speed


def _with_positions(model: nn.Module, tokens: int) -> nn.Module:
    config = model.transformer.config
    longer = copy.deepcopy(model)
    torch.manual_seed(0)
    longer.transformer = GPT(
        config.vocab_size, 1 + tokens, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd
    )
    return longer.to(model.device).eval()


# --- pictures -------------------------------------------------------------------------------------------------------


def _pictures(rows: Sequence[Row], settings: Mapping[str, Any], validation: Any, out: Path, device: str) -> dict:
    """Draw the sheets; returns their file names with what they show."""
    count, size = settings["sampling"]["images"], settings["data"]["size"]
    shown = torch.stack([torch.as_tensor(validation[i]["image"]) for i in range(count)]).permute(0, 3, 1, 2)
    sheet, pictures = {"image": shown}, {}
    for row in _shown(rows, "drawn"):
        model = load_model(out / f"{row.name}_prior", device=device)
        sheet[row.label] = torch.cat([tasks.reconstructed(model, x[None].to(model.device)).cpu() for x in shown])
        side, number = (size, count) if row.levels == 1 else (row.crop, SMALL_PER_LARGE * count)
        grid = model.first_stage_model.grid(side, side)
        stride = {"schedule": "strided", "stride": settings["sampling"]["stride"]}
        options = _drawing(row, model, grid, settings) | stride
        batch = settings["sampling"]["batch"]
        drawn = tasks.draw(model, tasks.conditions(model, number), *grid, batch=batch, **options)
        parts = torch.cat([model.decode_grid(part).cpu() for part in drawn]).split(count)
        images.save_rows(out / f"samples_{row.name}.png", parts, [row.label] * len(parts), max(1, size // side))
        pictures[f"samples_{row.name}.png"] = f"Samples, {row.label}, {side} x {side} pixels"
    images.save_rows(out / "reconstructions.png", list(sheet.values()), list(sheet))
    text = f"Validation images, and what is left of them with {', '.join(row.label for row in rows)}"
    return {"reconstructions.png": text} | pictures
