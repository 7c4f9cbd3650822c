"""`tamingfast completion`: bash itself completes by the script; those of other shells name every command and option."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run

from tamingfast import cli
from tamingfast.cli.completion import SHELLS

pytest.importorskip("shtab", reason="it writes the scripts")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        done = subprocess.run(
            [sys.executable, "-m", "tamingfast", "completion", shell], capture_output=True, text=True, check=True
        )
        assert not done.stderr
        (folder / shell).write_text(done.stdout)
    return folder


def completed(scripts: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    code = """
source "$1"; shift
COMP_WORDS=(tamingfast "$@"); COMP_CWORD=$#
command=$(complete -p tamingfast | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$command" && printf '%s\\n' "${COMPREPLY[@]}"
"""
    line = [bash, "--norc", "--noprofile", "-c", code, "bash", str(scripts / "bash"), *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return set(done.stdout.split())


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_commands_and_options(scripts):
    (commands,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert completed(scripts, "") == set(commands.choices)
    assert completed(scripts, "s") == {"sample"}
    assert completed(scripts, "train", "") == {"vqgan", "prior"}
    shown = {
        option for action in commands.choices["sample"]._actions if action.help != argparse.SUPPRESS
        for option in action.option_strings
    }  # fmt: skip
    assert completed(scripts, "sample", "-") == shown > {"--like", "--seed"}
    assert completed(scripts, "sample", "--no") == {"--no-metadata"}


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["sample", "model", "--schedule", ""], {"paper", "scene", "strided", "block"}),
        (["sample", "--engine", "n"], {"native", "naive"}),
        (["complete", "--dtype", "b"], {"bfloat16"}),
        (["encode", "--split", ""], {"train", "validation"}),
        (["export", "--format", ""], {"torch", "onnx"}),
        (["completion", ""], set(SHELLS)),
    ],
)
def test_values(scripts, words, values):
    assert completed(scripts, *words) == values


def test_files_and_directories(scripts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photo.png").touch()
    Path("photos").mkdir()
    for words in (["edit", "m", "ph"], ["sample", "--like", "ph"], ["edit", "--mask", "ph"], ["sample", "--out", "ph"]):
        assert completed(scripts, *words) == {"photo.png", "photos"}
    assert completed(scripts, "export", "m", "--out", "ph") == {"photos"}


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_name_every_option(scripts, shell):
    script = (scripts / shell).read_text()
    for parser in parsers(cli.parser()):
        for action in parser._actions:
            if action.help != argparse.SUPPRESS:
                assert all(option.lstrip("-") in script for option in action.option_strings)
    assert str(Path.cwd()) not in script and "%(default)" not in script


def test_an_unknown_shell(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("completion", "cmd")
    assert stopped.value.code == 2 and "bash" in capsys.readouterr().err
