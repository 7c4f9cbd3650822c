"""What a file is, by its content: its name decides nothing."""

from __future__ import annotations

import os
import re
import struct
from typing import IO

SAFETENSORS, TORCH, MSGPACK, INDEX = "safetensors", "torch", "msgpack", "index"
_HEAD = 1024
_BOM = b"\xef\xbb\xbf"

_BEGINNINGS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (of Keras)",
    b"GGUF": "a GGUF file (of llama.cpp)",
    b"\x93NUMPY": "a numpy array (.npy)",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\0": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"\x04\x22\x4d\x18": "an LZ4 archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program or library",
    b"SQLite format 3": "an SQLite database",
}
# A map of one to fifteen entries, or of more, whose first key is text.
_MSGPACK = re.compile(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9\xda]", re.DOTALL)
_INDEX = re.compile(rb"\s*\{\s*\"(metadata|weight_map)\"\s*:\s*\{")
# Fields of protobuf: the version of ONNX's format (3 to 13) or TensorFlow's (1), then another field.
_ONNX, _TENSORFLOW = re.compile(rb"\x08[\x03-\x0d][\x12\x1a\x22\x32\x3a\x42]"), re.compile(rb"\x08\x01\x12")
_LEVELDB = struct.pack("<Q", 0xDB4775248B80FB57)  # ends the .index file of a TensorFlow checkpoint


def kind_of(stream: IO[bytes]) -> str:
    """`SAFETENSORS`, `TORCH` (by either format of ``torch.save``), `MSGPACK`, `INDEX`, or a noun phrase for any other.

    An `INDEX` is the JSON that lists the files into which weights are divided.
    """
    size = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    head = stream.read(_HEAD)
    if size >= 10 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= size - 8:
        return SAFETENSORS
    if head.startswith((b"PK\3\4", b"PK\5\6")) or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and size > 2):
        return TORCH
    if _MSGPACK.match(head):
        return MSGPACK
    if _INDEX.match(head):
        return INDEX
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return f"{kind} of {size} bytes"
    return f"{_by_structure(stream, head, size)} of {size} bytes"


def _by_structure(stream: IO[bytes], head: bytes, size: int) -> str:
    if head[8:10] == b'{"':
        return "a damaged safetensors file, whose end is missing,"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if _ONNX.match(head):
        return "an ONNX model"
    if _TENSORFLOW.match(head):
        return "a TensorFlow model"
    stream.seek(max(0, size - 8))
    if stream.read(8) == _LEVELDB:
        return "the index of a TensorFlow checkpoint"
    if not head.strip(b"\0"):
        return "an unfinished download that begins with zeros,"
    return _text(head) or "a file in no format of torch or safetensors, or a damaged one,"


def _text(head: bytes) -> str | None:
    """The kind of a text file, None for bytes that are no text."""
    head = head.removeprefix(_BOM)
    cut = head if len(head) < _HEAD - len(_BOM) else head[:-4]  # the last character can be incomplete
    try:
        text = cut.decode("utf-8").lstrip()
    except UnicodeDecodeError:
        return None
    if any(ord(letter) < 32 and letter not in "\t\n\r\f" for letter in text):
        return None
    if text.startswith(("version https://git-lfs.github.com/spec/", "version https://hawser.github.com/spec/")):
        return "a pointer of git-lfs to the real file (which git lfs pull gets)"
    if text.startswith("/annex/objects/"):
        return "a pointer of git-annex to the real file (which git annex get gets)"
    lower = text.lower()
    if lower.startswith(("<!doctype html", "<html", "<head", "<!--")):
        return "a web page"
    if lower.startswith("<"):
        return "an XML document"
    if text.startswith(("{", "[")):
        return "a JSON text"
    if re.match(r"(---\s|#.*\n|\s)*[\w.\"'-]+:(\s|$)", text):
        return "a YAML text"
    return "a text"
