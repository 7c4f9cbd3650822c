"""What commands print and exit with: JSON whose keys are documented, codes that are documented, and no colours."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml
from commands import run
from PIL import Image

from tamingfast import cli, progress, tasks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command-line.md").read_text("utf-8")


@pytest.fixture
def files(runs, tmp_path, monkeypatch) -> dict[str, str]:
    """One file of each kind, by the row of the documentation that describes it."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(tiny.photographs(1, 16)[0]).save("photo.png")
    tasks.encode(str(runs / "vqgan"), None, "t.safetensors")
    tasks.sample(runs / "prior", 1, size=(8, 8)).save("s.png")
    return {
        "`inspect` of a model": f"inspect {runs / 'prior'}",
        "`inspect` of a token file": "inspect t.safetensors",
        "`inspect` of a picture": "inspect s.png",
        "`evaluate`": f"evaluate {runs / 'prior'} --samples 2 --limit 2 --out r.json",
        "`info`": "info",
    }


def documented(row: str) -> set[str]:
    """The keys that a row of the table lists, without what stands in brackets."""
    found = re.search(rf"^\| {re.escape(row)} \| (.*) \|$", PAGE, re.M)
    return set(re.findall(r"`([a-z_]+)`", re.sub(r"\([^)]*\)", "", found[1]).partition(";")[0]))


def test_json_is_all_of_standard_output_and_its_keys_are_documented(files, monkeypatch, capsys):
    now = iter(range(0, 10**9, 61))  # so that all progress is due
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    monkeypatch.setattr(progress.Lines, "last", 0.0)
    for row, line in files.items():
        assert run(*line.split(), "--json") == 0, line
        printed = capsys.readouterr()
        found = json.loads(printed.out, parse_constant=pytest.fail)
        assert set(found) <= documented(row), row
        assert {"file", "model", "version"} & set(found)
        if row == "`evaluate`":
            assert found == json.loads(Path("r.json").read_text())
            assert "images: " in printed.err and "written: r.json" in printed.err
        if row.endswith("a model"):
            assert set(found) == documented(row)
    assert documented("`info`") == set(found) and found["backends"]["reference"]["available"] is True


def test_text_says_the_same_as_json(files, capsys):
    for line in list(files.values())[:3]:
        assert run(*line.split()) == 0
        text = capsys.readouterr().out
        assert run(*line.split(), "--json") == 0
        assert yaml.safe_load(text) == json.loads(capsys.readouterr().out)


def test_entries_of_a_recipe_are_documented(files):
    table = PAGE.split("| entry | meaning |")[1].split("\n\n")[0]
    entries = {name for line in table.splitlines() if line for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert entries == set(tasks.inspect("s.png")["recipe"])


def test_exit_codes_are_those_of_the_documentation(files, runs, monkeypatch, capsys):
    table = PAGE.split("| code | meaning |")[1].split("\n\n")[0]
    codes = dict(re.findall(r"^\| (\d+) \| (\w+)", table, re.M))
    assert codes == {"0": "done", str(cli.FAILED): "a", str(cli.USAGE_ERROR): "something", "130": "interrupted"}
    assert run("info") == 0
    assert run("inspect", "none") == 2 == run("sample", runs / "prior", "--temperature", 0)
    for error, code in ((KeyboardInterrupt(), 130), (ZeroDivisionError(), 1)):

        def fail(path: str, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(tasks, "inspect", fail, raising=False)
            assert run("inspect", "s.png") == code
    assert "Traceback" in capsys.readouterr().err


def on_terminal(*words: object, **environment: str) -> str:
    """What a command writes to a terminal that shows colours."""
    master, slave = pty.openpty()
    variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tamingfast", *map(str, words)], stdout=slave, stderr=slave,
        env=variables | {"TERM": "xterm-256color"} | environment,
    )  # fmt: skip
    os.close(slave)
    text = b""
    try:
        while part := os.read(master, 1 << 16):
            text += part
    except OSError:  # how Linux says that the other end was closed
        pass
    os.close(master)
    process.wait()
    return text.decode()


def test_nothing_is_coloured(runs, tmp_path):
    lines = (["--help"], ["sample", "--help"], ["inspect", "none"], ["sample", runs / "prior", "--stride", 0])
    for line in (*lines, ["sample", runs / "prior", "-n", 1, "--size", 40, "--out", tmp_path / "s.png"]):
        text = on_terminal(*line, NO_COLOR="1")
        assert text and not re.search(r"\x1b\[[\d;]*m", text)
    if sys.version_info < (3, 14):  # whose argparse colours what it prints
        assert not re.search(r"\x1b\[[\d;]*m", on_terminal("sample", "--help"))


def test_progress_has_one_home():
    """Bars are tqdm's, made in `progress.py`; the command line only writes above them."""
    homes = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("tamingfast/**/*.py")
        if "import tqdm" in path.read_text("utf-8")
    }
    assert homes == {"tamingfast/progress.py", "tamingfast/cli/__init__.py"}
    others = [
        path
        for path in ROOT.glob("tamingfast/**/*.py")
        if re.search(r"import (rich|alive_progress|progressbar)", path.read_text("utf-8"))
    ]
    assert not others
