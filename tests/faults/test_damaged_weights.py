"""Files of weights that are cut, damaged, of other programs or unreadable end in one sentence that names them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import golden
import hostile
import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

import tamingfast
from tamingfast import cli
from tamingfast.checkpoints import save_weights
from tamingfast.checkpoints.weights import metadata_of, read_checkpoint, read_state_dict
from tamingfast.errors import UserError


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder.conv_in.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "quantize.used": torch.arange(5),
        "half": torch.randn(7, generator=generator).half(),
        "steps": torch.tensor(3),
    }


def content() -> dict:
    return {"state_dict": weights(), "global_step": 5, "hyper_parameters": {"sizes": [1, 2], "name": "x"}}


def unchecked(path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content(), path)
    finally:
        torch.serialization.set_crc32_options(before)


def unsealed(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights(), path)


#: Kinds of files, and whether a flipped bit in them must be noticed.
KINDS: dict[str, tuple[Callable[[Path], None], bool]] = {
    "zip": (lambda path: torch.save(content(), path), True),
    "safetensors": (lambda path: save_weights(path, weights(), {"step": "5"}), True),
    "zip without checksums": (unchecked, False),
    "before torch 1.6": (
        lambda path: torch.save(content(), path, _use_new_zipfile_serialization=False), False
    ),
    "safetensors of another program": (unsealed, False),
}  # fmt: skip


def refused(action: Callable[[], object], name: str) -> str:
    with pytest.raises(UserError) as error:
        action()
    text = str(error.value)
    assert name in text and "\n" not in text and ": got " in text and ", expected " in text, text
    return text


def read_or_refused(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a file, None if it is refused with one line that names it."""
    try:
        return read_checkpoint(path).state
    except UserError as error:
        text = str(error)
    assert path.name in text and "\n" not in text
    return None


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits(kind, count, tmp_path):
    path = tmp_path / "x.ckpt"
    write, noticed = KINDS[kind]
    write(path)
    whole, expected, chance = path.read_bytes(), weights(), random.Random(count)
    for _ in range(count):
        place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        state = read_or_refused(path)
        if noticed and state is not None:
            assert state.keys() == expected.keys(), (place, bit)
            assert all(torch.equal(state[key], value) for key, value in expected.items()), (place, bit)


@pytest.mark.parametrize("kind", [kind for kind, (_, noticed) in KINDS.items() if noticed])
def test_a_flipped_bit_in_each_tensor_is_noticed(kind, tmp_path):
    path = tmp_path / "x.ckpt"
    KINDS[kind][0](path)
    whole = path.read_bytes()
    for value in weights().values():
        place = whole.index(value.numpy().tobytes())
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "checksum" in refused(lambda: read_state_dict(path), "x.ckpt")


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read_under_any_name(kind, tmp_path):
    for name in ("x.ckpt", "x.safetensors", "x.pt", "x.bin", "x.png", "x"):
        path = tmp_path / name
        KINDS[kind][0](path)
        checkpoint = read_checkpoint(path)
        assert all(torch.equal(checkpoint.state[key], value) for key, value in weights().items())
        if kind != "safetensors of another program":
            assert checkpoint.number("global_step", "step") == 5


@pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", KINDS)
def test_files_cut_at_any_length(kind, every, tmp_path):
    path = tmp_path / "x.ckpt"
    KINDS[kind][0](path)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), every), len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(lambda: read_state_dict(path), "x.ckpt")
        if length % (every * 8) == 0:
            refused(lambda: tamingfast.load_model(path), "x.ckpt")


@pytest.mark.parametrize("kind", KINDS)
def test_files_with_bytes_after_their_end_or_in_their_middle(kind, tmp_path):
    """Neither is as the file was written: it is read as it was or refused."""
    path = tmp_path / "x.ckpt"
    KINDS[kind][0](path)
    whole = path.read_bytes()
    for changed in (whole + bytes(1000), whole + whole, whole[:300] + bytes(64) + whole[300:], bytes(512) + whole):
        path.write_bytes(changed)
        state = read_or_refused(path)
        assert state is None or all(torch.equal(state[key], value) for key, value in weights().items())


def packed(pack: Callable[[bytes], bytes]) -> bytes:
    stream = io.BytesIO()
    torch.save(weights(), stream)
    return pack(stream.getvalue())


def picture(format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format)
    return stream.getvalue()


def archive(names: list[str], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as made:
        for name in names:
            made.writestr(name, b"0" * 300)
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        made.addfile(tarfile.TarInfo("weights"), io.BytesIO())
    return stream.getvalue()


def saved(save: Callable[[io.BytesIO], None]) -> bytes:
    stream = io.BytesIO()
    save(stream)
    return stream.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 19332096\n"
# What a file is, and the words that say so.
OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a pointer of git-lfs": (lambda: POINTER, "pointer of git-lfs"),
    "a pointer of its first version": (lambda: POINTER.replace(b"git-lfs", b"hawser"), "pointer of git-lfs"),
    "a pointer of git-annex": (lambda: b"/annex/objects/SHA256E-s5--a.ckpt\n", "pointer of git-annex"),
    "a web page": (lambda: b"\n  <!DOCTYPE html>\n<html>", "web page"),
    "a web page with a byte-order mark": (lambda: b"\xef\xbb\xbf<HTML>", "web page"),
    "an XML answer": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    "a JSON answer": (lambda: json.dumps({"error": "Repository not found"}).encode(), "JSON"),
    "an index of shards": (lambda: json.dumps({"metadata": {}, "weight_map": {}}, indent=2).encode(), "JSON"),
    "a config": (lambda: b"# of a model\nmodel:\n  target: x\n", "YAML"),
    "a line of text": (lambda: b"Entry not found", "text"),
    "text of the world": (lambda: ("é漢" * 900).encode(), "text"),
    "JAX": (lambda: b"\x81\xa6params\x82\xa5stage" + os.urandom(300), "msgpack"),
    "JAX, large": (lambda: b"\xde\x00\x20\xa6params" + os.urandom(300), "msgpack"),
    "TensorFlow": (lambda: b"\x08\x01\x12\x80\x10" + os.urandom(300), "TensorFlow"),
    "TensorFlow's index": (lambda: bytes(range(256)) + struct.pack("<Q", 0xDB4775248B80FB57), "TensorFlow"),
    "TensorFlow Lite": (lambda: b"\x1c\0\0\0TFL3" + os.urandom(300), "TensorFlow Lite"),
    "ONNX": (lambda: b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + os.urandom(300), "ONNX"),
    "GGUF": (lambda: b"GGUF\3\0\0\0" + os.urandom(300), "GGUF"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + os.urandom(300), "HDF5"),
    "Keras": (lambda: archive(["metadata.json", "config.json", "model.weights.h5"]), "Keras"),
    "numpy": (lambda: saved(lambda stream: np.save(stream, np.zeros(3))), "numpy"),
    "several of numpy": (lambda: saved(lambda stream: np.savez(stream, a=np.zeros(3))), "numpy"),
    "compressed ones of numpy": (lambda: saved(lambda stream: np.savez_compressed(stream, a=np.zeros(300))), "numpy"),
    "a pickle of numpy": (lambda: pickle.dumps({"a": np.zeros(3)}), "pickle that torch.save did not write"),
    "TorchScript": (lambda: archive(["x/data.pkl", "x/code/__torch__.py", "x/constants.pkl"]), "TorchScript"),
    "a tar archive": (tarred, "tar archive"),
    "gzip": (lambda: packed(gzip.compress), "gzip"),
    "bzip2": (lambda: packed(bz2.compress), "bzip2"),
    "xz": (lambda: packed(lzma.compress), "xz"),
    "a zip archive": (lambda: archive(["weights/a.txt"]), "zip archive"),
    "a compressed zip archive": (lambda: archive(["x/data.pkl"], zipfile.ZIP_DEFLATED), "compressed"),
    "an empty zip archive": (lambda: archive([]), "zip archive"),
    "PNG": (lambda: picture("PNG"), "PNG image"),
    "JPEG": (lambda: picture("JPEG"), "JPEG image"),
    "WebP": (lambda: picture("WEBP"), "WebP image"),
    "PDF": (lambda: b"%PDF-1.7\n" + os.urandom(300), "PDF"),
    "zeros": (lambda: bytes(5000), "zeros"),
    "noise": (lambda: b"\xfe" + bytes(range(128, 256)) * 3, "no format"),
    "nothing": (lambda: b"", "empty file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_as_what_they_are(name, tmp_path):
    make, words = OTHERS[name]
    for ending in ("ckpt", "safetensors", "bin"):
        path = tmp_path / f"vq.{ending}"
        path.write_bytes(make())
        assert words in refused(partial(tamingfast.load_model, path), path.name)
        refused(partial(read_state_dict, path), path.name)
        refused(partial(tamingfast.tasks.inspect, path), path.name)


@pytest.mark.parametrize("name", ["a pointer of git-lfs", "JAX", "TorchScript", "noise"])
def test_the_command_line_says_it_in_one_line(name, tmp_path, capsys):
    path = tmp_path / "vq.ckpt"
    path.write_bytes(OTHERS[name][0]())
    for words in (["inspect", path], ["convert", path, tmp_path / "out.safetensors"], ["sample", path]):
        assert run(*words) == cli.USAGE_ERROR
        error = capsys.readouterr().err
        assert OTHERS[name][1] in error and "vq.ckpt" in error and len(error.splitlines()) == 1
    assert os.listdir(tmp_path) == ["vq.ckpt"]


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path):
    """Records that are compressed, or whose declared sizes are more than the file's."""
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x/data.pkl", hostile.tensor((1,), (1,), 0, 25_000_000))
        made.writestr("x/data/0", bytes(100_000_000))
    assert "compressed" in refused(lambda: read_state_dict(path), "bomb.ckpt")
    hostile.zipped(path, hostile.tensor((1,), (1,), 0, 4), {"data/0": hostile.four_floats()})
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 4)
    entry = whole.index(b"PK\x01\x02", entry + 4)  # that of data/0
    sizes = struct.pack("<2I", 3_000_000_000, 3_000_000_000)
    path.write_bytes(whole[: entry + 20] + sizes + whole[entry + 28 :])
    refused(lambda: read_state_dict(path), "bomb.ckpt")


def test_an_archive_whose_records_overlap_is_refused(tmp_path):
    pickled = hostile.tensor((4,), (1,))
    path = hostile.zipped(tmp_path / "x.ckpt", pickled, {f"data/{i}": bytes(10_000) for i in range(3)})
    with zipfile.ZipFile(path, "a") as made:
        for entry in made.infolist()[2:]:
            entry.header_offset = made.infolist()[2].header_offset
            entry.file_size = entry.compress_size = 20_000
        made._didModify = True
    assert "claims to hold more" in refused(lambda: read_state_dict(path), "x.ckpt")


@pytest.mark.parametrize("records", [{}, {"data/0": b"\0" * 8}, {"data/0": b"\0" * 20}, {"data/1": b"\0" * 16}])
def test_records_that_are_missing_or_of_another_size(records, tmp_path):
    refused(lambda: read_state_dict(hostile.zipped(tmp_path / "x.ckpt", hostile.tensor((4,), (1,)), records)), "x.ckpt")


@pytest.mark.parametrize("numel", [0, 3, 5, -1, 2**62])
def test_old_files_whose_storages_have_another_size(numel, tmp_path):
    storages = struct.pack("<q", numel) + hostile.four_floats()
    path = hostile.legacy(tmp_path / "x.ckpt", hostile.tensor((4,), (1,)), ("0",), storages)
    refused(lambda: read_state_dict(path), "x.ckpt")


def test_weights_of_the_other_byte_order(tmp_path):
    memory = struct.pack(">4f", 0, 1, 2, 3)
    path = hostile.zipped(tmp_path / "x.ckpt", hostile.tensor((4,), (1,)), {"data/0": memory, "byteorder": b"big"})
    assert torch.equal(read_state_dict(path)["w"], torch.arange(4.0))


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "loop.ckpt").symlink_to(tmp_path / "loop.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "nowhere.ckpt").symlink_to(tmp_path / "missing")
    for name in ("pipe.ckpt", "loop.ckpt", "folder.ckpt", "nowhere.ckpt", "n" * 300):
        refused(lambda name=name: tamingfast.load_model(tmp_path / name), name)
        refused(lambda name=name: metadata_of(tmp_path / name), name)
    refused(lambda: tamingfast.load_model("/dev/zero"), "/dev/zero")
    refused(lambda: tamingfast.load_model("a\0b"), "a")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path, opens = tmp_path / "x.ckpt", os.open
    torch.save(weights(), path)

    def denied(name, *arguments, **options):
        if Path(name) == path:
            raise PermissionError(13, "Permission denied", str(name))
        return opens(name, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    assert "Permission denied" in refused(lambda: tamingfast.load_model(path), "x.ckpt")


def test_a_checkpoint_of_the_original_with_a_flipped_bit(tmp_path):
    path = tmp_path / "vq.ckpt"
    whole = golden.path("vqmodel_f2.ckpt").read_bytes()
    place = len(whole) // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    (tmp_path / "vq.yaml").write_bytes(golden.path("vqmodel_f2.yaml").read_bytes())
    refused(lambda: tamingfast.load_model(path), "vq.ckpt")
