"""Squares cut from the images of other datasets."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from tamingfast import data
from tamingfast.data.crops import Crops
from tamingfast.errors import UserError


def test_training_squares_lie_at_random_by_epoch_and_index():
    crops = Crops(tiny.Noise(40), 4, seed=1)
    assert len(crops) == 40
    whole = tiny.Noise(40)
    places = set()
    for index in range(40):
        square, image = crops[index]["image"], whole[index]["image"]
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(image[top : top + 4, left : left + 4], square)
        ]
        assert len(found) == 1
        places |= set(found)
    assert {top for top, _ in places} == {left for _, left in places} == set(range(5))
    first = crops.batch(np.arange(8))["image"]
    assert torch.equal(first, torch.stack([crops[i]["image"] for i in range(8)]))
    crops.set_epoch(1)
    assert whole.epoch == 0 and crops.images.epoch == 1
    assert not torch.equal(first, crops.batch(np.arange(8))["image"])


def test_validation_squares_are_tiles_of_every_image():
    noise = tiny.Noise(3)
    tiles = Crops(noise, 4, tiles=True)
    assert len(tiles) == 12
    found = tiles.batch(np.arange(12))
    expected = [
        (number, part)
        for number in range(3)
        for rows in noise[number]["image"].split(4, 0)
        for part in rows.split(4, 1)
    ]
    for square, label in zip(found["image"], found["class_label"].tolist(), strict=True):
        same = [i for i, (number, part) in enumerate(expected) if number == label and torch.equal(part, square)]
        assert len(same) == 1
        expected.pop(same[0])
    assert not expected


def test_crop_is_a_setting_of_every_dataset_of_images():
    train, validation = data.build({"name": "photos", "size": 64, "crop": 16, "length": 5})
    assert train[0]["image"].shape == validation[0]["image"].shape == (16, 16, 3)
    assert len(train) == 5 and len(validation) % 16 == 0
    assert "16x16 cuts of 64x64 crops" in train.description and "astronaut" in train.classes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "photos", "size": 64, "crop": 65}, "crop: got 65"),
        ({"name": "photos", "size": 64, "crop": 0}, "at least 1"),
        ({"name": "photos", "size": 64, "crops": 8}, "did you mean 'data.crop'"),
        ({"name": "conditions", "path": ".", "kind": "edges", "crop": 8}, "short_side"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UserError, match=message):
        data.build(settings)
