"""Two drawings into one canvas, and drawings that are killed: nothing that was drawn is lost, nothing is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from commands import run
from refusals import refused

from tamingfast import tasks
from tamingfast.errors import UserError
from tamingfast.sampling.canvas import Canvas, drawing_into

#: Draws slowly: says "begun" after the first tokens and then waits for a line. "kill" ends it while it saves.
SLOW = """
import os, signal, sys
from tamingfast import cli, files, sampling

class Waiting(sampling.canvas._Regularly):
    waited = False
    def tick(self):
        if not Waiting.waited:
            Waiting.waited = True
            self.act()
            print("begun", flush=True)
            if sys.stdin.readline() == "kill\\n":
                files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
                self.act()

sampling.canvas._Regularly = Waiting
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.runs(tmp_path_factory.mktemp("runs")) / "prior"


def begun(words: list[object]) -> subprocess.Popen[str]:
    """A drawing in another process, which has drawn and saved its first tokens."""
    command = [sys.executable, "-c", SLOW, *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_two_drawings_into_one_canvas(prior, tmp_path):
    canvas, out = tmp_path / "c.canvas", tmp_path / "o.png"
    words = ["sample", prior, "-n", 1, "--size", "32x32", "--out", out, "--canvas", canvas]
    assert run(*words) == 0
    expected = out.read_bytes()
    canvas.unlink()
    first = begun(words)
    saved = canvas.read_bytes()
    link = tmp_path / "link.canvas"
    link.symlink_to(canvas)
    for path in (canvas, link):
        for more in (["--resume"], ["--resume", "--engine", "naive"]):
            said = refused("sample", prior, "--out", tmp_path / "other.png", "--canvas", path, *more, names=path)
            assert "another process" in said
    assert refused(*words, names=canvas)
    with pytest.raises(UserError, match="another process"):
        tasks.sample(prior, canvas=canvas, resume=True)
    assert canvas.read_bytes() == saved and not (tmp_path / "other.png").exists()
    first.communicate("go on\n", timeout=60)
    assert first.returncode == 0 and out.read_bytes() == expected
    assert names(tmp_path) == ["c.canvas", "link.canvas", "o.png"] and Canvas.load(canvas).done
    assert run(*words, "--resume") == 0  # free again


def test_two_drawings_without_a_canvas(prior, tmp_path):
    """Each has one beside its picture, until that is written."""
    out = tmp_path / "o.png"
    words = ["sample", prior, "-n", 1, "--size", "32x32", "--out", out]
    first = begun(words)
    refused(*words, names=tmp_path / "o.canvas")
    refused(*words, "--resume", names=tmp_path / "o.canvas")
    first.communicate("go on\n", timeout=60)
    assert first.returncode == 0 and names(tmp_path) == ["o.png"]


def test_a_finished_canvas_is_kept_while_another_draws_there(prior, tmp_path):
    path = tmp_path / "c.canvas"
    path.write_bytes(b"another's")
    with drawing_into(path):
        tasks.forget(path)
        assert path.read_bytes() == b"another's"
    tasks.forget(path)
    assert names(tmp_path) == []


def test_killed_drawings(prior, tmp_path):
    """The killed one's last save is whole, and what it left is removed by the next drawing."""
    words = ["sample", prior, "-n", 1, "--size", "32x32", "--out", tmp_path / "o.png"]
    assert run(*words) == 0
    expected = (tmp_path / "o.png").read_bytes()
    (tmp_path / "o.png").unlink()
    process = begun(words)
    process.communicate("kill\n", timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert sorted(name.partition("-")[0] for name in names(tmp_path)) == [".o", ".o.canvas.lock", "o.canvas"]
    assert not Canvas.load(tmp_path / "o.canvas").done
    refused(*words, names=tmp_path / "o.canvas")
    resumed = subprocess.run([sys.executable, "-m", "tamingfast.cli", *map(str, words), "--resume"], timeout=120)
    assert resumed.returncode == 0 and (tmp_path / "o.png").read_bytes() == expected
    assert names(tmp_path) == ["o.png"]


def test_a_place_without_room_for_a_canvas(prior, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "c.canvas", "/proc/c.canvas", "/dev/null"):
        with pytest.raises(UserError, match=str(path)):
            tasks.sample(prior, 1, size=(8, 8), canvas=path)
    deep = tmp_path / "a" / "b" / "c.canvas"
    tasks.sample(prior, 1, size=(8, 8), canvas=deep)
    assert names(deep.parent) == ["c.canvas"]
