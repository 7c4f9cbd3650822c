"""Commands that several processes of ``torchrun`` work on together, with one result and the messages of the first."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

from tamingfast.errors import Elsewhere, UserError


def follows() -> bool:
    """Whether torchrun has started this process as another than the first, which speaks for all before they meet."""
    # Read here, as `tamingfast.ranks` imports torch, which a mistake in the options need not wait for.
    size, rank = (os.environ.get(name, "").strip() for name in ("WORLD_SIZE", "RANK"))
    return size not in ("", "0", "1") and rank not in ("", "0")


@contextlib.contextmanager
def quiet_followers() -> Iterator[None]:
    """Inside, the first process alone says what is wrong with the words of the command, which all have got."""
    if not follows():
        yield
        return
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):  # of argparse
            yield
    except UserError as error:
        raise Elsewhere(str(error)) from error


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """Inside, a command that can be shared is one of several processes, if torchrun has started several."""
    if not (getattr(arguments, "together", False) and os.environ.get("WORLD_SIZE", "").strip()):
        yield
        return
    from tamingfast import ranks

    with ranks.world(arguments.device), contextlib.ExitStack() as stack:
        if not ranks.is_first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            logging.disable()
            stack.callback(logging.disable, logging.NOTSET)
        yield
