"""`tamingfast encode`: a data set as tokens."""

from __future__ import annotations

import argparse

from tamingfast import tasks
from tamingfast.cli.arguments import output, source, whole
from tamingfast.cli.options import ALLOW, DEVICE, ENGINE, OR_DEMO, Commands, command, data_settings, load
from tamingfast.cli.progress import bars_of, say_written
from tamingfast.tasks.options import ENCODING_BATCH, SPLITS


def add_to(commands: Commands) -> None:
    """Declare the command."""
    added = command(
        commands,
        "encode",
        encode,
        "turn a data set into a token file for `train prior`",
        (DEVICE, ALLOW, ENGINE),
        together=True,
    )
    added.add_argument("model", type=source, help=f"run directory or checkpoint of a first stage{OR_DEMO}")
    added.add_argument("--out", type=output, required=True, help="token file to write (.safetensors)")
    added.add_argument(
        "--cond-stage", type=source, help="run or checkpoint of the conditions' first stage, if they have one"
    )
    added.add_argument("--split", choices=SPLITS, default=SPLITS[0])
    added.add_argument("--batch", type=whole(1), default=ENCODING_BATCH)
    text = "the data set, e.g. name=folder path=DIR size=256; default: the one that the model was trained on"
    added.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def encode(arguments: argparse.Namespace) -> None:
    cond_stage = None
    if arguments.cond_stage:
        cond_stage = tasks.Unread(arguments.cond_stage, arguments.device, arguments.allow)
    count = tasks.encode(
        load(arguments), data_settings(arguments), arguments.out, split=arguments.split, cond_stage=cond_stage,
        batch=arguments.batch, engine=arguments.engine, bars=bars_of(arguments),
    )  # fmt: skip
    say_written(arguments.out, f"{count} images")
