"""What the tabs share: fields, buttons, and the way in which an event calls a function for its visitor."""

from __future__ import annotations

import contextlib
import html
import inspect
import re
import secrets
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from tamingfast import tasks
from tamingfast.errors import in_words
from tamingfast.ui.choices import Choices
from tamingfast.ui.studio import Shown, Studio

#: One thing is drawn at a time; others wait in the queue.
_ONE = {"concurrency_limit": 1, "concurrency_id": "model"}
#: Sides up to which pictures are shown with hard pixels.
_SMALL = 128


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
        with told(own):
            return function(own.desks.of(str(request.session_hash)), *given)

    def steps(request: gr.Request, *given: Any) -> Iterator[Any]:
        with told(own):
            yield from function(own.desks.of(str(request.session_hash)), *given)

    run = steps if inspect.isgeneratorfunction(function) else values
    chosen = {"show_progress": "minimal", "api_visibility": "private"} | _ONE | settings
    return event(run, list(inputs), list(outputs), **chosen)


@contextlib.contextmanager
def told(own: Studio) -> Iterator[None]:
    """Turns errors into what the page shows: the user's into their sentence, others into a request for a report."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        words = in_words(error)
        if words is None:
            traceback.print_exception(error)
            words = "This is a bug of tamingfast; please report it with the lines that the server has printed"
        # Names of files, not where they lie.
        words = re.sub(re.escape(str(own.desks.folder.parent)) + r"(?:/[^/\s:]+)*/", "", words)
        raise gr.Error(html.escape(words), title="This cannot be done", print_exception=False) from None


def picture_field(own: Studio, label: str, height: int = 440) -> gr.Image:
    hard = " tf-hard" if max(own.size) <= _SMALL else ""
    classes = f"tf-picture{hard}".split()
    return gr.Image(
        label=label, interactive=False, format="png", height=height, elem_classes=classes, type="filepath",
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def note_field(text: str = "") -> gr.Markdown:
    return gr.Markdown(text, elem_classes=["tf-note"])


def files_field() -> gr.File:
    return gr.File(label="Take away", file_count="multiple", interactive=False, visible=False)


def choice_fields(own: Studio) -> list[Any]:
    """Fields in the order of `Choices`."""
    guides, begin = own.abilities.guides, Choices.of(tasks.drawing_options(own.model))
    with gr.Row(equal_height=True):
        seed = gr.Textbox(begin.seed, label="Seed", info="The same seed gives the same image.", scale=3, min_width=120)
        anew = gr.Button("New seed", scale=1, min_width=100)
    anew.click(lambda: str(secrets.randbelow(1 << 32)), None, seed, queue=False, api_visibility="private")
    with gr.Accordion("How tokens are chosen", open=False):
        temperature = gr.Slider(
            0.1, 2, begin.temperature, step=0.05, label="Temperature", info="Lower is safer, higher is wilder."
        )
        top_k = gr.Number(begin.top_k, label="Top-k", precision=0, minimum=0, info="Among the k likeliest; 0 for all.")
        top_p = gr.Slider(
            0.05, 1, begin.top_p, step=0.05, label="Top-p", info="Among the likeliest of this total; 1 for all."
        )
        cfg = gr.Slider(
            1, 12, begin.cfg, step=0.25, label="Guidance", info="Closer to the class; 1 for none.", visible=guides
        )
        rising = gr.Checkbox(begin.rising, label="Guidance rises from 1", visible=guides)
        schedule = gr.Dropdown(
            ["paper", "scene", "strided", "block"], value=begin.schedule, label="Schedule",
            info="How the window moves over images larger than it.",
        )  # fmt: skip
        stride = gr.Number(
            begin.stride, label="Stride", precision=0, minimum=1, info="Of strided and block, in tokens."
        )
    return [seed, temperature, top_k, top_p, cfg, rising, schedule, stride]


def stop_button(own: Studio) -> gr.Button:
    button = gr.Button("Stop", variant="stop", min_width=80)

    def stop(request: gr.Request) -> None:
        own.desks.of(str(request.session_hash)).stopping.set()

    button.click(stop, None, None, queue=False, api_visibility="private")
    return button


def shown_step(step: Shown) -> list[Any]:
    """Updates of a picture, a note and files."""
    if not step.files:
        return [str(step.picture), step.note, gr.update()]
    return [str(step.picture), step.note, gr.update(value=[str(path) for path in step.files], visible=True)]


def pixels_settings(own: Studio) -> dict[str, Any]:
    return {"precision": 0, "step": own.abilities.factor, "minimum": own.abilities.factor, "min_width": 90}
