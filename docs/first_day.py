"""Runs the walk of docs/first-day.md: its code blocks, in order, in a fresh directory.

    python docs/first_day.py            # a quarter of an hour on two CPU cores
    python docs/first_day.py --quick    # trainings of seconds
    python docs/first_day.py --offline  # without the blocks that need a network, and with downloads forbidden

Blocks that begin with ```bash install are left out: this script needs the installation to run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).with_name("first-day.md")
QUICK_SECONDS = 2


class Block(NamedTuple):
    """A code block of a page."""

    language: str
    kind: str  # the second word of its first line: "install", "network" or ""
    text: str


def blocks(page: Path) -> list[Block]:
    """The code blocks of a Markdown page that can be run."""
    found = re.findall(r"^```(bash|python) ?(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [Block(*each) for each in found]


def quick(text: str, before: int) -> str:
    """The block with trainings of `QUICK_SECONDS` seconds more than ``before``, the seconds of earlier ones."""
    return re.sub(r"training\.seconds=\d+", f"training.seconds={before + QUICK_SECONDS}", text)


def environment(offline: bool) -> dict[str, str]:
    """The variables of a reader's shell, in which `tamingfast` and `python` are those of this environment."""
    folder = Path(sys.executable).parent
    own = {"PATH": os.pathsep.join((str(folder), os.environ.get("PATH", os.defpath)))}
    return os.environ | own | ({"TAMINGFAST_OFFLINE": "1"} if offline else {})


def run(block: Block, directory: Path, environment: dict[str, str]) -> None:
    """Run one block as a reader would; CalledProcessError if it fails."""
    command = ["bash", "-e", "-c", block.text] if block.language == "bash" else [sys.executable, "-c", block.text]
    subprocess.run(command, cwd=directory, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument(
        "--directory", type=Path, help="an empty one to work in; default: a temporary one, then removed"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory, trainings = options.directory or Path(temporary), 0
        directory.mkdir(parents=True, exist_ok=True)
        for block in blocks(PAGE):
            if block.kind == "install" or (block.kind == "network" and options.offline):
                continue
            if options.quick:
                block = block._replace(text=quick(block.text, trainings * QUICK_SECONDS))
                trainings += "training.seconds" in block.text
            print(f"\n$ {block.text.strip()}", flush=True)
            began = time.monotonic()
            try:
                run(block, directory, environment(options.offline))
            except subprocess.CalledProcessError as error:
                sys.exit(f"failed with exit status {error.returncode}")
            print(f"[{time.monotonic() - began:.1f} s]", flush=True)


if __name__ == "__main__":
    main()
