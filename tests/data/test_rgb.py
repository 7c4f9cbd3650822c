"""Reading image files: size, orientation and colour modes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from picture_files import save
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from tamingfast.data.image_files import ImageFiles
from tamingfast.data.rgb import read_rgb


def test_large_jpegs_keep_their_shape_and_colours_when_reduced(tmp_path):
    array = np.zeros((700, 1100, 3), np.uint8)
    array[:, :550] = (200, 40, 40)
    array[:, 550:] = (30, 60, 220)
    Image.fromarray(array).save(tmp_path / "a.jpg", quality=95)
    image = read_rgb(tmp_path / "a.jpg", 35)
    assert image.size == (55, 35)
    assert np.abs(np.asarray(image)[:, :25].astype(int) - (200, 40, 40)).max() < 8
    assert np.abs(np.asarray(image)[:, 30:].astype(int) - (30, 60, 220)).max() < 8
    # Reducing while decoding must not cost sharpness: the border of the colours stays a pixel or two wide.
    sharp = np.asarray(read_rgb(tmp_path / "a.jpg", 350)).astype(int)
    assert np.abs(sharp[:, 271] - (200, 40, 40)).max() < 20
    assert np.abs(sharp[:, 278] - (30, 60, 220)).max() < 20


def test_exif_orientation_is_honoured(tmp_path):
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown upright, the left half is on top
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    image = np.asarray(read_rgb(tmp_path / "turned.png"))
    assert image.shape == (40, 20, 3)
    assert image[:20].min() == 255
    assert image[20:].max() == 0
    assert ImageFiles([str(tmp_path / "turned.png")], 10)[0]["image"].shape == (10, 10, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_agrees_with_pillow(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned{suffix}", (12, 8), exif=exif)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(read_rgb(path)), np.asarray(ImageOps.exif_transpose(image)))


def test_faulty_exif_does_not_lose_the_picture(tmp_path):
    path = save(tmp_path / "a.jpg", (12, 8), exif=b"Exif\0\0no notes about a camera")
    assert read_rgb(path).size == (12, 8)


def test_an_exif_block_that_cannot_be_rewritten_still_turns_the_picture(tmp_path, monkeypatch):
    def fails(exif):
        raise struct.error("argument out of range")

    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", (12, 8), exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", fails)
    assert read_rgb(path).size == (8, 12)


def _palette_with_transparency():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "expected", "tolerance"),
    [
        pytest.param(lambda: Image.new("L", (4, 4), 77), ".png", (77, 77, 77), 0, id="gray"),
        pytest.param(lambda: Image.new("1", (4, 4), 1), ".png", (255, 255, 255), 0, id="bilevel"),
        pytest.param(lambda: Image.new("LA", (4, 4), (9, 0)), ".png", (255, 255, 255), 0, id="gray, transparent"),
        pytest.param(lambda: Image.new("RGBA", (4, 4), (9, 8, 7, 255)), ".png", (9, 8, 7), 0, id="opaque"),
        pytest.param(lambda: Image.new("RGBA", (4, 4), (9, 8, 7, 0)), ".png", (255, 255, 255), 0, id="transparent"),
        pytest.param(lambda: Image.new("RGBA", (4, 4), (0, 0, 200, 51)), ".png", (204, 204, 244), 1, id="veil"),
        pytest.param(_palette_with_transparency, ".png", (255, 255, 255), 0, id="palette, transparent"),
        pytest.param(lambda: Image.new("CMYK", (4, 4), (0, 255, 255, 0)), ".jpg", (255, 0, 0), 6, id="CMYK"),
        pytest.param(lambda: Image.fromarray(np.full((4, 4), 40000, np.uint16)), ".png", (156,) * 3, 0, id="16 bits"),
        pytest.param(
            lambda: Image.fromarray(np.full((4, 4), 65535, np.uint16)), ".png", (255,) * 3, 0, id="16 bits, white"
        ),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path, image, suffix, expected, tolerance):
    path = tmp_path / f"image{suffix}"
    image().save(path)
    converted = read_rgb(path)
    assert converted.mode == "RGB"
    assert np.abs(np.asarray(converted).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize(
    ("side", "decoded"),
    [(32, (200, 120)), (64, (400, 240)), (240, (800, 480)), (256, (1600, 960)), (None, (1600, 960))],
)
def test_jpegs_are_decoded_at_twice_the_wanted_size_or_more(tmp_path, monkeypatch, side, decoded):
    save(tmp_path / "photo.jpg", (1600, 960))
    sizes, load = set(), JpegImageFile.load

    def noted(self):
        sizes.add(self.size)
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", noted)
    read_rgb(tmp_path / "photo.jpg", side)
    assert sizes == {decoded}
