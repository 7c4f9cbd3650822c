"""Tiny runs of both stages in several processes, and the losses that they recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from forked import ranks

from tamingfast.checkpoints import run_directory

#: Crops for epochs of four steps of 12 images.
CROPS = tiny.CROPS | {"length": 48}
STEPS = 40


def prior_config(folder: Path, noise: bool = True, **training: Any) -> Path:
    """The config of a prior, with every kind of noise or none: dropout and replaced tokens."""
    settings = {"steps": STEPS, "checkpoint_every": 20, "validate_every": 20, "ema_decay": 0.9, "grad_clip": 1.0}
    config = tiny.config(tiny.PRIOR, **settings | training)
    if not noise:
        config["model"]["params"]["pkeep"] = 1.0
        config["model"]["params"]["transformer_config"]["params"]["resid_pdrop"] = 0.0
    return _written(folder / "prior.yaml", config | {"data": CROPS, "prior": {"condition": "none"}})


def vqgan_config(folder: Path, **training: Any) -> Path:
    """The config of a first stage, whose discriminator has batch norm."""
    config = tiny.config(tiny.VQGAN, **{"steps": STEPS, "checkpoint_every": 20, "validate_every": 20} | training)
    return _written(folder / "vqgan.yaml", config | {"data": CROPS})


def _written(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config))
    return path


def run(count: int, *words: object) -> None:
    """The command in ``count`` processes, all of which must succeed."""
    outcomes = [process.outcome() for process in ranks(count, *words, "--device", "cpu")]
    assert [outcome.code for outcome in outcomes] == [0] * count, "".join(outcome.error for outcome in outcomes)


def values(out: Path, split: str = "train") -> list[dict[str, float]]:
    """The recorded values of a split, by step."""
    return run_directory.read_metrics(out, split)
