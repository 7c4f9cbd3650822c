"""Whether an installed tamingfast works as people find it: ``PYTHON .ci/smoke.py`` checks that of PYTHON.

It must have the extension, leave alone what torch brought, and draw the README's first picture with nothing on the path
but its own commands: no compiler, and no network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    scripts = sysconfig.get_path("scripts")
    command = Path(scripts, "tamingfast")
    # The working directory is elsewhere, so that no checkout is imported.
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": scripts, "HOME": folder, "TAMINGFAST_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}

        def answer(*words: str) -> str:
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
            if done.returncode != 0:
                sys.exit(f"{' '.join(words)}: exit status {done.returncode}\n{done.stderr}")
            return done.stdout

        home = Path(answer(sys.executable, "-c", "import tamingfast; print(tamingfast.__file__)").strip())
        check(ROOT not in home.parents or Path(sys.prefix) in home.parents, f"{home}: a checkout, not an installation")
        said = answer(str(command), "info")
        print(said)
        check("native     yes" in said, "no native extension")
        answer(str(command), "sample", "demo", "-n", "4", "--seed", "1", "--out", "demo.png")
        with Image.open(Path(folder, "demo.png")) as picture:
            colours = picture.convert("RGB").getcolors(1 << 24) or []
            check(len(colours) > 500, f"demo.png: {len(colours)} colours, expected a picture")
        check('"seed": 1' in answer(str(command), "inspect", "demo.png"), "the picture does not say how it was made")
    check_torch()
    print(f"tamingfast {metadata.version('tamingfast')} works on Python {sys.version.split()[0]} ({os.name})")


def check_torch() -> None:
    """Nothing but torch itself may have asked for parts of a build for GPUs."""
    names = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
    asked = " ".join(metadata.requires("torch") or ()).lower()
    foreign = [name for name in names if name.startswith(("nvidia-", "torchvision", "triton")) and name not in asked]
    if "nvidia-" not in asked:  # a torch for CPUs
        check(not foreign, f"got {', '.join(sorted(foreign))} beside a torch for CPUs")


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"tamingfast: {otherwise}")


if __name__ == "__main__":
    main()
