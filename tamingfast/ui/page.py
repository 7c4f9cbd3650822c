"""The page's layout: fields, buttons, and which function of the other modules each of them calls."""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
import secrets
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from tamingfast.errors import in_words
from tamingfast.ui import conditions, painting, studio, uploads
from tamingfast.ui.choices import Choices, Wanted, whole
from tamingfast.ui.desks import Desk
from tamingfast.ui.studio import MOST, Shown, Studio

#: One thing is drawn at a time; others wait in the queue.
_ONE = {"concurrency_limit": 1, "concurrency_id": "model"}
#: Sides up to which pictures are shown with hard pixels.
_SMALL = 128
#: From this side on the page offers fewer images at first.
_LARGE = 64
CSS = """
.tf-picture img { object-fit: contain !important; width: 100%; height: 100%; }
.tf-hard img { image-rendering: pixelated; }
.tf-note { min-height: 1.6em; }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""


def built(own: Studio) -> gr.Blocks:
    """The page for a model."""
    with gr.Blocks(title=f"tamingfast: {own.name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# tamingfast\nThe model **{own.name}**: {_described(own)}")
        with gr.Tabs() as tabs:
            with gr.Tab("Sample", id="sample"):
                to_paint = _sample_tab(own)
            with gr.Tab("Paint", id="paint"):
                shown = _paint_tab(own)
            with gr.Tab("Reconstruct", id="reconstruct"):
                _reconstruct_tab(own)
            with gr.Tab("Condition", id="condition"):
                _condition_tab(own)
            with gr.Tab("Inspect", id="inspect"):
                _inspect_tab(own)
        if to_paint is not None and shown is not None:
            button, number = to_paint
            act(
                own, button.click, lambda desk, which: _laid(painting.taken(own, desk, which)), [number], shown
            ).success(lambda: gr.Tabs(selected="paint"), None, tabs, queue=False, api_visibility="private")

        def leave(request: gr.Request) -> None:
            own.desks.leave(str(request.session_hash))

        page.unload(leave)
    page.queue(max_size=64)
    return page


def act(
    own: Studio,
    event: Callable[..., Any],
    function: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    **settings: Any,
) -> Any:
    """Let an event call ``function(desk, *values)``, in turn with the others, and show its errors as sentences."""

    def values(request: gr.Request, *given: Any) -> Any:
        with _told(own):
            return function(own.desks.of(str(request.session_hash)), *given)

    def steps(request: gr.Request, *given: Any) -> Iterator[Any]:
        with _told(own):
            yield from function(own.desks.of(str(request.session_hash)), *given)

    run = steps if inspect.isgeneratorfunction(function) else values
    chosen = {"show_progress": "minimal", "api_visibility": "private"} | _ONE | settings
    return event(run, list(inputs), list(outputs), **chosen)


class _told:
    """Turns errors into what the page shows: the user's into their sentence, others into a request for a report."""

    def __init__(self, own: Studio) -> None:
        self.folder = str(own.desks.folder.parent)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, gr.Error):
            return
        words = in_words(error)
        if words is None:
            traceback.print_exception(error)
            words = "This is a bug of tamingfast; please report it with the lines that the server has printed"
        # Names of files, not where they lie.
        words = re.sub(re.escape(self.folder) + r"(?:/[^/\s:]+)*/", "", words)
        raise gr.Error(html.escape(words), title="This cannot be done", print_exception=False) from None


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


# --- parts of tabs --------------------------------------------------------------------------------------------------


def _picture(own: Studio, label: str, height: int = 440) -> gr.Image:
    hard = " tf-hard" if max(own.size) <= _SMALL else ""
    classes = f"tf-picture{hard}".split()
    return gr.Image(
        label=label, interactive=False, format="png", height=height, elem_classes=classes, type="filepath",
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _note(text: str = "") -> gr.Markdown:
    return gr.Markdown(text, elem_classes=["tf-note"])


def _files() -> gr.File:
    return gr.File(label="Take away", file_count="multiple", interactive=False, visible=False)


def _choice_fields(own: Studio) -> list[Any]:
    """Fields in the order of `Choices`."""
    guides = own.abilities.guides
    with gr.Row(equal_height=True):
        seed = gr.Textbox("0", label="Seed", info="The same seed gives the same image.", scale=3, min_width=120)
        anew = gr.Button("New seed", scale=1, min_width=100)
    anew.click(lambda: str(secrets.randbelow(1 << 32)), None, seed, queue=False, api_visibility="private")
    with gr.Accordion("How tokens are chosen", open=False):
        temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature", info="Lower is safer, higher is wilder.")
        top_k = gr.Number(100, label="Top-k", precision=0, minimum=0, info="Among the k likeliest; 0 for all.")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="Among the likeliest of this total; 1 for all.")
        cfg = gr.Slider(1, 12, 1, step=0.25, label="Guidance", info="Closer to the class; 1 for none.", visible=guides)
        rising = gr.Checkbox(False, label="Guidance rises from 1", visible=guides)
        schedule = gr.Dropdown(
            ["paper", "scene", "strided", "block"], value="paper", label="Schedule",
            info="How the window moves over images larger than it.",
        )  # fmt: skip
        stride = gr.Number(8, label="Stride", precision=0, minimum=1, info="Of strided and block, in tokens.")
    return [seed, temperature, top_k, top_p, cfg, rising, schedule, stride]


def _stop_button(own: Studio) -> gr.Button:
    button = gr.Button("Stop", variant="stop", min_width=80)

    def stop(request: gr.Request) -> None:
        own.desks.of(str(request.session_hash)).stopping.set()

    button.click(stop, None, None, queue=False, api_visibility="private")
    return button


def _shown(step: Shown) -> list[Any]:
    """Updates of a picture, a note and files."""
    if not step.files:
        return [str(step.picture), step.note, gr.update()]
    return [str(step.picture), step.note, gr.update(value=[str(path) for path in step.files], visible=True)]


def _wide(own: Studio) -> dict[str, Any]:
    return {"precision": 0, "step": own.abilities.factor, "minimum": own.abilities.factor, "min_width": 90}


# --- the tabs -------------------------------------------------------------------------------------------------------


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
                height = gr.Number(own.size[0], label="Height", **_wide(own))
                width = gr.Number(own.size[1], label="Width", **_wide(own))
            photo = uploads.photo("Begin with the coarse scales of this photo", 160, bool(can.scales))
            scales = gr.Slider(0, max(1, len(can.scales)), 0, step=1, label="Scales taken", visible=bool(can.scales))
            fields = _choice_fields(own)
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", min_width=120)
                _stop_button(own)
            like = gr.File(label="Repeat a picture: a PNG that tamingfast drew", file_types=[".png"], height=150)
        with gr.Column(scale=3, min_width=300):
            picture, note, files = _picture(own, "Images", 520), _note("Press **Draw**."), _files()
            with gr.Row(visible=can.no_editing is None, equal_height=True):
                number = gr.Number(1, label="Image number", precision=0, minimum=1, min_width=90)
                paint = gr.Button("Paint on it", min_width=120)
    wanted = [count, height, width, labels, photo, scales]

    def drawn(desk: Desk, *values: Any) -> Iterator[list[Any]]:
        first = len(wanted)
        for step in studio.sample(own, desk, Wanted(*values[:first]), Choices(*values[first:])):
            yield _shown(step)

    def opened(desk: Desk, path: str | None) -> list[Any]:
        if path is None:
            desk.recipe = None
            return [gr.update() for _ in (*wanted, *fields)] + [""]
        filled, chosen, told = studio.opened_recipe(own, desk, path)
        return [*dataclasses.astuple(filled), *dataclasses.astuple(chosen), told]

    act(own, draw.click, drawn, [*wanted, *fields], [picture, note, files], show_progress_on=note)
    act(own, like.change, opened, [like], [*wanted, *fields, note])
    return paint, number


def _laid(before: painting.Before) -> list[Any]:
    """Updates of the editor, a picture, a note and files."""
    path = str(before.editor)
    return [{"background": path, "layers": [], "composite": path}, *_shown(before.shown)]


def _paint_tab(own: Studio) -> list[Any] | None:
    """The tab, and its outputs, in the order of `_laid`."""
    can = own.abilities
    if can.no_editing is not None:
        gr.Markdown(can.no_editing)
        return None
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            upload = gr.File(
                label="Open a photo or a saved canvas", height=150,
                file_types=[".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".canvas"],
            )  # fmt: skip
            with gr.Row(equal_height=True):
                side = gr.Number(painting.side_of(own), label="Longer side in pixels", **_wide(own))
                blank = gr.Button("Blank picture", min_width=120)
            label = gr.Dropdown(
                list(can.classes), value=can.classes[0] if can.classes else None, label="Class",
                visible=bool(can.classes),
            )  # fmt: skip
            condition = gr.File(
                label="Condition, of the whole picture's size", visible=can.condition is not None, height=150
            )
            fields = _choice_fields(own)
            with gr.Row():
                redraw = gr.Button("Redraw what is brushed", variant="primary", min_width=180)
                _stop_button(own)
            with gr.Row():
                keep = gr.Button("Keep as paint", min_width=120)
                undo = gr.Button("Undo", min_width=80)
            gr.Markdown("**Extend**, in pixels")
            with gr.Row():
                step, half = can.factor, max(can.factor, own.size[1] // 2 // can.factor * can.factor)
                sides = [
                    gr.Number(
                        half if name == "Right" else 0, label=name, precision=0, step=step, minimum=0, min_width=70
                    )
                    for name in ("Left", "Right", "Top", "Bottom")
                ]
            extend = gr.Button("Extend")
        with gr.Column(scale=3, min_width=300):
            brush = gr.Brush(default_size=24, colors=["#ffffff", "#000000", "#d83a3a", "#3a8fd8", "#4caf50", "#f2c230"])
            editor = uploads.editor("Brush here", 600, brush)
            note, picture, files = (
                _note("Open a photo, or begin with a blank picture."),
                _picture(own, "Picture", 300),
                _files(),
            )
    outputs = [editor, picture, note, files]

    def layers_of(value: Any) -> list[str]:
        return [path for path in (value or {}).get("layers") or [] if path]

    def drawn(steps: Iterator[Shown | painting.Before]) -> Iterator[list[Any]]:
        for each in steps:
            yield _laid(each) if isinstance(each, painting.Before) else [gr.update(), *_shown(each)]

    def on_redraw(desk: Desk, value: Any, chosen: str | None, given: str | None, *values: Any) -> Iterator[list[Any]]:
        yield from drawn(painting.redrawn(own, desk, layers_of(value), chosen, given, Choices(*values)))

    def on_extend(desk: Desk, chosen: str | None, given: str | None, *values: Any) -> Iterator[list[Any]]:
        yield from drawn(painting.extended(own, desk, values[:4], chosen, given, Choices(*values[4:])))

    how = [label, condition, *fields]
    act(own, upload.upload, lambda desk, *given: _laid(painting.opened(own, desk, *given)), [upload, side], outputs)
    act(own, blank.click, lambda desk, given: _laid(painting.blank(own, desk, given)), [side], outputs)
    act(own, redraw.click, on_redraw, [editor, *how], outputs, show_progress_on=note)
    act(own, extend.click, on_extend, [label, condition, *sides, *fields], outputs, show_progress_on=note)
    act(own, keep.click, lambda desk, value: _laid(painting.painted(desk, layers_of(value))), [editor], outputs)
    act(own, undo.click, lambda desk: _laid(painting.undone(desk)), [], outputs)
    return outputs


def _reconstruct_tab(own: Studio) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = uploads.photo("Image", 300)
            side = gr.Number(painting.largest_side(own), label="Longer side in pixels", **_wide(own))
            start = gr.Button("Reconstruct", variant="primary")
            note = _note("What the first stage keeps of an image: its tokens, and what they decode to.")
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                before, after = (_picture(own, name, 280) for name in ("Image, as it was encoded", "Reconstruction"))
            with gr.Row():
                tokens, apart = (
                    _picture(own, name, 280) for name in ("Tokens as colours", "Difference, four times as bright")
                )

    def compared(desk: Desk, path: str | None, pixels: float) -> list[str]:
        found = studio.reconstruct(own, desk, path, pixels)
        paths = (found.image, found.reconstruction, found.tokens, found.difference)
        return [*map(str, paths), found.note]

    act(own, start.click, compared, [image, side], [before, after, tokens, apart, note])


def _inspect_tab(own: Studio) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            upload = gr.File(label="A picture, checkpoint or token file", height=160)
            gr.Markdown("Without a file: the model of this page. Nothing in a file is run.")
            show = gr.Button("Show the model")
        with gr.Column(scale=3, min_width=300):
            facts = gr.JSON(label="Facts", height=600)

    act(own, upload.change, lambda desk, path: studio.inspected(own, path), [upload], [facts])
    act(own, show.click, lambda desk: studio.inspected(own, None), [], [facts])


def _condition_tab(own: Studio) -> None:
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
                height = gr.Number(own.size[0], label="Height", **_wide(own))
                width = gr.Number(own.size[1], label="Width", **_wide(own))
            file = gr.File(
                label=f"File ({', '.join(form.suffixes)})", file_types=list(form.suffixes) or None, height=150,
                visible=offered[0] == conditions.FILE,
            )  # fmt: skip
            photo = uploads.photo("Photo", 220, offered[0] == conditions.PHOTO)
            count = gr.Slider(1, MOST, 4, step=1, label="Images")
            fields = _choice_fields(own)
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", min_width=120)
                _stop_button(own)
        with gr.Column(scale=3, min_width=300):
            with gr.Group(visible=offered[0] == conditions.DRAWN) as board:
                sheet, read = _drawing_board(own, form, height, width)
            picture, note, files = _picture(own, "Condition and images", 440), _note(), _files()

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
            yield _shown(step)

    way.change(shown, way, [board, file, photo], queue=False, api_visibility="private")
    inputs = [way, height, width, file, photo, sheet, count, *fields]
    act(own, draw.click, drawn, inputs, [picture, note, files], show_progress_on=note)


def _drawing_board(own: Studio, form: Any, height: Any, width: Any) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """What a condition is drawn on, and ``read(desk, value, size)``, the task's arguments."""
    begin = gr.Button("New drawing")
    if form.name in conditions.BOXED:
        board = _boxes_board(own, form, height, width, begin)
        return board, lambda desk, _, size: conditions.from_boxes(desk, size)
    names = [name for name, _ in form.labels]
    colors = (
        ["#ffffff", "#000000"] if form.name == "edges" else [f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in form.labels]
    )
    if names:
        chips = "".join(
            f'<span style="margin-right:1em"><b style="color:{color}">&#9632;</b> {html.escape(name)}</span>'
            for name, color in zip(names, colors, strict=True)
        )
        gr.HTML(f"<div>Labels: {chips}</div>")
    brush = gr.Brush(default_size=16, colors=list(colors), color_mode="fixed")
    editor = uploads.editor("Draw here", 560, brush)

    def begun(desk: Desk, tall: Any, wide: Any) -> dict[str, Any]:
        path = str(conditions.sheet(own, desk, tall, wide))
        return {"background": path, "layers": [], "composite": path}

    act(own, begin.click, begun, [height, width], [editor])

    def read(desk: Desk, value: Any, size: tuple[int, int]) -> dict[str, Any]:
        return conditions.from_brush(own, (value or {}).get("composite"), size)

    return editor, read


def _boxes_board(own: Studio, form: Any, height: Any, width: Any, begin: gr.Button) -> gr.Image:
    names = [name for name, _ in form.labels]
    chosen = gr.Dropdown(names, value=names[0], label="Class of the next box")
    sheet = gr.Image(
        label="Click two corners of each box", interactive=False, type="filepath", format="png", buttons=[]
    )
    note = _note("Begin a new drawing.")
    back = gr.Button("Take back")

    def begun(desk: Desk, tall: Any, wide: Any) -> list[Any]:
        desk.boxes, desk.corner = [], None
        return [str(conditions.sheet(own, desk, tall, wide)), "Click the first corner of a box."]

    def clicked(name: str, tall: Any, wide: Any, request: gr.Request, event: gr.SelectData) -> list[Any]:
        with _told(own):
            size = (whole("height", tall), whole("width", wide))
            desk = own.desks.of(str(request.session_hash))
            path, told = conditions.cornered(own, desk, name, event.index, size)
            return [str(path), told]

    def fewer(desk: Desk, tall: Any, wide: Any) -> list[Any]:
        path, told = conditions.fewer(own, desk, (whole("height", tall), whole("width", wide)))
        return [str(path), told]

    act(own, begin.click, begun, [height, width], [sheet, note])
    act(own, back.click, fewer, [height, width], [sheet, note])
    sheet.select(clicked, [chosen, height, width], [sheet, note], show_progress="hidden", api_visibility="private")
    return sheet
