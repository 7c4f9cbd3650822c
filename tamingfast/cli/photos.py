"""Commands on a set of images: `reconstruct`, `complete` and `likelihood`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from tamingfast.cli.conditions import condition_options, conditions_of_each, tokens_of_each
from tamingfast.cli.options import DEVICE, DRAWING, at_least_one, command, drawing_settings, load, named_images
from tamingfast.cli.progress import progress_bar, say_written
from tamingfast.files import check_png


def add_to(commands: Any) -> None:
    added = _command(commands, "reconstruct", reconstruct, "images above what the first stage makes of them", ())
    added.add_argument("--out", default="reconstructed.png", help="PNG to write (default: %(default)s)")

    text = "keep the upper half of images and draw the lower half anew"
    added = _command(commands, "complete", complete, text, (DRAWING, condition_options(nargs="+")))
    added.add_argument("--out", default="completed.png", help="PNG to write (default: %(default)s)")
    added.add_argument("--times", type=int, default=3, help="completions of each image (default: %(default)s)")

    text = "what each schedule costs: nats per token of real images"
    added = _command(commands, "likelihood", likelihood, text, (condition_options(nargs="+"),))
    added.add_argument("--strides", type=int, nargs="+", default=[8], help="of strided and block (default: 8)")
    added.add_argument("--batch", type=int, default=4, help="images at a time (default: %(default)s)")
    added.add_argument("--plot", metavar="PNG", help="plot likelihood against work")


def _command(commands: Any, name: str, run: Callable, text: str, parents: Sequence) -> argparse.ArgumentParser:
    added = command(commands, name, run, text, (DEVICE, *parents))
    added.add_argument("model", help="run directory or checkpoint")
    added.add_argument("images", nargs="+", help="image files, or directories of them")
    added.add_argument("--size", help="HEIGHTxWIDTH in pixels to cut them to; default: as trained")
    return added


def reconstruct(arguments: argparse.Namespace) -> None:
    from tamingfast import images, tasks

    check_png(arguments.out)
    model = load(arguments)
    x, _ = named_images(arguments, model)
    out, figures = tasks.reconstruct(model, x)
    images.save_rows(arguments.out, [x, out])
    print(json.dumps(figures))
    say_written(arguments.out)


def complete(arguments: argparse.Namespace) -> None:
    import torch

    from tamingfast import images, tasks

    check_png(arguments.out)
    model = tasks.check_windowed(load(arguments))
    x, files = named_images(arguments, model)
    conditions = conditions_of_each(arguments, model, files, x.shape[2:])
    cond = tokens_of_each(arguments, model, conditions, len(x))
    rows = [x]
    if conditions:
        rows.insert(0, torch.cat([tasks.condition_picture(model, condition) for condition in conditions]))
    for again in range(at_least_one(arguments.times, "--times")):
        with progress_bar("tokens") as bar:
            rows.append(
                tasks.complete(
                    model, x, cond, first_image=again * len(x), progress=bar.moved, **drawing_settings(arguments)
                )
            )
    images.save_rows(arguments.out, rows)
    say_written(arguments.out)


def likelihood(arguments: argparse.Namespace) -> None:
    from tamingfast import tasks
    from tamingfast.evaluation import plot_schedules

    if arguments.plot:
        check_png(arguments.plot)
    model = tasks.check_windowed(load(arguments))
    x, files = named_images(arguments, model)
    cond = tokens_of_each(arguments, model, conditions_of_each(arguments, model, files, x.shape[2:]), len(x))
    with progress_bar("schedules") as bar:
        rows = tasks.likelihood(
            model, x, cond, arguments.strides, at_least_one(arguments.batch, "--batch"), progress=bar.moved
        )
    for row in rows:
        print(json.dumps(row))
    if arguments.plot:
        plot_schedules(arguments.plot, rows)
        say_written(arguments.plot)
