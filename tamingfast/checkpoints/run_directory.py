"""The directory of a training run: the files from which a run is opened, or continued bit for bit.

``state.pt`` alone is enough to continue: it contains the weights, their averages, the optimizers and the position in
the data, and is replaced atomically. ``weights.safetensors`` is an export for all other uses, of the averages where
there are any, and is written second, so a run that is killed between the two has an older export but a consistent
state. No random state is stored, because every draw is keyed by (seed, step, batch); see `tamingfast.training.loop`.

Whoever trains holds the lock ``.lock``; readers need none, since every file is replaced whole or appended to by lines.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tamingfast.checkpoints.config import at, load_yaml
from tamingfast.checkpoints.file_kinds import TORCH
from tamingfast.checkpoints.metrics import METRICS, Metrics, read_metrics
from tamingfast.checkpoints.seal import check_seal
from tamingfast.checkpoints.torch_files import BadFile, TorchFile, open_torch_file
from tamingfast.checkpoints.unpickling import StoredTensor
from tamingfast.checkpoints.weights import folded, load_into, opened, save_weights
from tamingfast.errors import UserError, first_line, storage_sentence
from tamingfast.files import atomic_write, check_directory, locked, remove_leftovers, writable_path

CONFIG, STATE, WEIGHTS, IMAGES, LOCK = "config.yaml", "state.pt", "weights.safetensors", "images", ".lock"
PLOT = "metrics.png"
INDEX = "data.index"  # of the files that the run is trained on
FORMAT = 1
__all__ = ["METRICS", "Metrics", "read_metrics"]  # part of a run directory
#: What `save` records of the progress of a run.
_PROGRESS: dict[str, type | tuple[type, ...]] = {
    "step": int, "epoch": int, "batch": int, "seconds": (int, float), "images": int, "processes": int,
    "metrics_bytes": int,
}  # fmt: skip


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold the run directory ``out``, made if it is missing, for writing; what killed writers left in it is removed.

    Raises UserError when another process holds it, or when it or one of its files cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(storage_sentence(error, out)) from error
    with locked(out / LOCK, str(out), "wait until it has ended, or give another directory"):
        for name in (CONFIG, STATE, WEIGHTS, METRICS, PLOT, INDEX):
            writable_path(out / name)
        check_directory(out / IMAGES)
        for folder in (out, out / IMAGES):
            if folder.is_dir():
                remove_leftovers(folder)
        yield


def state_of(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], averages: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """The tensors of ``state.pt``; ``averages`` are moving averages of some of the weights by name."""
    state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    return state if averages is None else state | {"averages": dict(averages)}


def save(
    out: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    progress: dict[str, Any],
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write ``state.pt``, then ``weights.safetensors``, each atomically.

    ``state`` is what `state_of` returned, with whole tensors, by default that of the model and its optimizers; its
    averages replace weights in the export. ``progress`` has plain numbers: "step", "epoch", "batch", "seconds",
    "images", "processes" and "metrics_bytes", and as "launches" the table of `tamingfast.kernels.choices` of each
    process. If a weight or an optimizer's average is not finite, raises UserError and keeps the previous checkpoint; so
    it does when the files cannot be written, as on a full disk.
    """
    state = state_of(model, optimizers) if state is None else state
    weights, averages = state["model"], state.get("averages", {})
    averaged = {f"average of {name}": value for name, value in averages.items()}
    for key, value in (*weights.items(), *averaged.items(), *_moments(model, optimizers, state["optimizers"])):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(
                f"{key}: got values that are not finite after step {progress['step']}, expected finite values; "
                f"continue from the last good checkpoint in {out} with --resume and a lower training.learning_rate"
            )
    with atomic_write(out / STATE) as temporary:
        torch.save({"format": FORMAT, "progress": progress, **state}, temporary)
    weights = folded(model, {**weights, **averages})
    save_weights(out / WEIGHTS, weights, {key: str(progress[key]) for key in ("step", "epoch", "seconds")})


def _moments(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], states: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the optimizers' ``states``, named like "exp_avg of encoder.conv_in.weight"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer, state in zip(optimizers, states, strict=True):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, kept in state["state"].items():
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    yield f"{name} of {names.get(parameters[number], 'a parameter')}", value


def config_file(out: str | os.PathLike) -> Path:
    """The path of the config of the run in ``out``; UserError if no run has been started there, or it is damaged."""
    if not begun(Path(out)):
        raise UserError(f"{out}: got no run in this directory, expected one to resume; start it without --resume")
    path = Path(out) / CONFIG
    if at(load_yaml(path), "model", "target") is None:
        raise UserError(f"{path}: got no 'target' in a section 'model', expected a run's config; restore a copy of it")
    return path


def begun(out: Path) -> bool:
    """Whether a run has been started in ``out``, even if it has no state yet."""
    return os.path.lexists(out / CONFIG)


def exists(out: Path) -> bool:
    """Whether there is a state in ``out`` to continue from, sound or damaged."""
    return os.path.lexists(out / STATE)


def check_not_lost(out: Path) -> None:
    """Raise UserError if there are weights in ``out`` without a state, which a training run writes first."""
    if os.path.lexists(out / WEIGHTS) and not exists(out):
        raise UserError(
            f"{out / STATE}: got no file beside {WEIGHTS}, expected the state of the run; restore a copy of it, or "
            "start a new run in another directory"
        )


def restore(
    out: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    averages: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Load ``state.pt`` into the model, its optimizers and ``averages``, and return the saved ``progress``.

    The optimizers keep their own settings, such as the learning rate. Raises UserError if the file is damaged or
    belongs to another format, model or optimizer.
    """
    path = out / STATE
    state = _read(path)
    weights, saved = state.get("model"), state.get("optimizers") or ()
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: got no tensors under 'model', expected the state of a run; restore a copy of it")
    # A model registers `colorize` when it first draws label maps.
    load_into(model, weights, path, optional=("colorize",))
    try:
        for optimizer, kept in zip(optimizers, saved, strict=True):
            _load_optimizer(optimizer, kept)
    except Exception as error:  # whatever a structure of another kind leads to, there and in torch
        raise UserError(
            f"{path}: got optimizers that do not fit this model ({first_line(error)}), expected those of the run; "
            "resume with the config that the run began with"
        ) from error
    if averages is not None:
        _load_averages(averages, state.get("averages"), path)
    return state["progress"]


def _load_averages(averages: Mapping[str, Tensor], saved: Any, path: Path) -> None:
    saved = saved if isinstance(saved, Mapping) else {}
    for name, value in averages.items():
        found = saved.get(name)
        if not isinstance(found, Tensor) or found.shape != value.shape or not torch.isfinite(found).all():
            raise UserError(
                f"{path}: got no sound average of {name}, expected one, as the run keeps averages of its weights; "
                "restore a copy of the file"
            )
        value.copy_(found)


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    own = optimizer.state_dict()["param_groups"]
    indices, found = ([group["params"] for group in groups] for groups in (own, saved["param_groups"]))
    if indices != found:
        raise ValueError(f"parameters: got groups of {list(map(len, found))}, expected {list(map(len, indices))}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, kept in saved["state"].items():
        for name, value in kept.items():
            shape = parameters[number].shape
            if isinstance(value, Tensor) and value.ndim and value.shape != shape:
                raise ValueError(f"{name}: got the shape {tuple(value.shape)}, expected {tuple(shape)}")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def progress(out: str | os.PathLike) -> dict[str, Any]:
    """The progress of the run in ``out``: step, epoch, seconds of training and more. UserError without a state."""
    path = Path(out) / STATE
    if not os.path.lexists(path):
        raise UserError(
            f"{out}: got a directory without {STATE}, expected that of a training run that reached a checkpoint"
        )
    return _read(path, tensors=False)["progress"]


def _read(path: Path, tensors: bool = True) -> dict[str, Any]:
    """The content of a ``state.pt`` with a sound ``progress``; UserError if it is damaged or of another format.

    Without ``tensors`` they are left as `StoredTensor`, which is fast.
    """
    with opened(path) as (kind, stream):
        try:
            if kind != TORCH:
                raise BadFile(kind)
            file = open_torch_file(stream)
            state = _with_tensors(file.content, file) if tensors else file.content
        except BadFile as error:
            raise UserError(
                f"{path}: got {error}, expected the state of a run; restore a copy of it, or start a new run in "
                "another directory"
            ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = f"format {state['format']!r}" if isinstance(state, dict) and "format" in state else "no state of a run"
        raise UserError(f"{path}: got {found}, expected format {FORMAT}; continue it with the version that wrote it")
    reached = state.get("progress")
    for name, number in _PROGRESS.items():
        value = reached.get(name) if isinstance(reached, dict) else None
        least = 1 if name == "processes" else 0
        if not isinstance(value, number) or not least <= float(value) < float("inf"):  # type: ignore[arg-type]
            raise UserError(f"{path}: got {value!r} for '{name}', expected a number; restore a copy of the file")
    launches = state["progress"].setdefault("launches", [])  # which older states lack
    if not isinstance(launches, list) or not all(map(_is_table, launches)):
        raise UserError(f"{path}: got no tables for 'launches', expected names with whole numbers; restore a copy")
    return state


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(type(key) is str and type(item) is int for key, item in value.items())


def _with_tensors(value: Any, file: TorchFile) -> Any:
    """``value`` with its tensors read from the file, which compares them with their checksums."""
    match value:
        case StoredTensor():
            return file.tensor(value)
        case dict():
            return {key: _with_tensors(item, file) for key, item in value.items()}
        case list() | tuple():
            return type(value)(_with_tensors(item, file) for item in value)
    return value


def exported(out: Path) -> int | None:
    """The step of ``weights.safetensors``; None if there are none, or if they are damaged."""
    try:
        check_seal(out / WEIGHTS)
        with safe_open(out / WEIGHTS, framework="pt") as stream:
            return int(stream.metadata()["step"])
    except Exception:  # whatever is wrong with the export, it can be written again from the state
        return None
