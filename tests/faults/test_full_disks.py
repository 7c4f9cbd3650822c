"""Every command that writes, on a disk without room: a sentence, the old files as they were, and nothing left over."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from PIL import Image
from refusals import contents, judged

from tamingfast import cli

PROBLEMS = "File too large", "No space left on device"
#: The commands that write, each with the names of the files that may be too large for the disk.
COMMANDS = {
    "train vqgan": ("train vqgan vqgan.yaml --out new", ["new"]),
    "train prior": ("train prior prior.yaml --first-stage runs/vqgan --out new", ["new"]),
    "train --resume": ("train vqgan --resume --out runs/vqgan training.steps=6", ["runs/vqgan"]),
    "sample": ("sample runs/prior -n 4 --out o.png", ["o.png", "o.canvas"]),
    "sample --separate": ("sample runs/prior -n 2 --out o.png --separate", ["o-0000.png", "o.canvas"]),
    "sample --canvas": ("sample runs/prior -n 4 --out o.png --canvas new.canvas", ["new.canvas", "o.png"]),
    "sample --npz": ("sample runs/prior -n 2 --npz o.npz", ["o.npz", "o.canvas"]),
    "edit": ("edit runs/prior photo.png --mask mask.png --out o.png", ["o.png", "o.canvas"]),
    "outpaint": ("outpaint runs/prior photo.png --right 8 --out o.png", ["o.png", "o.canvas"]),
    "complete": ("complete runs/prior photo.png --out o.png", ["o.png"]),
    "reconstruct": ("reconstruct runs/vqgan photo.png --out o.png", ["o.png"]),
    "likelihood": ("likelihood runs/prior photo.png --strides 2 --plot o.png", ["o.png"]),
    "encode": ("encode runs/vqgan --out o.safetensors", ["o.safetensors"]),
    "encode --shard": ("encode runs/vqgan --out new --shard 4 --views 2", ["new/tokens-00000.safetensors"]),
    "convert": ("convert runs/vqgan o.safetensors", ["o.safetensors"]),
    "convert --layout": ("convert runs/vqgan new --layout diffusers", ["new"]),
    "export": ("export runs/vqgan --out new", ["new"]),
    "evaluate": ("evaluate runs/vqgan --limit 1 --out o.json", ["o.json"]),
    "reproduce": ("reproduce pixels --preset smoke --out new", ["new"]),
}
NOT_WRITING = {"ui", "inspect", "info", "completion", "push", "download"}  # the last one writes into a cache of its own
OLD = ("o.png", "o-0000.png", "o.npz", "o.safetensors", "o.json")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with runs, configs and pictures, to be copied."""
    root = tmp_path_factory.mktemp("models")
    tiny.runs(root / "runs")
    for name, base in (("vqgan", tiny.VQGAN), ("prior", tiny.PRIOR | {"prior": {"condition": "none"}})):
        config = tiny.config(base, steps=2, checkpoint_every=1) | {"data": tiny.CROPS}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "photo.png")
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(root / "mask.png")
    return root


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(models, tmp_path / "place", monkeypatch)


def prepared(models: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the models beside old files that each command replaces, as the working directory."""
    shutil.copytree(models, place, dirs_exist_ok=True)
    for name in OLD:
        (place / name).write_bytes(b"old")
    monkeypatch.chdir(place)
    return place


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become larger than this inside the block, as with `ulimit -f`; Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def outcome(line: str) -> tuple[int, str]:
    """Exit status and standard error of a command, which is run with nothing on a disk but its own files."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(line.split())
    return code, err.getvalue()


def test_all_commands_that_write_are_here():
    def leaves(parser: argparse.ArgumentParser, words: str = "") -> Iterator[str]:
        inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not inner:
            yield words.strip()
        for action in inner:
            for name, chosen in action.choices.items():
                yield from leaves(chosen, f"{words} {name}")

    assert set(leaves(cli.parser())) - NOT_WRITING == COMMANDS.keys() - {
        "train --resume", "sample --separate", "sample --canvas", "sample --npz", "convert --layout", "encode --shard",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_no_room_at_all(command, place):
    line, names = COMMANDS[command]
    before = contents(place)
    with largest_file(16):
        code, error = outcome(line)
    said = judged(code, error, names)
    assert PROBLEMS[0] in said, said
    assert_unharmed(place, before)


@pytest.mark.parametrize(
    "command", ["train vqgan", "train prior", "train --resume", "encode", "convert", "sample --canvas"]
)
def test_room_for_a_part(command, place):
    """The limit moves through the sizes of the files that a command writes one after the other."""
    line, names = COMMANDS[command]
    before, refusals = contents(place), 0
    for size in (300, 1200, 3000, 20_000):
        with largest_file(size):
            code, error = outcome(line)
        assert not list(place.rglob("*.partial*"))
        if code != 0:
            refusals += 1
            assert PROBLEMS[0] in judged(code, error, names)
        if command != "train --resume":
            assert {name: contents(place).get(name) for name in before if name not in OLD} == {
                name: value for name, value in before.items() if name not in OLD
            }
        shutil.rmtree(place / "new", ignore_errors=True)
    assert refusals
    assert outcome(line)[0] == 0  # once there is room


def assert_unharmed(place: Path, before: dict[str, bytes | None]) -> None:
    after = {name: value for name, value in contents(place).items() if not name.startswith("new")}
    assert after.keys() == before.keys(), sorted(after.keys() ^ before.keys())
    assert all(after[name] == before[name] for name in before)
    assert not list(place.rglob("*.partial*")) and not list(place.rglob("*.lock"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system, and not everywhere")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_is_full(small_disk, models, tmp_path, monkeypatch):
    prepared(models, tmp_path / "place", monkeypatch)
    for command, (line, names) in COMMANDS.items():
        if command == "train --resume":
            continue
        for name in OLD:
            (small_disk / name).write_bytes(b"old")
        line = " ".join(
            f"{small_disk}/{word}" if word in ("new", "new.canvas", *OLD) else word for word in line.split()
        )
        with open(small_disk / "filling", "wb", buffering=0) as filling, contextlib.suppress(OSError):
            while filling.write(bytes(4096)):
                pass
        with contextlib.suppress(OSError), open(small_disk / "filling", "ab", buffering=0) as filling:
            while filling.write(b"\0"):
                pass
        code, error = outcome(line)
        assert PROBLEMS[1] in judged(code, error, names), command
        assert all((small_disk / name).read_bytes() == b"old" for name in OLD), command
        assert not list(small_disk.rglob("*.partial*")), command
        os.unlink(small_disk / "filling")
        for left in ("new", "new.canvas"):
            shutil.rmtree(small_disk / left, ignore_errors=True)


def test_a_limit_on_open_files(place):
    """In a process of its own, as libraries keep files open."""
    code = """
import os, resource
from tamingfast import cli
cli.main(["sample", "runs/prior", "-n", "1", "--canvas", "some.canvas"])  # imports what is needed
free = os.open("/dev/null", os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
print(cli.main(["sample", "runs/prior", "--resume", "--out", "other.png", "--canvas", "some.canvas"]), flush=True)
os._exit(0)  # without what libraries do at the end
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "Too many open files" in judged(int(done.stdout.split()[-1]), done.stderr, ["some.canvas", "other.png"])
