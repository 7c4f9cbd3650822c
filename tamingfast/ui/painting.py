"""What the tab Paint does: a sheet that is drawn on, redrawn, extended and undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from tamingfast import images, tasks
from tamingfast.errors import UserError
from tamingfast.ui.choices import Choices, whole
from tamingfast.ui.desks import Desk
from tamingfast.ui.jobs import Job
from tamingfast.ui.studio import EVERY, SIDE, Shown, Studio, saved

#: Pixels of the longer side that small pictures are magnified to, so that they can be brushed.
EDITED = 512
#: How much of a pixel a brush must cover, of 255, for its token to be redrawn: more than the brush's soft rim.
_TOUCHED = 64


@dataclass(frozen=True)
class Before:
    """A sheet as it lies before the visitor: magnified for the editor, as it is, a sentence, and its files."""

    editor: Path
    shown: Shown


def magnification(size: tuple[int, int]) -> int:
    """How many times a picture of (height, width) pixels is enlarged in the editor."""
    return max(1, EDITED // max(size))


def opened(studio: Studio, desk: Desk, path: str | None, side: float) -> Before:
    """Begin with a photo, scaled to a longer side of ``side`` pixels, or with a saved canvas."""
    if path is None:
        raise UserError("photo: got none, expected a picture or a saved canvas; upload it")
    desk.sheet = tasks.Sheet.of(studio.model, path, whole("side", side))
    return laid(desk, "Brush over what is to change.")


def blank(studio: Studio, desk: Desk, side: float) -> Before:
    """Begin with a gray square of ``side`` pixels, to draw on."""
    gray = np.full((whole("side", side),) * 2, 128, np.uint8)
    desk.sheet = tasks.Sheet.of(studio.model, gray)
    return laid(desk, "Draw with the brush, then choose Keep as paint.")


def taken(studio: Studio, desk: Desk, number: float) -> Before:
    """Begin with the image of this number, from 1, of the last drawing of the tab Sample."""
    if desk.drawing is None:
        raise UserError("image: got none, expected one of the tab Sample; draw some first")
    count, which = len(desk.drawing.images), whole("image", number)
    if not 1 <= which <= count:
        raise UserError(f"image: got {which}, expected 1 to {count}")
    tasks.check_windowed(studio.model.outline)
    alone = desk.drawing.only(desk.drawing.canvas.settings.get("first_image", 0) + which - 1)
    desk.sheet = tasks.Sheet(alone.images, alone.canvas, alone.recipe)
    return laid(desk, "Brush over what is to change.")


def redrawn(
    studio: Studio, desk: Desk, layers: Sequence[str], label: str | None, condition: str | None, choices: Choices
) -> Iterator[Shown | Before]:
    """Redraw what was brushed; gives previews, and the new sheet at the end."""
    sheet = _sheet(desk)
    mask = _strokes(sheet, layers)[..., 3] >= _TOUCHED
    options = choices.options()
    yield from _stepped(
        desk,
        lambda preview, stop: sheet.redrawn(
            studio.model, mask, label=label, condition=condition, options=options, preview=preview, stop=stop,
            every=EVERY,
        ),
    )  # fmt: skip


def extended(
    studio: Studio,
    desk: Desk,
    sides: Sequence[float],
    label: str | None,
    condition: str | None,
    choices: Choices,
) -> Iterator[Shown | Before]:
    """Draw what lies around the sheet: pixels to the left, right, top and bottom."""
    sheet, names = _sheet(desk), ("left", "right", "top", "bottom")
    added = {name: whole(name, value) for name, value in zip(names, sides, strict=True)}
    options = choices.options()
    yield from _stepped(
        desk,
        lambda preview, stop: sheet.extended(
            studio.model, **added, label=label, condition=condition, options=options, preview=preview, stop=stop,
            every=EVERY,
        ),
    )  # fmt: skip


def painted(desk: Desk, layers: Sequence[str]) -> Before:
    """Keep the brush's strokes as paint."""
    sheet = _sheet(desk)
    desk.sheet = sheet.painted(_strokes(sheet, layers))
    return laid(desk, "The strokes are part of the picture.")


def undone(desk: Desk) -> Before:
    """Take back the last step."""
    sheet = _sheet(desk)
    desk.sheet = sheet.undone()
    return laid(desk, "The last step is undone." if sheet.before else "There is nothing to undo.")


def laid(desk: Desk, note: str) -> Before:
    """The sheet for the editor and for taking away: the picture with its recipe, and the canvas if it has one."""
    sheet = _sheet(desk)
    picture, editor = desk.file("painting.png"), desk.file("editor.png")
    sheet.save(picture)
    images.save_png(editor, images.to_uint8(sheet.pixels[0]), scale=magnification(sheet.size))
    files = [picture]
    if sheet.canvas is not None:
        files.append(picture.with_suffix(".canvas"))
        sheet.canvas.save(files[-1])
    height, width = sheet.size
    return Before(editor, Shown(picture, f"{note} {height}x{width} pixels.", tuple(files)))


def side_of(studio: Studio) -> int:
    """The longer side in pixels that photos get by default: what the model was trained on."""
    return max(studio.size)


def largest_side(studio: Studio) -> int:
    """The longer side that photos get by default where they are only encoded."""
    return max(side_of(studio), SIDE)


def _sheet(desk: Desk) -> tasks.Sheet:
    if desk.sheet is None:
        raise UserError("photo: got none, expected a picture to paint on; open one or begin with a blank one")
    return desk.sheet


def _stepped(
    desk: Desk, step: Callable[[Callable[[Tensor], object], Callable[[], bool]], tasks.Sheet]
) -> Iterator[Shown | Before]:
    desk.stopping.clear()
    begun, job = time.monotonic(), Job(step, desk.stopping)
    for preview in job:
        yield Shown(saved(desk, preview))
    desk.sheet = job.result()
    canvas = desk.sheet.canvas
    stopped = canvas is not None and not canvas.done
    yield laid(desk, "Stopped." if stopped else f"Drawn in {time.monotonic() - begun:.1f} seconds.")


def _strokes(sheet: tasks.Sheet, layers: Sequence[str]) -> np.ndarray:
    """The layers of the editor as one, in the sheet's own size: uint8 (H, W, 4)."""
    height, width = sheet.size
    scale = magnification(sheet.size)
    color, cover = np.zeros((height, width, 3)), np.zeros((height, width, 1))
    for layer in layers:
        strokes = tasks.read_strokes(layer).astype(np.float64)
        if strokes.shape[:2] != (height * scale, width * scale):
            got = "x".join(map(str, strokes.shape[:2]))
            raise UserError(f"strokes: got {got} pixels, expected {height * scale}x{width * scale}; open it again")
        blocks = strokes.reshape(height, scale, width, scale, 4)
        alpha = blocks[..., 3:].mean((1, 3)) / 255
        own = (blocks[..., :3] * blocks[..., 3:]).mean((1, 3)) / np.maximum(255 * alpha, 1e-9)
        color = own * alpha + color * (1 - alpha)  # already multiplied by what it covers
        cover = alpha + cover * (1 - alpha)
    color /= np.maximum(cover, 1e-9)
    return np.concatenate((color, 255 * cover), -1).round().clip(0, 255).astype(np.uint8)
