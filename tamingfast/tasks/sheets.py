"""Painting on a picture step by step, each of which can be undone: `Sheet`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamingfast import images
from tamingfast.errors import UserError
from tamingfast.sampling.canvas import Canvas
from tamingfast.tasks.drawing import Drawing, decoded
from tamingfast.tasks.editing import PhotoOrCanvas, edit, kept_canvas, outpaint
from tamingfast.tasks.models import Model, check_windowed, first_stage_of, unread
from tamingfast.tasks.pictures import Picture, Sized, load_images, multiples_of, named, own_size, scaled_size
from tamingfast.tasks.recipes import Recipe, texts_of

#: Steps that are kept for undoing.
STEPS = 30


@dataclass(frozen=True, eq=False)
class Sheet:
    """A picture that is painted on; each step gives a new sheet, which knows those before it.

    What a step keeps, keeps its pixels and its tokens, so that they do not fade over many steps.

    Attributes:
        pixels: float32 (1, 3, H, W) in [-1, 1].
        canvas: its tokens; None where they are still to be encoded from the pixels.
        recipe: how the last step drew it; None where that drew nothing.
        before: the sheets before each step, the oldest first, at most `STEPS`.
    """

    pixels: Tensor
    canvas: Canvas | None = None
    recipe: Recipe | None = None
    before: tuple[Sheet, ...] = ()

    @classmethod
    def of(cls, model: Model, source: PhotoOrCanvas, side: int | None = None) -> Sheet:
        """A sheet of a photo, or of a canvas of one image, itself or in a file.

        A photo's longer side becomes about ``side`` pixels, as `scaled_size` says; by default it is cut to multiples of
        f. Raises UserError for a model that cannot `edit`, and for what cannot be read.
        """
        opened = unread(model)
        canvas = kept_canvas(source)
        if canvas is not None:
            if len(canvas.tokens) != 1:
                raise UserError(f"{canvas.name}: got {len(canvas.tokens)} images, expected a canvas of one")
            return cls(decoded(check_windowed(opened.model), canvas).clamp(-1, 1), canvas)
        assert not isinstance(source, Canvas)  # kept_canvas returns a canvas as it is
        outline = check_windowed(opened.outline)
        if side is None:
            factor = first_stage_of(outline).factor
            whole = multiples_of(factor, *own_size(source), named(source, "photo"))
            return cls(Sized(source, whole).read(factor))
        return cls(load_images([source], *scaled_size(outline, source, side)))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def redrawn(self, model: Model, mask: Picture, **how: Any) -> Sheet:
        """`edit` of the sheet; ``how`` are its other arguments."""
        return self._drawn(edit(model, **self._source(), mask=mask, **how))

    def extended(self, model: Model, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, **how: Any) -> Sheet:
        """`outpaint` of the sheet; ``how`` are its other arguments."""
        return self._drawn(outpaint(model, **self._source(), left=left, right=right, top=top, bottom=bottom, **how))

    def painted(self, strokes: np.ndarray) -> Sheet:
        """The sheet under strokes of paint, uint8 (H, W, 4), whose last channel is how much they cover."""
        if strokes.dtype != np.uint8 or strokes.shape != (*self.size, 4):
            raise UserError(
                f"strokes: got {strokes.dtype} of shape {strokes.shape}, expected uint8 {(*self.size, 4)}, the sheet's "
                "size and four channels"
            )
        paint = torch.from_numpy(strokes).permute(2, 0, 1)[None].float()
        cover = paint[:, 3:] / 255
        return self._next(Sheet(torch.lerp(self.pixels, paint[:, :3] / 127.5 - 1, cover)))

    def undone(self) -> Sheet:
        """The sheet before the last step; itself where there is none."""
        return replace(self.before[-1], before=self.before[:-1]) if self.before else self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture as PNG, with the recipe of the last step; raises what `images.save_png` raises."""
        images.save_png(path, images.to_uint8(self.pixels[0]), texts=texts_of(self.recipe))

    def _source(self) -> dict[str, Any]:
        return {"photo": self.pixels} if self.canvas is None else {"photo": self.canvas, "pixels": self.pixels}

    def _drawn(self, drawing: Drawing) -> Sheet:
        return self._next(Sheet(drawing.images, drawing.canvas, drawing.recipe))

    def _next(self, after: Sheet) -> Sheet:
        return replace(after, before=(*self.before, replace(self, before=()))[-STEPS:])
