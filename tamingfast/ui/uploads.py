"""Fields for files, whose content Gradio does not decode: the tasks do, with the limits that files have."""

from __future__ import annotations

import tempfile
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import gradio as gr


def _derived(base: Any, **methods: Callable[..., Any]) -> Any:
    """A field with other methods, shown in the browser as its base.

    It is made past the metaclass of Gradio's fields, which would write a stub file beside this one; and it keeps the
    constructor of the base, from whose signature Gradio reads the settings to send to the browser.
    """

    async def moved(field: Any, path: Any) -> Any:
        if "://" in str(path):  # which Gradio would fetch
            raise gr.Error("An upload is a file, not an address", print_exception=False)
        return await base.async_move_resource_to_block_cache(field, path)

    members = {"__module__": __name__, "is_template": True, "async_move_resource_to_block_cache": moved, **methods}
    return ABCMeta.__new__(type(base), f"{base.__name__}Upload", (base,), members)


def _path(field: Any, payload: Any) -> str | None:
    return None if payload is None else payload.path


def _path_of_part(field: Any, part: Any, flatten_on_white: bool = False) -> str | None:
    """The path of a part of an edited picture, which the browser sent as a file or as the bytes of one."""
    if part is None or not isinstance(part, bytes | bytearray | memoryview):
        return _path(field, part)
    with tempfile.NamedTemporaryFile(dir=field.GRADIO_CACHE, suffix=".png", delete=False) as written:
        written.write(part)
    return written.name


_File = _derived(gr.File)
_Photo = _derived(gr.Image, preprocess=_path)
_Editor = _derived(gr.ImageEditor, convert_and_format_image=_path_of_part)


def file(label: str, height: int, file_types: list[str] | None = None, visible: bool = True) -> gr.File:
    """A file that is handed on as its path."""
    return _File(label=label, height=height, file_types=file_types, visible=visible, type="filepath")


def photo(label: str, height: int, visible: bool = True, interactive: bool = True) -> gr.Image:
    """A picture that is handed on as the path of the uploaded file."""
    return _Photo(
        label=label,
        height=height,
        visible=visible,
        interactive=interactive,
        type="filepath",
        format="png",
        sources=["upload", "clipboard"],
        buttons=[],
    )


def editor(label: str, height: int, brush: gr.Brush) -> gr.ImageEditor:
    """A picture with strokes over it, handed on as paths: ``{"layers": [...], "composite": ...}``."""
    return _Editor(
        label=label, height=height, brush=brush, type="filepath", format="png", sources=(), transforms=(),
        layers=False, buttons=[], canvas_size=(512, 512),
    )  # fmt: skip
