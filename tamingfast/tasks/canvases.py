"""Drawing on canvases that are saved to a file and can be resumed; an unfinished one is never overwritten."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from tamingfast.errors import UserError
from tamingfast.files import check_png
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars
from tamingfast.sampling.canvas import Canvas
from tamingfast.tasks.drawing import PAPER, Drawing, decoded, painted
from tamingfast.tasks.options import DrawingOptions
from tamingfast.tasks.pictures import save_pictures

SUFFIX = ".canvas"  # of a saved `tamingfast.sampling.canvas.Canvas`

#: A function to call with the images so far, float32 (B, 3, H, W), gray where nothing is drawn yet; or the path of a
#: PNG to write them to.
Preview: TypeAlias = Callable[[Tensor], object] | str | os.PathLike[str]


@dataclass(frozen=True)
class Painter:
    """How a canvas is drawn and where it is saved, for `sample`, `edit` and `outpaint`.

    Attributes:
        options: how tokens are drawn; None means the paper's options or, on resuming, those that the canvas was begun
            with.
        canvas: the file in which the tokens are saved during drawing and afterwards; None saves nothing.
        resume: continue the canvas in that file.
        preview: see `Preview`.
        bars: opens progress counters; see `tamingfast.progress`.

    Raises:
        UserError: the preview is a path without the suffix .png, or ``resume`` is given without ``canvas``.
    """

    options: DrawingOptions | None
    canvas: str | os.PathLike[str] | None
    resume: bool
    preview: Preview | None
    bars: Bars

    def __post_init__(self) -> None:
        if self.preview is not None and not callable(self.preview):
            check_png(self.preview)
        if self.resume and self.canvas is None:
            raise UserError("canvas: got none, expected the file of the drawing to resume")

    def paint(self, model: Net2NetTransformer, begun: Canvas | None, count: int | None = None) -> Canvas:
        """Finish the canvas ``begun`` or, on resuming, the saved one, and return it.

        On resuming, ``begun`` may be None; otherwise it is only compared with the saved canvas. ``count`` is the number
        of images that the caller asked for. Raises UserError if another unfinished canvas would be overwritten, or if
        what is asked for on resuming differs from what the saved canvas was begun with.
        """
        options = self.options or PAPER
        if self.resume:
            canvas = self._resumed(model, begun, count)
        else:
            assert begun is not None  # may be None only on resuming
            canvas = painted(model, begun, **options.deciding())
            if self.canvas is not None:
                check_nothing_lost(self.canvas)
        with self.bars("tokens", None) as counter:
            return canvas.sample(
                model, batch=options.batch, path=self.canvas, preview=self._shown(model, options.batch),
                progress=counter.moved, **options.running(),
            )  # fmt: skip

    def finish(
        self,
        model: Net2NetTransformer,
        canvas: Canvas,
        conditions: tuple[Tensor, ...],
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> Drawing:
        """Decode a finished canvas; ``keep``, if given, is applied to the images (B, 3, H, W)."""
        with self.bars("multiply-adds of decoding", None) as counter:
            batch = decoded(model, canvas, (self.options or PAPER).batch, counter.moved)
        return Drawing((batch if keep is None else keep(batch)).clamp(-1, 1), canvas, conditions)

    def _resumed(self, model: Net2NetTransformer, begun: Canvas | None, count: int | None) -> Canvas:
        assert self.canvas is not None  # checked in __post_init__
        canvas = Canvas.load(self.canvas)
        if begun is not None:
            canvas.check_begun_as(begun)
        if count is not None and count != len(canvas.tokens):
            raise _other("count", count, len(canvas.tokens), self.canvas)
        if self.options is not None:
            wanted = painted(model, canvas, **self.options.deciding()).settings
            for name, value in begun_with(canvas).deciding().items():
                if wanted[name] != value:
                    raise _other(name, wanted[name], value, self.canvas)
        return canvas

    def _shown(self, model: Net2NetTransformer, batch: int) -> Callable[[Canvas], None] | None:
        preview = self.preview
        if preview is None:
            return None

        def show(now: Canvas) -> None:
            pictures = decoded(model, now, batch)
            if callable(preview):
                preview(pictures)
            else:
                save_pictures(preview, pictures)

        return show


def begun_with(canvas: Canvas | str | os.PathLike[str]) -> DrawingOptions:
    """The options that a canvas, itself or in a file, was begun with; others have their defaults.

    Raises UserError if the file is missing or is not a canvas.
    """
    found = canvas if isinstance(canvas, Canvas) else Canvas.load(canvas)
    known = {field.name for field in fields(DrawingOptions)}
    settings: dict[str, Any] = {name: value for name, value in found.settings.items() if name in known}
    return replace(PAPER, **{"top_k": None} | settings)  # a canvas that records no top_k is drawn without it


def check_nothing_lost(path: str | os.PathLike[str]) -> None:
    """Raise UserError if a new canvas would replace an unfinished one, or a file that is not a canvas."""
    if Path(path).exists() and not Canvas.load(path).done:
        check_unused(path)


def check_unused(path: str | os.PathLike[str]) -> None:
    """Raise UserError if the file exists."""
    if Path(path).exists():
        raise UserError(
            f"{path}: got a file that already contains a drawing, expected a new path for the canvas; resume that "
            "drawing, delete the file, or give another path"
        )


def _other(name: str, got: object, expected: object, path: str | os.PathLike[str]) -> UserError:
    return UserError(
        f"{name}: got {got}, expected {expected}, as when the drawing in {path} was begun; leave it out to continue"
    )
