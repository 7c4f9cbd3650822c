"""The papers' experiments, each from training to a report: ``tamingfast reproduce EXPERIMENT``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from tamingfast.errors import UserError, nearest

#: Experiments, each a module of this package with ``presets()`` and ``run``, and their subjects.
EXPERIMENTS = {
    "pixels": "sampling from pixels against sampling from latents (the first source, section 4.4)",
    "orderings": "the order in which tokens are predicted (the second source, Fig. 2)",
    "compression": "how far the first stage compresses (the first source, section 4.3)",
    "multiscale": "images from coarse to fine, from some scales of a given image (the second source, Fig. 3 and 7)",
}
DEFAULT = "pixels"
ALL = "all"


def run(
    experiment: str,
    preset: str,
    out: str | os.PathLike,
    overrides: Sequence[str] = (),
    resume: bool = False,
    device: str | None = None,
) -> Path:
    """Run one of `EXPERIMENTS`, or `ALL` of them; returns the path of ``out/report.md``.

    ``resume`` continues an interrupted run in ``out``. Raises UserError for unknown experiments, bad settings, and when
    ``out`` holds a run that is not to be resumed.
    """
    known = (*EXPERIMENTS, ALL)
    if experiment not in known:
        hint = nearest(experiment, known)
        raise UserError(
            f"'{experiment}' is no experiment{hint} (experiments: {', '.join(known)}; settings are key=value)"
        )
    module = "everything" if experiment == ALL else experiment
    return importlib.import_module(f"{__name__}.{module}").run(preset, out, overrides, resume, device)


def presets(experiment: str) -> list[str]:
    """Names of an experiment's packaged presets."""
    from tamingfast.reproduce import settings

    return settings.presets(experiment)
