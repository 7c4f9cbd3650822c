"""What the tab Condition does: conditions from files, photos and drawings, and images drawn from them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tamingfast import images, tasks
from tamingfast.errors import UserError
from tamingfast.ui.choices import Choices, whole
from tamingfast.ui.desks import Desk
from tamingfast.ui.painting import magnification
from tamingfast.ui.studio import EVERY, Shown, Studio, counted, drawing, said

#: Kinds that are drawn with a brush, and those that are drawn as boxes.
BRUSHED, BOXED = ("segmentation", "superpixels", "edges"), ("boxes", "centers")
#: The ways to give a condition, in the order of the page.
DRAWN, FILE, PHOTO = "Draw it", "Upload its file", "Compute it from a photo"


def ways(form: tasks.Form) -> list[str]:
    """The ways in which a condition of this form can be given."""
    found = [DRAWN] if form.name in (*BRUSHED, *BOXED) else []
    return found + [FILE] * bool(form.suffixes) + [PHOTO] * form.computable


def form_of(studio: Studio) -> tasks.Form:
    """The form of the model's condition; UserError for a model without one."""
    form = studio.abilities.condition
    if form is None:
        raise UserError("condition: got a model without one, expected a prior on label maps, edges, boxes or the like")
    return form


def sheet(studio: Studio, desk: Desk, height: float, width: float) -> Path:
    """An empty drawing of (height, width) pixels, magnified for the editor: of the first label, or black."""
    form, size = form_of(studio), (whole("height", height), whole("width", width))
    if min(size) < 1:
        raise UserError(f"size: got {size[0]}x{size[1]} pixels, expected at least 1x1")
    color = (0, 0, 0) if form.name == "edges" else (255, 255, 255) if form.objects else form.labels[0][1]
    path, scale = desk.file("drawing.png"), magnification(size)
    images.save_png(path, np.full((*size, 3), color, np.uint8), scale=scale)
    return path


def sample(studio: Studio, desk: Desk, given: dict[str, Any], count: float, choices: Choices) -> Iterator[Shown]:
    """Draw from a condition, which is ``given`` as an argument of `tasks.sample`."""
    begun, options, number = time.monotonic(), choices.options(), counted(count)
    steps = drawing(
        desk,
        lambda preview, stop: tasks.sample(
            studio.model, number, **given, options=options, preview=preview, stop=stop, every=EVERY
        ),
    )
    for step in steps:
        if isinstance(step, tasks.Drawing):
            picture, canvas = desk.file("drawn.png"), desk.file("drawn.canvas")
            step.save(picture)
            step.canvas.save(canvas)
            step = Shown(picture, said(step, time.monotonic() - begun), (picture, canvas))
        yield step


def from_file(path: str | None) -> dict[str, Any]:
    """The condition in an uploaded file."""
    if path is None:
        raise UserError("condition: got no file, expected one; upload it")
    return {"condition": path}


def from_photo(path: str | None, size: tuple[int, int]) -> dict[str, Any]:
    """The condition that is computed from a photo, which is scaled to cover (height, width) pixels."""
    if path is None:
        raise UserError("photo: got none, expected one to compute the condition from; upload it")
    return {"condition_of": path, "size": size}


def from_brush(studio: Studio, drawn: str | None, size: tuple[int, int]) -> dict[str, Any]:
    """The label map or the edges that were drawn on `sheet`; ``drawn`` is the editor's picture."""
    form = form_of(studio)
    if drawn is None:
        raise UserError("condition: got no drawing, expected one; draw with the brush")
    scale, strokes = magnification(size), tasks.read_strokes(drawn)
    if strokes.shape[:2] != (size[0] * scale, size[1] * scale):
        got = "x".join(map(str, strokes.shape[:2]))
        raise UserError(f"drawing: got {got} pixels, expected {size[0] * scale}x{size[1] * scale}; begin a new one")
    blocks = strokes[..., :3].reshape(size[0], scale, size[1], scale, 3)
    if form.name == "edges":
        return {"condition": (blocks.max((1, 3, 4)) >= 128).astype(np.uint8) * 255}
    middle = blocks[:, scale // 2, :, scale // 2].astype(np.int32)
    return {"condition": nearest_labels(middle, form)}


def nearest_labels(pixels: np.ndarray, form: tasks.Form) -> np.ndarray:
    """The label whose colour is nearest to each pixel, integers (H, W) from (H, W, 3)."""
    found, least = np.zeros(pixels.shape[:2], np.int32), np.full(pixels.shape[:2], np.iinfo(np.int64).max)
    for number, (_, color) in enumerate(form.labels):
        apart = ((pixels - np.array(color)) ** 2).sum(-1)
        found, least = np.where(apart < least, number, found), np.minimum(apart, least)
    return found


# --- boxes ----------------------------------------------------------------------------------------------------------


def cornered(studio: Studio, desk: Desk, name: str, place: Sequence[float], size: tuple[int, int]) -> tuple[Path, str]:
    """Take a click at ``place`` (x, y), a pixel of the magnified drawing, for a corner of a box of this class.

    Returns the drawing and a sentence about what comes next.
    """
    form, scale = form_of(studio), magnification(size)
    corner = (place[0] / (size[1] * scale), place[1] / (size[0] * scale))
    corner = (min(max(corner[0], 0.0), 1.0), min(max(corner[1], 0.0), 1.0))
    if desk.corner is None:
        if len(desk.boxes) >= form.objects:
            raise UserError(f"boxes: got one more than {form.objects}, expected at most that many; take one back")
        desk.corner = corner
        return boxes_drawn(studio, desk, size), "Click the opposite corner."
    (left, right), (top, bottom) = (sorted(pair) for pair in zip(desk.corner, corner, strict=True))
    desk.corner = None
    if right <= left or bottom <= top:
        return boxes_drawn(studio, desk, size), "A box needs two different corners. Click the first one."
    desk.boxes.append((name, left, top, right, bottom))
    return boxes_drawn(studio, desk, size), f"{_several(desk)} Click the first corner of the next one, or Draw."


def fewer(studio: Studio, desk: Desk, size: tuple[int, int]) -> tuple[Path, str]:
    """Take back the first corner of a box, or the last box."""
    if desk.corner is not None:
        desk.corner = None
    elif desk.boxes:
        desk.boxes.pop()
    return boxes_drawn(studio, desk, size), _several(desk)


def _several(desk: Desk) -> str:
    return "1 box." if len(desk.boxes) == 1 else f"{len(desk.boxes)} boxes."


def boxes_drawn(studio: Studio, desk: Desk, size: tuple[int, int]) -> Path:
    """A picture of the boxes so far, magnified."""
    colors = dict(form_of(studio).labels)
    scale = magnification(size)
    width, height = size[1] * scale, size[0] * scale
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    for name, left, top, right, bottom in desk.boxes:
        corners = (left * (width - 1), top * (height - 1), right * (width - 1), bottom * (height - 1))
        pen.rectangle(corners, outline=colors[name], width=3)
        pen.text((corners[0] + 6, corners[1] + 4), name, fill=colors[name], font_size=20)
    if desk.corner is not None:
        x, y = desk.corner[0] * (width - 1), desk.corner[1] * (height - 1)
        pen.line((x - 8, y, x + 8, y), fill="black", width=2)
        pen.line((x, y - 8, x, y + 8), fill="black", width=2)
    path = desk.file("boxes.png")
    images.save_png(path, np.asarray(picture))
    return path


def from_boxes(desk: Desk, size: tuple[int, int]) -> dict[str, Any]:
    """The scene of the boxes that were drawn, on a canvas of (height, width) pixels."""
    if not desk.boxes:
        raise UserError("boxes: got none, expected at least one; click two corners of it")
    objects = [
        {"class": name, "box": [x0 * size[1], y0 * size[0], (x1 - x0) * size[1], (y1 - y0) * size[0]]}
        for name, x0, y0, x1, y1 in desk.boxes
    ]
    path = desk.file("boxes.json")
    path.write_text(json.dumps({"width": size[1], "height": size[0], "objects": objects}), "utf-8")
    return {"condition": path}
