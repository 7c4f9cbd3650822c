"""Options that commands share, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tamingfast.errors import UserError


def command(to: Any, name: str, run: Callable, text: str, parents: Sequence = ()) -> argparse.ArgumentParser:
    """A new command ``name`` among those of ``to`` that calls ``run(arguments)``."""
    added = to.add_parser(name, help=text, description=text, parents=list(parents))
    added.set_defaults(run=run)
    return added


def options(*arguments: tuple[str, dict[str, Any]]) -> argparse.ArgumentParser:
    """Options that several commands take as a parent: (name, settings of `add_argument`) each."""
    group = argparse.ArgumentParser(add_help=False)
    for name, settings in arguments:
        group.add_argument(name, **settings)
    return group


DEVICE = options(("--device", {"help": "cpu, cuda or cuda:N; default: a GPU if there is one"}))
RESUME = options(("--resume", {"action": "store_true", "help": "continue the run in --out"}))
# Without argparse's defaults, so that what was given can be told from what was not; `DEFAULTS` has them.
DRAWING = options(
    ("--temperature", {"type": float, "help": "default: 1"}),
    ("--top-k", {"type": int, "help": "0: all tokens; default: 100"}),
    ("--top-p", {"type": float, "help": "nucleus: the likeliest tokens that hold this probability"}),
    ("--greedy", {"action": "store_true", "default": None, "help": "always the likeliest token"}),
    ("--seed", {"type": int, "help": "default: 0"}),
    ("--batch", {"type": int, "help": "images at a time; does not change them; default: 16"}),
    ("--schedule", {"help": "paper (default), scene, strided or block, for images beyond the window"}),
    ("--stride", {"type": int, "help": "tokens between windows, for strided and block; default: 8"}),
    ("--backend", {"help": "auto (default), native, torch or naive"}),
    ("--dtype", {"help": "weights while drawing: float32, bfloat16, float16 or int8; default: as stored"}),
)
DEFAULTS = {
    "temperature": 1.0,
    "top_k": 100,
    "top_p": None,
    "greedy": False,
    "seed": 0,
    "batch": 16,
    "schedule": "paper",
    "stride": 8,
    "backend": "auto",
    "dtype": None,
}


def drawing_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `DRAWING`, by the names of `tamingfast.tasks.draw`."""
    return DEFAULTS | given_settings(arguments)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of `drawing_settings` that the command line names."""
    given = {name: getattr(arguments, name) for name in DEFAULTS if getattr(arguments, name) is not None}
    at_least_one(given.get("batch", 1), "--batch")
    if given.get("top_k", 0) < 0:
        raise UserError(f"got --top-k {arguments.top_k}; expected a number of tokens, or 0 to keep all")
    if "top_k" in given:
        given["top_k"] = given["top_k"] or None
    return given


def wanted_size(size: str | None, model: Any) -> tuple[int, int]:
    """Pixels (height, width) of ``--size``, or, without one, those that the model was trained on."""
    from tamingfast import tasks

    if size is None:
        trained = tasks.trained_size(model)
        if trained is None:
            raise UserError("the model does not say what size it was trained on; give --size HEIGHTxWIDTH")
        return trained
    height, cross, width = size.lower().partition("x")
    if not (height.isdigit() and (width.isdigit() or not cross)):
        raise UserError(f"got --size {size}; expected HEIGHTxWIDTH in pixels, for example 256x512")
    return int(height), int(width or height)


def data_settings(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The ``data`` section that the overrides make, or, without any, the one that the model was trained with."""
    if not arguments.overrides:
        return (model.config or {}).get("data") or {}
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.from_dotlist(arguments.overrides))


def load(arguments: argparse.Namespace) -> Any:
    """The model that the command names, on its device."""
    from tamingfast.checkpoints import load_model
    from tamingfast.ops.backends import pick_device

    return load_model(arguments.model, device=pick_device(arguments.device))


def named_images(arguments: argparse.Namespace, model: Any) -> tuple[Any, list[Path]]:
    """The images (B, 3, H, W) that the command names, cut to its size, and their files."""
    from tamingfast import tasks

    height, width = wanted_size(arguments.size, model)
    tasks.grid_size(model, height, width)
    files = tasks.image_files(arguments.images)
    return tasks.load_images(files, height, width).to(model.device), files


def at_least_one(value: int, name: str) -> int:
    """The value of the option ``name``; UserError unless it is positive."""
    if value < 1:
        raise UserError(f"got {name} {value}; expected at least 1")
    return value
