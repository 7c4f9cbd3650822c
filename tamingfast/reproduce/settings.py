"""Presets of experiments: one YAML file each, in one directory per experiment, with ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from tamingfast.checkpoints.config import load_yaml, plain
from tamingfast.errors import UserError, first_line, nearest
from tamingfast.training.configs import PRESETS

_PRESETS = PRESETS / "reproduce"


def presets(experiment: str) -> list[str]:
    """Names of an experiment's packaged presets."""
    return sorted(path.stem for path in (_PRESETS / experiment).glob("*.yaml"))


def load_preset(experiment: str, name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a preset with ``key=value`` overrides applied.

    Raises UserError for unknown presets, and for overrides that have another form or an unknown section.
    """
    known = presets(experiment)
    if name not in known:
        raise UserError(
            f"preset: got '{name}', expected one of reproduce {experiment}: {', '.join(known)}{nearest(name, known)}"
        )
    settings = load_yaml(_PRESETS / experiment / f"{name}.yaml")
    sections = [str(section) for section in settings]
    for override in overrides:
        key, equals, _ = override.partition("=")
        section = key.split(".")[0]
        if not equals:
            raise UserError(f"settings: got '{override}', expected key=value, such as data.seed=1")
        if section not in sections:
            raise UserError(
                f"{key}: got an unknown section, expected one of {', '.join(sections)}{nearest(section, sections)}"
            )
        try:
            settings = OmegaConf.merge(settings, OmegaConf.from_dotlist([override]))
        except Exception as error:  # of omegaconf and of its YAML parser, which share no class
            raise UserError(f"{key}: got '{first_line(error)}', expected a value in YAML") from error
    return plain(settings)
