"""The order in which a transformer predicts the tokens of an image: An Image is Worth 16x16 Tokens, section 3, Fig. 2.

Trains one first stage, encodes the images once, and trains one transformer for each ordering and seed. All transformers
of a seed start with the same weights and see the same batches, so that only the ordering differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tamingfast import images, tasks
from tamingfast.checkpoints.run_directory import read_metrics
from tamingfast.data.base import EpochDataset
from tamingfast.data.tokens import TokenDataset
from tamingfast.errors import UserError, nearest
from tamingfast.reproduce import orderings_report
from tamingfast.reproduce.orderings_report import REFERENCE, title
from tamingfast.reproduce.study import Study, draw_images, magnification, sampling_options
from tamingfast.training.prior_config import ORDERINGS

VQGAN = "vqgan"
TOKENS = ("train.safetensors", "validation.safetensors")


def run(study: Study) -> Path:
    """Train a first stage and a prior for each ordering and seed; returns the path of ``out/report.md``."""
    settings = study.settings["orderings"]
    names, seeds = _orderings(settings["names"]), list(settings["seeds"])
    if not seeds:
        raise UserError("orderings.seeds: got an empty list, expected at least one seed, such as [0,1,2]")
    datasets = study.datasets()
    study.train_first_stage(VQGAN, datasets)
    tokens = _encoded(study, datasets)
    training = study.settings["prior"]["training"]
    for seed in seeds:
        for name in names:
            sections = {"prior": {"ordering": name}, "training": {**training, "seed": seed}}
            study.train_prior(directory(name, seed), VQGAN, tokens, **sections)
    results = study.facts(datasets[0]) | {
        "grid": list(tokens[0].grid),
        "vocabulary": tokens[0].vocab_size,
        "seconds": study.seconds([VQGAN, *(directory(name, seed) for seed in seeds for name in names)]),
        "orderings": [_curves(study, name, seeds) for name in names],
    }
    _draw_samples(study, names, seeds[0], tokens[0].grid)
    return orderings_report.write(results, study.out)


def directory(name: str, seed: int) -> str:
    """Run directory of an ordering's prior, below the output."""
    return f"{name}_{seed}"


def _orderings(names: Sequence[str]) -> list[str]:
    """The names, with the ordering that the others are compared to first, whether it was named or not."""
    for name in names:
        if name not in ORDERINGS:
            raise UserError(
                f"orderings.names: got '{name}', expected some of {', '.join(ORDERINGS)}{nearest(str(name), ORDERINGS)}"
            )
    return [REFERENCE, *(name for name in names if name != REFERENCE)]


def _encoded(study: Study, datasets: tuple[EpochDataset, EpochDataset]) -> tuple[TokenDataset, TokenDataset]:
    for file, dataset in zip(TOKENS, datasets, strict=True):
        if not (study.resume and (study.out / file).exists()):
            tasks.encode(study.first_stage(VQGAN), dataset, study.out / file)
    train, validation = (TokenDataset(study.out / file) for file in TOKENS)
    return train, validation


def _curves(study: Study, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The validation curve of each seed: steps and nats per token."""
    curves = {str(seed): read_metrics(study.out / directory(name, seed), "validation") for seed in seeds}
    return {
        "name": name,
        "steps": [line["step"] for line in curves[str(seeds[0])]],
        "nll": {seed: [line["nll"] for line in lines] for seed, lines in curves.items()},
    }


def _draw_samples(study: Study, names: Sequence[str], seed: int, grid: tuple[int, int]) -> None:
    """Write a sheet with a row of samples for each ordering."""
    sampling = study.settings["sampling"]
    rows = []
    for name in names:
        prior = study.prior(directory(name, seed))
        cond = tasks.conditions(prior, sampling["images"])
        rows.append(draw_images(prior, cond, *grid, **sampling_options(prior, sampling)))
    images.save_rows(
        study.out / orderings_report.SAMPLES, rows, [title(name) for name in names], magnification(rows[0].shape[-1])
    )
