"""Finds a checkpoint and its config, in the original's run directories and in ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import safe_open

from tamingfast.checkpoints.config import load_yaml
from tamingfast.checkpoints.run_directory import CONFIG, WEIGHTS
from tamingfast.errors import UserError

# Where the original saves checkpoints, and where its published models have them.
_CHECKPOINT_FOLDERS = ("checkpoints", "ckpts")


def weights_path(path: Path) -> Path:
    """The weights of a run directory of either project, UserError if there are none; any other path unchanged."""
    if not path.is_dir():
        return path
    candidates = [path / WEIGHTS, *(path / folder / "last.ckpt" for folder in _CHECKPOINT_FOLDERS)]
    for folder in _CHECKPOINT_FOLDERS:
        candidates += sorted((path / folder).glob("*.ckpt"), reverse=True)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise UserError(
        f"{path}: got a directory without {WEIGHTS} or checkpoints/last.ckpt, expected a run directory; give the --out "
        "of a training run"
    )


def embedded_config(path: Path) -> dict[str, Any] | None:
    """The config inside a safetensors file, if any, as `tamingfast.checkpoints.convert` writes it.

    Raises UserError if it is not JSON.
    """
    text = metadata_of(path).get("config")
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: got a config inside the file that is not JSON ({error}), expected the one that convert writes; "
            "give the config with config="
        ) from error


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as stream:
        return stream.metadata() or {}


def neighbouring_config(path: Path) -> Any:
    """The OmegaConf config that either project puts beside the weights at ``path``, None if there is none."""
    run = path.parent.parent if path.parent.name in _CHECKPOINT_FOLDERS else path.parent
    # The original writes one config per start of a run; later ones override earlier ones.
    projects = sorted((run / "configs").glob("*project.yaml"))
    if projects:
        return OmegaConf.merge(*map(load_yaml, projects))
    for candidate in (path.with_suffix(".yaml"), path.parent / CONFIG, run / "configs" / "model.yaml"):
        if candidate.exists():
            return load_yaml(candidate)
    return None
