"""Archives of arrays: written in pieces, read by NumPy, and never trusted."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tamingfast import UserError, npz

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3)).astype(np.uint8)


def read(path: Path) -> list[np.ndarray]:
    with npz.opened(path, "images") as found:
        found.size_of_images()
        return list(found.images(3))


def test_numpy_reads_what_is_written_in_pieces_and_the_reverse(tmp_path):
    with npz.written(tmp_path / "a.npz") as archive:
        archive.images(iter(np.array_split(PIXELS, 3)), 7)
        archive.array("mu", np.arange(3.0))
    with np.load(tmp_path / "a.npz") as found:
        assert (found["arr_0"] == PIXELS).all() and (found["mu"] == np.arange(3)).all()
    np.savez_compressed(tmp_path / "b.npz", PIXELS, sigma=np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    for name in ("a.npz", "b.npz"):
        batches = read(tmp_path / name)
        assert [len(batch) for batch in batches] == [3, 3, 1] and (np.concatenate(batches) == PIXELS).all()
    with npz.opened(tmp_path / "b.npz", "numbers") as found:
        assert found.whole("sigma", -1, 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_another_number_of_images_leaves_no_file(tmp_path):
    for count in (6, 8):
        with (
            pytest.raises(ValueError, match=f"got 7 images, expected {count}"),
            npz.written(tmp_path / "a.npz") as archive,
        ):
            archive.images(iter([PIXELS]), count)
    assert not list(tmp_path.iterdir())


class Trap:
    def __reduce__(self):
        return open, ("trapped", "w")


def hostile(path: Path, kind: str) -> None:
    plain = io.BytesIO()
    np.save(plain, PIXELS)
    whole, rest = plain.getvalue(), {}
    if kind == "pickle":
        held = io.BytesIO()
        np.save(held, np.array([Trap()], dtype=object), allow_pickle=True)
        whole = held.getvalue()
    elif kind == "floats":
        held = io.BytesIO()
        np.save(held, PIXELS.astype(np.float32))
        whole = held.getvalue()
    elif kind == "more than it has":
        whole = whole.replace(b"(7, 4, 5, 3)", b"(8, 4, 5, 3)")
    elif kind == "huge":
        whole = whole.replace(b"'shape': (7, 4, 5, 3), }", b"'shape': (7, 99999999, 5, 3), }")
    elif kind == "negative":
        whole = whole.replace(b"(7, 4, 5, 3)", b"(-7,4, 5, 3)")
    elif kind == "code":
        whole = whole.replace(b"(7, 4, 5, 3)", b"__import__()")
    elif kind == "no array":
        whole = pickle.dumps(Trap())
    elif kind == "other names":
        rest, whole = {"x.npy": whole}, b""
    with zipfile.ZipFile(path, "w") as found:
        for name, content in (rest or {"arr_0.npy": whole}).items():
            found.writestr(name, content)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "flipped":
        path.write_bytes(path.read_bytes().replace(PIXELS.tobytes()[:9], bytes(9)))


KINDS = (
    "pickle",
    "floats",
    "more than it has",
    "huge",
    "negative",
    "code",
    "no array",
    "other names",
    "cut",
    "flipped",
)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile(tmp_path / "a.npz", kind)
    with pytest.raises(UserError, match=r"a\.npz: got .*, expected") as caught:
        read(tmp_path / "a.npz")
    assert "\n" not in str(caught.value) and not Path("trapped").exists()


def test_numbers_that_do_not_fit(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.array([1.0, np.nan]), text=np.array(["a"]), wide=np.zeros((2, 3)))
    with npz.opened(tmp_path / "a.npz", "numbers") as found:
        for name, shape, said in (
            ("mu", (-1,), "not finite"),
            ("text", (-1,), "expected real numbers"),
            ("wide", (2, 2), r"shape \(2, 3\), expected real numbers of shape \(2, 2\)"),
            ("absent", (1,), "got mu, text, wide, expected absent among them, in numbers"),
        ):
            with pytest.raises(UserError, match=said):
                found.whole(name, *shape)
    for name in ("none.npz", "."):
        with (
            pytest.raises(UserError, match="got (no such file|a directory), expected"),
            npz.opened(tmp_path / name, "x"),
        ):
            pass
