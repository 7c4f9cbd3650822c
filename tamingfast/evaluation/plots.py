"""Plots of measurements."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from tamingfast import report


def plot_schedules(path: str | os.PathLike, rows: Sequence[Mapping[str, float | str]]) -> None:
    """Plot the likelihood of real images under each schedule against its work, as a PNG.

    Each row has ``name``, ``nats`` (per token) and ``tokens_per_token``. If every row has ``seconds``, they are plotted
    instead of ``tokens_per_token``. Raises UserError unless the path has the suffix .png.
    """
    from matplotlib import ticker  # optional package

    work, label = "tokens_per_token", "tokens computed per token sampled"
    if all("seconds" in row for row in rows):
        work, label = "seconds", "seconds per grid"
    points: dict[tuple[float, float], list[str]] = {}  # schedules may coincide
    for row in rows:
        points.setdefault((float(row[work]), float(row["nats"])), []).append(str(row["name"]))
    figure, (axes,) = report.figure(1, width=6)
    axes.set_xscale("log")
    # Schedules may lie so close together that default ticks, and names beside the points, would overlap.
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    for (x, y), names in sorted(points.items()):
        axes.plot(x, y, "o", label=", ".join(names))
    axes.legend()
    axes.set_xlabel(label)
    axes.set_ylabel("nats per token of real images")
    axes.margins(x=0.2, y=0.15)
    report.save_figure(figure, path)


def plot_lookahead(path: str | os.PathLike, panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> None:
    """Plot tokens per pass against the lookahead, as a PNG: panels by title, lines by label, tokens by lookahead.

    Raises UserError unless the path has the suffix .png.
    """
    figure, each = report.figure(len(panels), width=4)
    for axes, (title, lines) in zip(each, panels.items(), strict=True):
        axes.set_xscale("log", base=2)
        for label, rates in lines.items():
            axes.plot(list(rates), list(rates.values()), "o-", markersize=4, label=label)
        widths = sorted({width for rates in lines.values() for width in rates})
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set_title(title)
        axes.set_xlabel("lookahead, in tokens")
        axes.set_ylabel("tokens per pass")
        axes.set_ylim(bottom=1)
        axes.legend()
    report.save_figure(figure, path)
