"""Progress that is printed where there is no terminal."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from tamingfast import progress


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as a list of one number to set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.Lines, "last", now[0])
    return now


def test_a_line_for_each_state(always, capsys):
    with progress.bar(" images", 10, desc="encoding") as bar:
        bar.update(3)
        bar.set_postfix({"loss": 1.5}, refresh=False)
        bar.moved(20, 40)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("encoding: 3 of 10, ") and first.endswith(" left")
    assert second.startswith("encoding: 20 of 40, ") and second.endswith(" left, loss=1.5")


def test_without_a_total(always, capsys):
    with progress.bar("step") as bar:
        bar.update()
    assert capsys.readouterr().err.startswith("step: 1, ")


def test_short_work_and_silent_counters_print_nothing(capsys, monkeypatch):
    with progress.bar("step", 10) as bar:
        bar.update(10)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    for bar in (progress.bar("step", 10, disable=True), progress.silent("step", 10)):
        with bar:
            bar.update(10)
            bar.moved(3, 20)
    assert not capsys.readouterr().err


def test_long_work_prints_a_line_a_minute(clock, capsys):
    with progress.bar("image", 600) as bar:
        for _ in range(600):
            clock[0] += 1.0
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "image: 60 of 600,  1.00image/s, 09:00 left"


def test_many_short_counters_together_print_a_line_a_minute(clock, capsys):
    for number in range(40):
        with progress.bar(f"part {number}", 3) as outer, progress.bar("inner", 3) as inner:
            for _ in range(3):
                clock[0] += 1.0
                inner.update()
                outer.update()
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["inner", "inner"]


def test_lines_have_no_control_characters(clock, capsys):
    with progress.bar("step", None) as bar:
        clock[0] += 61
        bar.update()
        bar.set_postfix({"loss": 0.5})
        bar.refresh()
        clock[0] += 61
        bar.update()
    error = capsys.readouterr().err
    assert error.endswith("\n") and error.replace("\n", "").isprintable() and error.count("\n") == 2


def test_nothing_else_draws_bars():
    package = Path(progress.__file__).parent
    users = {path for path in package.rglob("*.py") if re.search(r"^\s*(from|import) tqdm", path.read_text(), re.M)}
    # The command line writes its messages above the bars.
    assert users == {package / "progress.py", package / "cli" / "__init__.py"}


def test_training_prints_its_steps_and_its_loss(always, capsys, tmp_path):
    tiny.train("vqgan", tmp_path / "run", steps=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("checksum: ")]
    assert [line.partition(",")[0] for line in lines] == ["run: 1 of 2", "run: 2 of 2"]
    assert "left" in lines[1] and "rec_loss=" in lines[1]


def test_a_moment_of_work_is_not_worth_a_line_even_when_one_is_due(clock, capsys):
    clock[0] += 1000
    with progress.bar("checksum", 10) as bar:
        clock[0] += 0.01
        bar.update(10)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs terminals as of Unix")
@pytest.mark.parametrize("columns", [0, 80])
def test_a_terminal_shows_bars_even_without_a_size(columns):
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    code = "from tamingfast import progress\nwith progress.bar(' x', 9) as bar: bar.update(4); bar.refresh()"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 4096)
    os.close(ours)
    assert b"4/9" in shown
