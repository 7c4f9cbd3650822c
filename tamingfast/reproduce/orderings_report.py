"""The report of `tamingfast.reproduce.orderings`: a table as Markdown and JSON, and curves as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tamingfast import report
from tamingfast.reproduce.study import geometry

#: The ordering that the others are compared to.
REFERENCE = "row_major"
SAMPLES = "samples.png"


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Write ``report.json``, ``report.md`` and ``nll.png`` into ``out``; returns the report's path.

    Everything in the report comes from ``results``, except the samples, which `tamingfast.reproduce.orderings` draws.
    """
    plot(results["orderings"], out / "nll.png")
    return report.write(out, {**results, "summary": summary(results["orderings"])}, _sections(results))


def title(name: str) -> str:
    """An ordering's name in words."""
    return name.replace("_", " ")


def _sections(results: Mapping[str, Any]) -> list[str]:
    settings, (rows, columns) = results["settings"], results["grid"]
    training, seeds = settings["prior"]["training"], settings["orderings"]["seeds"]
    names = ", ".join(title(row["name"]) for row in results["orderings"])
    return [
        f"# Orderings: preset `{results['preset']}`",
        report.provenance(results),
        f"The same transformer ({report.geometry(geometry(settings))}) for each ordering of {rows} x {columns} tokens "
        f"out of {results['vocabulary']}: {training['steps']} steps of "
        f"{report.counted(training['batch_size'], 'image')}. "
        f"Seeds: {', '.join(map(str, seeds))}; each determines the initial weights and the batches of all orderings "
        "alike. NLL is that of validation images, at the end of the budget; ± is the standard deviation over seeds, in "
        "the column 'above row major' that of the differences.",
        table(results["orderings"]),
        "![validation NLL over steps; bands reach from the best to the worst seed](nll.png)",
        f"Samples of seed {seeds[0]}, one row each for {names}:\n\n![samples]({SAMPLES})",
    ]


def summary(orderings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each ordering, sorted by its final nats per token, with mean and spread over seeds.

    ``spread`` is the sample standard deviation, None with one seed. ``behind`` and ``behind_spread`` describe the
    differences to row major, seed by seed. As the runs of a seed share their first weights and batches, these vary
    less.
    """
    final = {row["name"]: np.array([curve[-1] for curve in row["nll"].values()]) for row in orderings}

    def spread(values: np.ndarray) -> float | None:
        return float(values.std(ddof=1)) if len(values) > 1 else None

    rows = [
        {
            "name": name,
            "nll": float(values.mean()),
            "spread": spread(values),
            "behind": float((values - final[REFERENCE]).mean()),
            "behind_spread": spread(values - final[REFERENCE]),
        }
        for name, values in final.items()
    ]
    return sorted(rows, key=lambda row: row["nll"])


def table(orderings: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a Markdown table, with the final value of every seed."""
    seeds = list(orderings[0]["nll"])
    final = {row["name"]: [row["nll"][seed][-1] for seed in seeds] for row in orderings}

    def with_spread(value: float, spread: float | None, sign: str = "") -> str:
        return f"{value:{sign}.4f}" + ("" if spread is None else f" ± {spread:.4f}")

    heads = ["ordering", "NLL, nats per token", "above row major", *(f"seed {seed}" for seed in seeds)]
    cells = []
    for row in summary(orderings):
        each = [f"{value:.4f}" for value in final[row["name"]]]
        behind = "-" if row["name"] == REFERENCE else with_spread(row["behind"], row["behind_spread"], "+")
        cells.append([title(row["name"]), with_spread(row["nll"], row["spread"]), behind, *each])
    return report.table(heads, cells)


def plot(orderings: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Validation curves over steps: lines for the means over seeds, bands for their ranges."""
    figure, (axis,) = report.figure(1, width=7)
    for row in orderings:
        curves = np.array(list(row["nll"].values()))
        (line,) = axis.plot(row["steps"], curves.mean(0), label=title(row["name"]))
        if len(curves) > 1:
            axis.fill_between(row["steps"], curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15)
    axis.set(xlabel="step", ylabel="validation NLL, nats per token", title="Orderings of the tokens")
    axis.legend()
    report.save_figure(figure, path)
