"""The sizes that are computed from a config bound those of the model that it describes."""

from __future__ import annotations

import golden
import pytest
import torch

from tamingfast import load_model
from tamingfast.checkpoints import limits
from tamingfast.checkpoints.config import instantiate_from_config, plain
from tamingfast.training import load_config, presets
from tamingfast.training.prior_config import prior_config

GOLDEN = (
    "vqmodel_f2", "vqmodel_f8_rect", "gumbelvq_f2", "vqsegmentation_f2", "net2net_unmasked", "net2net_class",
    "vqgan_training",
)  # fmt: skip
FIRST = [name for name in presets() if "vqgan" in name]
PRIORS = [name for name in presets() if "vqgan" not in name]


def counted(config: dict, state: dict | None = None) -> tuple[limits.Size, limits.Size]:
    """(computed, actual) sizes of a model."""
    with torch.device("meta"):
        model = instantiate_from_config({key: config[key] for key in ("target", "params")})
    tensors = [*model.parameters(), *model.buffers()]
    actual = limits.Size(len(tensors), sum(tensor.numel() for tensor in tensors))
    asked = sum((part.size for part in limits._parts(config, "model")), limits.Size(0, 0))
    return asked, actual


def bounds(asked: limits.Size, actual: limits.Size) -> bool:
    tensors = actual.tensors <= asked.tensors <= 2 * actual.tensors + 1000
    return tensors and actual.values <= 1.01 * asked.values and asked.values <= 2 * actual.values + 10_000_000


@pytest.mark.parametrize("name", FIRST)
def test_presets_of_first_stages(name):
    model = plain(load_config(name, ["data.labels=5"] if name.startswith("segmentation") else []))["model"]
    assert bounds(*counted(model))


@pytest.mark.parametrize("name", PRIORS)
def test_presets_of_priors(name):
    first = plain(load_config("photos256_vqgan"))
    config = plain(load_config(name))
    config["prior"] = {"condition": "none", "ordering": "spiral_out"}
    assert bounds(*counted(prior_config(first, config, (16, 16))["model"]))


@pytest.mark.parametrize("name", GOLDEN)
def test_checkpoints_of_the_original(name):
    assert bounds(*counted(load_model(golden.checkpoint(name)).config["model"]))


def test_two_levels():
    model = plain(load_config("photos32_vqgan"))["model"]
    model["target"] = "tamingfast.models.hierarchical.HierarchicalVQModel"
    asked, actual = counted(model)
    assert actual.values <= asked.values <= 4 * actual.values
