"""Masks: what is transparent is not chosen, however a file says so, and values that are not black and white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import picture_files
import pytest
import torch
from PIL import Image, features

from tamingfast import UserError
from tamingfast.tasks import read_mask

SIDE = 8
#: White strokes in the upper quarter.
PAINTED = np.zeros((SIDE, SIDE), bool)
PAINTED[:2] = True
OPAQUE = (PAINTED * 255).astype(np.uint8)


def layer(mode: str, hidden: int = 255) -> Image.Image:
    """The strokes on a transparent layer, under whose transparency lies the gray ``hidden``."""
    gray = np.where(PAINTED, 255, hidden).astype(np.uint8)
    image = Image.fromarray(np.dstack([gray, gray, gray, OPAQUE]))
    return image if mode == "RGBA" else image.convert(mode)


def indexed(transparency: int | bytes) -> Image.Image:
    """Palette entry 1 is the strokes, entry 0, which is as white, is transparent."""
    image = Image.fromarray(PAINTED.astype(np.uint8))
    image = image.convert("P")
    image.putpalette([255] * 6)
    image.info["transparency"] = transparency
    return image


def keyed(path: Path, depth: int, color: int, key: bytes, painted: bytes, clear: bytes) -> Path:
    """Rows of white strokes and rows of the colour that the file declares transparent."""
    return picture_files.png(path, depth, color, [painted] * 2 + [clear] * 6, SIDE, (b"tRNS", key))


FILES = {
    "RGBA": lambda p: layer("RGBA").save(p / "m.png"),
    "RGBA over black": lambda p: layer("RGBA", 0).save(p / "m.png"),
    "LA": lambda p: layer("LA").save(p / "m.png"),
    "TIFF": lambda p: layer("RGBA").save(p / "m.tif"),
    "TIFF, compressed": lambda p: layer("RGBA").save(p / "m.tif", compression="tiff_lzw"),
    "WebP": lambda p: layer("RGBA").save(p / "m.webp", lossless=True),
    "WebP, animated": lambda p: layer("RGBA").save(
        p / "m.webp", lossless=True, save_all=True, append_images=[Image.new("RGBA", (SIDE, SIDE), "white")]
    ),
    "PNG, animated": lambda p: layer("RGBA").save(
        p / "m.png", save_all=True, append_images=[Image.new("RGBA", (SIDE, SIDE), "white")]
    ),
    "palette, one entry": lambda p: indexed(0).save(p / "m.png", transparency=0),
    "palette, alpha of each entry": lambda p: indexed(b"\0\xff").save(p / "m.png", transparency=b"\0\xff"),
    "GIF": lambda p: indexed(0).save(p / "m.gif", transparency=0),
    # The clear rows are almost white, so that only transparency keeps them from being chosen.
    "gray with a key": lambda p: keyed(p / "m.png", 8, 0, b"\0\xfe", b"\xff" * 8, b"\xfe" * 8),
    "gray of 16 bits with a key": lambda p: keyed(p / "m.png", 16, 0, b"\xfe\xfe", b"\xff\xff" * 8, b"\xfe\xfe" * 8),
    "gray of 4 bits with a key": lambda p: keyed(p / "m.png", 4, 0, b"\0\x0e", b"\xff" * 4, b"\xee" * 4),
    "gray of 2 bits with a key": lambda p: keyed(p / "m.png", 2, 0, b"\0\x02", b"\xff" * 2, b"\xaa" * 2),
    "RGB with a key": lambda p: keyed(p / "m.png", 8, 2, b"\0\xff\0\xff\0\xfe", b"\xff" * 24, b"\xff\xff\xfe" * 8),
    "RGB of 16 bits with a key": lambda p: keyed(
        p / "m.png", 16, 2, b"\xff\xff\xff\xff\xfe\xfe", b"\xff" * 48, b"\xff\xff\xff\xff\xfe\xfe" * 8
    ),
    "gray and alpha of 16 bits": lambda p: picture_files.png(
        p / "m.png", 16, 4, [b"\xff" * 32] * 2 + [b"\xff\xff\0\0" * 8] * 6, SIDE
    ),
    "RGBA of 16 bits": lambda p: picture_files.png(
        p / "m.png", 16, 6, [b"\xff" * 64] * 2 + [(b"\xff" * 6 + b"\0\0") * 8] * 6, SIDE
    ),
    "one bit": lambda p: Image.fromarray(PAINTED).save(p / "m.png"),
    "one bit, white is zero": lambda p: Image.fromarray(PAINTED).save(p / "m.tif", compression="group4"),
    "16 bits": lambda p: Image.fromarray(OPAQUE.astype(np.uint16) * 257).save(p / "m.png"),
    "CMYK": lambda p: Image.fromarray(OPAQUE).convert("CMYK").save(p / "m.tif"),
    "JPEG": lambda p: Image.fromarray(OPAQUE).save(p / "m.jpg", quality=95),
}


@pytest.mark.parametrize("name", FILES)
def test_only_what_is_painted_is_chosen(tmp_path, name):
    FILES[name](tmp_path)
    (path,) = tmp_path.iterdir()
    assert torch.equal(read_mask(path, SIDE, SIDE), torch.from_numpy(PAINTED))


def test_a_black_key_of_one_bit(tmp_path):
    path = keyed(tmp_path / "m.png", 1, 0, b"\0\x01", b"\0", b"\xff")  # white is transparent, so nothing is chosen
    assert not read_mask(path, SIDE, SIDE).any()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif(tmp_path):
    layer("RGBA").save(tmp_path / "m.avif", quality=100)
    assert torch.equal(read_mask(tmp_path / "m.avif", SIDE, SIDE), torch.from_numpy(PAINTED))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_images_in_memory(mode):
    image = indexed(0).convert("PA") if mode == "PA" else layer(mode)
    if mode == "PA":
        image.putalpha(Image.fromarray(OPAQUE))
    assert torch.equal(read_mask(image, SIDE, SIDE), torch.from_numpy(PAINTED))


def test_half_transparent_strokes_are_chosen_from_half_on():
    for alpha, chosen in ((127, False), (128, True)):
        image = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, alpha))
        assert bool(read_mask(image, SIDE, SIDE).all()) is chosen


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (PAINTED.astype(np.uint8), "mask: got no value above 1, expected 0 to 255; make white 255, or give bool"),
        (Image.fromarray(PAINTED.astype(np.uint8)), "mask: got no value above 1"),
        (PAINTED.astype(np.float32), r"mask: got float32 of shape \(8, 8\), expected uint8 \(H, W\)"),
        (PAINTED.astype(np.int64), r"mask: got int64 of shape \(8, 8\)"),
        (torch.from_numpy(PAINTED).float(), r"mask: got torch.float32 of shape \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"mask: got uint8 of shape \(8, 8, 4\)"),
        (np.zeros((0, 8), np.uint8), r"mask: got uint8 of shape \(0, 8\)"),
        (Image.fromarray(PAINTED.astype(np.float32)), "mask: got an image that cannot be used .*floating-point"),
        (None, "mask: got NoneType, expected a path"),
        (np.zeros((4, 4), bool), "mask: got 4x4 pixels, expected 8x8"),
        (np.zeros((8, 8, 1), bool), "mask: got 8x8x1 pixels, expected 8x8"),
    ],
)
def test_other_masks_from_python_are_told_what_is_expected(mask, message):
    with pytest.raises(UserError, match=message):
        read_mask(mask, SIDE, SIDE)


def test_a_photo_is_no_mask(tmp_path):
    photo = np.linspace(0, 255, SIDE * SIDE).reshape(SIDE, SIDE).round().astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    for source in (photo, Image.fromarray(photo), tmp_path / "photo.png"):
        with pytest.raises(UserError, match="got a picture of which 8[0-9]% is neither black nor white"):
            read_mask(source, SIDE, SIDE)
    soft = OPAQUE.copy()
    soft[2:4] = 100  # an edge that fades
    assert read_mask(soft, SIDE, SIDE).equal(torch.from_numpy(PAINTED))
