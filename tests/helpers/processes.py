"""Python in a process of its own, to test what is decided once per process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a program in a fresh interpreter."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TAMINGFAST_")}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=120)
