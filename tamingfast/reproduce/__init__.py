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
}
DEFAULT = "pixels"


def run(
    experiment: str,
    preset: str,
    out: str | os.PathLike,
    overrides: Sequence[str] = (),
    resume: bool = False,
    device: str | None = None,
) -> Path:
    """Run one of `EXPERIMENTS`; returns the path of ``out/report.md``.

    ``resume`` continues an interrupted run in ``out``. Raises UserError for unknown experiments, bad settings, and when
    ``out`` holds a run that is not to be resumed.
    """
    if experiment not in EXPERIMENTS:
        hint = nearest(experiment, EXPERIMENTS)
        raise UserError(
            f"'{experiment}' is no experiment{hint} (experiments: {', '.join(EXPERIMENTS)}; settings are key=value)"
        )
    return importlib.import_module(f"{__name__}.{experiment}").run(preset, out, overrides, resume, device)
