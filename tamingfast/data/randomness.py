"""Random numbers keyed by integers, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

_Words = TypeVar("_Words", int, np.ndarray)


def random_bits(seed: int, epoch: int, index: np.ndarray | Sequence[int], draw: int = 0) -> np.ndarray:
    """uint64 (n,): 64 random bits for each index, a pure function of (seed, epoch, index, draw).

    Output number ``index`` of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    2014), whose key is mixed from the other three. Integer arithmetic only, so the result is the same on every machine
    and with every library version, which neither numpy's nor torch's generators promise.
    """
    key = 0
    for word in (seed, epoch, draw):
        key = _mix((key + int(word) + _GOLDEN) & _MASK)
    steps = np.asarray(index).astype(np.uint64).reshape(-1) + np.uint64(1)
    return _mix(steps * np.uint64(_GOLDEN) + np.uint64(key))


def shuffled(count: int, seed: int, epoch: int = 0) -> np.ndarray:
    """int64 (count,): the numbers from 0 to ``count`` - 1, shuffled as a pure function of (count, seed, epoch)."""
    return np.argsort(random_bits(seed, epoch, np.arange(count)), kind="stable")


def random_integers(bits: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """int64 (n,) in [0, bound) from `random_bits`; ``bound`` must be below 2**32."""
    return (((bits >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def random_units(bits: np.ndarray) -> np.ndarray:
    """float64 (n,) in [0, 1) from `random_bits`."""
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: _Words) -> _Words:
    """SplitMix64's output function, for Python integers and for uint64 arrays (whose products wrap by themselves)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
