"""`tamingfast ui`: the page for people."""

from __future__ import annotations

import argparse

from tamingfast.cli.arguments import address, source, whole
from tamingfast.cli.options import ALLOW, DEVICE, FIRST_STAGE, OR_DEMO, Commands, command, load


def add_to(commands: Commands) -> None:
    """Declare the command."""
    text = "a page in the browser to sample, paint, reconstruct and inspect with a model"
    added = command(commands, "ui", ui, text, (DEVICE, ALLOW, FIRST_STAGE))
    added.add_argument(
        "model", type=source, nargs="?", default="demo",
        help=f"run directory or checkpoint{OR_DEMO} (default: %(default)s)",
    )  # fmt: skip
    added.add_argument(
        "--host", type=address, default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets everyone in who reaches this machine (default: %(default)s)",
    )  # fmt: skip
    added.add_argument("--port", type=whole(1, 65535), help="default: the first free one from 7860 on")


def ui(arguments: argparse.Namespace) -> None:
    from tamingfast.ui import server

    server.serve(
        load(arguments), arguments.host, arguments.port,
        lambda address: print(f"open {address} in a browser; Ctrl-C ends the page", flush=True),
    )  # fmt: skip
