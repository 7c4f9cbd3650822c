"""Kinds by name: what configs may say, and what follows from the classes."""

from __future__ import annotations

import pytest

from tamingfast.data.conditions import IMAGE_KEYS, KINDS, SPATIAL_KEYS, TOKEN_KEYS, make, settings_of

NEEDED = {
    "segmentation": {"labels": 3},
    "superpixels": {"labels": 3},
    "boxes": {"classes": ["cat", "dog"], "tokens": 64},
    "centers": {"classes": ["cat", "dog"], "tokens": 64},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_made_again_from_its_settings(name):
    kind = make(name, NEEDED.get(name, {}))
    settings = settings_of(kind)
    assert settings.pop("kind") == name and make(name, settings) == kind


def test_values_of_prior_condition_stay():
    assert set(IMAGE_KEYS) == {"segmentation", "depth", "edges", "lowres", "keypoints"}
    assert set(SPATIAL_KEYS) == {"coord", *IMAGE_KEYS}
    assert TOKEN_KEYS == {"boxes": "objects_bbox", "centers": "objects_center_points"}
