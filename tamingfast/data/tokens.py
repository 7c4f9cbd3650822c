"""Token files: images as grids of codebook indices, from ``tamingfast encode`` to the training of the prior.

A token file is a safetensors file with the integer tensor ``indices`` (N, h, w), perhaps ``class_label``
(N,), perhaps the tokens of spatial conditions ``conditions`` (N, h, w), and string metadata that always has
``format``, ``vocab_size`` and, with labels, ``classes`` (a JSON list of names), with conditions ``condition``
(JSON: their ``key`` in a batch, their ``vocab_size``, the fingerprint of their ``first_stage``, and ``data``,
the settings that made them).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tamingfast.data.base import ArrayDataset
from tamingfast.errors import UserError
from tamingfast.files import atomic_write

FORMAT = "tamingfast tokens 1"
_RESERVED = ("format", "vocab_size", "classes", "condition")
# Signed types above one byte, because every version of torch and safetensors knows them.
_TYPES = (
    (1 << 8, "U8", np.dtype("<u1")),
    (1 << 15, "I16", np.dtype("<i2")),
    (1 << 31, "I32", np.dtype("<i4")),
)
_SCAN_TOKENS = 1 << 24
_TENSORS = {"indices", "class_label", "conditions"}


def write_tokens(
    path: str | os.PathLike,
    indices: Iterable[np.ndarray | torch.Tensor] | np.ndarray | torch.Tensor,
    vocab_size: int,
    class_label: Iterable[Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    conditions: Iterable[np.ndarray] | None = None,
    condition: Mapping[str, Any] | None = None,
) -> int:
    """Write grids of tokens to ``path``, atomically, one array in memory at a time; return their number.

    ``indices`` is integer (N, h, w), or an iterable of such arrays that agree in (h, w). Tokens are stored in
    the smallest of uint8, int16 and int32 that holds ``vocab_size``. ``class_label`` has N integers, in any
    nesting of arrays; it is read after the last of ``indices``, so a generator of those may fill the list
    that is given here. ``conditions`` are arrays like ``indices`` and are read after them, too; ``condition`` says
    what they are, its ``vocab_size`` among it. ``classes`` names the labels. ``metadata`` says where the tokens
    come from (first stage, dataset, flips).

    Raises ValueError for tokens outside 0 to vocab_size - 1, grids that differ in shape, a number of labels or
    conditions other than N, an empty ``indices`` and reserved or non-string metadata.
    """
    extra = dict(metadata or {})
    for key, value in extra.items():
        if key in _RESERVED or not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata {key!r}: {value!r} is reserved or not a string")
    code, dtype = _storage(vocab_size)
    arrays = [indices] if isinstance(indices, (np.ndarray, torch.Tensor)) else indices
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        # The header comes first in the file but is known last, so its place is kept and filled with spaces,
        # which the format allows after the JSON text.
        header = {"format": FORMAT, "vocab_size": str(vocab_size), **extra}
        if classes is not None:
            header["classes"] = json.dumps([str(name) for name in classes])
        if condition is not None:
            header["condition"] = json.dumps(condition)
        room = -(-len(json.dumps(header).encode()) // 8) * 8 + 512
        stream.write(bytes(8 + room))
        count, grid = _write_grids(stream, arrays, vocab_size, dtype)
        tensors = {"indices": (code, (count, *grid), count * grid[0] * grid[1] * dtype.itemsize)}
        if conditions is not None:
            code, dtype = _storage(condition["vocab_size"])
            found, grid = _write_grids(stream, conditions, condition["vocab_size"], dtype, "conditions")
            if found != count:
                raise ValueError(f"conditions hold {found} grids, but indices {count}; all must agree")
            tensors["conditions"] = (code, (count, *grid), count * grid[0] * grid[1] * dtype.itemsize)
        if class_label is not None:
            labels = _flat_labels(class_label, count, classes)
            stream.write(labels.tobytes())
            tensors["class_label"] = ("I64", (count,), labels.nbytes)
        stream.seek(0)
        stream.write(_header(header, tensors, room))
    return count


def smallest(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """The same numbers in the smallest type that a token file would hold them in."""
    return tokens.astype(_storage(vocab_size)[1])


def _storage(vocab_size: int) -> tuple[str, np.dtype]:
    for limit, code, dtype in _TYPES:
        if 1 <= vocab_size <= limit:
            return code, dtype
    raise ValueError(f"vocab_size is {vocab_size}, but 1 to {_TYPES[-1][0]} is expected")


def _write_grids(
    stream: BinaryIO, arrays: Iterable[Any], vocab_size: int, dtype: np.dtype, name: str = "indices"
) -> tuple[int, tuple[int, int]]:
    """Append the tokens; return the number of grids and their (h, w)."""
    count, grid = 0, None
    for array in arrays:
        tokens = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
        if tokens.ndim != 3 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"{name} have dtype {tokens.dtype} and shape {tokens.shape}, but integers (n, h, w) are expected"
            )
        if grid is not None and tokens.shape[1:] != grid:
            raise ValueError(f"{name} have grids of {tokens.shape[1:]} after grids of {grid}; all must agree")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise ValueError(
                f"{name} reach from {tokens.min()} to {tokens.max()}, but 0 to {vocab_size - 1} is expected"
            )
        count, grid = count + len(tokens), tokens.shape[1:]
        stream.write(np.ascontiguousarray(tokens, dtype).tobytes())
    if not count:
        raise ValueError(f"{name} hold no grid of tokens")
    return count, grid


def _flat_labels(class_label: Iterable[Any], count: int, classes: Sequence[str] | None) -> np.ndarray:
    parts = [np.asarray(part).reshape(-1) for part in class_label]
    labels = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(labels) != count or labels.dtype.kind not in "iu":
        raise ValueError(
            f"class_label has {len(labels)} values of type {labels.dtype}, but {count} integers are expected"
        )
    limit = np.inf if classes is None else len(classes)
    if not 0 <= labels.min() <= labels.max() < limit:
        raise ValueError(f"class_label reaches from {labels.min()} to {labels.max()}, but 0 to {limit - 1} is expected")
    return labels.astype("<i8")


def _header(metadata: dict[str, str], tensors: dict[str, tuple[str, tuple[int, ...], int]], room: int) -> bytes:
    """The 8-byte length and the JSON text of a safetensors file, padded to ``room`` bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, (code, shape, size) in tensors.items():
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(entries).encode()
    return room.to_bytes(8, "little") + text.ljust(room)


class TokenDataset(ArrayDataset):
    """The grids of a token file, read from the disk as they are asked for (memory-mapped).

    Items are ``{"indices": int64 (h * w,), row by row}`` and, when the file has them, ``"class_label"`` and
    ``f"{condition['key']}_indices"``, int64 (h * w,).
    Attributes: ``vocab_size``; ``grid``, the pair (h, w); ``metadata``, the file's strings; ``classes``, the
    names of the labels (their numbers as text when the file has no names), or None without labels;
    ``condition``, what the metadata say about the conditions, or None without.

    Raises UserError when ``path`` is missing, truncated, not a token file, holds tokens or labels out of
    range, or when ``vocab_size`` is given and is not the file's.
    """

    def __init__(self, path: str | os.PathLike, vocab_size: int | None = None) -> None:
        self.path = os.fspath(path)
        tensors, self.metadata = _open(self.path)
        self.vocab_size = int(self.metadata["vocab_size"])
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise UserError(
                f"{self.path} holds tokens of a vocabulary of {self.vocab_size}, but {vocab_size} is"
                " expected:"
                " encode the images again with the first stage in use"
            )
        self._indices = tensors["indices"].numpy()
        self._labels = tensors["class_label"].numpy() if "class_label" in tensors else None
        self._conditions = tensors["conditions"].numpy() if "conditions" in tensors else None
        self.condition = None if self._conditions is None else json.loads(self.metadata["condition"])
        _check_range(self.path, self._indices, self.vocab_size)
        if self._conditions is not None:
            _check_range(self.path, self._conditions, self.condition["vocab_size"])
        self.grid = (int(self._indices.shape[1]), int(self._indices.shape[2]))
        self.classes = self._class_names()

    @property
    def description(self) -> str:
        """What the tokens are, for reports."""
        return f"{len(self)} grids of {self.grid[0]}x{self.grid[1]} tokens out of {self.vocab_size}"

    def _class_names(self) -> list[str] | None:
        if self._labels is None:
            return None
        low, high = int(self._labels.min()), int(self._labels.max())
        names = (
            json.loads(self.metadata["classes"]) if "classes" in self.metadata else [str(n) for n in range(high + 1)]
        )
        if low < 0 or high >= len(names):
            raise UserError(
                f"{self.path} has class labels from {low} to {high}, but 0 to {len(names) - 1} is"
                " expected: encode the images again"
            )
        return names

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        rows = self._indices[indices].reshape(len(indices), -1).astype(np.int64)
        batch = {"indices": torch.from_numpy(rows)}
        if self._labels is not None:
            batch["class_label"] = torch.from_numpy(self._labels[indices].astype(np.int64))
        if self._conditions is not None:
            rows = self._conditions[indices].reshape(len(indices), -1).astype(np.int64)
            batch[f"{self.condition['key']}_indices"] = torch.from_numpy(rows)
        return batch

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes map the file themselves instead of receiving a copy of it.
        return TokenDataset, (self.path,)


def _open(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The memory-mapped tensors and the metadata of a token file."""
    again = "write it again with tamingfast encode"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _TENSORS & set(file.keys())}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist, but a token file is expected: {again}") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}): {again}") from error
    if metadata.get("format") != FORMAT or not metadata.get("vocab_size", "").isdecimal():
        raise UserError(
            f"{path} is a safetensors file without the marks of a token file ({FORMAT!r}, vocab_size): {again}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    whole = all(not tensor.is_floating_point() and tensor.numel() for tensor in tensors.values())
    grids = shapes.get("indices", ())
    conditions = shapes.get("conditions", grids)
    agree = shapes.get("class_label", grids[:1]) == grids[:1] == conditions[:1]
    if not whole or len(grids) != 3 or len(conditions) != 3 or not agree:
        raise UserError(
            f"{path} has tensors {shapes}, but integers indices (N, h, w) and perhaps class_label (N,)"
            f" and conditions (N, h, w) are expected: {again}"
        )
    if "conditions" in shapes and "condition" not in metadata:
        raise UserError(f"{path} does not say what its conditions are: {again}")
    return tensors, metadata


def _check_range(path: str, indices: np.ndarray, vocab_size: int) -> None:
    step = max(1, _SCAN_TOKENS // (indices.shape[1] * indices.shape[2]))
    for begin in range(0, len(indices), step):
        part = indices[begin : begin + step]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{path} has the token {low if low < 0 else high} in grids {begin} to"
                f" {begin + len(part) - 1}, but 0 to {vocab_size - 1}"
                " is expected: encode the images again"
            )
