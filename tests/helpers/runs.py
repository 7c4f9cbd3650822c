"""Runs of the command `train vqgan` on eight-pixel crops, and whether two runs are one and the same."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch

from tamingfast import load_model
from tamingfast.checkpoints import run_directory


def config_file(folder: Path, **loss: object) -> Path:
    """A config of a tiny first stage; ``loss`` are parameters of its loss."""
    config = tiny.config(tiny.VQGAN) | {"data": tiny.CROPS}
    config["model"]["params"]["lossconfig"]["params"] |= loss
    path = folder / "config.json.yaml"
    path.write_text(json.dumps(config))
    return path


def begin(config: Path, out: Path, *words: str) -> list[object]:
    """The words of the command that begins a run."""
    return ["train", "vqgan", config, "--out", out, "--device", "cpu", *words]


def resume(out: Path, *words: str) -> list[object]:
    """The words of the command that continues a run."""
    return ["train", "vqgan", "--resume", "--out", out, "--device", "cpu", *words]


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs have the same metrics, states and weights, bit for bit."""
    assert (one / run_directory.METRICS).read_text() == (other / run_directory.METRICS).read_text()
    states = [torch.load(out / run_directory.STATE, weights_only=True) for out in (one, other)]
    for part in ("model", "optimizers"):
        left, right = (torch.utils._pytree.tree_leaves(state[part]) for state in states)
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    models = [load_model(out).state_dict() for out in (one, other)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def leftovers(out: Path) -> list[Path]:
    """The temporary files below a directory."""
    return [path for path in out.rglob("*") if ".partial" in path.name]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below ``folder`` by relative path, without the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != run_directory.LOCK
    }
