"""The directory of a training run: the files from which a run is opened, or continued bit for bit.

``state.pt`` alone is enough to continue: it contains the weights, the optimizers and the position in the data, and is
replaced atomically. ``weights.safetensors`` is an export for all other uses and is written second, so a run that is
killed between the two has an older export but a consistent state. No random state is stored, because every draw is
keyed by (seed, step, rank); see `tamingfast.training.loop`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tamingfast.checkpoints.weights import load_into, save_weights
from tamingfast.errors import UserError
from tamingfast.files import atomic_write

CONFIG, STATE, WEIGHTS, METRICS, IMAGES = (
    "config.yaml", "state.pt", "weights.safetensors", "metrics.jsonl", "images",
)  # fmt: skip
FORMAT = 1


def save(out: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: dict[str, Any]) -> None:
    """Write ``state.pt``, then ``weights.safetensors``, each atomically.

    ``progress`` has plain numbers, among them "step", "epoch" and "seconds". If a weight is not finite, raises
    UserError and keeps the previous checkpoint.
    """
    weights = model.state_dict()
    for key, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(
                f"{key}: got values that are not finite after step {progress['step']}, expected finite weights; "
                f"continue from the last good checkpoint in {out} with --resume and a lower training.learning_rate"
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
    """The path of the config of the run in ``out``; UserError if no run has been started there."""
    if not begun(Path(out)):
        raise UserError(f"{out}: got no run in this directory, expected one to resume; start it without --resume")
    return Path(out) / CONFIG


def begun(out: Path) -> bool:
    """Whether a run has been started in ``out``, even if it has no state yet."""
    return (out / CONFIG).is_file()


def exists(out: Path) -> bool:
    """Whether there is a state in ``out`` to continue from."""
    return (out / STATE).is_file()


def restore(out: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Load ``state.pt`` into the model and its optimizers, and return the saved ``progress``.

    Raises UserError if the file is damaged or belongs to another format or model.
    """
    path = out / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
    except Exception as error:
        raise UserError(
            f"{path}: got an unreadable file ({type(error).__name__}), expected the state of a run; start a new run in "
            "another directory"
        ) from error
    if found != FORMAT:
        raise UserError(f"{path}: got format {found}, expected {FORMAT}; continue it with the version that wrote it")
    # A model registers `colorize` when it first draws label maps.
    load_into(model, state["model"], path, optional=("colorize",))
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["progress"]


def progress(out: str | os.PathLike) -> dict[str, Any]:
    """The progress of the run in ``out``: step, epoch, seconds of training and more. UserError without a state."""
    path = Path(out) / STATE
    if not path.is_file():
        raise UserError(
            f"{out}: got a directory without {STATE}, expected that of a training run that reached a checkpoint"
        )
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["progress"]


class Metrics:
    """``metrics.jsonl``: one JSON object per line with step, epoch, split and values, flushed after each."""

    def __init__(self, out: Path, keep_bytes: int):
        """Open the file of the run in ``out`` for appending, truncated to ``keep_bytes``, the checkpoint's `size`."""
        self._stream = open(out / METRICS, "ab")  # noqa: SIM115 (closed by close)
        self._stream.truncate(min(keep_bytes, os.fstat(self._stream.fileno()).st_size))

    def write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
        """Append a line."""
        line = json.dumps({"step": step, "epoch": epoch, "split": split, **values})
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()

    def size(self) -> int:
        """Length of the file in bytes, all of it on disk."""
        os.fsync(self._stream.fileno())
        return os.fstat(self._stream.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(out: str | os.PathLike, split: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl`` as dicts, of all splits or of one."""
    with open(Path(out) / METRICS, encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    return [line for line in lines if split in (None, line["split"])]
