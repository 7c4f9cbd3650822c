"""Arrays of numbers in pickles are read from their description; anything else of numpy is not made."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest

from tamingfast.checkpoints.unpickling import BadPickle, Unpickler, numbers


def described(value: object, protocol: int = 4) -> object:
    return Unpickler().load(io.BytesIO(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "u1", "i1", "u2", "i4", "i8", "u8", ">f4", ">i2"])
def test_arrays_of_numbers(dtype, protocol):
    for array in (np.arange(-6, 6).astype(dtype).reshape(3, 4), np.zeros((0, 3), dtype), np.array(200).astype(dtype)):
        for given in (array, np.asfortranarray(array)):
            found = numbers(described(given, protocol))
            assert found.dtype == given.dtype.newbyteorder("=") and np.array_equal(found, given)


@pytest.mark.parametrize(
    "value",
    [np.array(["x"], object), np.array(["x"]), np.array([b"x"]), np.zeros(2, "c8"), np.zeros(2, "M8[s]"), np.float32(1),
     np.zeros(2, [("a", "f4")]), np.ma.zeros(2), np.dtype("f4"), np.ndarray, [1.0], None, 3, print],
)  # fmt: skip
def test_other_values(value):
    with pytest.raises(BadPickle, match="not an array of numbers"):
        numbers(described(value))


@pytest.mark.parametrize(
    "change", [{"shape": (5,)}, {"shape": (-1, 3)}, {"raw": b"abc"}, {"raw": 5}, {"shape": ("a",)}]
)
def test_damaged_arrays(change):
    value = described(np.zeros(4, "f4"))
    version, shape, dtype, columns, raw = value.state
    value.state = (version, change.get("shape", shape), dtype, columns, change.get("raw", raw))
    with pytest.raises(BadPickle, match="a damaged array"):
        numbers(value)
