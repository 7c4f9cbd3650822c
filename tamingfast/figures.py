"""The results of an evaluation as Markdown tables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from tamingfast import report
from tamingfast.errors import UserError
from tamingfast.files import read_text

_LABELS = {
    "images": "images",
    "l1": "mean absolute difference, of images in [-1, 1]",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS (VGG16)",
    "codebook_usage": "share of codes in use",
    "codebook_perplexity": "perplexity of the codes",
    "tokens": "tokens per image",
    "nats_per_token": "NLL, nats per token",
    "perplexity": "perplexity",
    "bits_per_token": "NLL, bits per dimension of the token grid",
    "token_bits_per_image_dimension": "rate of the tokens, bits per image dimension",
    "pixel_bits_per_dimension": "NLL of the 8-bit pixels, bits per dimension",
}
_LARGEST = 1 << 20
_DISTANCES = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score_mean": "Inception score",
    "frechet_distance": "Frechet distance, {} features",
    "kernel_distance": "kernel distance, {} features",
    "precision": "precision",
    "recall": "recall",
}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The result of `tamingfast.evaluation.evaluate_model` in a file; UserError for a file of anything else."""
    expected = "the JSON that `tamingfast evaluate --out` wrote"
    try:
        found: dict[str, Any] = json.loads(read_text(path, expected, largest=_LARGEST))
        whole = isinstance(found["data"], str) and table(found) and report.on(found["machine"])
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, StopIteration) as error:
        if isinstance(error, UserError):
            raise
        whole = False
    if not whole:
        raise UserError(f"{path}: got no figures of a model, expected {expected}; give that file")
    return found


def table(found: Mapping[str, Any]) -> str:
    """The result of `tamingfast.evaluation.evaluate` as Markdown tables, without the measures that are undefined."""
    parts = []
    for section in ("reconstruction", "likelihood"):
        if section in found:
            rows = [[_LABELS[key], _number(value)] for key, value in found[section].items() if value is not None]
            parts.append(report.table([section, ""], rows))
    if found.get("distances"):
        parts.append(distance_table(found["distances"]))
    return "\n\n".join(parts)


def distance_table(distances: Mapping[str, Mapping[str, str | float | None]]) -> str:
    """Results of `tamingfast.evaluation.compare` as a Markdown table; its headings name the network of the features."""
    first = next(iter(distances.values()))
    keys = [key for key in _DISTANCES if key in first]
    heads = ["to the real images", "images", "real images", *(_DISTANCES[key].format(first["network"]) for key in keys)]
    columns = ("images", "real_images", *keys)
    return report.table(heads, [[name, *(_number(row[key]) for key in columns)] for name, row in distances.items()])


def _number(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
