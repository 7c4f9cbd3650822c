"""Token files edited in every way: refused in one sentence that names the file, or read as before."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tamingfast import UserError, tasks
from tamingfast.cli import main
from tamingfast.data.tokens import FORMAT, TokenDataset, write_tokens

N, H, W = 6, 4, 5
RECORD = {"key": "edges", "vocab_size": 8, "first_stage": "f" * 32, "data": {"kind": "edges"}}


def parts() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a sound file without a checksum."""
    grids = torch.arange(N * H * W, dtype=torch.int16).view(N, H, W) % 8
    tensors = {"indices": grids, "conditions": grids.flip(0).contiguous(), "class_label": torch.arange(N) % 3}
    metadata = {
        "format": FORMAT, "vocab_size": "8", "classes": json.dumps(["a", "b", "c"]), "condition": json.dumps(RECORD)
    }  # fmt: skip
    return tensors, metadata


def refused(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        TokenDataset(path)
    message = str(raised.value)
    assert str(path) in message and ": got " in message and len(message.splitlines()) == 1 and len(message) < 800
    return message


def tensor(name, change):
    return lambda tensors, metadata: tensors.update({name: change(tensors[name])})


def without(name):
    return lambda tensors, metadata: (tensors.pop(name, None), metadata.pop(name, None))


def meta(name, value):
    return lambda tensors, metadata: metadata.update({name: value if isinstance(value, str) else json.dumps(value)})


def record(**changes):
    return meta("condition", RECORD | changes)


def put(value, place=0):
    """Replaces one value of a tensor."""

    def change(whole):
        whole = whole.to(torch.int64).clone()
        whole.view(-1)[place] = value
        return whole

    return change


DEEP = "[" * 100_000
EDITS = {
    # tensors
    "indices missing": without("indices"),
    "indices float": tensor("indices", torch.Tensor.float),
    "indices half": tensor("indices", torch.Tensor.half),
    "indices float8": tensor("indices", lambda t: t.float().to(torch.float8_e4m3fn)),
    "indices bool": tensor("indices", torch.Tensor.bool),
    "indices complex": tensor("indices", lambda t: t.to(torch.complex64)),
    "indices of two dimensions": tensor("indices", lambda t: t.flatten(1)),
    "indices of four dimensions": tensor("indices", lambda t: t[:, None]),
    "indices a number": tensor("indices", lambda t: t[0, 0, 0].clone()),
    "indices empty": tensor("indices", lambda t: t[:0]),
    "indices of no rows": tensor("indices", lambda t: t[:, :0]),
    "indices too few": tensor("indices", lambda t: t[:-1].clone()),
    "a token too large": tensor("indices", put(8)),
    "a token far too large": tensor("indices", put(2**62, -1)),
    "a token negative": tensor("indices", put(-1)),
    "a token the least": tensor("indices", put(-(2**63))),
    "labels too few": tensor("class_label", lambda t: t[:-1].clone()),
    "labels of two dimensions": tensor("class_label", lambda t: t[:, None]),
    "labels a number": tensor("class_label", lambda t: t[0].clone()),
    "labels float": tensor("class_label", torch.Tensor.float),
    "labels empty": tensor("class_label", lambda t: t[:0]),
    "a label beyond the classes": tensor("class_label", put(3)),
    "a label negative": tensor("class_label", put(-1)),
    "a label of 1e9": tensor("class_label", put(10**9)),
    "a label of 1e9 without classes": lambda t, m: (tensor("class_label", put(10**9))(t, m), m.pop("classes")),
    "a label of 2**62 without classes": lambda t, m: (tensor("class_label", put(2**62))(t, m), m.pop("classes")),
    "conditions float": tensor("conditions", torch.Tensor.float),
    "conditions of NaN": tensor("conditions", lambda t: torch.full(t.shape, torch.nan)),
    "conditions too few": tensor("conditions", lambda t: t[:-1].clone()),
    "conditions flat": tensor("conditions", lambda t: t.flatten(1)),
    "conditions empty": tensor("conditions", lambda t: t[:, :, :0]),
    "a condition too large": tensor("conditions", put(8)),
    "a condition negative": tensor("conditions", put(-5)),
    # metadata
    "no metadata": lambda t, m: m.clear(),
    "no format": without("format"),
    "another format": meta("format", "tamingfast tokens 2"),
    "no vocabulary": without("vocab_size"),
    "vocabulary empty": meta("vocab_size", ""),
    "vocabulary 0": meta("vocab_size", "0"),
    "vocabulary negative": meta("vocab_size", "-8"),
    "vocabulary a fraction": meta("vocab_size", "8.0"),
    "vocabulary a word": meta("vocab_size", "many"),
    "vocabulary too small": meta("vocab_size", "7"),
    "vocabulary 1e18": meta("vocab_size", "1" + "0" * 18),
    "vocabulary of 5000 digits": meta("vocab_size", "9" * 5000),
    "vocabulary in other digits": meta("vocab_size", "٨"),
    "classes no JSON": meta("classes", "a, b, c"),
    "classes a number": meta("classes", 3),
    "classes a string": meta("classes", json.dumps("abc")),
    "classes an object": meta("classes", {"a": 0, "b": 1, "c": 2}),
    "classes of numbers": meta("classes", [1, 2, 3]),
    "classes of lists": meta("classes", [["a"], ["b"], ["c"]]),
    "classes too few": meta("classes", ["a", "b"]),
    "classes none": meta("classes", []),
    "classes nested deeply": meta("classes", DEEP),
    "record missing": without("condition"),
    "record no JSON": meta("condition", "{edges}"),
    "record a list": meta("condition", [1, 2]),
    "record a number": meta("condition", 5),
    "record null": meta("condition", None),
    "record nested deeply": meta("condition", '{"key":' * 100_000),
    "record empty": meta("condition", {}),
    "record without a key": meta("condition", {"vocab_size": 8}),
    "record with a number for its key": record(key=7),
    "record without a vocabulary": meta("condition", {"key": "edges"}),
    "record's vocabulary a word": record(vocab_size="eight"),
    "record's vocabulary null": record(vocab_size=None),
    "record's vocabulary true": record(vocab_size=True),
    "record's vocabulary a fraction": record(vocab_size=8.5),
    "record's vocabulary a list": record(vocab_size=[8]),
    "record's vocabulary too small": record(vocab_size=3),
    "record's vocabulary of 4000 digits": meta("condition", json.dumps(RECORD).replace("8", "9" * 4000)),
    "record's vocabulary NaN": record(vocab_size=float("nan")),
    "record's data a list": record(data=["edges"]),
    "record's first stage a number": record(first_stage=5),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edits_of_tensors_and_metadata_are_refused(tmp_path, name):
    path = tmp_path / "edited.safetensors"
    tensors, metadata = parts()
    EDITS[name](tensors, metadata)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    began = time.process_time()
    refused(path)
    assert time.process_time() - began < 60  # and not after building a list of 2**62 names
    if metadata.get("format") == FORMAT:
        with pytest.raises(UserError, match=r"edited\.safetensors"):
            tasks.inspect(path)


def test_files_without_a_checksum_still_open(tmp_path):
    tensors, metadata = parts()
    save_file(tensors, tmp_path / "t.safetensors", metadata=metadata)
    dataset = TokenDataset(tmp_path / "t.safetensors")
    assert dataset.classes == ["a", "b", "c"] and dataset.condition == RECORD
    assert set(dataset[0]) == {"indices", "edges_indices", "class_label"}


def test_a_record_decides_nothing_but_its_kind(tmp_path):
    tensors, metadata = parts()
    record(data={"kind": "edges", "sigma": 2.0, "path": "/etc", "target": "os.system"})(tensors, metadata)
    save_file(tensors, tmp_path / "t.safetensors", metadata=metadata)
    assert TokenDataset(tmp_path / "t.safetensors").condition["data"] == {"kind": "edges", "sigma": 2.0}


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path) -> Path:
    path = tmp_path / "edited.safetensors"
    tensors, _ = parts()
    write_tokens(
        path, tensors["indices"], 8, tensors["class_label"], {"source": 'a "quoted" ünïcode crop'}, ["a", "b", "c"],
        [tensors["conditions"].numpy()], RECORD,
    )  # fmt: skip
    TokenDataset(path)
    return path


def header(content: bytes, **changes) -> bytes:
    """The file with other offsets, shapes or types of ``indices``."""
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    entries["indices"] |= changes
    text = json.dumps(entries).encode().ljust(length)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


BYTES = {
    "nothing": lambda c: b"",
    "seven bytes": lambda c: c[:7],
    "the length alone": lambda c: c[:8],
    "half of the header": lambda c: c[:300],
    "the last byte missing": lambda c: c[:-1],
    "a byte more": lambda c: c + b"\0",
    "twice": lambda c: c + c,
    "a length of 2**63": lambda c: struct.pack("<Q", 2**63) + c[8:],
    "a length of 0": lambda c: struct.pack("<Q", 0) + c[8:],
    "a length that is too short": lambda c: struct.pack("<Q", 50) + c[8:],
    "a header that is no JSON": lambda c: c[:8] + b"#" + c[9:],
    "a header nested deeply": lambda c: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a header that is a list": lambda c: struct.pack("<Q", 2) + b"[]",
    "no tensors": lambda c: struct.pack("<Q", 2) + b"{}",
    "negative lengths": lambda c: header(c, shape=[-N, -H, W]),
    "lengths beyond 64 bits": lambda c: header(c, shape=[2**40, 2**40, 2**40]),
    "offsets beyond the end": lambda c: header(c, data_offsets=[0, 10**15]),
    "offsets that go back": lambda c: header(c, data_offsets=[100, 0]),
    "negative offsets": lambda c: header(c, data_offsets=[-240, 0]),
    "an unknown type": lambda c: header(c, dtype="I17"),
    "another type": lambda c: header(c, dtype="BF16"),
    "a transposed shape": lambda c: header(c, shape=[W, H, N]),
    "a web page": lambda c: b"<!DOCTYPE html><html><body>Not found</body></html>",
    "a pointer of Git LFS": lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "zeros": lambda c: bytes(len(c)),
    "the last token changed": lambda c: c[:-1] + bytes([c[-1] ^ 1]),
    "two tokens exchanged": lambda c: c[:-6] + c[-4:-2] + c[-6:-4] + c[-2:] if c[-6:-4] != c[-4:-2] else c[1:],
    "a class renamed": lambda c: c.replace(rb"\"b\"", rb"\"d\""),
    "a space in the header": lambda c: c.replace(b"}}  ", b"}}\t "),
    "another checksum": lambda c: c.replace(b'"sha256":"', b'"sha256":"0')[: len(c)],
}


@pytest.mark.parametrize("name", BYTES)
def test_edits_of_bytes_are_refused(sealed, name):
    content = sealed.read_bytes()
    edited = BYTES[name](content)
    assert edited != content
    sealed.write_bytes(edited)
    refused(sealed)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_no_flipped_bit_changes_what_is_read(sealed, count):
    content, sound = bytearray(sealed.read_bytes()), TokenDataset(sealed)
    name = content.index(b'"sha256"')
    rng = np.random.default_rng(count)
    for place, bit in zip(rng.integers(0, len(content), count), rng.integers(0, 8, count), strict=True):
        content[place] ^= 1 << bit
        sealed.write_bytes(content)
        if not name <= place < name + 76:
            refused(sealed)
        else:  # a damaged name of the checksum makes a file without one
            with contextlib.suppress(UserError):
                found = TokenDataset(sealed)
                assert all(torch.equal(found[n]["indices"], sound[n]["indices"]) for n in range(N))
        content[place] ^= 1 << bit


def test_the_checksum_is_that_of_a_file_of_any_size(tmp_path):
    path = tmp_path / "t.safetensors"
    grids = np.zeros((300, 64, 64), np.int64)
    grids[-1, -1, -1] = 999
    write_tokens(path, (grids[first : first + 10] for first in range(0, 300, 10)), 1000)
    assert len(TokenDataset(path)) == 300
    with open(path, "rb+") as stream:
        stream.seek(1_500_000)
        stream.write(b"\1")
    assert "got bytes of checksum" in refused(path)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p)], ids=["pipe", "dir", "dev"]
)
def test_what_is_no_file_is_never_read(tmp_path, make):
    make(tmp_path / "t.safetensors")
    assert "expected a token file" in refused(tmp_path / "t.safetensors")


@pytest.mark.parametrize("name", ["a label of 1e9 without classes", "classes nested deeply", "record's data a list"])
def test_a_training_on_an_edited_file_ends_in_a_sentence(tmp_path, capsys, name):
    path = tmp_path / "edited.safetensors"
    tensors, metadata = parts()
    EDITS[name](tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    words = ["train", "prior", "--out", str(tmp_path / "run"), "data.name=tokens", f"data.path={path}"]
    assert main([*words, "--first-stage", str(tmp_path / "none")]) == 2
    assert main(["inspect", str(path)]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and str(path) in said.err
    assert not (tmp_path / "run").exists()


def test_labels_that_could_not_be_read_again_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="class_label: got 0 to 1000000000, expected 0 to 1048575"):
        write_tokens(tmp_path / "t.safetensors", np.zeros((2, 2, 2), int), 8, class_label=[0, 10**9])


def test_names_of_files_that_are_no_text_are_written(tmp_path):
    path, name = tmp_path / "t.safetensors", os.fsdecode(b"caf\xe9.png")
    write_tokens(path, np.zeros((2, 2, 2), int), 8, [0, 1], {"source": name}, [name, "b"])
    assert TokenDataset(path).classes == [name, "b"] and TokenDataset(path).metadata["source"] == "caf?.png"
