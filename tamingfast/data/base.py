"""What the datasets share: randomness keyed by integers, the [-1, 1] scale and checks of settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tamingfast.errors import UserError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# x / 127.5 - 1 rounded once from double precision, as the original repository's loaders compute it.
_UNIT_SCALE = (np.arange(256) / 127.5 - 1.0).astype(np.float32)


def _mix(x: Any) -> Any:
    """The output function of SplitMix64, for Python integers and for uint64 arrays (which wrap anyway)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def random_bits(seed: int, epoch: int, index: np.ndarray | Sequence[int], draw: int = 0) -> np.ndarray:
    """uint64 (n,): 64 random bits for each index, a pure function of (seed, epoch, index, draw).

    The index-th output of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014) whose key is mixed from the other three. Arithmetic on integers only: the same on every
    machine and in every version of every library, which the streams of numpy's and torch's generators do not
    promise.
    """
    key = 0
    for word in (seed, epoch, draw):
        key = _mix((key + int(word) + _GOLDEN) & _MASK)
    steps = np.asarray(index).astype(np.uint64).reshape(-1) + np.uint64(1)
    return _mix(steps * np.uint64(_GOLDEN) + np.uint64(key))


def random_integers(bits: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """int64 (n,) in [0, bound) from ``random_bits``; ``bound`` is below 2**32."""
    return (((bits >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def random_units(bits: np.ndarray) -> np.ndarray:
    """float64 (n,) in [0, 1) from ``random_bits``."""
    return (bits >> np.uint64(11)) * 2.0**-53


def to_unit_scale(pixels: np.ndarray) -> torch.Tensor:
    """float32 tensor in [-1, 1] of the same shape as the uint8 array ``pixels``."""
    return torch.from_numpy(_UNIT_SCALE[pixels])


def positive(name: str, value: Any) -> int:
    """``value`` when it is a whole number of at least 1, else UserError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UserError(
            f"{name} is {value!r}, but a whole number of at least 1 is expected: correct it in the data settings"
        )
    return int(value)


class EpochDataset(Dataset):
    """A map-style dataset whose items may differ from one epoch to the next, by ``set_epoch`` alone."""

    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that later items belong to."""
        self.epoch = int(epoch)

    def _check(self, index: int) -> int:
        length = len(self)  # type: ignore[arg-type]
        if not -length <= index < length:
            raise IndexError(f"index {index} is outside a dataset of {length} items")
        return int(index) % length


class ArrayDataset(EpochDataset):
    """A dataset held in memory, which gathers a whole batch at once; an item is a batch of one.

    Subclasses define ``__len__`` and ``batch(indices)``, which gives a dict of tensors and lists with one row
    per index.
    """

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self.batch(np.array([self._check(index)]))
        return {key: row[0].item() if key == "class_label" else row[0] for key, row in rows.items()}
