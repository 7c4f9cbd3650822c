"""Models as folders in the Hub's layout: ``config.json``, ``model.safetensors`` and a model card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tamingfast.checkpoints import hub
from tamingfast.checkpoints.config import at, check_config_values, plain, without_checkpoints
from tamingfast.checkpoints.load import dtype_of, load_model
from tamingfast.checkpoints.locate import HUB_CONFIG, HUB_WEIGHTS, located
from tamingfast.checkpoints.model_card import CARD, model_card
from tamingfast.checkpoints.weights import check_finite, folded, save_weights
from tamingfast.errors import UserError
from tamingfast.files import check_directory, writable_path, write_json, write_text

#: Settings of data that name files of one machine.
_LOCAL = ("path", "validation_path", "train", "validation")


def open_pretrained(
    name: str | os.PathLike[str],
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    allow: Collection[str] = (),
    access: hub.Access = hub.USUAL,
) -> nn.Module:
    """`load_model` of what a name stands for; a repository is reached as ``access`` says."""
    return load_model(located(name, access), config, device, dtype, allow=allow)


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    title: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and, unless there is one, ``README.md`` into ``folder``.

    Losses are left out, and so are settings that name local files. ``config`` is the config of a model that was not
    loaded with one; ``figures`` is a result of `tamingfast.evaluation.evaluate_model`, for the card; ``dtype`` is that
    of the weights in the file, by default the model's. Returns ``folder``; UserError if there is no config, if the
    weights do not fit into that type, or if the folder cannot be written.
    """
    folder = Path(folder)
    weights = weights_of(model, dtype)
    settings = published(model, config)
    card = model_card(model, settings, title or folder.resolve().name, figures)
    check_directory(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (HUB_CONFIG, HUB_WEIGHTS, CARD):
        writable_path(folder / name)
    save_weights(folder / HUB_WEIGHTS, weights, {"format": "pt"})
    write_json(folder / HUB_CONFIG, settings)
    if not (folder / CARD).exists():
        write_text(folder / CARD, card)
    return folder


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    config: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    *,
    commit_message: str = "Upload a model of tamingfast",
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Upload what `save_pretrained` writes to a repository of the Hub; returns the URL of the commit.

    The repository is made if it is missing, ``private`` or as its owner has chosen. Raises UserError without a network
    and where the Hub refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, config, figures, repo_id)
        return hub.upload(
            Path(folder), repo_id, private=private, token=token, commit_message=commit_message, revision=branch,
            create_pr=create_pr,
        )  # fmt: skip


def weights_of(model: nn.Module, dtype: torch.dtype | str | None = None) -> dict[str, Tensor]:
    """The state dict that using the model takes: without losses, with quantisers as `Quantizer.fold` leaves them.

    With a ``dtype``, such as "bfloat16", its real numbers are rounded to that; UserError if one becomes infinite.
    """
    wanted = None if dtype is None else dtype_of(dtype)
    state = folded(model, model.state_dict())
    state = {key: value for key, value in state.items() if ".loss." not in f".{key}"}
    if wanted is None:
        return state
    state = {key: value.to(wanted) if value.is_floating_point() else value for key, value in state.items()}
    check_finite(state, f"weights in {dtype}")
    return state


def published(model: nn.Module, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of a model, without what names local files and how it was trained."""
    given = config or getattr(model, "config", None)
    if not isinstance(at(plain(given), "model", "target"), str):
        raise UserError(
            f"config: got none for a {type(model).__name__} that was made without one, expected its config; give "
            "config={'model': {'target': ..., 'params': ...}}"
        )
    settings: dict[str, Any] = without_checkpoints(given)
    check_config_values(settings, "config")
    settings.pop("training", None)
    if isinstance(settings.get("data"), dict):
        settings["data"] = {key: value for key, value in settings["data"].items() if key not in _LOCAL}
    return settings
