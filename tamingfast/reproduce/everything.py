"""The experiments, one after another: ``tamingfast reproduce all``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tamingfast import report, reproduce
from tamingfast.errors import UserError, nearest
from tamingfast.files import write_text
from tamingfast.ops import backends
from tamingfast.reproduce.settings import presets


def run(
    preset: str, out: str | os.PathLike, overrides: Sequence[str] = (), resume: bool = False, device: str | None = None
) -> Path:
    """Run `tamingfast.reproduce.EXPERIMENTS` but `ALONE`, each in a directory of its name; returns an index's path.

    The index ``out/report.md`` links to their reports and is updated after each. Overrides are
    ``EXPERIMENT.key=value``. ``resume`` skips experiments that have a report. Raises UserError
    as `tamingfast.reproduce.run` does, and before anything runs if an experiment lacks the preset.
    """
    out, names = Path(out), [name for name in reproduce.EXPERIMENTS if name not in reproduce.ALONE]
    for name in names:
        known = presets(name)
        if preset not in known:
            raise UserError(
                f"preset: got '{preset}', expected one that all experiments have; {name} has {', '.join(known)}"
            )
    chosen = _by_experiment(overrides, names)
    finished = [name for name in names if (out / name / report.PAGE).exists()]
    if finished and not resume:
        raise UserError(f"{out}: got a directory with reports, expected a new one; continue it with --resume")
    for name in names:
        if name not in finished:
            reproduce.run(name, preset, out / name, chosen[name], resume, device)
            _write_index(preset, names, out)
    return _write_index(preset, names, out)


def _by_experiment(overrides: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        name, dot, rest = override.partition(".")
        if name not in names or not dot:
            raise UserError(
                f"settings: got '{override}', expected EXPERIMENT.key=value, such as {names[0]}.data.seed=1"
                f"{nearest(name, names)}"
            )
        chosen[name].append(rest)
    return chosen


def _write_index(preset: str, names: Sequence[str], out: Path) -> Path:
    rows = []
    for name in names:
        link, time = name, "not run yet"
        if (out / name / report.PAGE).exists():
            seconds = json.loads((out / name / report.FIGURES).read_text(encoding="utf-8"))["seconds"]
            link, time = f"[{name}]({name}/{report.PAGE})", report.duration(seconds)
        rows.append([link, reproduce.EXPERIMENTS[name], time])
    page = [
        f"# All experiments: preset `{preset}`",
        f"{report.on(backends.machine())}.",
        report.table(["experiment", "about", "time"], rows),
    ]
    write_text(out / report.PAGE, "\n\n".join(page) + "\n")
    return out / report.PAGE
