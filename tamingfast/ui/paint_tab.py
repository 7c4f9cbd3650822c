"""The tab Paint."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import gradio as gr

from tamingfast.ui import painting, uploads
from tamingfast.ui.choices import Choices
from tamingfast.ui.desks import Desk
from tamingfast.ui.fields import (
    act,
    choice_fields,
    files_field,
    note_field,
    picture_field,
    pixels_settings,
    shown_step,
    stop_button,
)
from tamingfast.ui.studio import Shown, Studio


def laid_step(before: painting.Before) -> list[Any]:
    """Updates of the editor, a picture, a note and files."""
    path = str(before.editor)
    return [{"background": path, "layers": [], "composite": path}, *shown_step(before.shown)]


def paint_tab(own: Studio) -> list[Any] | None:
    """The tab, and its outputs, in the order of `laid_step`."""
    if own.abilities.no_editing is not None:
        gr.Markdown(own.abilities.no_editing)
        return None
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            controls = _controls(own)
        with gr.Column(scale=3, min_width=300, elem_classes=["tf-desk"]):
            brush = gr.Brush(default_size=24, colors=["#ffffff", "#000000", "#d83a3a", "#3a8fd8", "#4caf50", "#f2c230"])
            editor = uploads.editor("Brush here", 600, brush)
            note = note_field("Open a photo, or begin with a blank picture.")
            outputs = [editor, picture_field(own, "Picture", 300), note, files_field()]
    _connect(own, controls, outputs)
    return outputs


def _controls(own: Studio) -> SimpleNamespace:
    can = own.abilities
    upload = uploads.file(
        label="Open a photo or a saved canvas", height=170,
        file_types=[".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".canvas"],
    )  # fmt: skip
    with gr.Row(equal_height=True):
        side = gr.Number(painting.side_of(own), label="Longer side in pixels", **pixels_settings(own))
        blank = gr.Button("Blank picture", min_width=120)
    label = gr.Dropdown(
        list(can.classes), value=can.classes[0] if can.classes else None, label="Class",
        visible=bool(can.classes),
    )  # fmt: skip
    condition = uploads.file(
        label="Condition, of the whole picture's size", visible=can.condition is not None, height=170
    )
    fields = choice_fields(own)
    with gr.Row():
        redraw = gr.Button("Redraw what is brushed", variant="primary", min_width=180)
        stop_button(own)
    with gr.Row():
        keep = gr.Button("Keep as paint", min_width=120)
        undo = gr.Button("Undo the last step", min_width=120)
    gr.Markdown("**Extend**, in pixels")
    with gr.Row():
        step, half = can.factor, max(can.factor, own.size[1] // 2 // can.factor * can.factor)
        sides = [
            gr.Number(half if name == "Right" else 0, label=name, precision=0, step=step, minimum=0, min_width=70)
            for name in ("Left", "Right", "Top", "Bottom")
        ]
    extend = gr.Button("Extend")
    return SimpleNamespace(
        upload=upload, side=side, blank=blank, label=label, condition=condition, fields=fields, redraw=redraw,
        keep=keep, undo=undo, sides=sides, extend=extend,
    )  # fmt: skip


def _connect(own: Studio, to: SimpleNamespace, outputs: list[Any]) -> None:
    """Let the controls act on the outputs of the tab."""
    editor, _, note, _ = outputs

    def layers_of(value: Any) -> list[str]:
        return [path for path in (value or {}).get("layers") or [] if path]

    def drawn(steps: Iterator[Shown | painting.Before]) -> Iterator[list[Any]]:
        for each in steps:
            yield laid_step(each) if isinstance(each, painting.Before) else [gr.update(), *shown_step(each)]

    def on_redraw(desk: Desk, value: Any, chosen: str | None, given: str | None, *values: Any) -> Iterator[list[Any]]:
        yield from drawn(painting.redrawn(own, desk, layers_of(value), chosen, given, Choices(*values)))

    def on_extend(desk: Desk, chosen: str | None, given: str | None, *values: Any) -> Iterator[list[Any]]:
        yield from drawn(painting.extended(own, desk, values[:4], chosen, given, Choices(*values[4:])))

    def on_open(desk: Desk, path: str | None, side: float) -> list[Any]:
        return laid_step(painting.opened(own, desk, path, side))

    how = [to.label, to.condition, *to.fields]
    act(own, to.upload.upload, on_open, [to.upload, to.side], outputs)
    act(own, to.blank.click, lambda desk, given: laid_step(painting.blank(own, desk, given)), [to.side], outputs)
    act(own, to.redraw.click, on_redraw, [editor, *how], outputs, show_progress_on=note)
    around = [to.label, to.condition, *to.sides, *to.fields]
    act(own, to.extend.click, on_extend, around, outputs, show_progress_on=note)
    act(own, to.keep.click, lambda desk, value: laid_step(painting.painted(desk, layers_of(value))), [editor], outputs)
    act(own, to.undo.click, lambda desk: laid_step(painting.undone(desk)), [], outputs)
