"""What reports share: where their figures come from, and plots as PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tamingfast.files import atomic_write, check_png


def provenance(results: Mapping[str, Any]) -> str:
    """Sentences on the data, the machine and the time."""
    return (
        f"Data: {results['data']}. Measured on {on(results['machine'])}. Everything below comes from this one run, "
        f"which took {duration(results['seconds'])} of training and measuring."
    )


def on(machine: Mapping[str, Any]) -> str:
    """What `tamingfast.ops.backends.machine` says, in words."""
    return (
        f"{machine['cpu']}, {counted(machine['threads'], 'thread')}; {machine['gpu']}; torch {machine['torch']}, "
        f"Python {machine['python']}"
    )


def geometry(transformer: Mapping[str, int]) -> str:
    """How large a transformer is, by the names of its config."""
    layers, heads = counted(transformer["n_layer"], "layer"), counted(transformer["n_head"], "head")
    return f"{layers}, {heads}, width {transformer['n_embd']}"


def counted(number: int, noun: str) -> str:
    """A number of things, as words: 1 image, 2 images."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """Seconds below a minute, with two digits, else minutes."""
    return f"{seconds:.2g} s" if seconds < 59.5 else f"{seconds / 60:.1f} min"


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
