"""Reads the msgpack files of flax: nested maps of arrays, as data.

A file holds values only, so reading one can run nothing. What it says of its sizes is compared with its bytes first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_DEEPEST = 32
_ARRAY, _CHUNKED = 1, "__msgpack_chunked_array__"
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
}
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_LENGTHS = (">B", ">H", ">I")
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class BadMsgpack(ValueError):
    """Bytes that are no msgpack of flax; the message is a noun phrase that says what they are."""


def tensors(content: bytes) -> dict[str, Tensor]:
    """The arrays of a file by their names, joined with dots. Raises BadMsgpack."""
    reader = _Reader(memoryview(content))
    value = reader.value(0)
    if reader.at != len(content):
        raise BadMsgpack(f"a msgpack file with {len(content) - reader.at} bytes behind its end")
    return dict(_flat("", value))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping) and _CHUNKED in value:
        yield name, _joined(value)
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inside)


def _joined(value: Mapping[Any, Any]) -> Tensor:
    """An array that was stored in parts because of its size."""
    shape, chunks = value.get("shape"), value.get("chunks")
    if isinstance(shape, Mapping) and isinstance(chunks, Mapping):
        sizes: list[Any] = [shape.get(str(i)) for i in range(len(shape))]
        parts: list[Any] = [chunks.get(str(i)) for i in range(len(chunks))]
        if all(type(n) is int and n >= 0 for n in sizes) and parts and all(isinstance(p, Tensor) for p in parts):
            flat = torch.cat([part.flatten() for part in parts])
            if len(flat) == math.prod(sizes):
                return flat.view(sizes)
    raise BadMsgpack("a damaged msgpack file in which the parts of an array do not fit")


class _Reader:
    def __init__(self, content: memoryview) -> None:
        self.content, self.at = content, 0

    def take(self, count: int) -> memoryview:
        if count > len(self.content) - self.at:
            raise BadMsgpack(f"a msgpack file that ends too early, after {len(self.content)} bytes")
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise BadMsgpack(f"a msgpack file of more than {_DEEPEST} levels")
        code = self.number(">B")
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self.number(_NUMBERS[code])
        if code <= 0x8F or code in (0xDE, 0xDF):
            return self.map(code & 0xF if code <= 0x8F else self.number(_LENGTHS[code - 0xDD]), depth)
        if code <= 0x9F or code in (0xDC, 0xDD):
            return self.list(code & 0xF if code <= 0x9F else self.number(_LENGTHS[code - 0xDB]), depth)
        if code <= 0xBF or 0xD9 <= code <= 0xDB:
            return self.text(code & 0x1F if code <= 0xBF else self.number(_LENGTHS[code - 0xD9]))
        if 0xC4 <= code <= 0xC6:
            return self.take(self.number(_LENGTHS[code - 0xC4]))
        if 0xC7 <= code <= 0xC9 or 0xD4 <= code <= 0xD8:
            return self.extension(self.number(_LENGTHS[code - 0xC7]) if code <= 0xC9 else 1 << (code - 0xD4), depth)
        raise BadMsgpack("no msgpack file, or a damaged one")

    def text(self, length: int) -> str:
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise BadMsgpack("a damaged msgpack file with text that is none") from error

    def list(self, length: int, depth: int) -> list[Any]:
        self._check(length)
        return [self.value(depth + 1) for _ in range(length)]

    def map(self, length: int, depth: int) -> dict[Any, Any]:
        self._check(2 * length)
        found = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str | int):
                raise BadMsgpack("a msgpack file with names that are no text")
            found[key] = self.value(depth + 1)
        return found

    def _check(self, values: int) -> None:
        if values > len(self.content) - self.at:  # each takes at least a byte
            raise BadMsgpack(f"a msgpack file that ends too early, after {len(self.content)} bytes")

    def extension(self, length: int, depth: int) -> Tensor | None:
        """An array, or None for what is no array, such as a complex number."""
        kind, content = self.number(">b"), self.take(length)
        if kind != _ARRAY:
            return None
        fields = _Reader(content).value(depth + 1)
        if isinstance(fields, list) and len(fields) == 3 and isinstance(fields[0], list):
            shape, name, raw = fields
            dtype = _DTYPES.get(name) if isinstance(name, str) else None
            if dtype is None:
                raise BadMsgpack(f"a msgpack file with an array of the type {str(name)[:20]!r}")
            sized = all(type(n) is int and n >= 0 for n in shape) and isinstance(raw, memoryview)
            if sized and math.prod(shape) * dtype.itemsize == len(raw):
                flat = torch.frombuffer(bytearray(raw), dtype=dtype) if len(raw) else torch.empty(0, dtype=dtype)
                return flat.view(shape)
        raise BadMsgpack("a damaged msgpack file in which an array is not as it says")
