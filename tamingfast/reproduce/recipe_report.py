"""The report of `tamingfast.reproduce.recipe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tamingfast import report
from tamingfast.models.lpips import distance_name

#: Row -> what it changes, in words.
CHANGES = {
    "base": "nothing: the original's recipe, with codes that start as latents of the data",
    "seed": "another seed, to show what chance does",
    "uniform": "codes start near zero, as the original's do",
    "ema": "averages of the weights are measured",
    "rotation": "rotation trick instead of the straight-through gradient",
    "restart": "unused codes start again",
    "cosine": "l2-normalised codes of few channels",
    "simvq": "SimVQ: codes as a learned map of fixed vectors",
    "fsq": "finite scalar quantisation",
    "lfq": "lookup-free quantisation with its entropy loss",
    "lecam": "LeCam regularisation of the discriminator",
    "non_saturating": "non-saturating adversarial loss",
    "warm_start": "the discriminator learns before it counts",
    "classifier": "a second perceptual loss, in a classifier's logits",
    "no_attention": "no attention",
    "checkpointing": "gradient checkpointing",
    "compile": "compiled networks",
    "together": "normalised codes with rotation and restarts, all of the discriminator's, no attention, averages",
    "without_rotation": "as together, with the straight-through gradient",
}


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Write ``report.json`` and ``report.md`` into ``out``; returns the latter's path."""
    settings = results["settings"]
    training, missing = settings["vqgan"]["training"], results["missing"]
    sections = [
        f"# Parts of a training recipe: preset `{results['preset']}`",
        report.provenance(results),
        f"Every first stage was trained for {training['steps']} steps of "
        f"{report.counted(training['batch_size'], 'image')}, with the same seed and batches, and measured on "
        f"{results['rows'][0]['reconstruction']['images']} validation images. "
        "One seed each: a difference no larger than that between `base` and `seed` says nothing.",
        table(results["rows"], settings["evaluation"]),
        _notes(results["rows"], settings["evaluation"]),
        *([f"Not run yet: {', '.join(missing)}."] if missing else []),
        *report.pictures(results["pictures"]),
    ]
    return report.write(out, results, sections)


def table(rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> str:
    """A row for each of the parts as a Markdown table."""
    perceptual = "LPIPS" if evaluation["perceptual"] is None else distance_name(evaluation["perceptual"])
    heads = ["row", "changes", "PSNR, dB", perceptual, "Frechet distance", "codes in use", "s/step"]
    body = []
    for row in rows:
        kept, distance = row["reconstruction"], row["distance"] or {}
        used = round(kept["codebook_usage"] * row["codes"])
        cells = [row["name"], CHANGES[row["name"]], _number(kept["psnr"], ".2f"), _number(kept.get("lpips"), ".4f")]
        cells.append(_number(distance.get("frechet_distance", distance.get("fid")), ".2f"))
        body.append([*cells, f"{used:,} of {row['codes']:,}", f"{row['seconds_per_step']:.3g}"])
    return report.table(heads, body)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _notes(rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> str:
    notes = ["- Seconds per step are training time over steps, on whatever else the machine was doing."]
    if evaluation["perceptual"] is None:
        notes.append("- LPIPS was not measured (evaluation.perceptual=null).")
    if evaluation["features"] is None:
        notes.append("- The Frechet distance was not measured (evaluation.features=null).")
    else:
        notes.append(
            f"- The Frechet distance is that of reconstructions from the same {rows[0]['reconstruction']['images']} "
            f"images, in features of {evaluation['features']}; it depends on their number."
        )
    return "\n".join(notes)
