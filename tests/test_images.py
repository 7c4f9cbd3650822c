"""Tensors to pixels, grids and PNG files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tamingfast import images
from tamingfast.errors import UserError


def test_the_ends_and_the_middle_of_the_range():
    row = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, float("nan")]).view(1, 1, 6).expand(3, 1, 6)
    assert images.to_uint8(row)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]


def test_every_pixel_value_survives():
    pixels = torch.arange(256).view(1, 1, 256).expand(3, 1, 256)
    assert np.array_equal(images.to_uint8(pixels / 127.5 - 1)[0, :, 2], np.arange(256))
    assert images.to_uint8((pixels / 127.5 - 1).bfloat16()).dtype == np.uint8


def test_gray_becomes_three_channels():
    assert images.to_uint8(torch.zeros(2, 1, 4, 5)).shape == (2, 4, 5, 3)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)]
)
def test_other_tensors_are_refused(bad):
    with pytest.raises(ValueError, match="images: got .* expected floating point"):
        images.to_uint8(bad)


def test_grid_places_images_row_by_row():
    colours = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 6)
    sheet = images.grid(colours, columns=3, padding=1)
    assert sheet.shape == (2 * 5 + 1, 3 * 7 + 1, 3)
    centres = [sheet[1 + row * 5 + 2, 1 + column * 7 + 3, 0] for row in range(2) for column in range(3)]
    assert centres == [0, 64, 128, 191, 255, 255]  # the sixth place is empty: white
    assert (sheet[0] == 255).all() and (sheet[:, 7] == 255).all()


def test_grid_defaults_to_a_square_and_refuses_nothing():
    assert images.grid(torch.zeros(5, 3, 2, 2), padding=0).shape == (4, 6, 3)
    with pytest.raises(ValueError, match="at least one image"):
        images.grid(torch.zeros(0, 3, 2, 2))


def test_png_holds_the_pixels(tmp_path):
    batch = torch.rand(3, 3, 5, 4) * 2 - 1
    path = tmp_path / "new" / "sheet.png"
    images.save_grid(path, batch, columns=3)
    with Image.open(path) as read:
        assert np.array_equal(np.asarray(read), images.grid(batch, columns=3))
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_rows_stand_one_above_the_other(tmp_path):
    top, bottom = torch.full((2, 3, 4, 4), -1.0), torch.full((2, 1, 4, 4), 1.0).expand(2, 3, 4, 4)
    images.save_rows(tmp_path / "rows.png", [top, bottom])
    with Image.open(tmp_path / "rows.png") as read:
        pixels = np.asarray(read)
    assert pixels.shape == (14, 14, 3) and pixels[3, 3, 0] == 0 and pixels[9, 9, 0] == 255
    with pytest.raises(ValueError, match="same number in each row"):
        images.save_rows(tmp_path / "rows.png", [top, bottom[:1]])


def test_names_stand_left_of_their_rows_and_change_no_pixel(tmp_path):
    rows = [torch.rand(2, 3, 20, 10) * 2 - 1 for _ in range(3)]
    images.save_rows(tmp_path / "plain.png", rows, scale=2)
    images.save_rows(tmp_path / "named.png", rows, ["one", "", "the third"], scale=2)
    plain, named = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "named"))
    margin = named.shape[1] - plain.shape[1]
    assert plain.shape == (2 * 68, 2 * 26, 3) and margin > 0 and np.array_equal(named[:, margin:], plain)
    ink = [(part < 128).any(-1) for part in np.array_split(named[:, :margin], 3)]
    assert not ink[1].any() and 0 < ink[0].sum() < ink[2].sum()
    for part in ink:  # no name is cut off
        assert not part[0].any() and not part[-1].any() and not part[:, 0].any() and not part[:, -1].any()


def test_other_formats_than_png_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"sheet.jpg: got the suffix '.jpg', expected .png"):
        images.save_grid(tmp_path / "sheet.jpg", torch.zeros(1, 3, 4, 4))
    assert not list(tmp_path.iterdir())
