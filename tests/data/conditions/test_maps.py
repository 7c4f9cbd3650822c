"""Maps over the image: what is computed from pixels, and how files are scaled."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from tamingfast import UserError
from tamingfast.data.conditions import Coordinates, Depth, Edges, Keypoints, LowResolution, Segmentation, Superpixels
from tamingfast.data.views import Picture, View


def test_what_is_computed():
    photo = tiny.photographs(1, 64)[0]
    edges = Edges().compute(photo)
    assert set(np.unique(edges)) == {-1.0, 1.0} and 0.01 < (edges > 0).mean() < 0.5
    low = LowResolution(8).compute(photo)
    blocks = photo.reshape(8, 8, 8, 8, 3).mean((1, 3)) / 127.5 - 1
    assert np.abs(low.reshape(8, 8, 8, 8, 3).mean((1, 3)) - blocks).mean() < 0.05
    assert np.abs(np.diff(low, axis=0)).mean() < np.abs(np.diff(photo / 127.5, axis=0)).mean()
    parts = Superpixels(labels=4, segments=30).compute(photo)
    brightness = [photo.mean(-1)[parts[..., label] > 0].mean() for label in range(4) if parts[..., label].any()]
    assert len(brightness) > 1 and brightness == sorted(brightness)


def test_depth_is_stretched_by_its_own_extremes_unless_a_range_is_given(tmp_path):
    values = np.array([[1000, 2000], [3000, 5000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "d.png")
    stretched = Depth().read(tmp_path / "d.png")[..., 0]
    assert np.allclose(stretched, [[-1, -0.5], [0, 1]])
    assert np.allclose(Depth((0, 4000)).read(tmp_path / "d.png")[..., 0], [[-0.5, 0], [0.5, 1]])
    np.save(tmp_path / "flat.npy", np.full((2, 2), 7.0))
    assert np.array_equal(Depth().read(tmp_path / "flat.npy"), np.full((2, 2, 1), -1.0))


def test_a_small_file_is_enlarged_by_the_factor(tmp_path):
    Image.fromarray(tiny.photographs(1, 8)[0]).save(tmp_path / "small.png")
    assert LowResolution(4).read(tmp_path / "small.png").shape == (32, 32, 3)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    "kind", [Segmentation(9), Depth(), Edges(), LowResolution(2), Keypoints()], ids=lambda kind: kind.key
)
@pytest.mark.parametrize("size", [(48, 32), (30, 20), (97, 65)])
def test_a_part_is_read_as_it_is_in_the_whole(tmp_path, kind, size, flipped):
    rng = np.random.default_rng(0)
    path = tmp_path / ("a.json" if kind.key == "keypoints" else "a.png")
    if kind.key == "keypoints":
        people = (rng.random((2, 17, 2)) * (48, 32)).tolist()
        path.write_text(json.dumps({"width": 48, "height": 32, "people": people}))
    else:
        shape = (16, 24) if kind.key == "lowres" else (32, 48)
        Image.fromarray(rng.integers(0, 9 if kind.key == "segmentation" else 256, shape, dtype=np.uint8)).save(path)
    assert kind.own_size(path) == (48, 32)
    view = View(5, 3, 17, 11, flipped)
    whole, part = kind.read(path, size), kind.read(path, size, view)
    assert whole.shape[:2] == size[::-1] and part.shape == (11, 17, whole.shape[2]) and part.dtype == np.float32
    away = np.abs(part - view.cut(whole))
    # A part is scaled by ratios that are rounded, and edges are either on or off.
    assert away.max() <= 0.01 if kind.key in ("depth", "lowres", "segmentation") else (away > 0).mean() < 0.02


def test_coordinates_of_a_part_are_those_of_the_whole_picture():
    picture = Picture(Image.new("RGB", (9, 5)), (90, 50))
    whole = Coordinates().whole((90, 50))
    assert np.array_equal(Coordinates().seen(picture, View(7, 3, 20, 10), None), whole[3:13, 7:27])
    assert np.array_equal(Coordinates().seen(picture, View(7, 3, 20, 10, True), None), whole[3:13, 63:83])


def test_lines_on_nothing_are_edges_and_nothing_is_none(tmp_path):
    drawing = np.zeros((8, 8, 4), np.uint8)
    drawing[3] = 255
    Image.fromarray(drawing).save(tmp_path / "a.png")
    found = Edges().read(tmp_path / "a.png")[..., 0]
    assert (found[3] == 1).all() and (np.delete(found, 3, 0) == -1).all()


def test_labels_are_limited_by_what_files_can_hold():
    with pytest.raises(UserError, match="labels: got 1000000000, expected at most 65536"):
        Segmentation(10**9).check(8)
