"""Where errors become sentences: what the machine refuses, standard streams that fail, names no encoding has."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import golden
import pytest
import torch
from commands import run
from refusals import judged, refused, said_in

from tamingfast import cli, errors, files
from tamingfast.cli import about, arguments

CHECKPOINT = golden.checkpoint("net2net_seg")
NUMBERS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE,
    errno.ENFILE, errno.ENAMETOOLONG, errno.ESTALE, errno.ENOTDIR, errno.ENOENT, errno.EISDIR, errno.ELOOP,
    errno.ENXIO, errno.ETIMEDOUT, errno.ENOMEM, errno.EBUSY, errno.ETXTBSY, errno.EXDEV, errno.EINVAL,
)  # fmt: skip


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `tamingfast info` raise the error."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("tamingfast.ops.info.describe", fail)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: errno.errorcode[number])
def test_errors_of_the_system(monkeypatch, number):
    words = os.strerror(number)
    for name, wanted in (("some/file.png", "some/file.png: "), (b"file\xff", "file\udcff: "), (3, "storage: ")):
        raising(monkeypatch, OSError(number, words, name))
        assert f"error: {wanted}got '{words}', expected " in refused("info")
    raising(monkeypatch, OSError(number, words))
    assert f"storage: got '{words}', expected " in refused("info")
    raising(monkeypatch, OSError(number, words, "a.png", None, "b.png"))  # of a move
    assert f"a.png: got '{words}'" in refused("info")


class Hiding(Exception):
    """A library's error; its module is not one of Python's own."""


def hiding(outer: BaseException, number: int = errno.ENOSPC, **chained: bool) -> BaseException:
    """``outer`` raised because of, or else while handling, an error of the system."""
    try:
        try:
            raise OSError(number, os.strerror(number), "file.bin")
        except OSError as error:
            if chained.get("because"):
                raise outer from error
            raise outer  # noqa: B904
    except BaseException as error:
        return error


def test_errors_of_the_system_inside_those_of_libraries(monkeypatch):
    from safetensors import SafetensorError

    full = os.strerror(errno.ENOSPC)
    for error in (
        hiding(Hiding("failed")), hiding(Hiding("failed"), because=True), hiding(RuntimeError("enforce fail")),
        hiding(SafetensorError("x")), SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError(f"unable to write to file </torch_12_34>: {full} (28)"),
        RuntimeError(f"unable to open shared memory object </torch_1_2_3> in read-write mode: {full} (28)"),
        OSError(f"Caught OSError in DataLoader worker process 0.\n[Errno 28] {full}: 'file.bin'"),
        hiding(hiding(Hiding("twice"))),
    ):  # fmt: skip
        raising(monkeypatch, error)
        assert full in refused("info", names=["file.bin", "storage"]), error


def test_bugs_keep_their_traceback(monkeypatch, capsys):
    for error in (
        RuntimeError("shapes do not match"), KeyError("x"), AssertionError(), ValueError("not a UserError"),
        TypeError("x"), Hiding("x"), hiding(KeyError("x")), hiding(ValueError("x")), RecursionError("x"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ):  # fmt: skip
        raising(monkeypatch, error)
        assert run("info") == cli.FAILED
        written = capsys.readouterr().err
        assert "Traceback (most recent call last)" in written and "please report it" in written
        assert type(error).__name__ in written


def test_names_of_logs_that_torch_does_not_know():
    # In another process, because torch reads the variable when it is imported.
    command = [sys.executable, "-m", "tamingfast.cli", "info"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TORCH_LOGS": "xyz"})
    assert done.returncode == cli.USAGE_ERROR and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("tamingfast: error: TORCH_LOGS: got 'xyz', expected names of torch's logs")


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (MemoryError(), "memory: "),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: 12 bytes"), "memory: "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory: "),
        (RuntimeError("CUDA error: out of memory\nmore\nmore\nmore"), "memory: "),
        (RuntimeError("std::bad_alloc"), "memory: "),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "training.workers: "),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "training.workers: "),
        (OSError("a library's own words"), "a library's own words"),
        (errors.SettingError("TAMINGFAST_ISA: got 'x', expected auto"), "TAMINGFAST_ISA"),
        (errors.UserError("a\nb\r\n\n   c\x1b[31m\0: got 1, expected 2"), "a b c\\x1b[31m\\x00: got 1"),
    ],
)
def test_other_refusals(monkeypatch, error, name):
    raising(monkeypatch, error)
    assert len(refused("info", names=name).splitlines()) == 1


def test_a_stopped_run_counts_as_interrupted_not_as_an_error(monkeypatch, capsys):
    raising(monkeypatch, errors.Stopped("stopped after step 3 (SIGTERM); --resume continues from there"))
    assert run("info") == cli.INTERRUPTED
    said = said_in(capsys.readouterr().err)
    assert said == ["tamingfast: stopped after step 3 (SIGTERM); --resume continues from there"]


def test_arguments_are_named_as_options():
    given = argparse_of("complete", "m", "i.png")
    for message, words, wanted in (
        ("top_k: got 1", [], "--top-k: got 1"), ("label: got 9", [], "--class: got 9"),
        ("conditions: got 2", [], "--condition: got 2"), ("engine: got x", ["--backend", "x"], "--backend: got x"),
        ("engine: got x", ["--engine=x"], "--engine: got x"), ("model: got x", [], "model: got x"),
        ("data.path: got x", [], "data.path: got x"), ("no colon", [], "no colon"),
        ("condition, label: got 0; give it with condition_of", [],
         "--condition, --class: got 0; give it with --condition-of"),
    ):  # fmt: skip
        assert arguments.as_typed(message, given, words) == wanted
    assert arguments.as_typed("top_k: got 1", None, []) == "top_k: got 1"


def argparse_of(*words: str):
    return cli.parser().parse_args(words)


def test_what_torch_hides_is_found_out(tmp_path, monkeypatch):
    """torch says "unexpected pos 576 vs 534" on a full disk; the file that it wrote is asked again."""

    def full(*_: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    def fail(words: str) -> None:
        with files.atomic_write(tmp_path / "x.pt"):
            raise RuntimeError(words)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(errors.UserError, match=f"x.pt: got '{os.strerror(errno.EFBIG)}'"):
            fail("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    with pytest.raises(errors.UserError, match="x.pt: got 'the file cannot be written to its end"):
        fail("PytorchStreamWriter failed writing file data/0: file write failed")
    assert list(tmp_path.iterdir()) == []


def test_only_the_written_file_is_blamed(tmp_path):
    (tmp_path / "x").write_text("old")
    for error in (
        FileNotFoundError(2, "No such file or directory", "read.png"),
        RuntimeError("PytorchStreamReader: x"),
    ):
        with pytest.raises(type(error)) as raised, files.atomic_write(tmp_path / "x"):
            raise error
        assert raised.value is error
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# --- in processes of their own ---------------------------------------------------------------------------------------


def started(shell: str, *words: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command through a shell with this redirection."""
    command = [sys.executable, "-m", "tamingfast.cli", *map(str, words)]
    known = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", f'exec "$@" {shell}', "bash", *command],
        env=known | environment,
        capture_output=True,
        timeout=120,
    )


FULL = "standard output: got 'No space left on device'"


@pytest.mark.parametrize("buffered", ["", "1"])
def test_streams_that_fail(buffered):
    for words in (["--help"], ["sample", "--help"], ["--version"]):
        done = started(">/dev/full", *words, PYTHONUNBUFFERED=buffered)
        assert FULL in judged(done.returncode, done.stderr.decode())
        assert started("2>/dev/full", *words, PYTHONUNBUFFERED=buffered).returncode == 0
        for closing in (">&-", "2>&-", ">&- 2>&- <&-"):
            done = started(closing, *words, PYTHONUNBUFFERED=buffered)
            assert (done.returncode, done.stderr) == (0, b"")
    for closing in ("2>/dev/full", "2>&-", ">&- 2>&-"):
        assert started(closing, "sample", "model", "--batch", "0", PYTHONUNBUFFERED=buffered).returncode == 2


def test_streams_that_fail_in_the_middle_of_the_work():
    done = started(">/dev/full", "inspect", CHECKPOINT)
    assert FULL in judged(done.returncode, done.stderr.decode())
    assert started("2>/dev/full", "inspect", CHECKPOINT).stdout.startswith(b"{")


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path):
    """Otherwise what libraries print lands in the file that is being written."""
    code = """
    import os
    from tamingfast.cli import streams
    with streams.guarded():
        print("to nobody")
        opened = os.open("file", os.O_CREAT | os.O_WRONLY)
    os.write(opened, str(opened).encode())
    """
    closed = ["bash", "-c", 'exec "$@" >&- 2>&- <&-', "bash", sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(closed, cwd=tmp_path, check=True)
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C", "LANG": "C"},
    ],
    ids=lambda environment: ",".join(f"{name}={value}" for name, value in environment.items()),
)
def test_names_that_the_encoding_lacks(environment, tmp_path):
    names = [os.fsencode(tmp_path / "caf\u00e9-\u6f22.safetensors"), os.fsencode(tmp_path) + b"/byte-\xff.safetensors"]
    code = """
    import os, sys
    from tamingfast import cli
    for name in sys.argv[2:]:
        print(cli.main(["convert", sys.argv[1], name]), cli.main(["inspect", f"{name}-missing"]))
    """
    known = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment
    command = [sys.executable, "-c", textwrap.dedent(code), CHECKPOINT, *names]
    done = subprocess.run(command, env=known, capture_output=True, timeout=120)
    assert done.stdout.splitlines()[1::2] == [b"0 2", b"0 2"], done.stderr.decode(errors="replace")
    assert done.stdout.startswith(b"written: ") and done.stderr.count(b"-missing: got no file") == 2
    assert all(os.path.getsize(name) > 1000 for name in names)


@pytest.mark.parametrize("level", ["foo", "10", "warn ", "WARNING,INFO", "\u00e9", "-1", "notset"])
def test_no_level_of_logging(level, monkeypatch):
    monkeypatch.setenv("TAMINGFAST_LOG", level)
    refused("info", names="TAMINGFAST_LOG")


@pytest.mark.parametrize("level", ["", "debug", "Info", "WARNING", "error", "critical"])
def test_levels_of_logging(level, monkeypatch):
    monkeypatch.setenv("TAMINGFAST_LOG", level)
    assert run("info") == 0


@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "0", "TERM": "dumb"}, {"COLUMNS": "1"}, {"COLUMNS": "-5", "LINES": "x"}, {"COLUMNS": "wide"},
        {"TERM": ""}, {"COLUMNS": "1000000"},
    ],
    ids=str,
)  # fmt: skip
def test_odd_terminals(environment, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        run("sample", "--help")
    assert stopped.value.code == 0 and "--temperature" in capsys.readouterr().out
    assert run("inspect", CHECKPOINT) == 0


def test_a_home_that_is_missing(runs, square, tmp_path):
    nowhere = {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "XDG_CACHE_HOME": "/proc/x", "MPLCONFIGDIR": "/proc/x"}
    words = ["likelihood", runs / "prior", square, "--size", 8, "--strides", 2, "--plot", tmp_path / "p.png"]
    done = started("", *words, **nowhere)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_working_directory_that_was_deleted(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f'cd "{gone}" && rmdir "{gone}" && exec "{sys.executable}" -m tamingfast.cli inspect x.pt'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": source()}
    )
    judged(done.returncode, done.stderr, "working directory")


def source() -> str:
    return str(Path(about.__file__).resolve().parents[2])
