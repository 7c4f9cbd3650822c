"""Keypoints: the usual skeletons, and errors that name the file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tamingfast import UserError
from tamingfast.data.conditions import Keypoints


@pytest.mark.parametrize("points", [17, 18, 25])
def test_usual_skeletons(tmp_path, points):
    angles = np.arange(points) * 2 * np.pi / points
    circle = np.column_stack([32 + 28 * np.cos(angles), 32 + 28 * np.sin(angles), np.ones(points)])
    people = [{"pose_keypoints_2d": circle.ravel().tolist()}]
    (tmp_path / "pose.json").write_text(json.dumps({"width": 64, "height": 64, "people": people}))
    drawn = Keypoints().read(tmp_path / "pose.json")
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > points // 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", 'without the list "people"'),
        ("{", "cannot be read .* expected JSON"),
        ('{"people": []}', "got width None and height None"),
        ('{"width": 9, "height": 9, "people": [[[1, 2, 3, 4]]]}', "got person 0 without a list of finite points"),
        ('{"width": 9, "height": 9, "people": [[[1, 2], [3, 4]]]}', "got a person with 2 points and no"),
        (
            '{"width": 9, "height": 9, "people": [[[1, 2]]], "skeleton": [[0, 1]]}',
            "expected a list of pairs of points 0 to 0",
        ),
        (
            '{"width": 9, "height": 9, "people": [[[10, 2], [-3, 4], [5, 5, 0]]], "skeleton": [[0, 1]]}',
            "all points outside the image of 9x9 pixels",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        Keypoints().read(tmp_path / "p.json")
    assert "p.json" in str(raised.value) and "\n" not in str(raised.value)
