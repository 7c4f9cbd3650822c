"""The data sets of a run, including those that a caller passes."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from tamingfast import UserError
from tamingfast.data.base import EpochDataset
from tamingfast.data.tokens import write_tokens
from tamingfast.models.base import image_from_batch
from tamingfast.training import vqgan
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


@pytest.mark.parametrize("key", ["images", "class_label", "file_path_", 5])
@pytest.mark.parametrize("data", ["photos", "tokens"])
def test_data_without_the_image_key_are_refused_before_a_run_begins(tmp_path, key, data):
    config = tiny.config(tiny.VQGAN, {"image_key": key})
    if data == "tokens":
        write_tokens(tmp_path / "t.safetensors", np.zeros((4, 4, 4), int), 16)
        config["data"] = {"name": "tokens", "path": str(tmp_path / "t.safetensors")}
    with pytest.raises(
        UserError, match=f"image_key: got {key!r}, expected the name of images .*model.params.image_key"
    ):
        vqgan.train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_batches_without_the_image_key_are_told():
    with pytest.raises(UserError, match="data: got items with image, label, expected 'images' among them"):
        image_from_batch({"image": torch.zeros(1, 8, 8, 3), "label": torch.zeros(1)}, "images")
