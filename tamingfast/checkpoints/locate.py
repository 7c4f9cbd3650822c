"""Finds a checkpoint and its config, in the original's run directories and in ours."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tamingfast.checkpoints import hub
from tamingfast.checkpoints.config import load_yaml
from tamingfast.checkpoints.run_directory import CONFIG, WEIGHTS
from tamingfast.checkpoints.weights import metadata_of, read_checkpoint
from tamingfast.errors import UserError

# Where the original saves checkpoints, and where its published models have them.
_CHECKPOINT_FOLDERS = ("checkpoints", "ckpts")
_CHECKPOINTS = (".ckpt", ".safetensors", ".pt", ".pth")
#: The Hub's layout of a model.
HUB_CONFIG, HUB_WEIGHTS = "config.json", "model.safetensors"
# What trainers call the number of steps that they record.
_STEPS = ("global_step", "step", "steps", "iteration", "iter")
# Names of weights in folders of the Hub and of latent-diffusion, the first that exists being taken; and the parts of a
# pipeline of diffusers that are first stages.
_PUBLISHED = (
    "model.safetensors", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
    "model.safetensors.index.json", "pytorch_model.bin", "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin", "pytorch_model.bin.index.json", "flax_model.msgpack", "model.ckpt",
)  # fmt: skip
_PIPELINE_PARTS = ("vqvae", "movq", "vqmodel")
#: Models that come with the package, each a folder of its name in the Hub's layout.
PACKAGED = Path(__file__).parents[1] / "pretrained"
_DEEPEST_CONFIG = 64  # levels of sections; those of real configs have about ten


def located(name: str | os.PathLike[str], access: hub.Access = hub.USUAL) -> Path:
    """The file or folder that a user means: what is at that path or, if nothing is, what has that name.

    That is a model in `PACKAGED`, or the local copy of a repository of the Hub (`tamingfast.checkpoints.hub`).
    """
    if names_packaged(name):
        return PACKAGED / name
    return hub.fetched(name, access) if hub.names_repository(name) else Path(name)


def names_packaged(name: str | os.PathLike[str]) -> bool:
    """Whether a path means a model in `PACKAGED`: it is the name of one, and there is nothing at it."""
    return os.fspath(name) in packaged_names() and not os.path.lexists(name)


def packaged_names() -> list[str]:
    """The names of the models in `PACKAGED`."""
    return sorted(path.parent.name for path in PACKAGED.glob(f"*/{HUB_CONFIG}"))


def weights_path(path: Path) -> Path:
    """The weights of a run directory of either project, UserError if there are none; any other path unchanged.

    Of several checkpoints it is the one of the most steps, as the files themselves record them. Names stand for what
    `located` finds.
    """
    path = located(path)
    if not os.path.isdir(path):  # as Path.is_dir, but False for a path that no system call takes
        return path
    for name in (WEIGHTS, HUB_WEIGHTS):
        if (path / name).exists():
            return path / name
    for folder in _CHECKPOINT_FOLDERS:
        found = [file for file in (path / folder).glob("[!.]*") if file.suffix.lower() in _CHECKPOINTS]
        # One that is a link to nothing is returned if there is no other, so that it is named.
        usable = [file for file in found if file.is_file()] or [file for file in found if file.is_symlink()]
        if usable:
            return usable[0] if len(usable) == 1 else max(usable, key=_progress)
    published = _published(path)
    if published is not None:
        return published
    raise UserError(
        f"{path}: got a directory without {WEIGHTS} or checkpoints/last.ckpt, expected a run directory; give the --out "
        "of a training run"
    )


def _published(path: Path) -> Path | None:
    """The weights in a folder as models are published, which may be that of a pipeline; None if there are none."""
    for folder in (path, *(path / part for part in _PIPELINE_PARTS)):
        for name in _PUBLISHED:
            if (folder / name).is_file():
                return folder / name
    return None


def _progress(path: Path) -> tuple[int, int, int, bool, list[int], int]:
    """What is larger for a later checkpoint: its steps and epochs, then the numbers in its name, then its time."""
    checkpoint = read_checkpoint(path, tensors=False)
    recorded = [checkpoint.number(*names) for names in (_STEPS, ("epoch",))]
    stem = path.stem.lower()
    named = {name: int(number) for name, number in re.findall(r"(step|epoch)[=_ -]?(\d{1,15})", stem)}
    step, epoch = (
        named.get(name, -1) if number is None else number
        for name, number in zip(("step", "epoch"), recorded, strict=True)
    )
    version = re.search(r"-v(\d{1,15})$", stem)  # Lightning's, where a name was taken
    # Numbers with a point are measures, not counts.
    counts = [int(number) for number in re.findall(r"\d{1,15}", re.sub(r"\d*\.\d+", "", stem))]
    return step, epoch, int(version[1]) if version else 0, stem == "last", counts, path.stat().st_mtime_ns


def hub_config(path: Path) -> Any:
    """The OmegaConf config in the config.json beside the weights at ``path``, None if there is none."""
    found = path.parent / "config.json"
    return load_yaml(found) if found.is_file() else None


def embedded_config(path: Path) -> dict[str, Any] | None:
    """The config inside a safetensors file, if any, as `tamingfast.checkpoints.convert` writes it.

    Raises UserError if it is not a mapping in JSON.
    """
    text = metadata_of(path).get("config")
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"not JSON ({error})"
    else:
        if isinstance(config, dict) and _depth(config) <= _DEEPEST_CONFIG:
            return config
        problem = "too deeply nested" if isinstance(config, dict) else "no mapping"
    raise UserError(
        f"{path}: got a config inside the file that is {problem}, expected the mapping that convert writes; give the "
        "config with config="
    )


def _depth(value: Any) -> int:
    """How many levels of mappings and lists a JSON value has."""
    depth, level = 0, [value]
    while level := [child for container in level for child in _children(container)]:
        depth += 1
    return depth


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def neighbouring_config(path: Path) -> Any:
    """The OmegaConf config that either project puts beside the weights at ``path``, None if there is none."""
    run = path.parent.parent if path.parent.name in _CHECKPOINT_FOLDERS else path.parent
    # The original writes one config per start of a run; later ones override earlier ones.
    projects = sorted((run / "configs").glob("[!.]*project.yaml"))
    if projects:
        return OmegaConf.merge(*map(load_yaml, projects))
    for candidate in (path.with_suffix(".yaml"), path.parent / CONFIG, run / "configs" / "model.yaml"):
        if candidate.exists():
            return load_yaml(candidate)
    return None
