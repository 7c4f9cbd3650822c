"""The Dockerfile: it copies what a build needs and no more, and keeps to the rules of hadolint that concern it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]


def of(instruction: str) -> list[str]:
    """What follows an instruction each time that it stands in the file."""
    return [line.partition(" ")[2] for line in LINES if line.startswith(f"{instruction} ")]


def copied() -> list[str]:
    """The sources that are copied from the repository."""
    return [name for line in of("COPY") if "--from" not in line for name in line.split()[:-1]]


def test_the_copied_sources_are_not_ignored_and_nothing_else_is_sent():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert sorted(line[1:] for line in rules if line.startswith("!")) == sorted(copied())
    assert all((ROOT / name).exists() for name in copied())


def test_the_copied_sources_suffice_for_the_package(tmp_path):
    if importlib.util.find_spec("setuptools") is None:  # importing it here would fail after distutils has been
        pytest.skip("the build needs setuptools")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "kernels")
    for name in copied():
        target = tmp_path / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=ignored if name == "tamingfast" else None)
        else:
            shutil.copy(ROOT / name, target)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    built = {str(path.relative_to(tmp_path / "built")) for path in (tmp_path / "built").rglob("*") if path.is_file()}
    sources = [
        *ROOT.glob("tamingfast/**/*.py"),
        *ROOT.glob("tamingfast/configs/**/*.yaml"),
        ROOT / "tamingfast/py.typed",
    ]
    wanted = {str(path.relative_to(ROOT)) for path in sources}
    wanted |= {f"tamingfast/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/*.py")}
    assert wanted and not wanted - built


def test_base_images_have_versions_of_supported_pythons():
    images = [line.split()[0] for line in of("FROM")]
    versions = {re.fullmatch(r"python:(3\.\d+)(-slim)?-[a-z]+", image)[1] for image in images}
    assert len(versions) == 1  # the environment is copied from one to the other
    assert f"Python :: {versions.pop()}" in (ROOT / "pyproject.toml").read_text()


def test_installations_are_pinned_and_leave_no_caches():
    for run in of("RUN"):
        for install in re.findall(r"pip install.*", run):
            assert "--no-cache-dir" in install and "--constraint constraints.txt" in install
        if "apt-get" in run:
            assert "--no-install-recommends" in run and "rm -rf /var/lib/apt/lists/*" in run
        assert not re.search(r"\bsudo\b|\bcd \b|apt-get (dist-)?upgrade|\|", run)


def test_it_runs_the_command_as_an_ordinary_user():
    assert of("USER")[-1] not in ("root", "0") and of("WORKDIR")[-1].startswith("/")
    assert json.loads(of("ENTRYPOINT")[-1]) == ["tamingfast"] and json.loads(of("CMD")[-1]) == ["--help"]
