"""The papers' experiments, each from training to a report: ``tamingfast reproduce EXPERIMENT``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from tamingfast.errors import UserError, nearest

#: Experiment -> its subject. Each is a module of this package with a function ``run(study)``.
EXPERIMENTS = {
    "pixels": "sampling from pixels against sampling from latents (Taming Transformers, section 4.4)",
    "orderings": "the order in which tokens are predicted (An Image is Worth 16x16 Tokens, Fig. 2)",
    "compression": "how far the first stage compresses (Taming Transformers, section 4.3)",
    "multiscale": "images from coarse to fine, starting from scales of a given image (An Image is Worth 16x16 Tokens, "
    "Fig. 3 and 7)",
    "recipe": "what the parts of a training recipe of today change in the first stage",
}
DEFAULT = "pixels"
ALL = "all"
#: What `ALL` leaves out: it would take longer than all others together.
ALONE = ("recipe",)


def run(
    experiment: str,
    preset: str,
    out: str | os.PathLike,
    overrides: Sequence[str] = (),
    resume: bool = False,
    device: str | None = None,
) -> Path:
    """Run one of `EXPERIMENTS`, or `ALL` of them but `ALONE`; returns the path of ``out/report.md``.

    Args:
        preset: name of a packaged preset, as listed by `tamingfast.reproduce.settings.presets`.
        out: directory for the report, its pictures and the run directories of the models.
        overrides: ``key=value`` settings that replace the preset's, or ``EXPERIMENT.key=value`` for `ALL`.
        resume: continue what was interrupted in ``out``; finished models are not trained again.
        device: as for `tamingfast.ops.backends.pick_device`.

    Raises:
        UserError: unknown experiments, presets or settings; or ``out`` contains runs and ``resume`` is False.
    """
    # Imported here because `tamingfast --help` reads the table above and should not wait for torch.
    from tamingfast.reproduce import everything
    from tamingfast.reproduce.study import Study

    known = (*EXPERIMENTS, ALL)
    if experiment not in known:
        raise UserError(
            f"experiment: got '{experiment}', expected one of {', '.join(known)}{nearest(experiment, known)}; write "
            "settings as key=value"
        )
    if experiment == ALL:
        return everything.run(preset, out, overrides, resume, device)
    study = Study.of(experiment, preset, out, overrides, resume, device)
    return importlib.import_module(f"{__name__}.{experiment}").run(study)
