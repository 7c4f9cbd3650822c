"""The commands of the README and of the guides run, as they stand there, on a desk with small stand-ins.

A page is run from top to bottom. What cannot be run here is listed with its reason.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import documented
import pytest
import torch
from documented import PAGES, execute, lines

#: What cannot be run -> why.
NOT_RUN = {
    r"^pip install|^source ": "changes the environment; .ci/smoke.py installs into an empty one",
    r"^make ": "a target of .ci/run, or work of many minutes",
    r"docker ": "needs docker; tests/test_container.py reads the Dockerfile",
    r"^torchrun ": "needs eight processes; tests/training/test_parallel.py and tests/cli/test_together.py start some",
    r"owner/": "needs the Hub; tests/checkpoints/test_hub.py serves one",
    r"^docs/fetch_landscapes": "downloads",
    r"^W=|\$W": "needs the weights of the Inception network; tests/evaluation/test_published.py has small ones",
    r" --accept ": "needs a prior of ImageNet's classes; tests/tasks/test_selection.py has a classifier of its own",
    r"reproduce --preset smoke|reproduce \w+ --preset smoke": "tests/reproduce runs all of them at once, smaller still",
    r"reproduce(?!.*smoke)": "takes from minutes to days",
    r"tamingfast ui": "serves until it is stopped; tests/ui/test_browser.py visits it",
    r"--format onnx": "takes most of a minute; tests/tasks/test_export.py",
    r"benchmarks/": "measures, for minutes",
    r"examples/": "tests/test_examples.py",
    r"tamingfast\.compat script\.py": "stands for a script of the reader's; tests/checkpoints/test_install.py",
    r"c2i_B_256|^tamingfast sample last\.ckpt .*--class 207": "needs a thousand classes; tests/checkpoints has five",
}
#: Pages with a test of their own.
ELSEWHERE = {"first-day.md": "docs/first_day.py runs it", "conditions.md": "tests/tasks/test_conditional_*.py"}
#: Pages that take more than ten seconds.
LONG = ("command-line.md", "evaluation.md", "sharing.md")


def reason(line: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, line)), None)


def runnable(page: Path) -> list[str]:
    return [] if page.name in ELSEWHERE else [line for line in lines(page) if reason(line) is None]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory "desk" with the stand-ins, and the user's "home"."""
    folder, before = tmp_path_factory.mktemp("documented"), Path.cwd()
    (folder / "desk").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        os.chdir(folder / "desk")
        try:
            documented.lay_out(folder / "desk", folder / "home")
        finally:
            os.chdir(before)
    return folder


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.exhaustive if page.name in LONG else ()) for page in PAGES if runnable(page)],
    ids=lambda page: page.name,
)
def test_the_commands_of_a_page_run(page, desk, tmp_path, monkeypatch):
    shutil.copytree(desk, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "desk")
    torch.set_num_threads(1)
    for line in runnable(page):
        status, said = execute(line)
        assert status == 0, f"{line}\n{said}"
        for name in re.findall(r"(?:--out|--npz|>) ([\w/.-]+)", line):
            assert Path(name).exists(), line


def test_every_command_is_run_or_has_a_reason():
    every = [line for page in PAGES for line in lines(page)]
    assert all(line.startswith("tamingfast ") for page in PAGES for line in runnable(page))
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line) for line in every), pattern
    assert sum(len(runnable(page)) for page in PAGES) > 60
