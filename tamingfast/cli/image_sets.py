"""Commands on a set of images: `reconstruct`, `complete` and `likelihood`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tamingfast import tasks
from tamingfast.cli.arguments import output, source, whole
from tamingfast.cli.options import (
    ALLOW,
    DEVICE,
    DRAWING,
    ENGINE,
    FIRST_STAGE,
    METADATA,
    OR_DEMO,
    RECONSTRUCT,
    Commands,
    command,
    condition_options,
    given_options,
    load,
    size_of,
)
from tamingfast.cli.progress import bars_of, say_written
from tamingfast.errors import UserError
from tamingfast.files import check_png
from tamingfast.tasks.options import LIKELIHOOD_BATCH, STRIDES, TIMES


def add_to(commands: Commands) -> None:
    """Declare the three commands."""
    added = _command(commands, "reconstruct", reconstruct, "show images above their reconstructions", (ENGINE,))
    added.add_argument("--out", type=output, default="reconstructed.png", help="PNG to write (default: %(default)s)")

    text = "keep the upper half of images and redraw the lower half"
    added = _command(
        commands, "complete", complete, text, (FIRST_STAGE, DRAWING, condition_options(nargs="+"), METADATA)
    )
    added.add_argument("--out", type=output, default="completed.png", help="PNG to write (default: %(default)s)")
    added.add_argument("--reconstruct", action="store_true", help=RECONSTRUCT)
    added.add_argument("--times", type=whole(1), default=TIMES, help="completions of each image (default: %(default)s)")

    text = "measure what each schedule costs, in nats per token of real images"
    added = _command(commands, "likelihood", likelihood, text, (FIRST_STAGE, ENGINE, condition_options(nargs="+")))
    added.add_argument(
        "--strides",
        type=whole(1),
        nargs="+",
        default=list(STRIDES),
        help=f"for strided and block (default: {STRIDES[0]})",
    )
    added.add_argument(
        "--batch", type=whole(1), default=LIKELIHOOD_BATCH, help="images at a time (default: %(default)s)"
    )
    added.add_argument("--plot", type=output, metavar="PNG", help="plot likelihood against work")


def _command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
    parents: Sequence[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    added = command(commands, name, run, text, (DEVICE, ALLOW, *parents), together=name == "likelihood")
    added.add_argument("model", type=source, help=f"run directory or checkpoint{OR_DEMO}")
    added.add_argument("images", type=source, nargs="+", help="image files, or directories of them")
    whole = "the training size" if name == "likelihood" else "each whole, its sides rounded down to multiples of f"
    added.add_argument("--size", help=f"HEIGHTxWIDTH in pixels to scale and cut them to; default: {whole}")
    return added


def _pictures(arguments: argparse.Namespace, option: str, written: str | None) -> list[Path]:
    """The given pictures and those in given directories; UserError if writing would replace one of them."""
    found = tasks.image_files(arguments.images)
    for path in found:
        if written and os.path.exists(written) and os.path.exists(path) and os.path.samefile(path, written):
            raise UserError(f"{option}: got {written}, expected another file than the images, which are kept")
    return found


def reconstruct(arguments: argparse.Namespace) -> None:
    from tamingfast import images

    check_png(arguments.out)
    size = size_of(arguments)
    pictures = _pictures(arguments, "--out", arguments.out)
    found = tasks.reconstruct(load(arguments), pictures, size=size, engine=arguments.engine, bars=bars_of(arguments))
    images.save_rows(arguments.out, [found.images, found.reconstructed])
    print(json.dumps(found.figures))
    say_written(arguments.out)


def complete(arguments: argparse.Namespace) -> None:
    check_png(arguments.out)
    size, model = size_of(arguments), load(arguments)
    options = tasks.drawing_options(model, **given_options(arguments))
    found = tasks.complete(
        model, _pictures(arguments, "--out", arguments.out), arguments.times, size=size,
        label=arguments.label, conditions=arguments.condition, conditions_of=arguments.condition_of,
        own_pixels=not arguments.reconstruct, options=options, metadata=arguments.metadata,
        bars=bars_of(arguments),
    )  # fmt: skip
    found.save(arguments.out)
    say_written(arguments.out)


def likelihood(arguments: argparse.Namespace) -> None:
    from tamingfast.evaluation import plot_schedules
    from tamingfast.ranks import is_first

    if arguments.plot:
        check_png(arguments.plot)
    size = size_of(arguments)
    costs = tasks.likelihood(
        load(arguments), _pictures(arguments, "--plot", arguments.plot), size=size, label=arguments.label,
        conditions=arguments.condition, conditions_of=arguments.condition_of, strides=arguments.strides,
        batch=arguments.batch, engine=arguments.engine, bars=bars_of(arguments),
    )  # fmt: skip
    rows = [asdict(cost) for cost in costs]
    for row in rows:
        print(json.dumps(row))
    if arguments.plot and is_first():
        plot_schedules(arguments.plot, rows)
        say_written(arguments.plot)
