"""Behaviour common to all commands: help, unknown words, interrupts, closed pipes and old names."""

from __future__ import annotations

import os
import subprocess
import sys

import golden
import pytest
from commands import run, size_of

from tamingfast import cli
from tamingfast.sampling import Canvas


def test_unknown_words_are_refused(capsys):
    for words in (["sample", "x", "--colour", "red"], ["info", "extra"], ["nonsense"]):
        with pytest.raises(SystemExit) as stopped:
            run(*words)
        assert stopped.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_help_answers_without_torch():
    code = "import sys; from tamingfast import cli; cli.parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_closed_pipe_is_no_error():
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tamingfast", "inspect", str(golden.checkpoint("net2net_seg"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait() == 0


#: Sends itself SIGINT, as Ctrl-C does, once some tokens are drawn.
INTERRUPTED = """
import os, signal, sys
from tamingfast import cli, progress

report = progress.Lines.update

def update(self, n=1):
    report(self, n)
    if self.n and "token" in self._shown["unit"]:
        os.kill(os.getpid(), signal.SIGINT)

progress.Lines.update = update
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have told its children to ignore
sys.exit(cli.main(sys.argv[1:]))
"""


def test_an_interrupt_keeps_the_canvas(runs, tmp_path):
    words = ["sample", runs / "prior", "-n", 1, "--size", "80x80", "--out", tmp_path / "s.png"]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, words), "--engine", "naive"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    rest = process.stderr.read()
    assert process.wait() == cli.INTERRUPTED
    assert "interrupted" in rest and "Traceback" not in rest
    assert not (tmp_path / "s.png").exists()
    assert not Canvas.load(tmp_path / "s.canvas").done
    assert run(*words, "--resume") == 0
    assert size_of(tmp_path / "s.png") == (80, 80) and not (tmp_path / "s.canvas").exists()


def test_the_old_name_of_engine_is_logged(runs, tmp_path, caplog):
    assert run("sample", runs / "prior", "-n", 1, "--out", tmp_path / "s.png", "--backend", "torch") == 0
    assert "--backend is now called --engine" in caplog.text
