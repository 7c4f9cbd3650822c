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
DRAWING = options(
    ("--temperature", {"type": float, "default": 1.0}),
    ("--top-k", {"type": int, "default": 100, "help": "0: all tokens (default: %(default)s)"}),
    ("--top-p", {"type": float, "help": "nucleus: the likeliest tokens that hold this probability"}),
    ("--greedy", {"action": "store_true", "help": "always the likeliest token"}),
    ("--seed", {"type": int, "default": 0}),
    (
        "--batch",
        {"type": int, "default": 16, "help": "images at a time; does not change them (default: %(default)s)"},
    ),
    ("--schedule", {"default": "paper", "help": "paper, scene, strided or block, for images beyond the window"}),
    ("--stride", {"type": int, "default": 8, "help": "tokens between windows, for strided and block"}),
    ("--backend", {"default": "auto", "help": "auto, native, torch or naive"}),
    ("--dtype", {"help": "weights while drawing: float32, bfloat16, float16 or int8; default: as stored"}),
)


def drawing_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `DRAWING`, by the names of `tamingfast.apply.draw`."""
    if arguments.top_k < 0:
        raise UserError(f"got --top-k {arguments.top_k}; expected a number of tokens, or 0 to keep all")
    names = ("temperature", "top_p", "greedy", "seed", "schedule", "stride", "backend", "dtype")
    at_least_one(arguments.batch, "--batch")
    return {name: getattr(arguments, name) for name in names} | {
        "top_k": arguments.top_k or None,
        "batch": arguments.batch,
    }


def wanted_size(size: str | None, model: Any) -> tuple[int, int]:
    """Pixels (height, width) of ``--size``, or, without one, those that the model was trained on."""
    from tamingfast import apply

    if size is None:
        trained = apply.trained_size(model)
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
    from tamingfast.backends import pick_device
    from tamingfast.checkpoints import load_model

    return load_model(arguments.model, device=pick_device(arguments.device))


def named_images(arguments: argparse.Namespace, model: Any) -> tuple[Any, list[Path]]:
    """The images (B, 3, H, W) that the command names, cut to its size, and their files."""
    from tamingfast import apply

    height, width = wanted_size(arguments.size, model)
    apply.grid_size(model, height, width)
    files = apply.image_files(arguments.images)
    return apply.load_images(files, height, width).to(model.device), files


def at_least_one(value: int, name: str) -> int:
    """The value of the option ``name``; UserError unless it is positive."""
    if value < 1:
        raise UserError(f"got {name} {value}; expected at least 1")
    return value
