"""The data sets of a run, including those that a caller passes."""

from __future__ import annotations

import tiny
import torch

from tamingfast.data.base import EpochDataset
from tamingfast.training.datasets import datasets_of


class Bare(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": torch.full((8, 8, 3), float(index))}


def test_a_plain_data_set_of_torch_is_enough():
    training, validation = datasets_of({}, (Bare(), None))
    assert isinstance(training, EpochDataset) and validation is None
    assert (len(training), training.classes, training.grid, training.kind) == (3, None, None, None)


def test_classes_may_be_names_or_their_number():
    named, counted = tiny.Noise(), tiny.Noise()
    counted.classes = 4
    training, validation = datasets_of({}, (named, counted))
    assert list(training.classes) == ["a", "b", "c"] and len(validation.classes) == 4


def test_without_any_the_config_says_which():
    training, validation = datasets_of({"data": {"name": "photos", "size": 8, "length": 5}})
    assert len(training) == 5 and len(validation) > 0
