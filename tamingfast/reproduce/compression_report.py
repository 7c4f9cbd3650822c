"""The report of `tamingfast.reproduce.compression`: tables as Markdown and JSON, plots as PNG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tamingfast import report
from tamingfast.models.lpips import distance_name
from tamingfast.reproduce.study import geometry

if TYPE_CHECKING:  # optional package
    from matplotlib.axes import Axes

#: One entry of ``results["rows"]``: a first stage and the prior on it.
Row = Mapping[str, Any]

SPEEDS = {
    "paper": "full forward pass per token (paper)",
    "engine": "our engine, the same tokens",
    "strided": "our engine, window in strides",
}


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Write ``report.json``, ``report.md`` and its plots into ``out``; returns the report's path.

    Everything in the report comes from ``results``, except the sheets that ``results["pictures"]`` names, which
    `tamingfast.reproduce.compression` draws.
    """
    name = distance_name(results["settings"]["evaluation"]["perceptual"])
    plot_reconstruction(results["rows"], name, out / "reconstruction.png")
    plot_speed(results["rows"], out / "speed.png")
    return report.write(out, results, _sections(results))


def _sections(results: Mapping[str, Any]) -> list[str]:
    settings, rows = results["settings"], results["rows"]
    size, window, first = settings["data"]["size"], settings["stages"]["window"], settings["vqgan"]["training"]
    return [
        f"# How far to compress: preset `{results['preset']}`",
        report.provenance(results),
        f"All first stages but the colours (f = 1) were trained on the same {first['steps']} batches of "
        f"{report.counted(first['batch_size'], 'crop')} of {settings['stages']['crop']} pixels. Then the same "
        f"transformer ({report.geometry(geometry(settings))}) was trained on the tokens of each, on sequences of at "
        f"most {window}² tokens and with {results['budget_flops']:.3g} floating-point operations: its window sees a "
        f"crop whose side is {window} f pixels. Images of {size} x {size} pixels are drawn by sliding that window.",
        "## Reconstruction and likelihood",
        quality_table(rows, distance_name(settings["evaluation"]["perceptual"])),
        _quality_notes(rows),
        "![reconstruction against pixels per token](reconstruction.png)",
        "## Sampling speed",
        speed_table(rows),
        _speed_notes(rows, settings),
        "![seconds per image against pixels per token](speed.png)",
        "## Pictures",
        *report.pictures(results["pictures"]),
    ]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def quality_table(rows: Sequence[Row], perceptual: str) -> str:
    """Tokens, reconstruction and likelihood of each first stage as a Markdown table."""
    measures = [("psnr", "PSNR, dB", ".2f"), ("ssim", "SSIM", ".3f")]
    if any(row["reconstruction"].get("lpips") is not None for row in rows):
        measures.append(("lpips", perceptual, ".3f"))
    heads = ["first stage", "tokens per image", "codes", "in use", *(label for _, label, _ in measures)]
    heads += ["the window sees, pixels", "NLL, nats per token", "bits per pixel and channel"]
    body = []
    for row in rows:
        kept, nll = row["reconstruction"], row["likelihood"]
        cells = [row["label"], f"{row['tokens']:,}", str(row["vocabulary"]), f"{kept['codebook_usage']:.0%}"]
        cells += [_cell(kept.get(name), form) for name, _, form in measures]
        cells += [f"{row['crop']} x {row['crop']}", f"{nll['nats_per_token']:.3f}"]
        cells.append(f"{nll['token_bits_per_image_dimension']:.3f}")
        body.append(cells)
    return report.table(heads, body)


def _quality_notes(rows: Sequence[Row]) -> str:
    kept, nll = rows[0]["reconstruction"], rows[0]["likelihood"]
    return (
        f"PSNR, SSIM and the codes in use are measured on {report.counted(kept['images'], 'whole validation image')}, "
        f"the NLL on up to {report.counted(nll['images'], 'validation crop')} of the size that the window sees. First "
        "stages have different alphabets, so the NLLs per token cannot be compared; bits per pixel and channel is the "
        "cost of storing the tokens, which does not include what the first stage has lost."
    )


def speed_table(rows: Sequence[Row]) -> str:
    """Seconds per image of each first stage and its speed-up over the first row, as a Markdown table."""
    heads = ["first stage", *(f"{label}, s/image" for label in SPEEDS.values())]
    heads.append(f"times faster than {rows[0]['label']}")
    body = []
    for row in rows:
        seconds = {key: row["speed"][key]["seconds_per_image"] for key in SPEEDS}
        ratios = [rows[0]["speed"][key]["seconds_per_image"] / seconds[key] for key in SPEEDS]
        times = ", ".join(f"{ratio:.3g}x" for ratio in ratios)
        body.append([row["label"], *(f"{value:.4g}" for value in seconds.values()), times])
    return report.table(heads, body)


def _speed_notes(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    lines = [
        f"- Batches of {settings['timing']['batch']}; times include the decoding of tokens to images.",
        "- Where the window moves, the paper's protocol is timed on a part of the tokens and scaled up; the engine is "
        f"timed on whole images. Strides are of {settings['sampling']['stride']} tokens; they give other tokens than "
        "the paper's window, which is centred on each token.",
    ]
    lines += [
        f"- Two levels ({row['label']}) have no window to slide, so the time is that of an untrained transformer with "
        f"one window over all {row['tokens']:,} tokens; their prior was trained on {row['crop']}-pixel crops of "
        f"{row['tokens_trained']} tokens."
        for row in rows
        if row["levels"] > 1
    ]
    return "\n".join(lines)


def _across(row: Row) -> float:
    """Pixels per token along one side: f or, for two levels, the f of a single level with as many tokens."""
    return row["pixels_per_token"] ** 0.5


def plot_reconstruction(rows: Sequence[Row], perceptual: str, path: Path) -> None:
    """A panel for each measure of the reconstructions, over the pixels per token; measures not taken are left out."""
    names = [("psnr", "PSNR, dB"), ("ssim", "SSIM"), ("lpips", perceptual)]
    names = [pair for pair in names if any(row["reconstruction"].get(pair[0]) is not None for row in rows)]
    figure, axes = report.figure(len(names), width=4.5)
    for axis, (name, label) in zip(axes, names, strict=True):
        _name_stars(axis, _curve(axis, rows, [row["reconstruction"].get(name) for row in rows]))
        axis.set(ylabel=label)
    report.save_figure(figure, path)


def plot_speed(rows: Sequence[Row], path: Path) -> None:
    """Seconds per image over the pixels per token, both on a logarithmic scale; a curve for each way of sampling."""
    figure, (axis,) = report.figure(1, width=7)
    axis.set_yscale("log")
    # Where the window does not slide, two ways take the same time; a smaller mark leaves the one below it visible.
    stars = []
    for (key, label), size in zip(SPEEDS.items(), (9, 8, 4), strict=True):
        stars += _curve(axis, rows, [row["speed"][key]["seconds_per_image"] for row in rows], label, size)
    _name_stars(axis, stars)
    axis.set(ylabel="seconds per image")
    axis.legend()
    report.save_figure(figure, path)


def _curve(
    axis: Axes, rows: Sequence[Row], values: Sequence[float | None], label: str | None = None, size: float = 6
) -> list[tuple[float, float, str]]:
    """One level as a line over f, two levels as stars; returns the stars (x, y, first stage)."""
    points = [(_across(row), value, row) for row, value in zip(rows, values, strict=True) if value is not None]
    single = [(x, y) for x, y, row in points if row["levels"] == 1]
    stars = [(x, y, row["label"]) for x, y, row in points if row["levels"] > 1]
    (line,) = axis.plot([x for x, _ in single], [y for _, y in single], "o-", markersize=size, label=label)
    for x, y, _ in stars:
        axis.plot([x], [y], "*", markersize=2 * size, color=line.get_color())
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(y=0.15)
    axis.set(xlabel="pixels per token, along one side (f)")
    return stars


def _name_stars(axis: Axes, stars: Iterable[tuple[float, float, str]]) -> None:
    """Write each first stage's name above its star, once where stars coincide."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
    for x, y, label in dict.fromkeys(stars):
        axis.annotate(label, (x, y), xytext=(0, 10), textcoords="offset points", ha="center", fontsize=8, bbox=box)
