"""The tab Condition."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from tamingfast import tasks
from tamingfast.ui import conditions, uploads
from tamingfast.ui.choices import Choices, whole
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
    told,
)
from tamingfast.ui.studio import MOST, Studio


def condition_tab(own: Studio) -> None:
    form = own.abilities.condition
    if form is None or not conditions.ways(form):
        what = "classes" if own.abilities.classes else "nothing but its seed"
        gr.Markdown(
            f"This model draws from {what}. With a prior that was trained on label maps, edges, boxes, depth or key "
            "points, this tab has what draws or uploads them: `tamingfast ui runs/prior`."
        )
        return
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            offered = conditions.ways(form)
            way = gr.Radio(offered, value=offered[0], label="Condition")
            with gr.Row():
                height = gr.Number(own.size[0], label="Height", **pixels_settings(own))
                width = gr.Number(own.size[1], label="Width", **pixels_settings(own))
            file = uploads.file(
                label=f"File ({', '.join(form.suffixes)})", file_types=list(form.suffixes) or None, height=170,
                visible=offered[0] == conditions.FILE,
            )  # fmt: skip
            photo = uploads.photo("Photo", 220, offered[0] == conditions.PHOTO)
            count = gr.Slider(1, MOST, 4, step=1, label="Images")
            fields = choice_fields(own)
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", min_width=120)
                stop_button(own)
        with gr.Column(scale=3, min_width=300, elem_classes=["tf-desk"]):
            with gr.Group(visible=offered[0] == conditions.DRAWN) as board:
                sheet, read = _drawing_board(own, form, height, width)
            picture, note, files = picture_field(own, "Condition and images", 440), note_field(), files_field()

    def shown(chosen: str) -> list[Any]:
        wanted = (conditions.DRAWN, conditions.FILE, conditions.PHOTO)
        return [gr.update(visible=chosen == each) for each in wanted]

    def drawn(
        desk: Desk, chosen: str, tall: Any, wide: Any, path: Any, of: Any, on: Any, *values: Any
    ) -> Iterator[Any]:
        size = (whole("height", tall), whole("width", wide))
        if chosen == conditions.FILE:
            given = conditions.from_file(path)
        elif chosen == conditions.PHOTO:
            given = conditions.from_photo(of, size)
        else:
            given = read(desk, on, size)
        for step in conditions.sample(own, desk, given, values[0], Choices(*values[1:])):
            yield shown_step(step)

    way.change(shown, way, [board, file, photo], queue=False, api_visibility="private")
    inputs = [way, height, width, file, photo, sheet, count, *fields]
    act(own, draw.click, drawn, inputs, [picture, note, files], show_progress_on=note)


def _drawing_board(own: Studio, form: tasks.Form, height: Any, width: Any) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """What a condition is drawn on, and ``read(desk, value, size)``, the task's arguments."""
    begin = gr.Button("New drawing")
    if form.name in conditions.BOXED:
        board = _boxes_board(own, form, height, width, begin)
        return board, lambda desk, _, size: conditions.from_boxes(desk, size)
    names = [name for name, _ in form.labels]
    colors = [f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in form.labels] or ["#ffffff", "#000000"]
    if names:
        chips = "".join(
            f'<span style="margin-right:1em"><b style="color:{color}">&#9632;</b> {html.escape(name)}</span>'
            for name, color in zip(names, colors, strict=True)
        )
        gr.HTML(f"<div>Labels: {chips}</div>")
    # A new drawing is all of the first label, so the brush begins with the second.
    first = colors[1] if len(names) > 1 else colors[0]
    brush = gr.Brush(default_size=16, colors=list(colors), default_color=first, color_mode="fixed")
    editor = uploads.editor("Draw here", 560, brush)

    def begun(desk: Desk, tall: Any, wide: Any) -> dict[str, Any]:
        path = str(conditions.sheet(own, desk, tall, wide))
        return {"background": path, "layers": [], "composite": path}

    act(own, begin.click, begun, [height, width], [editor])

    def read(desk: Desk, value: Any, size: tuple[int, int]) -> dict[str, Any]:
        return conditions.from_brush(own, (value or {}).get("composite"), size)

    return editor, read


def _boxes_board(own: Studio, form: tasks.Form, height: Any, width: Any, begin: gr.Button) -> gr.Image:
    names = [name for name, _ in form.labels]
    chosen = gr.Dropdown(names, value=names[0], label="Class of the next box")
    sheet = uploads.photo("Click two corners of each box", 560, interactive=False)
    note = note_field("Begin a new drawing.")
    back = gr.Button("Take back")

    def begun(desk: Desk, tall: Any, wide: Any) -> list[Any]:
        desk.boxes, desk.corner = [], None
        return [str(conditions.sheet(own, desk, tall, wide)), "Click the first corner of a box."]

    def clicked(name: str, tall: Any, wide: Any, request: gr.Request, event: gr.SelectData) -> list[Any]:
        with told(own):
            size = (whole("height", tall), whole("width", wide))
            desk = own.desks.of(str(request.session_hash))
            path, said = conditions.cornered(own, desk, name, event.index, size)
            return [str(path), said]

    def fewer(desk: Desk, tall: Any, wide: Any) -> list[Any]:
        path, said = conditions.fewer(own, desk, (whole("height", tall), whole("width", wide)))
        return [str(path), said]

    act(own, begin.click, begun, [height, width], [sheet, note])
    act(own, back.click, fewer, [height, width], [sheet, note])
    sheet.select(clicked, [chosen, height, width], [sheet, note], show_progress="hidden", api_visibility="private")
    return sheet
