"""Every experiment, one after the other: ``tamingfast reproduce all``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tamingfast import report, reproduce
from tamingfast.errors import UserError, nearest
from tamingfast.files import write_text
from tamingfast.ops import backends

REPORT = "report.md"


def run(
    preset: str, out: str | os.PathLike, overrides: Sequence[str] = (), resume: bool = False, device: str | None = None
) -> Path:
    """Run all of `tamingfast.reproduce.EXPERIMENTS` into folders of their names; returns the path of ``out/report.md``.

    That page links their reports and is renewed after each. Overrides are ``EXPERIMENT.key=value``. ``resume`` skips
    experiments that have a report and resumes the one that has none. Raises as `tamingfast.reproduce.run`, before
    anything runs for presets that some experiment lacks.
    """
    out, names = Path(out), list(reproduce.EXPERIMENTS)
    for name in names:
        known = reproduce.presets(name)
        if preset not in known:
            raise UserError(f"'{preset}' is no preset of reproduce {name}, so not of all (presets: {', '.join(known)})")
    chosen = _by_experiment(overrides, names)
    finished = [name for name in names if (out / name / REPORT).exists()]
    if finished and not resume:
        raise UserError(f"{out} holds reports already; continue with --resume, or give another directory")
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
                f"the override '{override}' names no experiment{nearest(name, names)}; write EXPERIMENT.key=value, "
                f"e.g. {names[0]}.data.seed=1"
            )
        chosen[name].append(rest)
    return chosen


def _write_index(preset: str, names: Sequence[str], out: Path) -> Path:
    lines = [
        f"# All experiments: preset `{preset}`",
        "",
        f"{report.on(backends.machine())}.",
        "",
        "| experiment | about | time |",
        "|---|---|---|",
    ]
    for name in names:
        if (out / name / REPORT).exists():
            seconds = json.loads((out / name / "report.json").read_text(encoding="utf-8"))["seconds"]
            lines.append(f"| [{name}]({name}/{REPORT}) | {reproduce.EXPERIMENTS[name]} | {report.duration(seconds)} |")
        else:
            lines.append(f"| {name} | {reproduce.EXPERIMENTS[name]} | not run yet |")
    write_text(out / REPORT, "\n".join(lines) + "\n")
    return out / REPORT
