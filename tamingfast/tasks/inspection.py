"""The contents of a checkpoint or token file: `inspect`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tamingfast.checkpoints.config import at, trained_side
from tamingfast.checkpoints.fingerprint import fingerprint
from tamingfast.checkpoints.infer import KNOWN
from tamingfast.checkpoints.load import config_beside, read_translated
from tamingfast.checkpoints.locate import embedded_config, weights_path
from tamingfast.checkpoints.weights import unwrapped
from tamingfast.data.rgb import upright_size
from tamingfast.data.tokens import FORMAT, TokenDataset
from tamingfast.files import check_path, open_regular
from tamingfast.models.prior import UNCONDITIONAL
from tamingfast.tasks.recipes import recipe_of


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe the contents and the config of a run directory, checkpoint or token file, without building a model.

    ``first_stage`` is the fingerprint of the first stage's weights; for a token file, of the first stage that made the
    tokens. Of a PNG that a task drew, ``recipe`` says how, as `Recipe.facts` does. Raises UserError if the file is
    missing, damaged, or none of these.
    """
    check_path("path", path)
    if _is_png(path):
        height, width = upright_size(path)
        picture = {"file": str(path), "bytes": os.path.getsize(path), "size": f"{height}x{width}"}
        return picture | {"recipe": recipe_of(path).facts()}
    path = weights_path(Path(path))
    checkpoint, config = read_translated(path)
    facts: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size}
    if checkpoint.metadata.get("format") == FORMAT:
        return facts | _of_tokens(path)
    state = unwrapped(checkpoint.state, KNOWN)
    return facts | {
        "global_step": checkpoint.number("global_step", "step"),
        "epoch": checkpoint.number("epoch"),
        **_of_config(path, config),
        "first_stage": _fingerprint(state),
        "tensors": len(state),
        "values_by_dtype": _counted(state, lambda key: str(state[key].dtype).removeprefix("torch.")),
        "values_by_part": _counted(state, lambda key: key.split(".")[0]),
    }


def _is_png(path: str | os.PathLike[str]) -> bool:
    if not os.path.isfile(path):
        return False
    with open_regular(path) as stream:
        return stream.read(8) == b"\x89PNG\r\n\x1a\n"


def _of_tokens(path: Path) -> dict[str, Any]:
    dataset = TokenDataset(path)
    metadata = dataset.metadata
    return {
        "images": len(dataset),
        "grid": list(dataset.grid),
        "vocab_size": dataset.vocab_size,
        "size": metadata.get("size"),
        "data": metadata.get("source"),
        "first_stage": metadata.get("first_stage"),
        "classes": dataset.classes,
        "condition": dataset.condition,
    }


def _of_config(path: Path, config: Any) -> dict[str, Any]:
    """Facts from the config, which may be one that the weights alone gave."""
    params = at(config, "model", "params")
    inside = embedded_config(path) is not None
    beside = config_beside(path) is not None
    found = {
        "config": "in the file" if inside else "beside the file" if beside else None,
        "family": at(config, "family"),
        "model": at(config, "model", "target"),
    }
    transformer = at(params, "transformer_config", "params")
    if transformer is not None:
        unconditional = at(params, "unconditional") or at(params, "cond_stage_config") == UNCONDITIONAL
        found |= {
            "transformer": transformer,
            "condition": None if unconditional else at(params, "cond_stage_key"),
            "classes": at(config, "classes") or at(params, "cond_stage_config", "params", "n_classes"),
            "ordering": at(params, "permuter_config", "target"),
            "scales": at(params, "scales"),
        }
    side = trained_side(config)
    return found | {"size": None if side is None else f"{side}x{side}", "data": at(config, "data")}


def _fingerprint(state: Mapping[str, Tensor]) -> str | None:
    """The fingerprint of the first stage that the weights are or contain; None for a transformer alone."""
    prefix = "first_stage_model."
    if any(key.startswith("transformer.") for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return fingerprint(state) if state else None


def _counted(state: Mapping[str, Tensor], group: Callable[[str], str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key, value in state.items():
        counts[group(key)] = counts.get(group(key), 0) + value.numel()
    return counts
