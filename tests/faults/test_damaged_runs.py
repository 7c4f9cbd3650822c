"""Every file of a run directory, damaged in every way: commands work or say in one sentence which file is at fault."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import tiny

from tamingfast import cli

FILES = ("config.yaml", "state.pt", "weights.safetensors", "metrics.jsonl")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


#: New bytes of a file, or what takes its place.
EDITS: dict[str, Callable[[bytes], bytes] | Callable[[Path], object]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut early": lambda content: content[:10],
    "longer": lambda content: content + b"\0" * 100,
    "text": lambda content: b"not a checkpoint\n",
    "binary": lambda content: bytes(range(256)) * 20,
    "a web page": lambda content: b"<!DOCTYPE html><html><body>404</body></html>",
    "a pointer of Git LFS": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a flipped bit": flipped,
}
PLACES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}
COMMANDS = ("inspect", "sample", "resume")
#: Files without which a command cannot work, whatever is wrong with them.
NEEDED = {
    "inspect": ["weights.safetensors"],
    "sample": ["weights.safetensors", "config.yaml"],
    "resume": ["config.yaml", "state.pt"],
}
#: Damages that leave a file as good as it was, or that nobody can tell from an intended one.
HARMLESS = {("config.yaml", "a flipped bit"), ("config.yaml", "cut"), ("state.pt", "longer")}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An unconditional prior of two steps, which no test changes."""
    return tiny.runs(tmp_path_factory.mktemp("made")) / "prior"


def words(command: str, out: Path, folder: Path) -> list[object]:
    if command == "resume":
        return ["train", "prior", "--resume", "--out", out, "--device", "cpu", "training.steps=3"]
    return ["inspect", out] if command == "inspect" else ["sample", out, "--out", folder / "drawn.png", "--count", 1]


@pytest.mark.parametrize("edit", [*EDITS, *PLACES])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_file(command, name, edit, made, tmp_path, capsys):
    out = shutil.copytree(made, tmp_path / "run")
    path = out / name
    content = path.read_bytes()
    path.unlink()
    if edit in EDITS:
        path.write_bytes(EDITS[edit](content))
    else:
        PLACES[edit](path)
    before = runs.contents(out)
    code = cli.main([str(word) for word in words(command, out, tmp_path)])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if not line.startswith("warning: ") and "%|" not in line]
    if code == 0:
        assert name not in NEEDED[command] or (name, edit) in HARMLESS, "the damage was not noticed"
        return
    assert code == cli.USAGE_ERROR and 1 <= len(lines) <= 3
    if (name, edit) not in HARMLESS:  # else the message is about a key
        assert name in said or ((command != "resume" or edit == "missing") and str(out) in said)
    assert runs.contents(out) == before
    assert not (tmp_path / "drawn.png").exists()


def test_the_undamaged_run_works(made, tmp_path):
    for command in COMMANDS:
        out = shutil.copytree(made, tmp_path / command)
        assert cli.main([str(word) for word in words(command, out, tmp_path)]) == 0
