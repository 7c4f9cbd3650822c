"""Canvas files that somebody has edited or cut: each ends in a sentence that names the file, or in a sound drawing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import run, size_of
from refusals import contents, refused, unchanged
from safetensors import safe_open
from safetensors.torch import save_file

from tamingfast.sampling import Canvas

CODES, SIDE = 16, 16  # of the first stage, and of the drawing in tokens
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.runs(tmp_path_factory.mktemp("runs")) / "prior"


@pytest.fixture(scope="module")
def begun(prior: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawing of which half is pending."""
    path = tmp_path_factory.mktemp("canvas") / "begun.canvas"
    assert run("sample", prior, "-n", 2, "--size", "32x32", "--canvas", path, "--out", path.with_suffix(".png")) == 0
    whole = Canvas.load(path)
    lower = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    lower[SIDE // 2 :] = True
    whole.resample(lower).save(path)
    return path


def edited(begun: Path, path: Path, tensors: dict[str, Any], settings: Any = None, **metadata: Any) -> Path:
    """A copy of the file without its checksum: tensors, settings and metadata replaced, or left out where None."""
    with safe_open(begun, "pt") as stream:
        kept, words = {name: stream.get_tensor(name) for name in stream.keys()}, stream.metadata()  # noqa: SIM118
    words.pop("sha256", None)
    if isinstance(settings, dict):
        known = json.loads(words["settings"]) | settings
        words["settings"] = json.dumps({name: value for name, value in known.items() if value != "left out"})
    elif settings is not None:
        words["settings"] = settings
    kept |= {name: value(kept[name]) if callable(value) else value for name, value in tensors.items()}
    words |= metadata
    save_file(
        {name: value for name, value in kept.items() if value is not None},
        path,
        metadata={name: value for name, value in words.items() if value is not None},
    )
    return path


def with_cell(value: int) -> Any:
    """The tensor with its first entry, which is kept, replaced."""

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[0] = value
        return x

    return change


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64)


#: Edits of tensors that leave no canvas.
TENSORS: dict[str, dict[str, Any]] = {
    "no tokens": {"tokens": None},
    "no pending": {"pending": None},
    "no cond": {"cond": None},
    "no tensors": {"tokens": None, "pending": None, "cond": None},
    "one more": {"more": ones(2)},
    "another name": {"tokens": None, "token": ones(2, SIDE, SIDE)},
    "tokens float": {"tokens": lambda x: x.float()},
    "tokens NaN": {"tokens": lambda x: x.float() * NAN},
    "tokens half": {"tokens": lambda x: x.half()},
    "tokens bool": {"tokens": lambda x: x > 3},
    "tokens complex": {"tokens": lambda x: x.to(torch.complex64)},
    "tokens float8": {"tokens": lambda x: x.float().to(torch.float8_e4m3fn)},
    "tokens flat": {"tokens": lambda x: x.flatten()},
    "tokens 2 dims": {"tokens": lambda x: x[0]},
    "tokens 4 dims": {"tokens": lambda x: x[None]},
    "tokens scalar": {"tokens": torch.tensor(3)},
    "tokens none": {"tokens": ones(0, SIDE, SIDE)},
    "nothing at all": {
        "tokens": ones(0, SIDE, SIDE), "pending": torch.ones(0, SIDE, SIDE, dtype=torch.bool), "cond": ones(0, 1),
    },
    "no rows": {"tokens": ones(2, 0, SIDE), "pending": torch.ones(2, 0, SIDE, dtype=torch.bool)},
    "no columns": {"tokens": ones(2, SIDE, 0), "pending": torch.ones(2, SIDE, 0, dtype=torch.bool)},
    "fewer rows": {"tokens": lambda x: x[:, 1:].contiguous()},
    "more images": {"tokens": lambda x: torch.cat([x, x])},
    "pending of another batch": {"pending": lambda x: x[:1].contiguous()},
    "pending of another size": {"pending": lambda x: x[:, :, 1:].contiguous()},
    "pending integers": {"pending": lambda x: x.long()},
    "pending bytes": {"pending": lambda x: x.to(torch.uint8)},
    "pending float": {"pending": lambda x: x.float()},
    "pending scalar": {"pending": torch.tensor(True)},
    "pending flat": {"pending": lambda x: x.flatten()},
    "cond float": {"cond": lambda x: x.float()},
    "cond bool": {"cond": lambda x: x > 0},
    "cond complex": {"cond": lambda x: x.to(torch.complex64)},
    "cond scalar": {"cond": torch.tensor(1)},
    "cond flat": {"cond": lambda x: x.flatten()},
    "cond empty": {"cond": ones(2, 0)},
    "cond of no image": {"cond": ones(0, 1)},
    "cond of one image": {"cond": lambda x: x[:1].contiguous()},
    "cond of three images": {"cond": ones(3, 1)},
    "cond a grid": {"cond": ones(2, SIDE, SIDE)},
    "cond a grid of another size": {"cond": ones(2, SIDE, 3)},
    "cond a grid of prefixes": {"cond": ones(2, SIDE, SIDE, 2)},
    "cond 5 dims": {"cond": ones(2, SIDE, SIDE, 1, 1)},
    "cond as long as the block": {"cond": ones(2, 300)},
    "token -1": {"tokens": with_cell(-1)},
    "token of the vocabulary's size": {"tokens": with_cell(CODES)},
    "token 10**6": {"tokens": with_cell(10**6)},
    "token 2**62": {"tokens": with_cell(2**62)},
    "token -2**63": {"tokens": with_cell(-(2**63))},
    "tokens unsigned and huge": {"tokens": lambda x: torch.full(x.shape, 2**63, dtype=torch.uint64)},
    "cond -1": {"cond": with_cell(-1)},
    "cond 10**6": {"cond": with_cell(10**6)},
    "cond 2**62": {"cond": with_cell(2**62)},
}  # fmt: skip
#: Settings that are no JSON object.
TEXTS = ["", "{", "no", "[]", "null", "3", '"text"', "[" * 100_000, "{'seed': 1}", '{"seed": 1', '{"seed": 00}', "\0"]
#: Values that a setting cannot have.
VALUES: dict[str, list[Any]] = {
    "window": [0, -1, 2**40, 1e400, 1.5, "8", None, True, [8], {}],
    "schedule": ["", "papers", "PAPER", 3, None, ["paper"], {}],
    "stride": [0, -8, 2**70, 0.5, "8", None, [1]],
    "temperature": [0, -1, NAN, INF, 1e39, 1e-50, "1", None, [1.0], True],
    "top_k": [0, -3, NAN, 2.5, "3", [], True],
    "top_p": [0, -0.1, 1.1, NAN, INF, "0.9", {}, True],
    "greedy": [0, 1, "true", None, []],
    "seed": [-1, 2**64, 1.0, NAN, "1", None, True],
    "first_image": [-1, 2**32 - 1, 2**40, 0.5, "0", None],
    "cfg": ["", "x", "3:x", -1, NAN, INF, 1e4, [], {}, True],
    "dtype": ["", "floats", "float64", "torch", 3, [], "torch.torch.float32"],
    "engine": ["torch"],
    "": [1],
}
METADATA: dict[str, dict[str, Any]] = {
    "no settings": {"settings": ""},
    "another format": {"format": "tamingfast canvas 2"},
    "no format": {"format": None},
    "another model": {"model": "0" * 64},
    "a model that is no name": {"model": "\x1b[31m\n\n\n\n\x00" + "x" * 1000},
    "no model": {"model": None},
    "a wrong checksum": {"sha256": "0" * 63 + "1"},
    "a checksum that is none": {"sha256": "\u00e9" * 32},
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(prior, begun, tmp_path, name):
    refused_alike(prior, edited(begun, tmp_path / "e.canvas", TENSORS[name]))


@pytest.mark.parametrize("text", TEXTS, ids=[text[:12].replace("\0", "NUL") for text in TEXTS])
def test_settings_that_are_no_object(prior, begun, tmp_path, text):
    refused_alike(prior, edited(begun, tmp_path / "e.canvas", {}, settings=text))


@pytest.mark.parametrize("name", VALUES)
def test_settings(prior, begun, tmp_path, name):
    for value in VALUES[name]:
        said = refused_alike(prior, edited(begun, tmp_path / "e.canvas", {}, settings={name: value}))
        assert name in said


def test_settings_that_do_not_fit_one_another(prior, begun, tmp_path):
    for settings in (
        {"schedule": "block", "stride": 9, "window": 8},
        {"schedule": "strided", "stride": 17, "window": "left out"},
        {"window": 5, "schedule": "paper"},  # more than the model's block holds
        {"window": 2**31},
        "{}",  # a window of 16
    ):
        refused_alike(prior, edited(begun, tmp_path / "e.canvas", {}, settings=settings))


@pytest.mark.parametrize("name", METADATA)
def test_metadata(prior, begun, tmp_path, name):
    refused_alike(prior, edited(begun, tmp_path / "e.canvas", {}, **METADATA[name]))


def test_cut_files(prior, begun, tmp_path):
    whole, path = begun.read_bytes(), tmp_path / "e.canvas"
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, header + 7, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused_alike(prior, path)
    for more in (b"\0", b"x" * 4096, whole):
        path.write_bytes(whole + more)
        refused_alike(prior, path)
    for length in (2**63 - 1, 2**64 - 1, 100_000_001, 0, 1):
        path.write_bytes(length.to_bytes(8, "little") + whole[8:])
        refused_alike(prior, path)


def test_files_that_are_none(prior, begun, tmp_path):
    path = tmp_path / "e.canvas"
    for content in (
        b"PK\x03\x04",
        b"<!DOCTYPE html>" * 40,
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\0" * 99,
    ):
        path.write_bytes(content)
        refused_alike(prior, path)
    refused_alike(prior, path.with_name("missing.canvas"))
    path.unlink()
    path.mkdir()
    refused_alike(prior, path)


def refused_alike(prior: Path, path: Path) -> str:
    """The message when a drawing is resumed from the file; going on from it as a photo must be refused alike."""
    with unchanged(path.parent):
        out = path.with_name("e.png")
        said = refused("sample", prior, "--resume", "--canvas", path, "--out", out, names=path.name)
    return said


SOUND: dict[str, tuple[dict[str, Any], Any]] = {
    "nothing edited": ({}, None),
    "nothing pending": ({"pending": torch.zeros_like}, None),
    "all pending": ({"pending": torch.ones_like}, None),
    "all pending over nonsense": ({"pending": torch.ones_like, "tokens": lambda x: x - 10**9}, None),
    "small integers": ({"tokens": lambda x: x.to(torch.uint8), "cond": lambda x: x.int()}, None),
    "temperature 3": ({}, {"temperature": 3}),
    "smallest temperature": ({}, {"temperature": 2e-38}),
    "top_k above the vocabulary": ({}, {"top_k": 10**9}),
    "top_p 1": ({}, {"top_p": 1}),
    "a narrow window": ({}, {"window": 3, "schedule": "block", "stride": 3}),
    "the widest window": ({}, {"window": 4}),
    "the largest seed": ({}, {"seed": 2**64 - 1}),
    "float32": ({}, {"dtype": "float32"}),
    "a late image": ({}, {"first_image": 2**32 - 2}),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_edits_are_drawn(prior, begun, tmp_path, name):
    tensors, settings = SOUND[name]
    path, out = edited(begun, tmp_path / "e.canvas", tensors, settings), tmp_path / "e.png"
    assert run("sample", prior, "--resume", "--canvas", path, "--out", out) == 0
    assert size_of(out) == (2 * 34 + 2, 34 + 2)
    assert Canvas.load(path).done and sorted(contents(tmp_path)) == ["e.canvas", "e.png"]


def test_bytes_that_are_neither_true_nor_false(prior, begun, tmp_path):
    """A bool of any other byte than 0 and 1 would be counted as more than one token."""
    path = edited(begun, tmp_path / "e.canvas", {})
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    first, end = header["pending"]["data_offsets"]
    start = len(content) - max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    content[start + first : start + end] = bytes(255 * byte for byte in content[start + first : start + end])
    path.write_bytes(content)
    loaded = Canvas.load(path)
    assert torch.equal(loaded.pending, Canvas.load(begun).pending)
    assert int(loaded.pending.sum()) == 2 * SIDE * SIDE // 2


@pytest.mark.parametrize("name", ["token -1", "cond 10**6", "cond a grid", "tokens 4 dims"])
def test_canvases_in_place_of_photos(prior, begun, tmp_path, name):
    path = edited(begun, tmp_path / "e.canvas", TENSORS[name])
    with unchanged(tmp_path):
        refused("outpaint", prior, path, "--right", 2, "--out", tmp_path / "o.png", names=path.name)
