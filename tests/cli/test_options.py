"""Every option of every command, found through the parser: values out of range and paths that cannot be are refused."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import pixels_of, run
from PIL import Image
from refusals import refused, unchanged

from tamingfast import cli
from tamingfast.cli import arguments
from tamingfast.cli.options import size_of

#: A valid command line of each command; files and directories are names in the test's own directory.
COMMANDS = {
    "reproduce": ["reproduce", "pixels", "--preset", "smoke", "--out", "out"],
    "train vqgan": ["train", "vqgan", "tiny", "--out", "out"],
    "train prior": ["train", "prior", "tiny", "--first-stage", "model", "--out", "out"],
    "sample": ["sample", "model", "-n", "1", "--out", "out.png"],
    "edit": ["edit", "model", "photo.png", "--mask", "mask.png", "--out", "out.png"],
    "outpaint": ["outpaint", "model", "photo.png", "--right", "2", "--out", "out.png"],
    "reconstruct": ["reconstruct", "model", "photo.png", "--out", "out.png"],
    "complete": ["complete", "model", "photo.png", "--out", "out.png"],
    "likelihood": ["likelihood", "model", "photo.png"],
    "evaluate": ["evaluate", "model"],
    "encode": ["encode", "model", "--out", "out.safetensors"],
    "ui": ["ui", "model"],
    "inspect": ["inspect", "model"],
    "convert": ["convert", "model", "out.safetensors"],
    "export": ["export", "model", "--out", "out"],
    "push": ["push", "model", "owner/name"],
    "download": ["download", "lpips"],
    "completion": ["completion", "bash"],
}
FILES = arguments.output, arguments.output_or_directory
MAY_BE_ZERO = {"top_k", "seed", "left", "right", "top", "bottom", "scales"}
NO_WHOLE_NUMBERS = ("-1", "1e9", "1.0", "nan", "inf", "many", "", " ", "0x10", "9" * 5000, str(2**64))
NO_NUMBERS = {
    "temperature": ("nan", "inf", "-1", "0", "1e39", "1e-50", "warm", ""),
    "accept": ("nan", "inf", "-0.1", "0", "1.01", "most", ""),
    "top_p": ("nan", "inf", "-0.1", "0", "1.01", "most", ""),
    "cfg": ("nan", "inf", "-0.1", "1001", "4:", "4:linear", ":cosine", "most", ""),
}
#: Names that nothing has.
NAMES = {
    "host",
    "shell",
    "schedule",
    "engine",
    "dtype",
    "device",
    "split",
    "preset",
    "what",
    "layout",
    "format",
    "repository",
}
#: Options whose values depend on the model, its config or optional packages.
FREE = {"features", "allow"}
#: Names of classes are known with the model.
NO_CLASSES = ("", " ", "-1", "-")
NO_SIZES = ("0", "0x0", "16x0", "0x16", "-1", "16x", "x16", "16x16x16", "1e2", "nan", "", "²", "٣x٣", "9" * 5000, "big")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a photo and a mask. There is no model, so what is refused later names another thing."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "mask.png"):
        Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(name)


def parsers(parser: argparse.ArgumentParser, words: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser of each command, by the command's words."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield words.strip(), parser
    for action in inner:
        for name, chosen in action.choices.items():
            yield from parsers(chosen, f"{words} {name}")


PARSERS = {words: parser for words, parser in parsers(cli.parser()) if words != "info"}
OPTIONS = [
    pytest.param(words, action, id=f"{words} {arguments.name_of(action)}")
    for words, parser in PARSERS.items()
    for action in parser._actions
    if action.nargs != 0 and action.dest != "overrides"
]


def with_value(words: str, action: argparse.Action, value: str) -> list[str]:
    """The command's line with this value of an option or of a positional argument."""
    line = list(COMMANDS[words])
    if action.option_strings:
        name = arguments.name_of(action)
        if action.nargs == "+":
            return [*line, name, value] if not value.startswith("-") else [*line, f"{name}={value}"]
        return [*line, f"{name}={value}"]
    positionals = [each for each in PARSERS[words]._actions if not each.option_strings]
    line[len(words.split()) + positionals.index(action)] = value
    return line


def wrong_values(action: argparse.Action) -> tuple[str, ...]:
    if action.type in (arguments.source, arguments.output, arguments.output_directory, arguments.output_or_directory):
        return "", "a\0b"
    if action.dest in NO_NUMBERS:
        return NO_NUMBERS[action.dest]
    if action.dest in ("size", "label"):
        return NO_SIZES if action.dest == "size" else NO_CLASSES
    if action.dest in NAMES:
        return "nonsense", ""
    return NO_WHOLE_NUMBERS if action.dest in MAY_BE_ZERO else (*NO_WHOLE_NUMBERS, "0")


def test_every_command_is_in_the_table():
    assert PARSERS.keys() == COMMANDS.keys()


@pytest.mark.parametrize(("words", "action"), OPTIONS)
def test_values_out_of_range(words, action, tmp_path):
    if action.dest in FREE:
        pytest.skip("what it names is known with the model")
    with unchanged(tmp_path):
        for value in wrong_values(action):
            refused(*with_value(words, action, value), names=arguments.name_of(action))


@pytest.mark.parametrize(("words", "action"), [p for p in OPTIONS if p.values[1].type in FILES])
def test_outputs_that_cannot_be_written(words, action, tmp_path):
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("to-folder").symlink_to("folder")
    Path("to-device").symlink_to("/dev/null")
    wrong = (
        "folder",
        "to-folder",
        "to-device",
        "/dev/null",
        "/dev/full",
        "pipe",
        "loop",
        "/",
        ".",
        "..",
        "photo.png/out",
    )
    with unchanged(tmp_path):
        for value in (*wrong, "n" * 300, "/proc/out", "/proc/1/none/out"):
            refused(*with_value(words, action, value), names=value)
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


@pytest.mark.parametrize("words", ["reproduce", "train vqgan", "train prior", "export"])
def test_directories_that_cannot_be_written(words, tmp_path):
    (action,) = (each for each in PARSERS[words]._actions if each.dest == "out")
    with unchanged(tmp_path):
        for value in ("photo.png", "photo.png/run", "/dev/null", "/dev/null/run", "/proc/run", "n" * 300):
            refused(*with_value(words, action, value), names=value)


@pytest.mark.parametrize(
    "line",
    [
        "edit model photo.png --mask mask.png --out photo.png",
        "edit model photo.png --mask mask.png --out mask.png",
        "edit model photo.png --mask mask.png --out linked.png",
        "edit model photo.png --mask mask.png --out ./photo.png",
        "edit model photo.png --mask mask.png --preview photo.png",
        "reconstruct model mask.png photo.png --out photo.png",
        "complete model photo.png --condition mask.png --out mask.png",
        "likelihood model photo.png --plot photo.png",
        "evaluate model --reference drawn.npz --save-reference drawn.npz",
        "evaluate drawn.npz --reference drawn.npz --state drawn.npz",
        "sample model --condition-of photo.png --out photo.png",
        "convert model.safetensors model.safetensors",
        "convert model.safetensors hard.safetensors",
        "evaluate model.safetensors --out model.safetensors",
        "encode model.safetensors --out model.safetensors",
        "encode model --cond-stage model.safetensors --out model.safetensors",
    ],
)
def test_an_input_is_no_output(line, tmp_path):
    Path("model.safetensors").write_bytes(b"weights")
    os.link("model.safetensors", "hard.safetensors")
    Path("linked.png").symlink_to("photo.png")
    np.savez("drawn.npz", np.zeros((2, 8, 8, 3), np.uint8))
    with unchanged(tmp_path):
        refused(*line.split(), names="expected another file than")


def test_a_canvas_is_no_picture(tmp_path):
    with unchanged(tmp_path):
        refused("sample", "model", "--out", "a.png", "--canvas", "a.png", names="--canvas")
        refused("sample", "model", "--out", "a.png", "--preview", "b.png", "--canvas", "./b.png", names="--canvas")


@pytest.mark.parametrize(("text", "size"), [("16", (16, 16)), ("16x8", (16, 8)), ("16X08", (16, 8))])
def test_sizes(text, size):
    assert size_of(argparse.Namespace(size=text)) == size


def test_values_at_the_ends_of_their_ranges(runs, tmp_path):
    ends = [
        ["--batch", 1], ["--batch", 2**31 - 1], ["--seed", 0], ["--seed", 2**64 - 1], ["--top-k", 0],
        ["--top-k", 2**31 - 1], ["--top-p", 1], ["--top-p", 1e-30], ["--temperature", 2e-38],
        ["--temperature", 3e38], ["--stride", 1], ["--schedule", "block", "--stride", 2], ["--size", 8],
    ]  # fmt: skip
    for words in ends:
        assert run("sample", runs / "prior", "-n", 1, "--out", tmp_path / "s.png", *words) == 0, words
        assert pixels_of(tmp_path / "s.png").shape[2] == 3
