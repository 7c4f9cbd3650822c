"""The page's layout: its tabs, and which function of the other modules each button calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import gradio as gr

from tamingfast.ui import painting, studio, uploads
from tamingfast.ui.choices import Choices, Wanted
from tamingfast.ui.condition_tab import condition_tab
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
from tamingfast.ui.paint_tab import laid_step, paint_tab
from tamingfast.ui.studio import MOST, Studio

#: From this side on the page offers fewer images at first.
_LARGE = 64
#: On narrow screens results stand above the controls and stay in sight while these are scrolled; what is brushed on
#: stands there without staying.
CSS = """
.tf-picture img { object-fit: contain !important; width: 100%; height: 100%; }
.tf-hard img { image-rendering: pixelated; }
.tf-note { min-height: 1.6em; }
footer { display: none !important; }
@media (max-width: 640px) {
    .tf-desk, .tf-results { order: -1; }
    .tf-results { position: sticky; top: 0; z-index: 100; max-height: 50vh; overflow-y: auto; }
    .tf-results { background: var(--body-background-fill); }
    .tf-results .tf-picture { height: 34vh !important; }
}
"""
#: Gradio confines CSS to what is inside this container, which would keep results from staying in sight.
HEAD = """<style>@media (max-width: 640px) {
    .gradio-container { padding: 8px !important; overflow: clip !important; }
}</style>"""


def built(own: Studio) -> gr.Blocks:
    """The page for a model."""
    with gr.Blocks(title=f"tamingfast: {own.name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# tamingfast\nThe model **{own.name}**: {_described(own)}")
        with gr.Tabs() as tabs:
            with gr.Tab("Sample", id="sample"):
                to_paint = _sample_tab(own)
            with gr.Tab("Paint", id="paint"):
                shown = paint_tab(own)
            with gr.Tab("Reconstruct", id="reconstruct"):
                _reconstruct_tab(own)
            with gr.Tab("Condition", id="condition"):
                condition_tab(own)
            with gr.Tab("Inspect", id="inspect"):
                _inspect_tab(own)
        if to_paint is not None and shown is not None:
            button, number = to_paint
            act(
                own, button.click, lambda desk, which: laid_step(painting.taken(own, desk, which)), [number], shown
            ).success(lambda: gr.Tabs(selected="paint"), None, tabs, queue=False, api_visibility="private")

        def leave(request: gr.Request) -> None:
            own.desks.leave(str(request.session_hash))

        page.unload(leave)
    page.queue(max_size=64)
    return page


def _described(own: Studio) -> str:
    """One sentence about what the model does."""
    can = own.abilities
    size = f", {can.size[0]}x{can.size[1]} pixels" if can.size else ""
    if can.no_drawing is not None:
        return f"a first stage, which encodes and decodes images{size}."
    if can.classes:
        return f"draws {len(can.classes)} classes{size}."
    what = "freely" if can.condition is None else f"from conditions of the kind '{can.condition.name}'"
    return f"draws {what}{size}."


def _sample_tab(own: Studio) -> tuple[gr.Button, gr.Number] | None:
    """The tab, and the button that goes on to Paint, with the field for the image's number."""
    can = own.abilities
    if can.no_drawing is not None or (can.condition is not None and can.condition.name != "coord"):
        gr.Markdown(can.no_drawing or "This model draws from a condition: see the tab **Condition**.")
        return None
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            labels = gr.Dropdown(
                list(can.classes), multiselect=True, label="Classes", info="None chosen: all, in turn.",
                visible=bool(can.classes),
            )  # fmt: skip
            count = gr.Slider(1, MOST, 4 if max(own.size) > _LARGE else 16, step=1, label="Images")
            with gr.Row(visible=not can.fixed):
                height = gr.Number(own.size[0], label="Height", **pixels_settings(own))
                width = gr.Number(own.size[1], label="Width", **pixels_settings(own))
            photo = uploads.photo("Begin with the coarse scales of this photo", 160, bool(can.scales))
            scales = gr.Slider(0, max(1, len(can.scales)), 0, step=1, label="Scales taken", visible=bool(can.scales))
            fields = choice_fields(own)
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", min_width=120)
                stop_button(own)
            like = uploads.file(label="Repeat a picture: a PNG that tamingfast drew", file_types=[".png"], height=170)
        with gr.Column(scale=3, min_width=300, elem_classes=["tf-results"]):
            picture, note, files = picture_field(own, "Images", 520), note_field("Press **Draw**."), files_field()
            with gr.Row(visible=can.no_editing is None, equal_height=True):
                number = gr.Number(1, label="Image number", precision=0, minimum=1, min_width=90)
                paint = gr.Button("Paint on it", min_width=120)
    wanted = [count, height, width, labels, photo, scales]

    def drawn(desk: Desk, *values: Any) -> Iterator[list[Any]]:
        first = len(wanted)
        for step in studio.sample(own, desk, Wanted(*values[:first]), Choices(*values[first:])):
            yield shown_step(step)

    def opened(desk: Desk, path: str | None) -> list[Any]:
        if path is None:
            desk.recipe = None
            return [gr.update() for _ in (*wanted, *fields)] + [""]
        filled, chosen, told = studio.opened_recipe(own, desk, path)
        return [*dataclasses.astuple(filled), *dataclasses.astuple(chosen), told]

    act(own, draw.click, drawn, [*wanted, *fields], [picture, note, files], show_progress_on=note)
    act(own, like.change, opened, [like], [*wanted, *fields, note])
    return paint, number


def _reconstruct_tab(own: Studio) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = uploads.photo("Image", 300)
            side = gr.Number(painting.largest_side(own), label="Longer side in pixels", **pixels_settings(own))
            start = gr.Button("Reconstruct", variant="primary")
            note = note_field("What the first stage keeps of an image: its tokens, and what they decode to.")
        with gr.Column(scale=3, min_width=300, elem_classes=["tf-results"]):
            with gr.Row():
                before, after = (
                    picture_field(own, name, 280) for name in ("Image, as it was encoded", "Reconstruction")
                )
            with gr.Row():
                tokens, apart = (
                    picture_field(own, name, 280) for name in ("Tokens as colours", "Difference, four times as bright")
                )

    def compared(desk: Desk, path: str | None, pixels: float) -> list[str]:
        found = studio.reconstruct(own, desk, path, pixels)
        paths = (found.image, found.reconstruction, found.tokens, found.difference)
        return [*map(str, paths), found.note]

    act(own, start.click, compared, [image, side], [before, after, tokens, apart, note])


def _inspect_tab(own: Studio) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            upload = uploads.file(label="A picture, checkpoint or token file", height=160)
            gr.Markdown("Without a file: the model of this page. Nothing in a file is run.")
            show = gr.Button("Show the model")
        with gr.Column(scale=3, min_width=300, elem_classes=["tf-results"]):
            facts = gr.JSON(label="Facts", height=600)

    act(own, upload.change, lambda desk, path: studio.inspected(own, path), [upload], [facts])
    act(own, show.click, lambda desk: studio.inspected(own, None), [], [facts])
