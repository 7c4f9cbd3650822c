"""Building blocks of reports: their two files, Markdown tables, numbers in words, and plots as PNG."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tamingfast.files import atomic_write, check_png, write_json, write_text

if TYPE_CHECKING:  # optional package
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE, FIGURES = "report.md", "report.json"


def write(out: Path, results: Mapping[str, Any], sections: Iterable[str]) -> Path:
    """Write ``results`` to ``out/report.json`` and the Markdown sections to ``out/report.md``; returns the latter."""
    write_json(out / FIGURES, results)
    write_text(out / PAGE, "\n\n".join(sections) + "\n")
    return out / PAGE


def provenance(results: Mapping[str, Any]) -> str:
    """Sentences that state the data, the machine, the time taken, and what can be expected of the preset."""
    return (
        f"Data: {results['data']}. Measured on {on(results['machine'])}. Everything below comes from this one run, "
        f"which took {duration(results['seconds'])} of training and measuring." + _expectation(results["preset"])
    )


def _expectation(preset: str) -> str:
    """What a reader may expect of a preset whose pictures would surprise; empty for the others."""
    if preset != "smoke":
        return ""
    return (
        "\n\n**What to expect.** The preset `smoke` trains tiny networks for seconds, to see that everything runs. Its "
        "pictures do not resemble the photographs, completions not even the half that was kept, and its figures of "
        "quality mean nothing. For pictures worth looking at, take the preset `cpu`, which trains for minutes."
    )


def on(machine: Mapping[str, Any]) -> str:
    """The facts of `tamingfast.ops.backends.machine` in words."""
    return (
        f"{machine['cpu']}, {counted(machine['threads'], 'thread')}; {machine['gpu']}; torch {machine['torch']}, "
        f"Python {machine['python']}"
    )


def geometry(transformer: Mapping[str, int]) -> str:
    """A transformer's ``n_layer``, ``n_head`` and ``n_embd`` in words."""
    layers, heads = counted(transformer["n_layer"], "layer"), counted(transformer["n_head"], "head")
    return f"{layers}, {heads}, width {transformer['n_embd']}"


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural: 1 image, 2 images."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """A duration as text: seconds with two significant digits, or minutes with one decimal from a minute on."""
    return f"{seconds:.2g} s" if seconds < 59.5 else f"{seconds / 60:.1f} min"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join([_row(heads), "|---" * len(heads) + "|", *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def pictures(captions: Mapping[str, str]) -> list[str]:
    """A Markdown paragraph for each picture, given by its file name and caption."""
    return [f"{caption}:\n\n![{caption}]({name})" for name, caption in captions.items()]


def figure(columns: int, width: float = 5, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with ``columns`` panels side by side in each row, each ``width`` inches wide, and its axes, by rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # optional package
    from matplotlib.figure import Figure

    # Without pyplot, which keeps global state and looks for a display.
    made = Figure(figsize=(width * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def save_figure(plotted: Figure, path: str | os.PathLike) -> None:
    """Write a figure as PNG, atomically; raises what `tamingfast.files.check_png` raises."""
    check_png(path)
    with atomic_write(path) as temporary:
        plotted.savefig(temporary, dpi=110, format="png")
