"""Everything that can be said of a model on a dataset, as one report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast.evaluation.batches import images_of
from tamingfast.evaluation.likelihood import likelihood
from tamingfast.evaluation.generated import distances, reconstructions, samples
from tamingfast.evaluation.reconstruction import reconstruction

#: ``bar(unit, total)`` gives a progress bar with ``update(n)`` and ``moved(done, total)``.
Bar = Callable[[str, int | None], AbstractContextManager[Any]]

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
_DISTANCES = {
    "fid": "FID",
    "kid": "KID",
    "inception_score_mean": "Inception score",
    "frechet_distance": "Frechet distance, {} features",
    "kernel_distance": "kernel distance, {} features",
}


class _Silent:
    def update(self, count: int) -> None:
        pass

    def moved(self, done: int, total: int) -> None:
        pass


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    network: nn.Module | None = None,
    perceptual: nn.Module | None = None,
    training_set: Dataset | None = None,
    count: int = 256,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    bar: Bar | None = None,
    **options: Any,
) -> dict[str, Any]:
    """All figures that ``model`` allows on ``limit`` images of ``dataset``, or on all.

    ``reconstruction`` and, for priors, ``likelihood`` are of the functions of those names. With a ``network`` of
    features, ``distances`` to the images of ``dataset`` are a row each for what the first stage makes of them, for
    ``count`` samples of a prior and, as a yardstick, for as many images of the ``training_set``. ``options`` are for
    drawing the samples; see `tamingfast.evaluation.samples`.
    """
    bar = bar or (lambda unit, total: nullcontext(_Silent()))
    is_prior = hasattr(model, "transformer")
    length = len(dataset) if limit is None else min(limit, len(dataset))
    common = {"batch_size": batch_size, "limit": limit, "seed": seed}
    with bar("images", length) as moved:
        found = {
            "reconstruction": reconstruction(model, dataset, perceptual=perceptual, progress=moved.update, **common)
        }
    if is_prior:
        with bar("images", length) as moved:
            found["likelihood"] = likelihood(model, dataset, progress=moved.update, **common)
    if network is not None:
        again = reconstructions(model, images_of(dataset, **common))
        made = {"reconstructions": _counted(again, bar, length)}
        if is_prior:
            made["samples"] = _drawn(model, dataset, count, bar, batch_size=batch_size, seed=seed, **options)
        if training_set is not None:
            those = images_of(training_set, batch_size, count, seed)
            made["training images"] = _counted(those, bar, min(count, len(training_set)))
        found["distances"] = distances(network, made, _counted(images_of(dataset, **common), bar, length))
    return found


def _drawn(model: nn.Module, dataset: Dataset, count: int, bar: Bar, **options: Any) -> Iterator[Tensor]:
    with bar("tokens", None) as moved:
        yield from samples(model, dataset, count, progress=moved.moved, **options)


def _counted(images: Iterator[Tensor], bar: Bar, total: int) -> Iterator[Tensor]:
    with bar("images", total) as moved:
        for batch in images:
            yield batch
            moved.update(len(batch))


def table(found: Mapping[str, Any]) -> str:
    """The report of `evaluate` as Markdown tables; figures that are not defined are left out."""
    parts = []
    for section in ("reconstruction", "likelihood"):
        if section in found:
            rows = [(_LABELS[key], value) for key, value in found[section].items() if value is not None]
            parts.append("\n".join([f"| {section} | |", "|---|---|", *(f"| {a} | {_number(b)} |" for a, b in rows)]))
    if found.get("distances"):
        parts.append(distance_table(found["distances"]))
    return "\n\n".join(parts)


def distance_table(distances: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of `tamingfast.evaluation.compare` as a Markdown table, under the names that they deserve."""
    first = next(iter(distances.values()))
    keys = [key for key in _DISTANCES if key in first]
    heads = ["to the real images", "images", "real images", *(_DISTANCES[key].format(first["network"]) for key in keys)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in distances.items():
        cells = [name, row["images"], row["real_images"], *(row[key] for key in keys)]
        lines.append(f"| {' | '.join(map(_number, cells))} |")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
