"""What listing the data has found, kept in a file beside a run, so that resuming it lists nothing again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tamingfast.errors import UserError
from tamingfast.files import atomic_write, check_regular

FORMAT = "tamingfast index 1"

#: The parts of a listing, by their names.
Arrays = Mapping[str, np.ndarray]


class Index:
    """Listings by the places that they are of.

    Whoever lists looks for an older listing first, decides whether it still holds (the times of folders, the sizes and
    times of archives), and keeps the one that it goes by. A file that is missing, damaged or no index holds nothing:
    everything is then listed again.
    """

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        self._found: dict[str, Arrays] = {} if path is None else _read(path)
        self._kept: dict[str, Arrays] = {}

    def find(self, place: str) -> Arrays | None:
        """The listing of ``place`` in the file, None without one."""
        return self._found.get(place)

    def keep(self, place: str, listing: Arrays) -> None:
        """Keep the listing of ``place`` that this process goes by."""
        self._kept[place] = listing

    def check_same(self, name: str) -> None:
        """Raise UserError unless every place still lists the files ``name`` that it listed in the file."""
        for place, listing in self._kept.items():
            before = self._found.get(place)
            if before is not None and not np.array_equal(before[name], listing[name]):
                older, newer = set(unpacked(before[name])), set(unpacked(listing[name]))
                gone, come = sorted(older - newer), sorted(newer - older)
                what = f"without {gone[0]}" if gone else f"with {come[0]}" if come else "in another order"
                raise UserError(
                    f"{place}: got files {what}, expected those that the run began with; put them back, or start a "
                    "new run in another directory"
                )

    def save(self, path: str | os.PathLike) -> None:
        """Write the listings that were kept to ``path``, atomically; nothing if there are none or they are there."""
        if not self._kept or all(self._found.get(place) is listing for place, listing in self._kept.items()):
            return
        places = list(self._kept)
        tensors = {f"{number}/{name}": each for number, place in enumerate(places)
                   for name, each in self._kept[place].items()}  # fmt: skip
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "places": json.dumps(places)})


_CURRENT: ContextVar[Index | None] = ContextVar("index", default=None)


@contextlib.contextmanager
def using(index: Index | None) -> Iterator[None]:
    """Data sets that are built inside the block find and keep their listings in ``index``."""
    token = _CURRENT.set(index)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Index:
    """The index of the innermost block of `using`, by default one that is dropped."""
    return _CURRENT.get() or Index()


def packed(texts: Sequence[str]) -> np.ndarray:
    """uint8: texts without null characters, such as names of files, one after the other."""
    joined = "".join(f"{text}\0" for text in texts)
    return np.frombuffer(joined.encode("utf-8", "surrogateescape"), np.uint8)


def unpacked(array: np.ndarray) -> list[str]:
    """The texts in what `packed` returned."""
    return array.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]


def _read(path: str | os.PathLike) -> dict[str, Arrays]:
    found: dict[str, dict[str, np.ndarray]] = {}
    try:
        check_regular(path)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                return {}
            places = json.loads(metadata["places"])
            for key in file.keys():  # noqa: SIM118, which takes it for a mapping
                number, _, name = key.partition("/")
                found.setdefault(places[int(number)], {})[name] = file.get_tensor(key)
    except Exception:  # whatever safetensors and JSON raise for a damaged file, which is listed anew
        return {}
    return dict(found)
