"""Images from coarse to fine: An Image is Worth 16x16 Tokens, section 3, Fig. 3 and 7.

One first stage and one prior over all scales of its tokens. Held-out images are drawn anew from their first s scales,
for every s: how far the samples are from the image, and from each other, says what each scale settles.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast import images, report, tasks
from tamingfast.checkpoints import load_model
from tamingfast.checkpoints.run_directory import begun, progress, read_metrics
from tamingfast.errors import UserError
from tamingfast.files import write_json, write_text
from tamingfast.models.lpips import LPIPS, distance_name
from tamingfast.ops import backends
from tamingfast.reproduce import settings as presets_of
from tamingfast.training import prior as prior_training
from tamingfast.training import vqgan as vqgan_training
from tamingfast.training.settings import build_datasets

EXPERIMENT, VQGAN, PRIOR = "multiscale", "vqgan", "prior"
#: Pairs of images whose distance is taken at once.
PAIRS = 256
PICTURES = {
    "given.png": "Held-out images, and a sample of each that begins with its first 1, 2, ... scales; with all scales "
    "given, in the last row, the first stage's reconstruction is all there is",
    "scales.png": "The same images, and what each of their scales decodes to when its tokens are repeated",
    "samples.png": "Samples from scratch",
}


def presets() -> list[str]:
    """Names of the packaged presets."""
    return presets_of.presets(EXPERIMENT)


def run(
    preset: str, out: str | os.PathLike, overrides: Sequence[str] = (), resume: bool = False, device: str | None = None
) -> Path:
    """Train a first stage and a multiscale prior, draw from given scales; returns the path of ``out/report.md``.

    Raises as `tamingfast.reproduce.run`.
    """
    settings, out = presets_of.load_preset(EXPERIMENT, preset, overrides), Path(out)
    if settings["scales"] is None:
        raise UserError("the setting scales is null; give scales=all, or a list such as scales=[4,2,1]")
    device = str(backends.pick_device(device))
    datasets = build_datasets({"data": settings["data"]})
    # Before anything is trained, as weights or images may be missing.
    distance = LPIPS(settings["measure"]["perceptual_weights"]).to(device)
    held_out = _held_out(datasets[1], settings["measure"]["images"]).to(device)
    config = {**settings["vqgan"], "data": settings["data"]}
    vqgan_training.train(config, out / VQGAN, resume and begun(out / VQGAN), device, datasets)
    config = {**settings["prior"], "data": settings["data"], "prior": {"scales": settings["scales"]}}
    prior_training.train(config, out / VQGAN, out / PRIOR, resume and begun(out / PRIOR), device, datasets)
    model = load_model(out / PRIOR, device=device)
    drawn = draw_given(model, held_out, settings["measure"]["samples"], settings["sampling"])
    results = {
        "preset": preset,
        "data": datasets[0].description,
        "held_out": datasets[1].description,
        "machine": backends.machine(),
        "settings": settings,
        "scales": model.pyramid.names,
        "seconds": sum(progress(out / run)["seconds"] for run in (VQGAN, PRIOR)),
        "distance": distance_name(settings["measure"]["perceptual_weights"]),
        "nll": nll_of_scales(out / PRIOR, model.pyramid),
        "given": [measure(distance, held_out, samples) for samples in drawn],
    }
    _pictures(model, held_out, drawn, settings["sampling"], out)
    return write(results, out)


# --- what is measured -----------------------------------------------------------------------------------------------


def _held_out(dataset: Dataset | None, count: int) -> Tensor:
    """Images (count, 3, H, W), evenly spread over a data set; UserError when it has too few."""
    if dataset is None or len(dataset) < count:
        found = 0 if dataset is None else len(dataset)
        raise UserError(f"the data have {found} held-out images, fewer than measure.images={count}; lower it")
    chosen = np.linspace(0, len(dataset) - 1, count).astype(int)
    return torch.stack([torch.as_tensor(dataset[i]["image"]) for i in chosen.tolist()]).permute(0, 3, 1, 2)


@torch.no_grad()
def draw_given(model: nn.Module, x: Tensor, samples: int, sampling: Mapping[str, Any]) -> list[Tensor]:
    """Samples (B, samples, 3, H, W) that begin with the first s scales of images x (B, 3, H, W), for s from 0 to all.

    Sample j of image i has the same noise whatever s is.
    """
    sequence = model.encode_to_z(x)[1].repeat_interleave(samples, 0)
    rows, columns = model.canvas_size(model.pyramid.height, model.pyramid.width)
    cond, drawn = tasks.conditions(model, len(sequence)), []
    options = {key: sampling[key] for key in ("temperature", "top_k", "seed", "batch")}
    for scales in range(len(model.pyramid.names) + 1):
        start = sequence[:, : model.pyramid.first(scales)]
        canvases = tasks.draw(model, cond, rows, columns, start=start, **options)
        pixels = [model.decode_grid(model.image_tokens(canvas)).clamp(-1, 1) for canvas in canvases]
        drawn.append(torch.cat(pixels).unflatten(0, (len(x), samples)))
    return drawn


def measure(distance: nn.Module, x: Tensor, samples: Tensor) -> dict[str, float]:
    """Figures of samples (B, n, 3, H, W) that were drawn from what is given of images x (B, 3, H, W).

    ``to_input`` is the mean distance of a sample to its image and ``to_input_error`` its standard error over images,
    ``between`` the mean distance of two samples of one image (0 with one sample), ``pixels`` the mean absolute
    difference to the image in [0, 1].
    """
    count = samples.shape[1]
    to_input = _distances(distance, x.repeat_interleave(count, 0), samples.flatten(0, 1)).view(len(x), count).mean(1)
    first, second = torch.triu_indices(count, count, offset=1)
    between = _distances(distance, samples[:, first].flatten(0, 1), samples[:, second].flatten(0, 1))
    return {
        "to_input": float(to_input.mean()),
        "to_input_error": float(to_input.std() / len(x) ** 0.5) if len(x) > 1 else 0.0,
        "between": float(between.mean()) if len(between) else 0.0,
        "pixels": float((samples - x[:, None]).abs().mean()) / 2,
    }


@torch.no_grad()
def _distances(distance: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Distance of each pair of images, double (B,)."""
    parts = zip(a.split(PAIRS), b.split(PAIRS), strict=True)
    return torch.cat([distance(*part).flatten().double() for part in parts]) if len(a) else a.new_zeros(0)


def nll_of_scales(run: Path, pyramid: Any) -> list[dict[str, Any]]:
    """For each scale its tokens and the last validation's nats per token, coarse to fine."""
    last = read_metrics(run, "validation")[-1]
    shapes = zip(pyramid.names, pyramid.shapes, strict=True)
    return [{"scale": name, "tokens": rows * columns, "nll": last[f"nll_{name}"]} for name, (rows, columns) in shapes]


# --- pictures -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _pictures(model: nn.Module, x: Tensor, drawn: Sequence[Tensor], sampling: Mapping[str, Any], out: Path) -> None:
    shown = x[: sampling["shown"]]
    given, names = [samples[: len(shown), 0] for samples in drawn[1:]], model.pyramid.names
    scale = max(1, 96 // x.shape[-1])
    images.save_rows(out / "given.png", [shown, *given], ["image", *_given(names)[1:]], scale)
    scales = model.pyramid.split(model.encode_to_z(shown)[1])
    # Tokens are enlarged, not pixels: the decoder knows feature maps of the finest scale's size only.
    enlarged = [F.interpolate(grid[:, None].float(), scales[-1].shape[1:])[:, 0].long() for grid in scales]
    decoded = [model.decode_grid(grid) for grid in enlarged]
    images.save_rows(out / "scales.png", [shown, *decoded], ["image", *names], scale)
    canvas = model.canvas_size(model.pyramid.height, model.pyramid.width)
    options = {key: sampling[key] for key in ("temperature", "top_k", "seed", "batch")}
    canvases = tasks.draw(model, tasks.conditions(model, sampling["images"]), *canvas, **options)
    pixels = torch.cat([model.decode_grid(model.image_tokens(canvas)) for canvas in canvases])
    images.save_png(out / "samples.png", images.grid(pixels, columns=min(8, len(pixels))), scale)


def _given(names: Sequence[str]) -> list[str]:
    """What each number of given scales is called in pictures."""
    return ["none", *(f"to {name}" for name in names[:-1]), "all"]


# --- the report -----------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """Distances against the number of given scales as a Markdown table."""
    heads = ["given scales", "tokens given", f"{results['distance']} to the input", "between samples", "pixels off"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    tokens = np.cumsum([0, *(row["tokens"] for row in results["nll"])])
    for scales, row in enumerate(results["given"]):
        cells = [
            "none" if not scales else ", ".join(results["scales"][:scales]),
            f"{tokens[scales]} of {tokens[-1]}",
            f"{row['to_input']:.4f} ± {row['to_input_error']:.4f}",
            f"{row['between']:.4f}",
            f"{row['pixels']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def nll_table(nll: Sequence[Mapping[str, Any]]) -> str:
    """What each scale costs as a Markdown table, and all of them together."""
    lines = ["| scale | tokens | nats per token | nats per image |", "|---|---|---|---|"]
    tokens, total = sum(row["tokens"] for row in nll), sum(row["tokens"] * row["nll"] for row in nll)
    for row in nll:
        lines.append(f"| {row['scale']} | {row['tokens']} | {row['nll']:.3f} | {row['tokens'] * row['nll']:.1f} |")
    return "\n".join([*lines, f"| all | {tokens} | {total / tokens:.3f} | {total:.1f} |"])


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Distances over the number of given scales, with standard errors over images."""
    figure, (axis,) = report.figure(1, width=7)
    given = results["given"]
    at, means, errors = range(len(given)), *([row[key] for row in given] for key in ("to_input", "to_input_error"))
    axis.errorbar(at, means, errors, marker="o", capsize=3, label="sample to input")
    if results["settings"]["measure"]["samples"] > 1:
        axis.plot(at, [row["between"] for row in given], marker="s", label="between samples of one input")
    axis.set_xticks(at, _given(results["scales"]))
    axis.set(xlabel="scales given", ylabel=results["distance"], title="What each scale settles", ylim=(0, None))
    axis.legend()
    report.save_figure(figure, path)


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Write ``report.json``, ``report.md`` and ``distance.png`` into ``out``; returns the report's path."""
    write_json(out / "report.json", results)
    plot(results, out / "distance.png")
    settings = results["settings"]
    geometry = settings["prior"]["model"]["params"]["transformer_config"]["params"]
    training, measured = settings["prior"]["training"], settings["measure"]
    text = "\n\n".join([
        f"# Multiscale prior: preset `{results['preset']}`",
        report.provenance(results),
        f"A transformer ({report.geometry(geometry)}) predicts the scales {', '.join(results['scales'])} of the tokens "
        f"one after the other: {training['steps']} steps of {report.counted(training['batch_size'], 'image')}.",
        "## Samples from given scales\n\n"
        f"{report.counted(measured['images'], 'held-out image')} ({results['held_out']}), "
        f"{report.counted(measured['samples'], 'sample')} each for every number of given scales; ± is "
        "the standard error over images. With all scales given nothing is sampled, and what is left is "
        "the first stage's error.",
        table(results),
        "![distance over the number of given scales](distance.png)",
        "## Likelihood of each scale\n\nOn validation images, each token given all before it. The sum bounds the "
        "negative log-likelihood of the image's own tokens from above, as these settle all coarser scales.",
        nll_table(results["nll"]),
        "## Pictures",
        *(f"{text}:\n\n![{name.removesuffix('.png')}]({name})" for name, text in PICTURES.items()),
    ]) + "\n"  # fmt: skip
    write_text(out / "report.md", text)
    return out / "report.md"
