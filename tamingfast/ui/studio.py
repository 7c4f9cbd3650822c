"""The model of a page, and what the tabs Sample, Reconstruct and Inspect do with it."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tamingfast import images, tasks
from tamingfast.errors import UserError
from tamingfast.ui.choices import Choices, Wanted, labels_of_recipe, whole
from tamingfast.ui.desks import Desk, Desks
from tamingfast.ui.jobs import Job, Work

#: Seconds between previews; each takes at most a tenth of the time.
EVERY = 0.4
#: Images at a time, of the tab Sample.
MOST = 64
#: Side in pixels that photos get where models were trained on smaller ones.
SIDE = 256


class Studio:
    """A model that people work with, and their desks.

    Attributes:
        model: read when it is needed.
        name: what the page calls it, without its path.
        abilities: what it can be asked for.
        desks: of the visitors.
    """

    def __init__(self, model: tasks.Unread, folder: Path) -> None:
        self.model, self.desks = model, Desks(folder)
        self.name = Path(os.fspath(model.path)).name
        self.abilities = tasks.abilities_of(model.outline)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that fields begin with."""
        side = 16 * self.abilities.factor
        return self.abilities.size or (side, side)


@dataclass(frozen=True)
class Shown:
    """What a tab shows while it draws and afterwards: a picture, a sentence, and files to take away."""

    picture: Path
    note: str = "Drawing ..."
    files: tuple[Path, ...] = ()


def drawing(desk: Desk, work: Work[tasks.Drawing]) -> Iterator[Shown | tasks.Drawing]:
    """Do the work; gives previews, and the drawing at the end."""
    desk.stopping.clear()
    job = Job(work, desk.stopping)
    for preview in job:
        yield Shown(saved(desk, preview))
    yield job.result()


def saved(desk: Desk, batch: Tensor, name: str = "preview.png") -> Path:
    """A PNG of images (B, 3, H, W) in [-1, 1], on a sheet if they are several."""
    path = desk.file(name)
    images.save_png(path, images.to_uint8(batch[0]) if len(batch) == 1 else images.grid(batch))
    return path


# --- Sample ---------------------------------------------------------------------------------------------------------


def sample(studio: Studio, desk: Desk, wanted: Wanted, choices: Choices) -> Iterator[Shown]:
    """Draw new images or, after `opened_recipe`, repeat a picture with what was changed since."""
    arguments = _repeating(studio, desk.recipe, wanted, choices) if desk.recipe else _new(studio, wanted, choices)
    begun = time.monotonic()
    for step in drawing(
        desk, lambda preview, stop: tasks.sample(studio.model, preview=preview, stop=stop, every=EVERY, **arguments)
    ):
        if isinstance(step, tasks.Drawing):
            desk.drawing = step
            step = Shown(*_taken(desk, step, time.monotonic() - begun))
        yield step


def _new(studio: Studio, wanted: Wanted, choices: Choices) -> dict[str, Any]:
    scales = whole("scales", wanted.scales)
    return {
        "count": counted(wanted.count),
        "size": None if studio.abilities.fixed else _size_of(wanted),
        "label": wanted.labels or None,
        "photo": wanted.photo if scales else None,
        "scales": scales or None,
        "options": choices.options(),
    }


def _repeating(studio: Studio, recipe: tasks.Recipe, wanted: Wanted, choices: Choices) -> dict[str, Any]:
    """What repeats the recipe's picture, with those fields that differ from it."""
    arguments = _new(studio, wanted, choices) | {"options": choices.options(recipe.options)}
    known: dict[str, Any] = {
        "count": 1 if recipe.image is not None else recipe.count,
        "size": recipe.size,
        "label": labels_of_recipe(recipe, studio.abilities.classes) or None,
        "scales": recipe.arguments.get("scales"),
        "options": recipe.options,
    }
    changed = {name: value for name, value in arguments.items() if value != known.get(name, value)}
    return changed | {"photo": arguments["photo"], "like": recipe}


def counted(value: object) -> int:
    """The number of images in a field; UserError where the page does not draw as many."""
    count = whole("count", value)
    if not 1 <= count <= MOST:
        raise UserError(f"count: got {count}, expected 1 to {MOST}; draw more with `tamingfast sample`")
    return count


def _size_of(wanted: Wanted) -> tuple[int, int]:
    return whole("height", wanted.height), whole("width", wanted.width)


def _taken(
    desk: Desk, drawn: tasks.Drawing, seconds: float, name: str = "samples"
) -> tuple[Path, str, tuple[Path, ...]]:
    """The picture of a drawing, a sentence about it, and its files: pictures with their recipes, and the canvas."""
    picture = desk.file(f"{name}.png")
    drawn.save(picture)
    files, folder = [picture], picture.parent
    if len(drawn.images) > 1:
        files.append(folder / f"{name}.zip")
        with zipfile.ZipFile(files[-1], "w") as archive:
            for path in drawn.save(folder / f"{name}-image.png", separate=True):
                archive.write(path, path.name)
    files.append(folder / f"{name}.canvas")
    drawn.canvas.save(files[-1])
    return picture, said(drawn, seconds), tuple(files)


def said(drawn: tasks.Drawing, seconds: float) -> str:
    """One sentence about a drawing."""
    total, left = drawn.canvas.pending.numel(), int(drawn.canvas.pending.sum())
    if left:
        return f"Stopped after {total - left:,} of {total:,} tokens. The canvas can be drawn to its end."
    count, (height, width) = len(drawn.images), drawn.images.shape[2:]
    what = "1 image" if count == 1 else f"{count} images"
    return f"{what} of {height}x{width} pixels in {seconds:.1f} seconds."


def opened_recipe(studio: Studio, desk: Desk, path: str) -> tuple[Wanted, Choices, str]:
    """The fields that repeat a picture of `sample`, and a sentence that says how well.

    Raises UserError for a file without a recipe, and for a picture of another task.
    """
    recipe = tasks.recipe_of(path)
    if recipe.task != "sample":
        raise UserError(
            f"{Path(path).name}: got a picture of '{recipe.task}', expected one of 'sample'; the tab Inspect shows how "
            "it was made"
        )
    same = True
    try:
        tasks.check_same_model(recipe, tasks.check_prior(studio.model.model))
    except UserError:
        same = False
    desk.recipe = recipe if same else None
    height, width = recipe.size or studio.size
    count = 1 if recipe.image is not None else min(recipe.count, MOST)
    labels = [name for name in labels_of_recipe(recipe, studio.abilities.classes) if same]
    wanted = Wanted(count, height, width, labels, None, recipe.arguments.get("scales") or 0)
    if same:
        note = "The fields are those of the picture: Draw repeats it, and what you change replaces its own."
    else:
        note = f"Another model, {recipe.model or 'without a name'}, drew this: its settings are filled in."
    return wanted, Choices.of(recipe.options), note


# --- Reconstruct ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """An image, its reconstruction, its tokens as colours, where the two differ, and a sentence with figures."""

    image: Path
    reconstruction: Path
    tokens: Path
    difference: Path
    note: str


def reconstruct(studio: Studio, desk: Desk, path: str | None, side: float) -> Compared:
    """Encode a photo, scaled to a longer side of ``side`` pixels, and decode it again."""
    if path is None:
        raise UserError("image: got none, expected one to encode; upload it, or paste it")
    size = tasks.scaled_size(studio.model.outline, path, whole("side", side))
    found = tasks.reconstruct(studio.model, path, size=size)
    (image,), (made,) = found.images, found.reconstructed
    (colors,) = tasks.token_pictures(studio.model.model, found.tokens)
    apart = (made - image).abs().mean(0, keepdim=True)[None]  # from 0 to 2
    rows, columns = found.tokens[0].shape
    psnr = "without any error" if found.psnr == float("inf") else f"PSNR {found.psnr:.2f} dB"
    note = (
        f"{size[0]}x{size[1]} pixels as {rows}x{columns} tokens, {found.codes:,} different ones. Mean difference "
        f"{found.l1 / 2:.2%} of the range, {psnr}."
    )
    pictures = (image[None], made[None], colors[None], (4 * apart - 1).clamp(-1, 1))
    names = ("image.png", "reconstruction.png", "tokens.png", "difference.png")
    image_at, made_at, tokens_at, apart_at = (saved(desk, x, name) for x, name in zip(pictures, names, strict=True))
    return Compared(image_at, made_at, tokens_at, apart_at, note)


# --- Inspect --------------------------------------------------------------------------------------------------------


def inspected(studio: Studio, path: str | None) -> dict[str, Any]:
    """What `tasks.inspect` says of an uploaded file or, without one, of the model, without paths of this machine."""
    facts = tasks.inspect(studio.model.path if path is None else path)
    return _plain(dict(facts) | {"file": studio.name if path is None else Path(path).name})


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts in values of JSON, those that do not apply left out."""
    found: dict[str, Any] = json.loads(json.dumps(facts, default=_as_json))
    return {name: value for name, value in found.items() if value is not None}


def _as_json(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
