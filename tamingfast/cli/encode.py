"""`tamingfast encode`: a data set as tokens."""

from __future__ import annotations

import argparse
from typing import Any

from tamingfast.cli.options import DEVICE, command, data_settings, load
from tamingfast.cli.progress import progress_bar


def add_to(commands: Any) -> None:
    added = command(commands, "encode", encode, "turn a data set into a token file for `train prior`", (DEVICE,))
    added.add_argument("model", help="run directory or checkpoint of a first stage")
    added.add_argument("--out", required=True, help="token file to write (.safetensors)")
    added.add_argument("--cond-stage", help="run or checkpoint of the conditions' first stage, where they have one")
    added.add_argument("--split", choices=("train", "validation"), default="train")
    added.add_argument("--batch", type=int, default=64)
    text = "the data set, e.g. name=folder path=DIR size=256; default: what the model was trained on"
    added.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def encode(arguments: argparse.Namespace) -> None:
    from tamingfast import tasks
    from tamingfast.checkpoints import load_model
    from tamingfast.training.settings import build_datasets

    model = load(arguments)
    cond_stage = None
    if arguments.cond_stage is not None:
        cond_stage = tasks.first_stage_of(load_model(arguments.cond_stage, device=model.device))
    data = data_settings(arguments, cond_stage or model)
    tasks.check_encodable(data)
    train, validation = build_datasets({"data": data})
    dataset = train if arguments.split == "train" else validation
    with progress_bar("images", len(dataset)) as bar:
        count = tasks.encode(model, dataset, arguments.out, arguments.batch, bar.update, cond_stage)
    print(f"written: {arguments.out}, {count} images")
