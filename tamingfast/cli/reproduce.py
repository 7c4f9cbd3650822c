"""`tamingfast reproduce`: the experiments of the papers."""

from __future__ import annotations

import argparse
import sys

from tamingfast import reproduce as experiments
from tamingfast.cli.arguments import output_directory
from tamingfast.cli.options import DEVICE, RESUME, Commands, command


def add_to(commands: Commands) -> None:
    added = command(commands, "reproduce", reproduce, "run an experiment and write a report", (DEVICE, RESUME))
    added.add_argument("--preset", default="cpu", help="smoke, cpu (default) or, for pixels, paper")
    added.add_argument(
        "--out",
        type=output_directory,
        help="directory of the report; default: runs/reproduce for pixels, else runs/EXPERIMENT",
    )
    text = (
        f"one of {', '.join(experiments.EXPERIMENTS)} (default: {experiments.DEFAULT}), then settings that override "
        f"the preset's; or all, which leaves out {', '.join(experiments.ALONE)}, with settings EXPERIMENT.key=value"
    )
    added.add_argument("overrides", nargs="*", metavar="EXPERIMENT | key=value", help=text)


def reproduce(arguments: argparse.Namespace) -> None:
    # One positional list, because argparse would mistake the first setting for an experiment left out.
    words = list(arguments.overrides)
    experiment = words.pop(0) if words and "=" not in words[0] else experiments.DEFAULT
    out = arguments.out or ("runs/reproduce" if experiment == experiments.DEFAULT else f"runs/{experiment}")
    path = experiments.run(experiment, arguments.preset, out, words, arguments.resume, arguments.device)
    print(path.read_text(encoding="utf-8"))
    print(f"written: {path} and the pictures beside it", file=sys.stderr)
