"""In which order a transformer predicts the tokens of an image: An Image is Worth 16x16 Tokens, section 3 and Fig. 2.

One first stage, its tokens encoded once, and for each seed one transformer per ordering: all of a seed begin with the
same weights and see the same batches, so that only the ordering is left to differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tamingfast import images, report, tasks
from tamingfast.checkpoints import load_model
from tamingfast.checkpoints.run_directory import begun, progress, read_metrics
from tamingfast.data.tokens import TokenDataset
from tamingfast.errors import UserError, nearest
from tamingfast.files import write_json, write_text
from tamingfast.ops import backends
from tamingfast.reproduce import settings as presets_of
from tamingfast.training import prior as prior_training
from tamingfast.training import vqgan as vqgan_training
from tamingfast.training.prior_config import ORDERINGS
from tamingfast.training.settings import build_datasets

EXPERIMENT, VQGAN = "orderings", "vqgan"
TOKENS = ("train.safetensors", "validation.safetensors")
REFERENCE = "row_major"


def presets() -> list[str]:
    """Names of the packaged presets."""
    return presets_of.presets(EXPERIMENT)


def run(
    preset: str, out: str | os.PathLike, overrides: Sequence[str] = (), resume: bool = False, device: str | None = None
) -> Path:
    """Train a first stage and a prior for each ordering and seed; returns the path of ``out/report.md``.

    Raises as `tamingfast.reproduce.run`.
    """
    settings, out = presets_of.load_preset(EXPERIMENT, preset, overrides), Path(out)
    names, seeds = _orderings(settings["orderings"]["names"]), list(settings["orderings"]["seeds"])
    if not seeds:
        raise UserError("orderings.seeds is empty; give at least one, e.g. orderings.seeds=[0,1,2]")
    device = str(backends.pick_device(device))
    datasets = build_datasets({"data": settings["data"]})
    config = {**settings["vqgan"], "data": settings["data"]}
    vqgan_training.train(config, out / VQGAN, resume and begun(out / VQGAN), device, datasets)
    tokens = _encoded(out, datasets, resume, device)
    for seed in seeds:
        for name in names:
            config = {**settings["prior"], "prior": {"ordering": name}}
            config["training"] = {**config["training"], "seed": seed}
            where = out / directory(name, seed)
            prior_training.train(config, out / VQGAN, where, resume and begun(where), device, tokens)
    runs = [VQGAN, *(directory(name, seed) for seed in seeds for name in names)]
    results = {
        "preset": preset,
        "data": datasets[0].description,
        "machine": backends.machine(),
        "settings": settings,
        "grid": list(tokens[0].grid),
        "vocabulary": tokens[0].vocab_size,
        "seconds": sum(progress(out / run)["seconds"] for run in runs),
        "orderings": [_facts(out, name, seeds) for name in names],
    }
    _samples(out, names, seeds[0], settings["sampling"], tokens[0].grid, device)
    return write(results, out)


def directory(name: str, seed: int) -> str:
    """Run directory of an ordering's prior, below the output."""
    return f"{name}_{seed}"


def _orderings(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in ORDERINGS:
            hint = nearest(str(name), ORDERINGS)
            raise UserError(f"orderings.names has '{name}', which is unknown{hint} (orderings: {', '.join(ORDERINGS)})")
    # What the others are compared with comes first, and is always there.
    return [REFERENCE, *(name for name in names if name != REFERENCE)]


def _encoded(out: Path, datasets: tuple, resume: bool, device: str) -> tuple[TokenDataset, TokenDataset]:
    for file, dataset in zip(TOKENS, datasets, strict=True):
        if not (resume and (out / file).exists()):
            tasks.encode(load_model(out / VQGAN, device=device), dataset, out / file)
    train, validation = (TokenDataset(out / file) for file in TOKENS)
    return train, validation


def _facts(out: Path, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The validation curve of each seed: steps and nats per token."""
    curves = {str(seed): read_metrics(out / directory(name, seed), "validation") for seed in seeds}
    return {
        "name": name,
        "steps": [line["step"] for line in curves[str(seeds[0])]],
        "nll": {seed: [line["nll"] for line in lines] for seed, lines in curves.items()},
    }


def summary(orderings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each ordering, from the least nats per token at the end: mean and spread over seeds.

    ``spread`` is the sample standard deviation, None with one seed. ``behind`` and ``behind_spread`` are of the
    differences to row major, seed by seed, which share their weights and batches and so vary less than both.
    """
    final = {row["name"]: np.array([curve[-1] for curve in row["nll"].values()]) for row in orderings}

    def spread(values: np.ndarray) -> float | None:
        return float(values.std(ddof=1)) if len(values) > 1 else None

    rows = [
        {
            "name": name,
            "nll": float(values.mean()),
            "spread": spread(values),
            "behind": float((values - final[REFERENCE]).mean()),
            "behind_spread": spread(values - final[REFERENCE]),
        }
        for name, values in final.items()
    ]
    return sorted(rows, key=lambda row: row["nll"])


def table(orderings: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a Markdown table, with the last figure of every seed."""
    seeds = list(orderings[0]["nll"])
    final = {row["name"]: [row["nll"][seed][-1] for seed in seeds] for row in orderings}

    def with_spread(value: float, spread: float | None, sign: str = "") -> str:
        return f"{value:{sign}.4f}" + ("" if spread is None else f" ± {spread:.4f}")

    heads = ["ordering", "NLL, nats per token", "above row major", *(f"seed {seed}" for seed in seeds)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in summary(orderings):
        each = [f"{value:.4f}" for value in final[row["name"]]]
        behind = "-" if row["name"] == REFERENCE else with_spread(row["behind"], row["behind_spread"], "+")
        cells = [row["name"].replace("_", " "), with_spread(row["nll"], row["spread"]), behind, *each]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(orderings: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Validation curves over steps, their means as lines and the range over seeds as bands."""
    figure, (axis,) = report.figure(1, width=7)
    for row in orderings:
        curves = np.array(list(row["nll"].values()))
        (line,) = axis.plot(row["steps"], curves.mean(0), label=row["name"].replace("_", " "))
        if len(curves) > 1:
            axis.fill_between(row["steps"], curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15)
    axis.set(xlabel="step", ylabel="validation NLL, nats per token", title="Orderings of the tokens")
    axis.legend()
    report.save_figure(figure, path)


def _samples(
    out: Path, names: Sequence[str], seed: int, sampling: Mapping[str, Any], grid: Sequence[int], device: str
) -> None:
    rows = {}
    for name in names:
        model = load_model(out / directory(name, seed), device=device)
        cond = tasks.conditions(model, sampling["images"])
        options = {key: sampling[key] for key in ("temperature", "top_k", "seed")}
        rows[name] = torch.cat([model.decode_grid(part).cpu() for part in tasks.draw(model, cond, *grid, **options)])
    images.save_rows(out / "samples.png", list(rows.values()), [name.replace("_", " ") for name in rows], scale=3)


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Write ``report.json``, ``report.md`` and ``nll.png`` into ``out``; returns the report's path."""
    write_json(out / "report.json", {**results, "summary": summary(results["orderings"])})
    plot(results["orderings"], out / "nll.png")
    geometry = results["settings"]["prior"]["model"]["params"]["transformer_config"]["params"]
    training, (rows, columns) = results["settings"]["prior"]["training"], results["grid"]
    seeds = results["settings"]["orderings"]["seeds"]
    names = ", ".join(row["name"].replace("_", " ") for row in results["orderings"])
    text = "\n\n".join([
        f"# Orderings: preset `{results['preset']}`",
        report.provenance(results),
        f"The same transformer ({report.geometry(geometry)}) for each ordering of {rows} x {columns} tokens out of "
        f"{results['vocabulary']}: {training['steps']} steps of {report.counted(training['batch_size'], 'image')}. "
        f"Seeds: {', '.join(map(str, seeds))}; each decides the first weights and the batches of all orderings alike. "
        "NLL is on validation images, at the end of the budget; ± is the standard deviation over seeds, of "
        "the differences in the column of differences.",
        table(results["orderings"]),
        "![validation NLL over steps; bands reach from the best to the worst seed](nll.png)",
        f"Samples of seed {seeds[0]}, one row each for {names}:\n\n![samples](samples.png)",
    ]) + "\n"  # fmt: skip
    write_text(out / "report.md", text)
    return out / "report.md"
