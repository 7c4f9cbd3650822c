"""The report of `tamingfast.reproduce.compression`: tables as Markdown and JSON, plots as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tamingfast import report
from tamingfast.files import write_json, write_text
from tamingfast.models.lpips import distance_name

_SPEEDS = {
    "paper": "full forward pass per token (paper)",
    "engine": "our engine, the same tokens",
    "strided": "our engine, window in strides",
}


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Write ``report.json``, ``report.md`` and its plots into ``out``; returns the report's path.

    ``results`` is what `tamingfast.reproduce.compression.run` measured; nothing else enters the report. Sample sheets
    that ``results["pictures"]`` names lie in ``out`` already.
    """
    write_json(out / "report.json", results)
    name = distance_name(results["settings"]["evaluation"]["perceptual"])
    plot_reconstruction(results["rows"], name, out / "reconstruction.png")
    plot_speed(results["rows"], out / "speed.png")
    write_text(out / "report.md", markdown(results))
    return out / "report.md"


def markdown(results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    settings, rows = results["settings"], results["rows"]
    geometry = settings["prior"]["model"]["params"]["transformer_config"]["params"]
    size, window, first = settings["data"]["size"], settings["stages"]["window"], settings["vqgan"]["training"]
    return "\n\n".join([
        f"# How far to compress: preset `{results['preset']}`",
        report.provenance(results),
        f"All first stages but the colours (f = 1) saw the same {first['steps']} batches of "
        f"{report.counted(first['batch_size'], 'crop')} of {settings['stages']['crop']} pixels. Then the same "
        f"transformer ({report.geometry(geometry)}) learned sequences of at most {window}² tokens of each, with "
        f"{results['budget_flops']:.3g} floating-point operations: its window sees a crop whose side is {window} f "
        f"pixels. Images of {size} x {size} pixels are drawn by sliding that window.",
        "## What is lost, and what the rest costs",
        quality_table(rows, distance_name(settings["evaluation"]["perceptual"])),
        _quality_notes(rows),
        "![reconstruction against pixels per token](reconstruction.png)",
        "## Sampling speed",
        speed_table(rows),
        _speed_notes(rows, settings),
        "![seconds per image against pixels per token](speed.png)",
        "## Pictures",
        *(f"{text}:\n\n![{text}]({name})" for name, text in results["pictures"].items()),
    ]) + "\n"  # fmt: skip


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def quality_table(rows: Sequence[Mapping[str, Any]], perceptual: str) -> str:
    """Tokens, reconstruction and likelihood of each first stage as a Markdown table."""
    with_lpips = any(row["reconstruction"].get("lpips") is not None for row in rows)
    heads = ["first stage", "tokens per image", "codes", "in use", "PSNR, dB", "SSIM", *[perceptual] * with_lpips]
    heads += ["the window sees, pixels", "NLL, nats per token", "bits per pixel and channel"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        kept, nll = row["reconstruction"], row["likelihood"]
        cells = [row["label"], f"{row['tokens']:,}", str(row["vocabulary"]), f"{kept['codebook_usage']:.0%}"]
        cells += [_cell(kept["psnr"], ".2f"), _cell(kept["ssim"], ".3f")]
        cells += [_cell(kept.get("lpips"), ".3f")] * with_lpips
        cells += [f"{row['crop']} x {row['crop']}", f"{nll['nats_per_token']:.3f}"]
        cells.append(f"{nll['token_bits_per_image_dimension']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _quality_notes(rows: Sequence[Mapping[str, Any]]) -> str:
    kept, nll = rows[0]["reconstruction"], rows[0]["likelihood"]
    return (
        f"PSNR, SSIM and the codes in use are of {report.counted(kept['images'], 'whole validation image')}, the NLL "
        f"of up to {report.counted(nll['images'], 'validation crop')} of the size that the window sees. Tokens of "
        "different first stages are different alphabets, so their NLL per token does not compare; bits per pixel and "
        "channel is what storing the tokens would cost, without what the first stage has lost."
    )


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds per image of each first stage and how many times faster than the first row, as a Markdown table."""
    heads = [
        "first stage",
        *(f"{label}, s/image" for label in _SPEEDS.values()),
        f"times faster than {rows[0]['label']}",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        seconds = {key: row["speed"][key]["seconds_per_image"] for key in _SPEEDS}
        ratios = [rows[0]["speed"][key]["seconds_per_image"] / seconds[key] for key in _SPEEDS]
        cells = [row["label"], *(f"{value:.4g}" for value in seconds.values())]
        cells.append(", ".join(f"{ratio:.3g}x" for ratio in ratios))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _speed_notes(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    lines = [
        f"- Batches of {settings['timing']['batch']}; times include the decoding of tokens to images.",
        "- The paper's protocol is timed on a part of the tokens and multiplied where the window moves; the engine's "
        f"times are of whole images. Strides are of {settings['sampling']['stride']} tokens, and give other tokens "
        "than the paper's window, which is centred on each token.",
    ]
    lines += [
        f"- Two levels ({row['label']}) have no window to slide, so their time is of one pass over all "
        f"{row['tokens']:,} tokens with as many positions, untrained; their prior was trained on {row['crop']}-pixel "
        f"crops of {row['tokens_trained']} tokens."
        for row in rows
        if row["levels"] > 1
    ]
    return "\n".join(lines)


def _across(row: Mapping[str, Any]) -> float:
    """Pixels of one side that a token stands for: f, or for two levels what f would give as many tokens."""
    return row["pixels_per_token"] ** 0.5


def plot_reconstruction(rows: Sequence[Mapping[str, Any]], perceptual: str, path: Path) -> None:
    """A panel for each figure of the reconstructions there is, over the pixels per token."""
    names = [("psnr", "PSNR, dB"), ("ssim", "SSIM"), ("lpips", perceptual)]
    names = [pair for pair in names if any(row["reconstruction"].get(pair[0]) is not None for row in rows)]
    figure, axes = report.figure(len(names), width=4.5)
    for axis, (name, label) in zip(axes, names, strict=True):
        _curve(axis, rows, lambda row, name=name: row["reconstruction"].get(name))
        axis.set(ylabel=label)
    report.save_figure(figure, path)


def plot_speed(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds per image over the pixels per token, both logarithmic, a curve for each way of sampling."""
    figure, (axis,) = report.figure(1, width=7)
    axis.set_yscale("log")
    # Where the window does not move, two ways take the same time: the smaller mark leaves the one below to be seen.
    for (key, label), size in zip(_SPEEDS.items(), (9, 8, 4), strict=True):
        _curve(axis, rows, lambda row, key=key: row["speed"][key]["seconds_per_image"], label, size)
    axis.set(ylabel="seconds per image")
    axis.legend()
    report.save_figure(figure, path)


def _curve(axis: Any, rows: Sequence[Mapping[str, Any]], value: Any, label: str | None = None, size: float = 6) -> None:
    """One level as a line over f, two levels as a star with its name, once where stars coincide."""
    points = [(_across(row), value(row), row) for row in rows if value(row) is not None]
    single = [point[:2] for point in points if point[2]["levels"] == 1]
    (line,) = axis.plot(*zip(*single, strict=True) if single else [[]], "o-", markersize=size, label=label)
    named = [note.xy for note in axis.texts]
    for x, y, row in points:
        if row["levels"] > 1:
            axis.plot([x], [y], "*", markersize=2 * size, color=line.get_color())
            if (x, y) not in named:
                above = {"textcoords": "offset points", "xytext": (0, 10), "ha": "center", "fontsize": 8}
                on_lines = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
                axis.annotate(row["label"], (x, y), bbox=on_lines, **above)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(y=0.15)
    axis.set(xlabel="pixels per token, along one side (f)")
