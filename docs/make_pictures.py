"""Writes the pictures of the model that comes with the package: samples, completions, outpainting, reconstructions.

``python docs/make_pictures.py IMAGES FOLDER [RUN...]`` takes the directory of CIFAR10's test images, in folders named
after the classes, and writes into FOLDER, such as ``docs``; further first stages reconstruct, too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tamingfast import images, load_model, tasks
from tamingfast.models.prior import Net2NetTransformer

#: Samples of each class; completions of each photo; pixels that are drawn to the right of one.
COLUMNS, TIMES, ADDED = 14, 3, 96
BATCH = 20
Rows = dict[str, list[Tensor]]


def samples(model: Net2NetTransformer, columns: int = COLUMNS) -> Rows:
    """A row of samples for each class, the first ones of seed 0: none are chosen."""
    classes = tasks.class_names_of(model) or []
    options = tasks.drawing_options(model, batch=BATCH)
    drawn = tasks.sample(model, columns * len(classes), options=options, metadata=False).images
    return {name: list(drawn[number :: len(classes)]) for number, name in enumerate(classes)}


def photos(folder: Path, number: int = 3) -> dict[str, Path]:
    """The ``number``-th image of each class, by the name of the class."""
    return {each.name: sorted(each.iterdir())[number] for each in sorted(folder.iterdir()) if each.is_dir()}


def completions(model: Net2NetTransformer, chosen: dict[str, Path]) -> Rows:
    """Photos, their upper halves, and completions of each under its own class."""
    found = [tasks.complete(model, [path], TIMES, label=name, metadata=False) for name, path in chosen.items()]
    rows = {"photo": [each.images[0] for each in found]}
    rows["kept"] = [torch.cat((photo[:, : photo.shape[1] // 2], blank(photo)), 1) for photo in rows["photo"]]
    return rows | {f"completed {number + 1}": [each.completed[0][number] for each in found] for number in range(TIMES)}


def blank(photo: Tensor) -> Tensor:
    """White in place of the lower half of an image (3, H, W)."""
    return torch.ones_like(photo[:, photo.shape[1] // 2 :])


def strips(model: Net2NetTransformer, chosen: dict[str, Path]) -> Rows:
    """Photos of each class, continued to the right by the sliding window."""
    return {
        name: [tasks.outpaint(model, path, right=ADDED, label=name, metadata=False).images[0]]
        for name, path in chosen.items()
    }


def reconstructions(models: Sequence[nn.Module], chosen: dict[str, Path]) -> Rows:
    """Photos above their reconstructions by first stages, the smallest f first."""
    rows: Rows = {}
    for model in sorted(models, key=lambda model: tasks.first_stage_of(model).factor):
        found = tasks.reconstruct(model, list(chosen.values()))
        rows |= {"photo": found.images, f"f = {tasks.first_stage_of(model).factor}": found.reconstructed}
    return rows


def main(source: Path, folder: Path, runs: Sequence[str] = ()) -> None:
    """Draw and write all of them; ``runs`` are further first stages that reconstruct."""
    model, chosen = load_model("demo", device="cpu"), photos(source)
    models = [model, *(load_model(run, device="cpu") for run in runs)]
    for name, rows, scale in (
        ("samples", samples(model), 2),
        ("completions", completions(model, chosen), 3),
        ("outpainted", strips(model, chosen), 3),
        ("reconstructions", reconstructions(models, chosen), 3),
    ):
        images.save_rows(folder / f"{name}.png", list(rows.values()), list(rows), scale)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
