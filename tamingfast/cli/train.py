"""`tamingfast train`: first stages and priors."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tamingfast import presets
from tamingfast.cli.arguments import output_directory, source, whole
from tamingfast.cli.options import ALLOW, DEVICE, RESUME, Commands, command
from tamingfast.cli.progress import say_written
from tamingfast.errors import UserError


def add_to(commands: Commands) -> None:
    text = "train a first stage or a prior"
    train = _with_presets(commands.add_parser("train", help=text, description=text), "vqgan", "prior")
    stages = train.add_subparsers(required=True, metavar="STAGE")
    _command(stages, "vqgan", train_vqgan, "the first stage: images to tokens and back")
    added = _command(stages, "prior", train_prior, "the second stage: a transformer over the tokens")
    added.add_argument("--first-stage", type=source, help="run or checkpoint of the first stage")
    added.add_argument(
        "--cond-stage", type=source, help="run or checkpoint of the condition's first stage, if it has one"
    )


def _command(
    stages: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    added = command(stages, name, run, text, (DEVICE, ALLOW, RESUME), together=True)
    added.add_argument("--out", type=output_directory, required=True, help="run directory to write")
    added.add_argument(
        "--from", dest="start", type=source, metavar="MODEL",
        help="begin with the weights of this run or checkpoint, whose architecture replaces the config's",
    )  # fmt: skip
    added.add_argument("--seed", type=whole(0, 2**64 - 1), help="the same as training.seed=N")
    text = (
        "a preset or a YAML file (the original's work too), then settings that override it; with --resume, CONFIG can "
        "be left out, as the run has its own"
    )
    added.add_argument("overrides", nargs="*", metavar="CONFIG | key=value", help=text)
    return _with_presets(added, name)


def _with_presets(parser: argparse.ArgumentParser, *stages: str) -> argparse.ArgumentParser:
    """The parser, whose help ends with the table of presets of these stages."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = presets.table(*stages)
    return parser


def train_vqgan(arguments: argparse.Namespace) -> None:
    from tamingfast.training import vqgan

    where = (arguments.out, arguments.resume, arguments.device)
    say_written(vqgan.train(_config(arguments), *where, start=arguments.start, allow=arguments.allow))


def train_prior(arguments: argparse.Namespace) -> None:
    from tamingfast.training import prior

    config = _config(arguments)
    _need_first_stage(arguments, config)
    where = (arguments.first_stage, arguments.out, arguments.resume, arguments.device)
    more = {"cond_stage": arguments.cond_stage, "start": arguments.start}
    say_written(prior.train(config, *where, **more, allow=arguments.allow))


def _config(arguments: argparse.Namespace) -> Any:
    from tamingfast.training import load_config, resumed_config

    # One positional list, because argparse would mistake the first setting for the config if that is left out.
    words = list(arguments.overrides)
    name = words.pop(0) if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    if arguments.start is not None:
        _check_start(arguments.resume, words)
    words += [] if arguments.seed is None else [f"training.seed={arguments.seed}"]
    if arguments.resume:
        return resumed_config(arguments.out, name, words, allow=arguments.allow)
    if name is None:
        raise UserError("CONFIG: got none, expected a preset or a YAML file; give one, or --resume to continue --out")
    return load_config(name, words)


def _check_start(resumed: bool, settings: Sequence[str]) -> None:
    """Raise UserError for what has no effect beside the weights to begin with."""
    if resumed:
        raise UserError("--from: got a model to begin with for a run that has begun, expected none; leave it out")
    for setting in settings:
        if re.match(r"prior\.|model\.(target|params\.(?!lossconfig|monitor))", setting):
            raise UserError(
                f"{setting.partition('=')[0]}: got a setting of the model that --from gives, expected settings of its "
                "training, such as model.params.lossconfig or model.base_learning_rate; leave it out"
            )


def _need_first_stage(arguments: argparse.Namespace, config: Any) -> None:
    # Only a run's config and one in the original's layout name their first stage themselves.
    if arguments.first_stage is None and arguments.start is None:
        if arguments.cond_stage is not None:
            raise UserError("--first-stage: got --cond-stage alone, expected the images' first stage too; give both")
        params = (config.get("model") or {}).get("params") or {}
        if "first_stage_config" not in params:
            raise UserError(
                "--first-stage: got none, expected a first stage, as the config names none; give a run of "
                "`tamingfast train vqgan`"
            )
