"""Presets of experiments: a YAML file each, in one directory per experiment, with ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tamingfast.checkpoints.config import load_yaml, plain
from tamingfast.errors import UserError, nearest

HOME = Path(__file__).parents[1] / "configs" / "reproduce"


def presets(experiment: str) -> list[str]:
    """Names of an experiment's packaged presets."""
    return sorted(path.stem for path in (HOME / experiment).glob("*.yaml"))


def load_preset(experiment: str, name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A preset's settings with ``key=value`` overrides; UserError for unknown presets and sections."""
    from omegaconf import OmegaConf

    known = presets(experiment)
    if name not in known:
        hint = nearest(name, known)
        raise UserError(f"'{name}' is no preset of reproduce {experiment}{hint} (presets: {', '.join(known)})")
    settings = load_yaml(HOME / experiment / f"{name}.yaml")
    sections = [str(section) for section in settings]
    for override in overrides:
        key, equals, _ = override.partition("=")
        section = key.split(".")[0]
        if not equals:
            raise UserError(f"the override '{override}' is not of the form key=value, e.g. data.seed=1")
        if section not in sections:
            raise UserError(f"unknown key '{key}'{nearest(section, sections)} (sections: {', '.join(sections)})")
        settings = OmegaConf.merge(settings, OmegaConf.from_dotlist([override]))
    return plain(settings)
