"""The report of `tamingfast.reproduce.multiscale`: tables as Markdown and JSON, and a plot as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tamingfast import report
from tamingfast.reproduce.study import geometry

PICTURES = {
    "given.png": "Held-out images, and a sample of each that starts from its first 1, 2, ... scales; in the last row "
    "all scales are given, which leaves the first stage's reconstruction",
    "scales.png": "The same images, and what each of their scales decodes to when its tokens are repeated",
    "samples.png": "Samples from scratch",
}


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Write ``report.json``, ``report.md`` and ``distance.png`` into ``out``; returns the report's path.

    Everything in the report comes from ``results``, except `PICTURES`, which `tamingfast.reproduce.multiscale` draws.
    """
    plot(results, out / "distance.png")
    return report.write(out, results, _sections(results))


def _sections(results: Mapping[str, Any]) -> list[str]:
    settings = results["settings"]
    training, measured = settings["prior"]["training"], settings["measure"]
    return [
        f"# Multiscale prior: preset `{results['preset']}`",
        report.provenance(results),
        f"A transformer ({report.geometry(geometry(settings))}) predicts the scales {', '.join(results['scales'])} of "
        f"the tokens one after the other: {training['steps']} steps of "
        f"{report.counted(training['batch_size'], 'image')}.",
        "## Samples from given scales\n\n"
        f"{report.counted(measured['images'], 'held-out image')} ({results['held_out']}), "
        f"{report.counted(measured['samples'], 'sample')} each for every number of given scales; ± is "
        "the standard error over images. With all scales given nothing is sampled, and only the first "
        "stage's error remains.",
        table(results),
        "![distance over the number of given scales](distance.png)",
        "## Likelihood of each scale\n\nOn validation images, each token given all before it. The sum bounds the "
        "negative log-likelihood of the image's own tokens from above, as these determine all coarser scales.",
        nll_table(results["nll"]),
        "## Pictures",
        *(f"{text}:\n\n![{name.removesuffix('.png')}]({name})" for name, text in PICTURES.items()),
    ]


def given_names(scales: Sequence[str]) -> list[str]:
    """Names for 0, 1, ... and all given scales, in pictures and plots."""
    return ["none", *(f"to {name}" for name in scales[:-1]), "all"]


def table(results: Mapping[str, Any]) -> str:
    """Distances for each number of given scales as a Markdown table."""
    heads = [
        "given scales",
        "tokens given",
        f"{results['distance']} to the input",
        "between samples",
        "pixel difference",
    ]
    tokens = np.cumsum([0, *(row["tokens"] for row in results["nll"])])
    cells = [
        [
            ", ".join(results["scales"][:scales]) or "none",
            f"{tokens[scales]} of {tokens[-1]}",
            f"{row['to_input']:.4f} ± {row['to_input_error']:.4f}",
            f"{row['between']:.4f}",
            f"{row['pixels']:.4f}",
        ]
        for scales, row in enumerate(results["given"])
    ]
    return report.table(heads, cells)


def nll_table(nll: Sequence[Mapping[str, Any]]) -> str:
    """NLL of each scale and of all together as a Markdown table."""
    tokens, total = sum(row["tokens"] for row in nll), sum(row["tokens"] * row["nll"] for row in nll)
    cells = [
        [row["scale"], str(row["tokens"]), f"{row['nll']:.3f}", f"{row['tokens'] * row['nll']:.1f}"] for row in nll
    ]
    cells.append(["all", str(tokens), f"{total / tokens:.3f}", f"{total:.1f}"])
    return report.table(["scale", "tokens", "nats per token", "nats per image"], cells)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Distances over the number of given scales, with standard errors over images."""
    figure, (axis,) = report.figure(1, width=7)
    given = results["given"]
    at, means, errors = range(len(given)), *([row[key] for row in given] for key in ("to_input", "to_input_error"))
    axis.errorbar(at, means, errors, marker="o", capsize=3, label="sample to input")
    if results["settings"]["measure"]["samples"] > 1:
        axis.plot(at, [row["between"] for row in given], marker="s", label="between samples of one input")
    axis.set_xticks(at, given_names(results["scales"]))
    axis.set(xlabel="scales given", ylabel=results["distance"], title="What each scale determines", ylim=(0, None))
    axis.legend()
    report.save_figure(figure, path)
