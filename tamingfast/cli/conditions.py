"""Conditions that a command's options name: read, as tokens, and as pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tamingfast.cli.options import options
from tamingfast.errors import UserError


def condition_options(**several: str) -> argparse.ArgumentParser:
    """Options of one condition, or with ``nargs="+"`` of one for each image."""
    text = "label map, depth map, keypoints, edges, objects or small image to draw from"
    return options(
        (
            "--class",
            {"dest": "label", "type": int, "help": "class index of a class-conditional prior; default: all in turn"},
        ),
        ("--condition", {"metavar": "FILE", "help": text + (", one for each image" if several else "")} | several),
        (
            "--condition-of",
            {"metavar": "PHOTO", "help": "compute the condition from this photo, where it can be computed"} | several,
        ),
    )


def named_conditions(arguments: argparse.Namespace) -> tuple[Callable, list[str]]:
    """How to read the files that --condition or --condition-of name, and these files."""
    from tamingfast import tasks

    if arguments.condition and arguments.condition_of:
        raise UserError("got --condition and --condition-of; give one of them")
    read = tasks.read_condition if arguments.condition else tasks.computed_condition
    named = arguments.condition or arguments.condition_of or []
    return read, [named] if isinstance(named, str) else named


def conditions_of_each(arguments: argparse.Namespace, model: Any, files: list[Path], size: Sequence[int]) -> list[Any]:
    """The condition (H, W, C) of each of the images; none for models without spatial ones."""
    from tamingfast import tasks

    read, named = named_conditions(arguments)
    if named and len(named) != len(files):
        raise UserError(f"got {len(named)} conditions for {len(files)} images; give one for each, in their order")
    if named:
        return [read(model, path, tuple(size)) for path in named]
    return [tasks.own_condition(model, tuple(size), path) for path in files] if tasks.is_spatial(model) else []


def tokens_under(arguments: argparse.Namespace, model: Any, condition: Any, count: int) -> Any:
    """Condition tokens of ``count`` images under a condition (H, W, C), or under --class where that is None."""
    from tamingfast import tasks

    if condition is None:
        return tasks.conditions(model, count, arguments.label)
    if arguments.label is not None:
        raise UserError(
            f"got class {arguments.label}, but the model is conditioned on '{model.cond_stage_key}'; leave --class out"
        )
    return tasks.condition_tokens(model, condition, count)


def tokens_of_each(arguments: argparse.Namespace, model: Any, conditions: list[Any], count: int) -> Any:
    """Condition tokens of ``count`` images, under a condition each or, without any, under --class."""
    import torch

    if not conditions:
        return tokens_under(arguments, model, None, count)
    return torch.cat([tokens_under(arguments, model, condition, 1) for condition in conditions])


def condition_pictures(model: Any, canvas: Any, condition: Any) -> list[Any]:
    """What to show of a canvas's condition, of which perhaps only the tokens are known: [(1, 3, H, W)] or nothing."""
    from tamingfast import tasks

    if condition is not None:
        return [tasks.condition_picture(model, condition)]
    return [tasks.decoded_condition(model, canvas.cond[:1])] if canvas.cond.ndim > 2 else []
