"""Token files: images as grids of codebook indices, from ``tamingfast encode`` to the training of the prior.

Many files, as for several views of many images, are read like one.

A token file is a safetensors file with the integer tensor ``indices`` (N, h, w), optionally ``class_label`` (N,) and
the tokens of spatial conditions, ``conditions`` (N, h, w). Its metadata, all strings, are ``format`` and
``vocab_size``; for named labels also ``classes`` (a JSON list of names); for conditions also ``condition`` (a
`ConditionRecord` as JSON), and for files that we write a checksum (`tamingfast.checkpoints.seal`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from safetensors import safe_open

from tamingfast.checkpoints.seal import UNSEALED, check_seal, seal
from tamingfast.data import index
from tamingfast.data.base import ArrayDataset, ConditionRecord
from tamingfast.data.checks import path_of
from tamingfast.data.conditions import SETTINGS
from tamingfast.data.patterns import files_of
from tamingfast.errors import UserError, brief, first_line
from tamingfast.files import atomic_write, check_regular

FORMAT = "tamingfast tokens 1"
_RESERVED = ("format", "vocab_size", "classes", "condition", *UNSEALED)
# Signed types above one byte, because every version of torch and safetensors knows them.
_TYPES = (
    (1 << 8, "U8", np.dtype("<u1")),
    (1 << 15, "I16", np.dtype("<i2")),
    (1 << 31, "I32", np.dtype("<i4")),
)
_SCAN_TOKENS = 1 << 24
_MOST_CLASSES = 1 << 20
_TENSORS = {"indices", "class_label", "conditions"}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_MAPPED = {"indices", "labels", "_conditions"}  # attributes that are parts of the file
_AGAIN = "write it again with tamingfast encode"


class _Stored(NamedTuple):
    """A tensor in the file: safetensors' name of its type, its shape, and its size in bytes."""

    code: str
    shape: tuple[int, ...]
    size: int


def write_tokens(
    path: str | os.PathLike,
    indices: Iterable[np.ndarray | torch.Tensor] | np.ndarray | torch.Tensor,
    vocab_size: int,
    class_label: Iterable[Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    conditions: Iterable[np.ndarray] | None = None,
    condition: ConditionRecord | None = None,
) -> int:
    """Write grids of tokens to ``path``, atomically, with one array in memory at a time; returns their number.

    ``indices`` is integer (N, h, w), or an iterable of such arrays with equal (h, w). Tokens are stored in the smallest
    of uint8, int16 and int32 that can hold ``vocab_size`` values. ``class_label`` has N integers, in any nesting of
    arrays; it is read after the last of ``indices``, so a generator passed as ``indices`` may fill the list
    passed here. ``conditions`` are arrays like ``indices`` and are also read after them; ``condition``, required with
    them, describes them and must have ``vocab_size``. ``classes`` names the labels. ``metadata`` records the origin of
    the tokens (first stage, dataset, flips).

    Raises ValueError for tokens outside 0 to vocab_size - 1, grids of different shapes, a number of labels or
    conditions other than N, no grids at all, conditions without their record, and reserved or non-string metadata.
    """
    extra = dict(metadata or {})
    for key, value in extra.items():
        if key in _RESERVED or not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(
                f"metadata: got {key!r}: {value!r}, expected strings under keys other than {', '.join(_RESERVED)}"
            )
    code, dtype = _storage(vocab_size)
    arrays = [indices] if isinstance(indices, (np.ndarray, torch.Tensor)) else indices
    header = {"format": FORMAT, "vocab_size": str(vocab_size), **extra, **UNSEALED}
    if classes is not None:
        header["classes"] = json.dumps([str(name) for name in classes])
    if condition is not None:
        header["condition"] = json.dumps(condition)
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as stream:
            # The header comes first in the file but is known last, so room for it is reserved and padded with spaces,
            # which the format allows after the JSON text.
            room = -(-len(_json(header)) // 8) * 8 + 512
            stream.write(bytes(8 + room))
            count, grid = _write_grids(stream, arrays, vocab_size, dtype)
            tensors = {"indices": _Stored(code, (count, *grid), count * grid[0] * grid[1] * dtype.itemsize)}
            if conditions is not None:
                if condition is None:
                    raise ValueError("condition: got None, expected the record of the conditions")
                code, dtype = _storage(condition["vocab_size"])
                found, grid = _write_grids(stream, conditions, condition["vocab_size"], dtype, "conditions")
                if found != count:
                    raise ValueError(f"conditions: got {found} grids, expected {count}, one for each of the indices")
                tensors["conditions"] = _Stored(code, (count, *grid), count * grid[0] * grid[1] * dtype.itemsize)
            if class_label is not None:
                labels = _flat_labels(class_label, count, classes)
                stream.write(labels.tobytes())
                tensors["class_label"] = _Stored("I64", (count,), labels.nbytes)
            stream.seek(0)
            stream.write(_header(header, tensors, room))
        seal(temporary)
    return count


def smallest(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """The tokens in the type that a token file would store them in."""
    return tokens.astype(_storage(vocab_size)[1])


def _storage(vocab_size: int) -> tuple[str, np.dtype]:
    for limit, code, dtype in _TYPES:
        if 1 <= vocab_size <= limit:
            return code, dtype
    raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to {_TYPES[-1][0]}")


def _write_grids(
    stream: BinaryIO,
    arrays: Iterable[np.ndarray | torch.Tensor],
    vocab_size: int,
    dtype: np.dtype,
    name: str = "indices",
) -> tuple[int, tuple[int, int]]:
    """Append the tokens; returns the number of grids and their (h, w)."""
    count, grid = 0, (0, 0)
    for array in arrays:
        tokens = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
        if tokens.ndim != 3 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{name}: got dtype {tokens.dtype} and shape {tokens.shape}, expected integers (n, h, w)")
        if count and tokens.shape[1:] != grid:
            raise ValueError(f"{name}: got grids of {tokens.shape[1:]} after grids of {grid}, expected equal shapes")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise ValueError(
                f"{name}: got tokens from {tokens.min()} to {tokens.max()}, expected 0 to {vocab_size - 1}"
            )
        count, grid = count + len(tokens), (tokens.shape[1], tokens.shape[2])
        stream.write(np.ascontiguousarray(tokens, dtype).tobytes())
    if not count:
        raise ValueError(f"{name}: got no grids, expected at least one")
    return count, grid


def _flat_labels(class_label: Iterable[Any], count: int, classes: Sequence[str] | None) -> np.ndarray:
    parts = [np.asarray(part).reshape(-1) for part in class_label]
    labels = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(labels) != count or labels.dtype.kind not in "iu":
        raise ValueError(f"class_label: got {len(labels)} values of type {labels.dtype}, expected {count} integers")
    limit = _MOST_CLASSES if classes is None else len(classes)
    if not 0 <= labels.min() <= labels.max() < limit:
        raise ValueError(f"class_label: got {labels.min()} to {labels.max()}, expected 0 to {limit - 1}")
    return labels.astype("<i8")


def _header(metadata: dict[str, str], tensors: dict[str, _Stored], room: int) -> bytes:
    """The 8-byte length and the JSON header of a safetensors file, padded to ``room`` bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, (code, shape, size) in tensors.items():
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    return room.to_bytes(8, "little") + _json(entries).ljust(room)


def _json(value: object) -> bytes:
    # As compact as the checksum's place is looked for; names of files that are no UTF-8 cannot stand in JSON.
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "replace")


def metadata_of(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a token file, whose bytes are those that were written; raises as `TokenDataset` does."""
    metadata = _opened(os.fspath(path))[1]
    check_seal(path)
    return {key: value for key, value in metadata.items() if key not in UNSEALED}


def build(
    path: str | os.PathLike, validation_path: str | os.PathLike | None = None
) -> tuple[TokenDataset, TokenDataset | None]:
    """(training, validation) from token files; validation is None without a path. Raises what `TokenDataset` raises."""
    train = TokenDataset(path)
    return train, None if validation_path is None else TokenDataset(path_of("validation_path", validation_path))


class TokenDataset(ArrayDataset):
    """The grids of one or several token files, memory-mapped, so that they are read from disk on demand.

    ``path`` is a file, a directory of token files, or a pattern such as ``tokens-{00..12}.safetensors``. Items are
    ``{"indices": int64 (h * w,), row by row}`` and, if the files have them, ``"class_label"`` and
    ``f"{condition['key']}_indices"``, int64 (h * w,). Attributes are those of `EpochDataset`; ``classes`` are the names
    of the labels, or their numbers as text if the files have no names. ``metadata`` are the first file's.

    Raises UserError when a file is missing, truncated, changed since it was written or not a token file, has tokens
    or labels out of range, does not fit the others, or when ``vocab_size`` is given and differs from the files'.
    """

    grid: tuple[int, int]
    vocab_size: int

    def __init__(self, path: str | os.PathLike, vocab_size: int | None = None) -> None:
        self.path = path_of("path", path)
        self._files = [_TokenFile(each) for each in files_of(self.path, ".safetensors", "a token file")]
        first = self._files[0]
        for file in self._files[1:]:
            file.check_fits(first)
        self.grid, self.vocab_size, self.condition = first.grid, first.vocab_size, first.condition
        self.metadata = first.metadata
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise UserError(
                f"{self.path}: got a vocabulary of {self.vocab_size} tokens, expected {vocab_size}; encode the images "
                "again with the first stage in use"
            )
        self._ends = np.cumsum([file.count for file in self._files])
        self.classes = None
        if first.labels is not None:
            self.classes = max((file.classes or [] for file in self._files), key=len)

    @property
    def description(self) -> str:
        """One phrase about the tokens, for reports."""
        return f"{len(self)} grids of {self.grid[0]}x{self.grid[1]} tokens out of {self.vocab_size}"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        indices = np.asarray(indices)
        numbers = np.searchsorted(self._ends, indices, side="right")
        batch: dict[str, torch.Tensor] = {}
        for number in np.unique(numbers):
            rows, file = np.flatnonzero(numbers == number), self._files[number]
            for key, values in file.rows(indices[rows] - (self._ends[number] - file.count)).items():
                whole = batch.setdefault(key, torch.empty(len(indices), *values.shape[1:], dtype=torch.int64))
                whole[torch.from_numpy(rows)] = torch.from_numpy(values)
        return batch


class _TokenFile:
    """One token file; ``labels`` (n,) is None without classes, ``conditions`` (n, h, w) is empty without them."""

    def __init__(self, path: str) -> None:
        self.path = path
        check_regular(path, "a token file")
        tensors, self.metadata = _opened(path)
        _check_tensors(path, tensors)
        self.vocab_size = _vocabulary(path, self.metadata.get("vocab_size"))
        self.condition = _record(path, self.metadata) if "conditions" in tensors else None
        self._map(tensors)
        self.count = len(self.indices)
        self.grid = (int(self.indices.shape[1]), int(self.indices.shape[2]))
        self._check_content()
        self.classes = self._class_names()

    def _check_content(self) -> None:
        """Check all of the file's bytes, unless the run's index has that they were checked and not changed since."""
        place, found, kept = f"tokens in {self.path}", os.stat(self.path), index.current()
        state = np.array([found.st_size, found.st_mtime_ns])
        known = kept.find(place)
        if known is None or not np.array_equal(known.get("state", ()), state):
            check_seal(self.path)
            _check_range(self.path, self.indices, self.vocab_size)
            if self.condition is not None:
                _check_range(self.path, self._conditions, self.condition["vocab_size"])
            known = {"state": state, "names": index.packed([])}
        kept.keep(place, known)

    def check_fits(self, first: _TokenFile) -> None:
        """Raise UserError unless the file can be read as one with the ``first``."""
        for what, mine, other in (
            ("grids", self.grid, first.grid),
            ("a vocabulary", self.vocab_size, first.vocab_size),
            ("tokens of the first stage", self.metadata.get("first_stage"), first.metadata.get("first_stage")),
            ("the condition", self.condition, first.condition),
            ("classes", self.metadata.get("classes"), first.metadata.get("classes")),
            ("labels", self.labels is not None, first.labels is not None),
        ):
            if mine != other:
                raise UserError(
                    f"{self.path}: got {what} {brief(mine)}, expected {brief(other)} as in {first.path}; give files "
                    "that were encoded alike"
                )

    def _map(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.indices = tensors["indices"].numpy()
        self.labels = tensors["class_label"].numpy() if "class_label" in tensors else None
        self._conditions = tensors["conditions"].numpy() if "conditions" in tensors else self.indices[:0]

    def _class_names(self) -> list[str] | None:
        if self.labels is None:
            return None
        low, high = int(self.labels.min()), int(self.labels.max())
        names = _listed_classes(self.path, self.metadata)
        limit = _MOST_CLASSES if names is None else len(names)
        if low < 0 or high >= limit:
            raise UserError(f"{self.path}: got class labels from {low} to {high}, expected 0 to {limit - 1}; {_AGAIN}")
        return [str(number) for number in range(high + 1)] if names is None else names

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The entries of a batch, int64 (n, ...), for grids of this file."""
        grids = {"indices": self.indices}
        if self.condition is not None:
            grids[f"{self.condition['key']}_indices"] = self._conditions
        found = {key: grid[numbers].reshape(len(numbers), -1).astype(np.int64) for key, grid in grids.items()}
        return found if self.labels is None else found | {"class_label": self.labels[numbers].astype(np.int64)}

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the file themselves instead of receiving a copy.
        return {name: value for name, value in vars(self).items() if name not in _MAPPED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map(_opened(self.path)[0])


def _opened(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The memory-mapped tensors and the metadata of a token file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _TENSORS & set(file.keys())}
    except FileNotFoundError as error:
        raise UserError(f"{path}: got no such file, expected a token file; correct the path") from error
    except Exception as error:  # whatever safetensors and torch raise for headers of other programs
        raise UserError(
            f"{path}: got a truncated file or one of another format ({first_line(error)}), expected a token file; "
            f"{_AGAIN}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: got a safetensors file without the metadata format={FORMAT!r}, expected a token file; {_AGAIN}"
        )
    return tensors, metadata


def _check_tensors(path: str, tensors: Mapping[str, torch.Tensor]) -> None:
    whole = all(tensor.dtype in _INTEGERS and tensor.numel() for tensor in tensors.values())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    grids = shapes.get("indices", ())
    conditions = shapes.get("conditions", grids)
    agree = shapes.get("class_label", grids[:1]) == grids[:1] == conditions[:1]
    if not whole or len(grids) != 3 or len(conditions) != 3 or not agree:
        got = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}
        raise UserError(
            f"{path}: got tensors {got}, expected integer tensors: indices (N, h, w), optionally class_label (N,) and "
            f"conditions (N, h, w); {_AGAIN}"
        )


def _vocabulary(path: str, value: object) -> int:
    """The number of codes that metadata state, as text or in JSON."""
    digits = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,10}", digits) or not 1 <= int(digits) <= _TYPES[-1][0]:
        raise UserError(
            f"{path}: got {brief(value)} as vocab_size in its metadata, expected 1 to {_TYPES[-1][0]}; {_AGAIN}"
        )
    return int(digits)


def _record(path: str, metadata: Mapping[str, str]) -> ConditionRecord:
    """The record of a file's conditions."""
    if "condition" not in metadata:
        raise UserError(f"{path}: got conditions without a record of what they are, expected both; {_AGAIN}")
    record = _parsed(path, metadata, "condition")
    types = {"key": str, "first_stage": str, "data": dict}
    valid = isinstance(record, dict) and all(isinstance(record[key], types[key]) for key in types.keys() & record)
    if not valid or not record.get("key"):
        raise UserError(
            f"{path}: got {brief(metadata['condition'])} as the record of its conditions, expected JSON with their "
            f"key and vocab_size; {_AGAIN}"
        )
    settings = {key: value for key, value in record.get("data", {}).items() if key in ("kind", *SETTINGS)}
    return cast(ConditionRecord, record | {"data": settings, "vocab_size": _vocabulary(path, record.get("vocab_size"))})


def _listed_classes(path: str, metadata: Mapping[str, str]) -> list[str] | None:
    if "classes" not in metadata:
        return None
    names = _parsed(path, metadata, "classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: got {brief(names)} as classes in its metadata, expected a list of names; {_AGAIN}")
    return names


def _parsed(path: str, metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: got {brief(metadata[key])} as {key} in its metadata ({first_line(error)}), expected JSON; "
            f"{_AGAIN}"
        ) from error


def _check_range(path: str, indices: np.ndarray, vocab_size: int) -> None:
    step = max(1, _SCAN_TOKENS // (indices.shape[1] * indices.shape[2]))
    for begin in range(0, len(indices), step):
        part = indices[begin : begin + step]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{path}: got the token {low if low < 0 else high} in grids {begin} to {begin + len(part) - 1}, "
                f"expected 0 to {vocab_size - 1}; {_AGAIN}"
            )
