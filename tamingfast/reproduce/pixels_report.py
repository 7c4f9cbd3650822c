"""The report of `tamingfast.reproduce.pixels`: tables as Markdown and JSON, plots as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tamingfast import report
from tamingfast.checkpoints.run_directory import read_metrics
from tamingfast.evaluation import distance_table

PAPER_RATIO = 14.08  # pixels / latents, seconds per image; An Image is Worth 16x16 Tokens, section 2
PAPER_QUALITY = 0.1863  # relative reduction of the FID from pixels to latents at the same budget; ibid.

TOLERATED = 0.1  # relative difference of an integrated time from that of a whole run above which the report warns

_PROTOCOLS = {
    "paper": "(a) the paper's: full forward pass per token",
    "cached": "(b) key/value cache",
    "fastest": "(c) our fastest path",
}
#: Steps of training before which pictures show nothing to recognise.
_STEPS_THAT_SHOW = 300


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Write ``report.json``, ``report.md``, ``training.png`` and ``speed.png`` into ``out``; returns the report's path.

    Everything in the report comes from ``results``, except the curves, read from the runs in ``out``, and the sheets
    that ``results["pictures"]`` names, which `tamingfast.reproduce.pixels` draws.
    """
    plot_training(results["runs"], out)
    plot_speed(results["speed"], out / "speed.png")
    return report.write(out, results, _sections(results))


def _sections(results: Mapping[str, Any]) -> list[str]:
    return [
        f"# Pixels against latents: preset `{results['preset']}`",
        report.provenance(results),
        "## Sampling speed\n\n" + speed_table(results["speed"]) + "\n\n" + _speed_notes(results["speed"]),
        "## Quality at the same budget\n\n" + _quality(results["quality"]),
        "## Training\n\n" + _training_table(results),
        "## Pictures\n\n" + _what_to_expect(results["runs"]),
        *report.pictures(results["pictures"]),
    ]


def _what_to_expect(runs: Sequence[Mapping[str, Any]]) -> str:
    """What pictures of networks trained for so many steps can show."""
    trained = ", ".join(f"{run['label']} {run['steps']}" for run in runs)
    if min(run["steps"] for run in runs) >= _STEPS_THAT_SHOW:
        return f"Steps of training: {trained}."
    return (
        f"Steps of training: {trained}. After fewer than {_STEPS_THAT_SHOW}, pictures are patches of colour, and "
        "completions do not resemble the half that was kept: they show that everything runs, not what it can learn."
    )


def speed_table(speed: Mapping[str, Any]) -> str:
    """The paper's comparison as a Markdown table: seconds per image from pixels and from latents, and their ratio."""
    heads = ["protocol", "pixels, s/image", "latents, s/image", "pixels / latents", "paper"]
    heads += ["pixels, tokens/s", "latents, tokens/s"]
    rows = []
    for key, label in _PROTOCOLS.items():
        both = [speed[key][name] for name in ("pixels", "latents")]
        pixels, latents = (row["seconds_per_image"] for row in both)
        cells = [label, f"{pixels:.4g}", f"{latents:.4g}", f"**{pixels / latents:.2f}**"]
        cells.append(str(PAPER_RATIO) if key == "paper" else "-")
        rows.append([*cells, *(f"{row['tokens_per_second']:,.0f}" for row in both)])
    return report.table(heads, rows)


def _speed_notes(speed: Mapping[str, Any]) -> str:
    paper, fastest = speed["paper"], speed["fastest"]
    latents, pixels = paper["latents"], paper["pixels"]
    whole = pixels["seconds_per_image"] / fastest["latents"]["seconds_per_image"]
    first = f"- From pixels by the paper's protocol to latents on our fastest path: **{whole:.0f} times** faster."
    lines = [
        f"- (a) and (b) draw batches of {speed['batch']}; times include the decoding of tokens to images.",
    ]
    for name in ("pixels", "latents"):
        row = fastest[name]
        lines.append(
            f"- (c) for {name}: engine {row['engine']}, batches of {row['batch']}, "
            f"weights {row['dtype'] or 'as trained'}, the best of {report.counted(len(row['candidates']), 'setting')} "
            "tried."
        )
    if pixels["integrated"]:
        estimate, measured = latents["seconds_per_image"], latents["whole_run_seconds_per_image"]
        off = estimate / measured - 1
        lines.append(
            f"- (a) is timed at {report.counted(len(pixels['prefixes']), 'prefix length')} and integrated over all "
            f"steps, {pixels['tokens']} for pixels and {latents['tokens']} for latents. A whole run for latents took "
            f"{measured:.4g} s/image; the integral is {abs(off):.1%} {'above' if off > 0 else 'below'} it."
        )
        if abs(off) > TOLERATED:
            # The speed-up above is derived from (a), so the warning replaces it.
            first = (
                f"- **Do not use the figures of (a): for latents the integral is more than {TOLERATED:.0%} off the "
                "time of a whole run. The machine was busy, or the steps are too short to be timed alone; repeat the "
                "run on an idle machine.**"
            )
    return "\n".join([first, *lines])


def _quality(quality: Mapping[str, Any]) -> str:
    if "missing" in quality:
        return f"Not measured: {quality['missing']}."
    distances = quality["distances"]
    samples = [distances[f"samples of the prior on {name}"] for name in ("latents", "pixels")]
    name = "fid" if "fid" in samples[0] else "frechet_distance"
    latents, pixels = (row[name] for row in samples)
    what = "FID" if name == "fid" else f"Frechet distance in features of {samples[0]['network']}"
    lines = [
        f"- The {what} of samples from latents is {abs(1 - latents / pixels):.1%} "
        f"{'lower (better)' if latents < pixels else 'higher (worse)'} than from pixels. The paper found the FID of "
        f"latents {PAPER_QUALITY:.2%} lower, on CIFAR10.",
        "- Frechet distances grow as sets get smaller, so these can only be compared with one another; the kernel "
        "distance is unbiased and may be below 0.",
    ]
    if name != "fid":
        lines.append("- These are not FIDs, whose features are those of the Inception network.")
    return distance_table(distances) + "\n\n" + "\n".join(lines)


def _training_table(results: Mapping[str, Any]) -> str:
    prior = results["prior"]
    rows = []
    for run in results["runs"]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in run["validation"].items())
        counts = [str(run[key]) for key in ("tokens", "vocabulary", "steps")]
        rows.append([run["label"], *counts, report.duration(run["seconds"]), figures])
    heads = ["stage", "tokens per image", "vocabulary", "steps", "training time", "validation"]
    parts = [
        f"Both priors are the same transformer, {prior['parameters'] / 1e6:.2g} M parameters without embeddings and "
        f"head ({report.geometry(prior)}), trained with the same "
        f"budget of {prior['budget_flops']:.3g} floating-point operations.",
        report.table(heads, rows),
        "The negative log-likelihoods (nll, in nats per token) are over different alphabets and sequence lengths, so "
        "they say nothing about which prior is better.",
        "![training curves](training.png)",
    ]
    return "\n\n".join(parts)


def _curve(lines: Sequence[Mapping[str, Any]], split: str, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric."""
    points = [(line["step"], line[name]) for line in lines if line.get("split") == split and name in line]
    return [p[0] for p in points], [p[1] for p in points]


def plot_training(runs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """One panel per run with its curves on training and validation data, over steps."""
    plotted, axes = report.figure(len(runs))
    for axis, run in zip(axes, runs, strict=True):
        lines = read_metrics(out / run["directory"])
        for split, style in (("train", "-"), ("validation", "o-")):
            x, y = _curve(lines, split, run["curve"][split])
            axis.plot(x, y, style, label=split, alpha=0.8, markersize=3)
        axis.set(title=run["label"], xlabel="step", ylabel=run["curve"]["validation"])
        axis.legend()
    report.save_figure(plotted, out / "training.png")


def plot_speed(speed: Mapping[str, Any], path: Path) -> None:
    """Seconds per image as bars on a logarithmic axis, with the ratio above each pair."""
    plotted, (axis,) = report.figure(1)
    for offset, name in ((-0.2, "pixels"), (0.2, "latents")):
        seconds = [speed[key][name]["seconds_per_image"] for key in _PROTOCOLS]
        axis.bar([i + offset for i in range(len(seconds))], seconds, width=0.38, label=name)
    for i, key in enumerate(_PROTOCOLS):
        pixels, latents = (speed[key][name]["seconds_per_image"] for name in ("pixels", "latents"))
        axis.annotate(f"{pixels / latents:.1f}x", (i, pixels), ha="center", va="bottom", fontweight="bold")
    axis.set_yscale("log")
    axis.set_xticks(
        range(len(_PROTOCOLS)), ["full forward\nper token (paper)", "key/value\ncache", "our fastest\npath"]
    )
    axis.set(ylabel="seconds per image", title="Sampling from pixels and from latents")
    axis.margins(y=0.15)
    axis.legend()
    report.save_figure(plotted, path)
