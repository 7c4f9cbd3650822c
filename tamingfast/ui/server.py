"""Serves the page: to this machine unless told otherwise, and nothing to anyone else."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tamingfast import tasks
from tamingfast.errors import UserError
from tamingfast.ui.studio import Studio

HOST, PORT = "127.0.0.1", 7860
#: The largest file that is taken in: checkpoints to inspect among them.
LARGEST_UPLOAD = "2gb"
#: Ports that are tried, from `PORT` on, where none is asked for.
_TRIED = 100


def serve(
    model: tasks.Unread,
    host: str = HOST,
    port: int | None = None,
    ready: Callable[[str], object] = lambda address: None,
) -> None:
    """Serve the page of a model until Ctrl-C; ``ready`` is called with its address.

    ``port`` None is the first free one from `PORT` on. Raises UserError without Gradio, for a port that is taken, and
    as the model does.
    """
    with served(model, host, port) as (page, address):
        ready(address)
        page.block_thread()


@contextlib.contextmanager
def served(model: tasks.Unread, host: str = HOST, port: int | None = None) -> Iterator[tuple[Any, str]]:
    """The page, which is served inside the block, and its address."""
    with tempfile.TemporaryDirectory(prefix="tamingfast-ui-", ignore_cleanup_errors=True) as folder, _private(folder):
        page_module = _page_module()
        studio = Studio(model, Path(folder, "desks"))
        studio.desks.folder.mkdir()
        _ = model.model  # so that a damaged file is told now, and the first visitor does not wait
        page = page_module.built(studio)
        address = _launched(page, page_module, host, port)
        try:
            yield page, address
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def _private(folder: str) -> Iterator[None]:
    """Inside the block Gradio reports nothing and keeps its files in this folder.

    It reads the environment when it is imported, when fields are made, and when files come.
    """
    values = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(Path(folder, "uploads"))}
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _page_module() -> Any:
    try:
        from tamingfast.ui import page
    except ImportError as error:
        raise UserError(
            f"gradio: got '{error}', expected the package, which shows the page; run pip install 'gradio<7'"
        ) from error
    return page


def _launched(page: Any, page_module: Any, host: str, port: int | None) -> str:
    import gradio as gr

    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]  # of the browser: none is fetched
    theme = gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, prevent_thread_lock=True, quiet=True,
            show_error=False, allowed_paths=[], max_file_size=LARGEST_UPLOAD, ssr_mode=False, pwa=False,
            mcp_server=False, enable_monitoring=False, footer_links=[], theme=theme, css=page_module.CSS,
            head=page_module.HEAD,
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"port: got {port or f'{PORT} to {PORT + _TRIED - 1}'} on {host}, which cannot be listened on, expected a "
            "free port of this machine; give another one"
        ) from error
    return str(address)
