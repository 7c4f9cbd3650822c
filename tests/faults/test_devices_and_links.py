"""Outputs that are no regular files, and links to some: devices stay devices, links stay links."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import golden
import numpy as np
import pytest
from commands import run
from PIL import Image
from refusals import contents, refused, unchanged

from tamingfast import files, images, report
from tamingfast.errors import UserError

NULL = os.makedev(1, 3)
CHECKPOINT = golden.checkpoint("net2net_seg")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with what no output may be, each under its own name."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("directory")
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name, kind in (("null", stat.S_IFCHR), ("block", stat.S_IFBLK)):
            with contextlib.suppress(PermissionError):  # only root may make devices
                os.mknod(name, kind | 0o666, NULL if name == "null" else os.makedev(7, 250))
        for name in ("directory", "pipe", "socket", "/dev/null", "/dev/full", "/dev/zero", "/dev/stdout", "/dev/tty"):
            os.symlink(name, f"to-{os.path.basename(name)}")
        for name in ("null", "block"):
            if os.path.exists(name):
                os.symlink(name, f"to-own-{name}")
        os.symlink("loop", "loop")
        os.symlink("to-null", "to-to-null")
        yield tmp_path


def wrong(place: Path) -> list[str]:
    devices = ["/dev/null", "/dev/full", "/dev/zero", "/dev/random", "/dev", "/dev/fd", "/proc/self/fd"]
    return [*sorted(os.listdir(place)), *devices]


def modes(paths: list[str]) -> list[tuple[int, int]]:
    found = [os.lstat(path) for path in paths if os.path.lexists(path)]
    return [(each.st_mode, each.st_rdev) for each in found]


WRITERS = {
    "text": lambda path: files.write_text(path, "new"),
    "json": lambda path: files.write_json(path, {}),
    "picture": lambda path: images.save_png(path, np.zeros((2, 2, 3), np.uint8)),
    "figure": lambda path: report.save_figure(report.figure(1)[0], path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_writers_refuse_them(place, writer):
    paths = wrong(place)
    before = modes(paths)
    for path in paths:
        if path == "to-stdout" and stat.S_ISREG(os.stat(1).st_mode):
            continue  # standard output is a file
        with unchanged(place), pytest.raises(UserError, match=path):
            WRITERS[writer](path)
    assert modes(paths) == before


def test_commands_refuse_them(place):
    paths = [path for path in wrong(place) if path != "to-stdout"]
    before = modes(paths)
    Image.new("RGB", (8, 8)).save(place / "photo.png")
    for path in paths:
        with unchanged(place):
            refused("convert", CHECKPOINT, path, names=path)
            refused("reconstruct", CHECKPOINT, "photo.png", "--out", path, names=path)
            refused("sample", CHECKPOINT, "--canvas", path, names=path)
    assert modes(paths) == before and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_inputs_that_are_none(place):
    """Nobody waits for the writer of a pipe, nor reads a device without an end."""
    for path in ("pipe", "to-pipe", "socket", "/dev/zero", "to-zero"):
        with unchanged(place):
            refused("inspect", path, names=path)
            refused("convert", CHECKPOINT, "out.safetensors", "--config", path, names=path)
            refused("sample", CHECKPOINT, "--resume", "--canvas", path, names=path)


@pytest.mark.parametrize("link", ["relative", "absolute", "chain", "dangling", "in another directory"])
def test_links_are_followed(tmp_path, monkeypatch, link):
    monkeypatch.chdir(tmp_path)
    os.mkdir("elsewhere")
    target = Path("elsewhere/target.json")
    if link != "dangling":
        target.write_text("old")
    if link == "chain":
        os.symlink("elsewhere/target.json", "middle")
    os.symlink({"absolute": target.absolute(), "chain": "middle"}.get(link, target), "out.json")
    if link == "in another directory":
        os.symlink("elsewhere", "through")
    path = "through/target.json" if link == "in another directory" else "out.json"
    files.write_json(path, {"new": 1})
    assert os.path.islink("out.json") and target.read_text() == '{\n  "new": 1\n}\n'
    assert not list(tmp_path.rglob("*.partial*"))
    with pytest.raises(TypeError):
        files.write_text(path, None)
    assert target.read_text() == '{\n  "new": 1\n}\n' and not list(tmp_path.rglob("*.partial*"))


def test_a_link_of_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("disk")
    os.symlink("disk/weights.safetensors", "out.safetensors")
    for _ in range(2):  # a name that is free, and a file
        assert run("convert", CHECKPOINT, "out.safetensors") == 0
        assert os.path.islink("out.safetensors") and not os.path.islink("disk/weights.safetensors")
    assert sorted(contents(tmp_path)) == ["disk", "disk/weights.safetensors", "out.safetensors"]


def test_the_other_name_of_a_file_keeps_the_old_content(tmp_path):
    (tmp_path / "a").write_text("old")
    os.link(tmp_path / "a", tmp_path / "b")
    files.write_text(tmp_path / "a", "new")
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("new", "old")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_is_protected_stays(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o444)
    (tmp_path / "directory").mkdir(mode=0o555)
    for path in (tmp_path / "file", tmp_path / "directory" / "new"):
        with pytest.raises(UserError, match="Permission denied"):
            files.write_text(path, "new")


def test_names_as_long_as_they_can_be(tmp_path):
    for name in ("n" * 251 + ".txt", "\u6f22" * 83 + ".txt", "x." + "n" * 253):
        files.write_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
    assert len(contents(tmp_path)) == 3
