"""The workflows call what exists, for the Pythons that the package names, with no more rights than they need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_workflow_calls_what_exists(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for step in steps(path):
        for command in re.findall(r"^make (.+)$", step.get("run", ""), re.MULTILINE):
            assert set(command.split()) <= targets
        assert "run" in step or re.fullmatch(r"[\w-]+(/[\w-]+)+@(v\d+(\.\d+)*|release/v\d+)", step["uses"])
    for job in read(path)["jobs"].values():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_ends(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 120
        assert "permissions" not in job or name == "publish"


def test_all_supported_pythons_are_tested_and_get_wheels():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    supported = re.findall(r"Python :: (3\.\d+)", project)
    assert (
        read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == supported
    )
    assert re.findall(r'"cp3(\d+)-\*"', project) == [version.partition(".")[2] for version in supported]


def test_the_tag_of_a_release_is_compared_with_the_version():
    (command,) = [step["run"] for step in steps(ROOT / ".github" / "workflows" / "release.yml") if "grep" in str(step)]
    line = re.search(r'"(__version__ = .*)" (\S+)$', command)
    wanted = line[1].replace("\\", "").replace("${GITHUB_REF_NAME#v}", "0.1.0")
    assert wanted in (ROOT / line[2]).read_text(encoding="utf-8").splitlines()
