"""What the package requires, what its extras bring, and what its messages advise to install."""

from __future__ import annotations

import ast
import contextlib
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def test_requirements_are_open_ranges():
    required = metadata.requires("tamingfast")
    assert required
    assert not [line for line in required if "==" in line.split(";")[0]]


def closure(extra: str) -> set[str]:
    """The distributions that an extra brings beside torch and what torch itself requires."""
    found: set[str] = set()
    queue = [Requirement(line) for line in metadata.requires("tamingfast")]
    queue = [one for one in queue if one.marker is None or one.marker.evaluate({"extra": extra})]
    while queue:
        name = canonicalize_name(queue.pop().name)
        if name == "torch" or name in found:
            continue
        found.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines = [Requirement(line) for line in metadata.requires(name) or ()]
            queue += [one for one in lines if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.parametrize("extra", ["", "train", "export", "lightning", "evaluate", "demo"])
def test_extras_leave_the_installed_torch_alone(extra):
    """torchvision replaces a torch of another index by its own; Triton is of no use beside a torch for CPUs."""
    brought = closure(extra)
    assert {"numpy", "safetensors"} <= brought
    assert not [name for name in brought if name in ("torchvision", "triton") or name.startswith("nvidia-")]


def test_advice_works_however_the_package_was_installed():
    """It names packages, as an extra's name means nothing to an environment without the package's index."""
    advice = [
        (path, command)
        for path in ROOT.glob("tamingfast/**/*.py")
        for command in re.findall(r"pip install[^`'\n]*", re.sub(r"\"\n\s+f?\"", "", path.read_text(encoding="utf-8")))
        if path.name != "model_card.py"  # which speaks to those who have not installed anything
    ]
    assert len(advice) > 5
    assert not [each for each in advice if "tamingfast" in each[1]]


def test_extras_that_the_documentation_names_exist():
    pages = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md"), *ROOT.glob("tamingfast/**/*.py")]
    named = {
        extra
        for page in pages
        for extras in re.findall(r"(?:tamingfast|['\s]\.)\[([a-z,]+)\]", page.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert named
    assert named <= set(metadata.metadata("tamingfast").get_all("Provides-Extra"))


def test_constraints_pin_what_make_installs_of_the_package():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    required = [
        line
        for line in metadata.requires("tamingfast")
        if not re.search("extra == (?!.(docs|examples|lint|package|test))", line)
    ]
    tools = ast.literal_eval(re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M).group(1))
    assert {re.match(r"[\w-]+", line).group() for line in (*required, *tools)} <= pinned
