"""A run directory on disk: what a training run leaves, so that it can be opened, and continued bit for bit.

``state.pt`` alone is enough to continue: it holds the weights, the optimizers and the position in the data, and
is replaced in one step. ``weights.safetensors`` is the export for everybody else and is written after it, so a
run killed between the two has an export that is merely older, never a state whose halves disagree.
No state of a random generator is kept: every draw is keyed by (seed, step, rank), see `tamingfast.training.loop`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tamingfast.checkpoints.weights import load_into
from tamingfast.errors import UserError
from tamingfast.files import atomic_write

CONFIG, STATE, WEIGHTS, METRICS, IMAGES = (
    "config.yaml", "state.pt", "weights.safetensors", "metrics.jsonl", "images",
)  # fmt: skip
FORMAT = 1


def save(out: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: dict[str, Any]) -> None:
    """Write ``state.pt``, then ``weights.safetensors``, each atomically; ``progress`` is plain numbers.

    Raises UserError, leaving the files of the previous checkpoint alone, when a weight is not finite.
    """
    from tamingfast.checkpoints import save_weights

    weights = model.state_dict()
    for key, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(
                f"the weight '{key}' is not finite after step {progress['step']}; the last good checkpoint in {out} "
                "was kept: continue it with --resume and a lower training.learning_rate"
            )
    state = {
        "format": FORMAT,
        "progress": progress,
        "model": weights,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    with atomic_write(out / STATE) as temporary:
        torch.save(state, temporary)
    save_weights(out / WEIGHTS, weights, {key: str(progress[key]) for key in ("step", "epoch", "seconds")})


def config_file(out: str | os.PathLike) -> Path:
    """The config that the run in ``out`` began with; UserError when there is no run."""
    path = Path(out) / CONFIG
    if not path.is_file():
        raise UserError(f"{out} holds no run to resume; start it without --resume")
    return path


def begun(out: Path) -> bool:
    """Whether ``out`` holds a run, be it one without a state yet, or colours, which have none."""
    return (out / CONFIG).exists()


def exists(out: Path) -> bool:
    """Whether ``out`` holds a state to continue from."""
    return (out / STATE).is_file()


def restore(out: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Load ``state.pt`` into the model and its optimizers; returns the ``progress`` that was saved.

    Raises UserError when the file is damaged, of another format, or of another model.
    """
    path = out / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}); start a new run in another directory"
        ) from error
    if found != FORMAT:
        raise UserError(f"{path} has format {found}, expected {FORMAT}; continue it with the version that wrote it")
    # A model that has drawn label maps has grown a buffer of colours, which the drawing makes anew.
    load_into(model, state["model"], path, optional=("colorize",))
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["progress"]


def progress(out: str | os.PathLike) -> dict[str, Any]:
    """Where the run in ``out`` stands: step, epoch, seconds of training time and more. UserError without a state."""
    path = Path(out) / STATE
    if not path.is_file():
        raise UserError(f"{out} holds no {STATE}; give the directory of a training run that reached a checkpoint")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["progress"]


class Metrics:
    """``metrics.jsonl``: one JSON object a line with step, epoch, split and values; appended to and flushed."""

    def __init__(self, out: Path, keep_bytes: int):
        """Open the file of run ``out``, cut to its first ``keep_bytes`` bytes: the lines the checkpoint knows of."""
        self._stream = open(out / METRICS, "ab")  # noqa: SIM115 (closed by close)
        self._stream.truncate(min(keep_bytes, os.fstat(self._stream.fileno()).st_size))

    def write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
        line = json.dumps({"step": step, "epoch": epoch, "split": split, **values})
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()

    def size(self) -> int:
        """Bytes that are safely on disk."""
        os.fsync(self._stream.fileno())
        return os.fstat(self._stream.fileno()).st_size

    def close(self) -> None:
        self._stream.close()


def read_metrics(out: str | os.PathLike, split: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl`` as dicts, of one split or of all."""
    with open(Path(out) / METRICS, encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    return [line for line in lines if split in (None, line["split"])]
