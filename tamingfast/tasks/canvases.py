"""Drawing on canvases that are saved to a file and can be resumed; an unfinished one is never overwritten."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tamingfast import images, npz
from tamingfast.errors import UserError, brief, first_line
from tamingfast.files import check_path, check_png
from tamingfast.models.condition_stages import CoordStage, DummyCondStage
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars
from tamingfast.ranks import is_first, take_part, wait_for_all
from tamingfast.sampling.canvas import EVERY, Canvas, drawing_into
from tamingfast.tasks.conditioning import condition_pictures
from tamingfast.tasks.drawing import (
    PAPER,
    Drawing,
    check_memory,
    decoded,
    decoded_batches,
    painted,
    token_unit,
)
from tamingfast.tasks.models import Unread, is_spatial
from tamingfast.tasks.options import DrawingOptions, drawing_options
from tamingfast.tasks.pictures import save_pictures
from tamingfast.tasks.recipes import Input, classes_in, made

SUFFIX = ".canvas"  # of a saved `tamingfast.sampling.canvas.Canvas`

#: A function to call with the images so far, float32 (B, 3, H, W), gray where nothing is drawn yet; or the path of a
#: PNG to write them to.
Preview: TypeAlias = Callable[[Tensor], object] | str | os.PathLike[str]
#: A function that says whether to stop.
Stop: TypeAlias = Callable[[], bool]


@dataclass(frozen=True)
class Painter:
    """How a canvas is drawn and where it is saved, for `sample`, `edit` and `outpaint`.

    Attributes:
        options: how tokens are drawn; None means those that `under` sets or, on resuming, those that the canvas was
            begun with.
        canvas: the file in which the tokens are saved during drawing and afterwards; None saves nothing.
        resume: continue the canvas in that file.
        preview: see `Preview`.
        bars: opens progress counters; see `tamingfast.progress`.
        every: seconds between previews, and between saves.
        stop: see `Canvas.sample`.
        whole: whether the images will be in memory together.

    Raises:
        UserError: the preview is a path without the suffix .png, ``resume`` is given without ``canvas``, or ``canvas``
            is an unfinished drawing that is not to be resumed.
    """

    options: DrawingOptions | None
    canvas: str | os.PathLike[str] | None
    resume: bool
    preview: Preview | None
    bars: Bars
    every: float = EVERY
    stop: Stop | None = None
    whole: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.options, DrawingOptions | None):
            raise UserError(f"options: got {brief(self.options)}, expected DrawingOptions, or None for the model's")
        if not isinstance(self.every, Real) or isinstance(self.every, bool) or not 0 <= self.every < math.inf:
            raise UserError(f"every: got {brief(self.every)}, expected a number of seconds")
        if self.stop is not None and not callable(self.stop):
            raise UserError(f"stop: got {brief(self.stop)}, expected a function that returns True or False")
        if self.canvas is not None:
            check_path("canvas", self.canvas)
        if self.preview is not None and not callable(self.preview):
            check_png(self.preview)
        if self.resume and self.canvas is None:
            raise UserError("canvas: got none, expected the file of the drawing to resume")
        if self.canvas is not None and not self.resume:
            check_nothing_lost(self.canvas)

    def under(self, model: Net2NetTransformer) -> Painter:
        """The painter of a drawing of ``model``, whose recommended options it takes if it has none of its own."""
        return self if self.options is not None or self.resume else replace(self, options=drawing_options(model))

    def paint(self, model: Net2NetTransformer, begun: Canvas | None, count: int | None = None) -> Canvas:
        """Finish the canvas ``begun`` or, on resuming, the saved one, unless told to stop, and return it.

        On resuming, ``begun`` may be None; otherwise it is only compared with the saved canvas. ``count`` is the number
        of images that the caller asked for. Raises UserError if another process draws into the same file, if
        another unfinished canvas would be overwritten, or if what is asked for on resuming differs from what the saved
        canvas was begun with.
        """
        alone_writes = self.canvas is not None and is_first()
        with drawing_into(self.canvas) if alone_writes else contextlib.nullcontext():  # type: ignore[arg-type]
            return self._painted(model, begun, count)

    def _painted(self, model: Net2NetTransformer, begun: Canvas | None, count: int | None) -> Canvas:
        options = self.options or PAPER
        if self.resume:
            canvas = self._resumed(model, begun, count)
        else:
            assert begun is not None  # may be None only on resuming
            first = {name: value for name, value in begun.settings.items() if name == "first_image"}
            canvas = painted(model, begun, **options.deciding(), **first)
            if self.canvas is not None:
                check_nothing_lost(self.canvas)
        if self.whole:
            check_memory(model, canvas)
        wait_for_all()  # until all have read the canvas that the first will write
        _, rows, columns = canvas.tokens.shape
        with self.bars(token_unit(model, rows, columns, canvas.cond), None) as counter:
            return canvas.sample(
                model, batch=options.batch, path=self.canvas, preview=self._shown(model, options.batch),
                progress=counter.moved, every=self.every, stop=self.stop, **options.running(),
            )  # fmt: skip

    def finish(
        self,
        model: Net2NetTransformer,
        canvas: Canvas,
        conditions: tuple[Tensor, ...],
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> Drawing:
        """Decode a canvas; ``keep``, if given, is applied to the images (B, 3, H, W)."""
        with self.bars("multiply-adds of decoding", None) as counter:
            batch = decoded(model, canvas, (self.options or PAPER).batch, counter.moved)
        return Drawing((batch if keep is None else keep(batch)).clamp(-1, 1), canvas, conditions)

    def archive(
        self, model: Net2NetTransformer, canvas: Canvas, conditions: tuple[Tensor, ...], path: str | os.PathLike[str]
    ) -> Drawing:
        """Decode a finished canvas batch by batch into an .npz file; the drawing returned holds no images."""
        count = len(canvas.tokens)
        with self.bars("images", count) as counter:

            def pixels() -> Iterator[np.ndarray]:
                for batch in decoded_batches(model, canvas, (self.options or PAPER).batch):
                    yield images.to_uint8(batch)
                    counter.update(len(batch))

            if is_first():
                with npz.written(path) as archive:
                    archive.images(pixels(), count)
            else:
                take_part(pixels())
        return Drawing(torch.zeros(0, 3, 0, 0), canvas, conditions)

    def noted(
        self,
        drawing: Drawing,
        task: str,
        source: Unread,
        model: Net2NetTransformer,
        inputs: dict[str, Input],
        *,
        size: tuple[int, int] | None = None,
        **arguments: Any,
    ) -> Drawing:
        """The drawing with its recipe, unless it was stopped; arguments as in `recipes.made`, ``size`` its own."""
        if not drawing.canvas.done:
            return drawing
        canvas, running = drawing.canvas, self.options or PAPER
        recipe = made(
            task, source, model, inputs, first=canvas.settings.get("first_image", 0), count=len(canvas.tokens),
            prior=canvas.model, classes=classes_in(model, canvas.cond), **arguments,
            size=size or (drawing.images.shape[2], drawing.images.shape[3]),
            options=replace(begun_with(canvas), engine=running.engine, batch=running.batch),
        )  # fmt: skip
        return replace(drawing, recipe=recipe)

    def _resumed(self, model: Net2NetTransformer, begun: Canvas | None, count: int | None) -> Canvas:
        assert self.canvas is not None  # checked in __post_init__
        canvas = Canvas.load(self.canvas)
        check_condition(model, canvas)
        canvas.check_windows(model)
        if begun is not None:
            canvas.check_begun_as(begun)
        if count is not None and count != len(canvas.tokens):
            raise _other("count", count, len(canvas.tokens), self.canvas)
        if self.options is not None:
            wanted, own = (
                painted(model, canvas, **options.deciding()).settings for options in (self.options, begun_with(canvas))
            )
            for name, value in own.items():
                if wanted[name] != value:
                    raise _other(name, wanted[name], value, self.canvas)
        return canvas

    def _shown(self, model: Net2NetTransformer, batch: int) -> Callable[[Canvas], None] | None:
        preview = self.preview
        if preview is None:
            return None

        def show(now: Canvas) -> None:
            pictures = decoded(model, now, batch, share=map)
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


def check_condition(model: Net2NetTransformer, canvas: Canvas) -> None:
    """Raise UserError unless the canvas's tokens and its condition are ones of ``model``."""
    canvas.check_vocabulary(model)
    stage, cond = model.cond_stage_model, canvas.cond
    objects = isinstance(stage, DummyCondStage)
    expected = 4 if objects else 3 if is_spatial(model) else 2
    if cond.ndim != expected:
        raise UserError(
            f"{canvas.name}: got a condition of {cond.ndim} dimensions, expected {expected}, as the model's have; give "
            "the run that began it"
        )
    codes = getattr(stage, "n_embed", None) if is_spatial(model) else None
    if codes is not None and int(cond.max()) > codes - (not isinstance(stage, CoordStage)):
        raise UserError(f"{canvas.name}: got condition token {int(cond.max())}, expected fewer than {codes}")
    if objects:
        try:
            condition_pictures(model, None, cond)
        except (ValueError, LookupError) as error:
            raise UserError(
                f"{canvas.name}: got a condition that cannot be drawn ({first_line(error)}), expected objects"
            ) from error


def check_nothing_lost(path: str | os.PathLike[str]) -> None:
    """Raise UserError if a new canvas would replace an unfinished one, or a file that is not a canvas."""
    if Path(path).exists() and not Canvas.load(path).done:
        check_unused(path)


def forget(path: str | os.PathLike[str]) -> None:
    """Delete the file of a finished canvas, unless another process has begun to draw into it."""
    with contextlib.suppress(UserError), drawing_into(path):
        Path(path).unlink(missing_ok=True)


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
