"""Maps over the image: what is computed from pixels, and how files are scaled."""

from __future__ import annotations

import numpy as np
import tiny
from PIL import Image

from tamingfast.data.conditions import Depth, Edges, LowResolution, Superpixels


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
