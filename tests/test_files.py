"""Locks on files, and temporary files that killed processes leave."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tamingfast import files
from tamingfast.errors import UserError
from tamingfast.files import atomic_write, locked, remove_leftovers

ADVICE = "wait"


def in_another_process(function, *arguments) -> None:
    """Run the function in a forked process; it must end well."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def refused_lock(path: Path) -> None:
    message = "the thing: got one that another process is writing, expected .*; wait"
    with pytest.raises(UserError, match=message), locked(path, "the thing", ADVICE):
        pass


class TestLocks:
    def test_another_process_and_this_one_are_refused(self, tmp_path):
        path = tmp_path / "lock"
        with locked(path, "a", ADVICE):
            refused_lock(path)
            in_another_process(refused_lock, path)
        assert list(tmp_path.iterdir()) == []
        with locked(path, "a", ADVICE):
            assert path.exists()

    def test_it_is_released_when_the_block_fails(self, tmp_path):
        with pytest.raises(KeyError), locked(tmp_path / "lock", "a", ADVICE):
            raise KeyError
        with locked(tmp_path / "lock", "a", ADVICE):
            pass

    def test_a_killed_process_loses_it(self, tmp_path):
        path = tmp_path / "lock"
        code = f"""
        import time
        from tamingfast.files import locked
        with locked({str(path)!r}, "a", "b"):
            print("held", flush=True)
            time.sleep(100)
        """
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"held\n"
        refused_lock(path)
        process.kill()
        process.wait()
        assert path.exists()  # its file alone holds nothing
        with locked(path, "a", ADVICE):
            pass
        assert not path.exists()

    def test_an_old_file_holds_nothing(self, tmp_path):
        (tmp_path / "lock").write_text("12345\n")
        with locked(tmp_path / "lock", "a", ADVICE):
            pass

    def test_a_directory_that_vanishes(self, tmp_path):
        place = tmp_path / "place"
        place.mkdir()
        with locked(place / "lock", "a", ADVICE):
            shutil.rmtree(place)
        assert not place.exists()

    def test_places_without_locks(self, tmp_path):
        (tmp_path / "directory").mkdir()
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "directory", tmp_path / "file" / "lock", Path("/proc/lock")):
            with pytest.raises(UserError, match="^a: got "), locked(path, "a", ADVICE):
                pass


def killed_while_writing(path: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


class TestLeftovers:
    def test_the_next_write_removes_them(self, tmp_path):
        target = tmp_path / "out.png"
        target.write_bytes(b"old")
        for _ in range(5):
            process = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(target,))
            process.start()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
        assert target.read_bytes() == b"old" and len(list(tmp_path.glob(".out-*.partial.png"))) == 1
        files._tidied.clear()  # a new process
        with atomic_write(tmp_path / "other.txt") as temporary:
            temporary.write_text("new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "out.png"]

    def test_those_of_living_writers_stay(self, tmp_path):
        with atomic_write(tmp_path / "out.png") as temporary:
            in_another_process(remove_leftovers, tmp_path)
            remove_leftovers(tmp_path)
            temporary.write_bytes(b"new")
        assert (tmp_path / "out.png").read_bytes() == b"new"

    def test_only_ours_are_removed(self, tmp_path):
        others = [
            ".hidden", "out.png", "out.partial.png", "out-abcdefgh.partial.png", ".out-abc.partial.png", ".partial",
            ".out-ABCDEFGH.partial.png", ".out-abcdefgh.partial.tar.gz", ".out-abcdefgh.part", ".out-abcdefgh.png",
            ".out.partial.png", ".lock",
        ]  # fmt: skip
        ours = [".out-abcdefgh.partial.png", ".a b-0_1x9zq7.partial", ".state-abcdefgh.partial.pt"]
        for name in (*others, *ours):
            (tmp_path / name).write_text("x")
        (tmp_path / ".link-abcdefgh.partial.png").symlink_to("out.png")
        (tmp_path / ".folder-abcdefgh.partial").mkdir()
        os.mkfifo(tmp_path / ".pipe-abcdefgh.partial")
        remove_leftovers(tmp_path)
        kept = {*others, ".link-abcdefgh.partial.png", ".folder-abcdefgh.partial", ".pipe-abcdefgh.partial"}
        assert {path.name for path in tmp_path.iterdir()} == kept

    def test_one_that_is_locked_in_another_way_stays(self, tmp_path):
        path = tmp_path / ".out-abcdefgh.partial.png"
        with open(path, "wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            remove_leftovers(tmp_path)
            assert path.exists()
        remove_leftovers(tmp_path)
        assert not path.exists()

    def test_writers_and_tidiers_at_once(self, tmp_path):
        """No write is lost to a process that tidies the same directory."""
        tidier = multiprocessing.get_context("fork").Process(target=tidying, args=(tmp_path,))
        tidier.start()
        try:
            for number in range(300):
                files.write_text(tmp_path / "out.txt", str(number))
        finally:
            tidier.kill()
            tidier.join()
        assert (tmp_path / "out.txt").read_text() == "299"


def tidying(directory: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        remove_leftovers(directory)


def test_bytes_that_are_no_text_survive(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    files.write_text(tmp_path / "a.txt", name)
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xe9"
