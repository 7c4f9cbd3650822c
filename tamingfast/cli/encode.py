"""`tamingfast encode`: a data set as tokens."""

from __future__ import annotations

import argparse

from tamingfast import tasks
from tamingfast.cli.arguments import output_or_directory, source, views, whole
from tamingfast.cli.options import ALLOW, DEVICE, ENGINE, OR_DEMO, Commands, command, data_settings, load
from tamingfast.cli.progress import bars_of, say_written
from tamingfast.tasks.options import ENCODING_BATCH, SPLITS, TEN_CROP


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
    text = "token file to write (.safetensors), with --shard the directory of the files"
    added.add_argument("--out", type=output_or_directory, required=True, help=text)
    added.add_argument(
        "--cond-stage", type=source, help="run or checkpoint of the conditions' first stage, if they have one"
    )
    added.add_argument("--split", choices=SPLITS, default=SPLITS[0])
    text = "views of each image: as many random crops, mirrored or not, as in N epochs of a training; or its ten crops"
    added.add_argument("--views", type=views, default=1, metavar=f"N|{TEN_CROP}", help=text)
    added.add_argument("--shard", type=whole(1), metavar="GRIDS", help="write several files, of so many grids each")
    added.add_argument(
        "--resume", action="store_true", help="keep the files in --out, and write those that are missing"
    )
    added.add_argument("--batch", type=whole(1), default=ENCODING_BATCH)
    text = "the data set, e.g. name=folder path=DIR size=256; default: the one that the model was trained on"
    added.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def encode(arguments: argparse.Namespace) -> None:
    cond_stage = None
    if arguments.cond_stage:
        cond_stage = tasks.Unread(arguments.cond_stage, arguments.device, arguments.allow)
    count = tasks.encode(
        load(arguments), data_settings(arguments), arguments.out, split=arguments.split, cond_stage=cond_stage,
        views=arguments.views, shard=arguments.shard, resume=arguments.resume, batch=arguments.batch,
        engine=arguments.engine, bars=bars_of(arguments),
    )  # fmt: skip
    say_written(arguments.out, f"{count} images" if arguments.views == 1 else f"{count} views of images")
