"""What reports share: where their figures come from, and plots as PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tamingfast.files import atomic_write, check_png


def provenance(results: Mapping[str, Any]) -> str:
    """A sentence on the data, the machine and the time."""
    machine = results["machine"]
    return (
        f"Data: {results['data']}. Measured on {machine['cpu']}, {machine['threads']} threads; {machine['gpu']}; "
        f"torch {machine['torch']}, Python {machine['python']}. Everything below comes from this one run, which took "
        f"{results['seconds'] / 60:.1f} minutes of training and measuring."
    )


def figure(columns: int, width: float = 5) -> Any:
    """A figure of so many panels side by side, ``width`` inches each, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, and nothing that looks for a screen.
    made = Figure(figsize=(width * columns, 3.8), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(1, columns, squeeze=False)[0]


def save_figure(plotted: Any, path: str | os.PathLike) -> None:
    """Write a figure as PNG, atomically; UserError for a name that says another format."""
    check_png(path)
    with atomic_write(path) as temporary:
        plotted.savefig(temporary, dpi=110, format="png")
