"""``metrics.png``: the recorded values of a run as curves."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tamingfast import report
from tamingfast.checkpoints import run_directory
from tamingfast.errors import UserError

logger = logging.getLogger(__name__)

#: Panels at most beside each other.
_COLUMNS = 3
#: Points of a curve of training values; more are averaged.
_POINTS = 200

#: How the values of each split are drawn.
_FORMS = {"train": "C0-", "validation": "C1o-"}


def plot(out: Path, shown: Iterable[str]) -> None:
    """Write ``metrics.png`` of the run in ``out``: a panel for each of the values ``shown`` that was recorded.

    Training values are averages of equally many neighbouring records; validation values are points. Nothing is written
    without the optional package matplotlib, or before anything is recorded. Raises UserError when it cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return
    try:
        records = run_directory.read_metrics(out)
    except UserError as error:  # a record that was damaged, which training does not need
        logger.warning("no curves are drawn: %s", error)
        return
    panels = {name: curves_of(records, name) for name in shown}
    panels = {name: curves for name, curves in panels.items() if any(curves.values())}
    if not panels:
        return
    figure, axes = report.figure(min(len(panels), _COLUMNS), 4.2, -(-len(panels) // _COLUMNS))
    for axis, (name, curves) in zip(axes, panels.items(), strict=False):
        for split, form in _FORMS.items():
            if curves[split]:
                axis.plot(*zip(*curves[split], strict=True), form, markersize=3, label=split)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    report.save_figure(figure, out / run_directory.PLOT)


def curves_of(records: Iterable[Mapping[str, Any]], name: str) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of the finite values called ``name``, for the splits ``train`` and ``validation``."""
    found: dict[str, list[tuple[float, float]]] = {"train": [], "validation": []}
    for record in records:
        value = record.get(name)
        if isinstance(value, int | float) and math.isfinite(value) and record["split"] in found:
            found[record["split"]].append((record["step"], value))
    return found | {"train": averaged(found["train"], _POINTS)}


def averaged(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` points: the means of equally many neighbours, of the last ones perhaps fewer."""
    size = -(-len(points) // most) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
