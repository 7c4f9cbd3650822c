"""Programs written for the original on our classes: ``python -m tamingfast.compat script.py arguments...``.

The script runs unchanged; its imports of ``taming`` and ``ldm`` find our classes, and for names that we lack those of a
copy of the original, if there is one (`install`). ``-m module`` runs a module instead.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from tamingfast.checkpoints.compat import LACKING, NAMES, SERVED, install, is_ours, resolve

__all__ = ["NAMES", "install", "is_ours", "main", "resolve"]
_USAGE = "usage: python -m tamingfast.compat (script.py | -m module) [arguments...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script as ``python`` would, with `install` before it; the exit status, 2 if there is no such script.

    Whatever the script raises passes; an ImportError for a module that is found nowhere also says what to do.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_module = words[:1] == ["-m"]
    words = words[is_module:]
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stderr if not words else sys.stdout)
        return 0 if words else 2
    if not is_module and not os.path.exists(words[0]):
        print(f"{words[0]}: got no such file, expected a script; {_USAGE}", file=sys.stderr)
        return 2
    install()
    sys.argv = words
    # As `python script.py` and `python -m module` have it.
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(words[0]))
    try:
        if is_module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{error.name}.".startswith(SERVED):
            raise
        raise ModuleNotFoundError(f"{error}: {LACKING}", name=error.name) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
