"""Options shared by commands, and the values that they stand for."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from tamingfast.cli.arguments import classes, device, guidance, number, source, whole
from tamingfast.errors import UserError
from tamingfast.tasks.options import DrawingOptions

if TYPE_CHECKING:  # imports torch, which `tamingfast --help` does without
    from tamingfast.tasks.models import Unread

logger = logging.getLogger(__name__)

#: What argparse's ``add_subparsers`` returns; it has no public name.
Commands = Any


def command(
    to: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
    parents: Sequence[argparse.ArgumentParser] = (),
    together: bool = False,
) -> argparse.ArgumentParser:
    """Add a command ``name`` that calls ``run(arguments)`` to the commands ``to``; ``text`` is its help.

    ``together``: the processes of torchrun share its work.
    """
    added: argparse.ArgumentParser = to.add_parser(name, help=text, description=text, parents=list(parents))
    added.set_defaults(run=run, parser=added, together=together)
    return added


def options(*arguments: tuple[str, dict[str, Any]]) -> argparse.ArgumentParser:
    """A parser to list among the ``parents`` of commands, from (option, keywords of `add_argument`) pairs."""
    group = argparse.ArgumentParser(add_help=False)
    for name, settings in arguments:
        group.add_argument(name, **settings)
    return group


class _OldName(argparse.Action):
    """An option under its old name, which still works but logs a warning."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        logger.warning("%s is now called --%s; use that name", option, self.dest)
        setattr(namespace, self.dest, values)


_DEFAULT = {field.name: field.default for field in fields(DrawingOptions)}

DEVICE = options(("--device", {"type": device, "help": "cpu, cuda or cuda:N; default: a GPU if there is one"}))
ALLOW = options((
    "--allow",
    {
        "action": "append", "default": [], "metavar": "PACKAGE.CLASS",
        "help": "a class that is not ours, but which the model's config may name; can be repeated",
    },
))  # fmt: skip
FIRST_STAGE = options((
    "--first-stage",
    {
        "type": source, "metavar": "FILE",
        "help": "the first stage of a model that is a transformer alone, such as LlamaGen's",
    },
))  # fmt: skip
#: In the help of a command that takes a model.
OR_DEMO = "; or demo, which comes with the package"
RECONSTRUCT = "show the first stage's reconstruction of the kept part, not its own pixels"
JSON = options(
    ("--json", {"action": "store_true", "help": "print one JSON object, and nothing else, to standard output"})
)
METADATA = options((
    "--no-metadata",
    {
        "dest": "metadata", "action": "store_false",
        "help": "do not write into the PNG how it was made (`tamingfast inspect` shows it)",
    },
))  # fmt: skip
RESUME = options(("--resume", {"action": "store_true", "help": "continue the run in --out"}))
#: Of commands that only encode or decode; those that draw have the engine of `DRAWING`.
ENGINE = options(
    ("--engine", {"default": "auto", "help": "implementation of the first stage: auto, native or torch; default: auto"})
)
#: Before the default of an option that `tamingfast.sampling.settings.RECOMMENDED` contains.
_RECOMMENDED = "what the model recommends, or"
# argparse gets no defaults, so that `given_options` can tell which options were given; `DrawingOptions` has them.
DRAWING = options(
    (
        "--temperature",
        {"type": number, "help": f"divides the logits; default: {_RECOMMENDED} {_DEFAULT['temperature']:g}"},
    ),
    (
        "--top-k",
        {
            "type": whole(0, note=", 0 to keep all"),
            "help": f"sample from the k most likely tokens, 0 for all; default: {_RECOMMENDED} {_DEFAULT['top_k']}",
        },
    ),
    (
        "--top-p",
        {
            "type": number,
            "help": f"sample from the most likely tokens with this total probability; default: {_RECOMMENDED} 1",
        },
    ),
    ("--greedy", {"action": "store_true", "default": None, "help": "always take the most likely token"}),
    ("--seed", {"type": whole(0, 2**64 - 1), "help": f"default: {_DEFAULT['seed']}"}),
    ("--batch", {"type": whole(1), "help": f"images at a time; it does not change them; default: {_DEFAULT['batch']}"}),
    (
        "--schedule",
        {
            "help": f"window placement on large images: paper, scene, strided or block; default: {_RECOMMENDED} "
            f"{_DEFAULT['schedule']}"
        },
    ),
    (
        "--stride",
        {
            "type": whole(1),
            "help": f"tokens between windows, for strided and block; default: {_RECOMMENDED} {_DEFAULT['stride']}",
        },
    ),
    (
        "--engine",
        {"help": f"implementation: auto, native, torch, or naive priors; default: {_DEFAULT['engine']}"},
    ),
    ("--backend", {"dest": "engine", "action": _OldName, "help": argparse.SUPPRESS}),
    (
        "--cfg",
        {
            "type": guidance,
            "metavar": "SCALE",
            "help": "strength of classifier-free guidance, such as 4, or 4:cosine, which rises to it; for priors with "
            f"a null class, 1 for none; default: {_RECOMMENDED} none",
        },
    ),
    ("--dtype", {"help": "of the weights: float32, bfloat16, float16 or int8; default: as stored"}),
    (
        "--lookahead",
        {
            "type": whole(1),
            "help": "tokens guessed and checked at a time; it does not change the images; 1 guesses none; "
            "default: what is fastest",
        },
    ),
    (
        "--drafts",
        {
            "action": "store_true",
            "default": None,
            "help": "on a CPU, let an int8 copy of the prior guess tokens where that is faster; it does not change the "
            "images",
        },
    ),
)


def condition_options(**several: str) -> argparse.ArgumentParser:
    """Options for one condition or, with ``nargs="+"``, for one condition per image."""
    text = "label map, depth map, keypoints, edges, objects or small image to draw from"
    return options(
        (
            "--class",
            {
                "dest": "label",
                "type": classes,
                "metavar": "CLASS",
                "help": "name or number, or several separated by commas, for class-conditional priors; default: cycle "
                "through all",
            },
        ),
        (
            "--condition",
            {"type": source, "metavar": "FILE", "help": text + (", one per image" if several else "")} | several,
        ),
        (
            "--condition-of",
            {"type": source, "metavar": "PHOTO", "help": "compute the condition from this photo, if its kind can be"}
            | several,
        ),
    )


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `DRAWING` that were given, by their names in `DrawingOptions`."""
    given = {name: getattr(arguments, name) for name in _DEFAULT if getattr(arguments, name) is not None}
    if "top_k" in given:
        given["top_k"] = given["top_k"] or None
    return given


def size_of(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Pixels (height, width) of ``--size``; None without it."""
    if arguments.size is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})(?:[xX]([0-9]{1,9}))?", arguments.size)
    if found is None or "0" in {side.lstrip("0") or "0" for side in found.groups(found[1])}:
        raise UserError(f"--size: got {arguments.size}, expected HEIGHTxWIDTH in pixels, for example 256x512")
    return int(found[1]), int(found[2] or found[1])


def data_settings(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The ``data`` section that the overrides make up; None without overrides."""
    if not arguments.overrides:
        return None
    from omegaconf import OmegaConf

    from tamingfast.checkpoints.config import plain

    section: dict[str, Any] = plain(OmegaConf.from_dotlist(arguments.overrides))
    return section


def load(arguments: argparse.Namespace) -> Unread:
    """The model named on the command line, for the device of --device; it is read when it is needed."""
    from tamingfast.tasks import Unread

    return Unread(arguments.model, arguments.device, arguments.allow, getattr(arguments, "first_stage", None))
