"""The benchmarks as a whole; each validates its own results before it times them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.name for path in (ROOT / "benchmarks").glob("test_*.py"))


def run(*words: str) -> str:
    """What pytest prints about the benchmarks."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quick_has_few_cases_of_every_file():
    pytest.importorskip("pytest_benchmark")
    counts = dict(re.findall(r"benchmarks/(\w+\.py): (\d+)", run("benchmarks", "--quick", "--collect-only", "-qq")))
    assert sorted(counts) == FILES
    assert max(map(int, counts.values())) <= 5


@pytest.mark.exhaustive
def test_quick_shows_results_and_the_reasons_of_skips():
    pytest.importorskip("pytest_benchmark")
    shown = run("benchmarks/test_group_norm.py", "--quick")
    assert re.search(r"ms, [\d.]+x the best of torch [\d.]+ ms", shown)
    assert "SKIPPED" not in shown or re.search(r"SKIPPED \[1\] \S+: no GPU: ", shown)
