"""Weights without a config: a first stage's architecture is inferred, other networks and assumptions are named."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import types

import golden
import pytest
import torch
from omegaconf import OmegaConf

import tamingfast
from tamingfast.checkpoints.infer import infer_config
from tamingfast.checkpoints.weights import read_state_dict
from tamingfast.errors import UserError


@pytest.fixture(scope="module")
def state():
    return read_state_dict(golden.checkpoint("vqmodel_f2"))


def refused(state, tmp_path, **beside) -> str:
    path = tmp_path / "weights.bin"
    torch.save({"state_dict": state, **beside}, path)
    with pytest.raises(UserError) as error:
        tamingfast.load_model(path)
    text = str(error.value)
    assert "weights.bin" in text and "\n" not in text and ": got " in text and ", expected " in text, text
    return text


def named(state, old: str, new: str) -> dict:
    return {key.replace(old, new): value for key, value in state.items()}


OTHERS = {
    "diffusers": lambda state: named(named(state, "down.", "down_blocks."), "up.", "up_blocks."),
    "MaskGIT": lambda state: {key: value for key, value in state.items() if "quant_conv" not in key},
    "a KL autoencoder": lambda state: {key: value for key, value in state.items() if not key.startswith("quantize.")},
    "a decoder alone": lambda state: {key: value for key, value in state.items() if key.startswith("decoder.")},
    "another codebook": lambda state: named(state, "quantize.embedding.weight", "quantize.codebook.weight"),
    "a list of levels with a gap": lambda state: named(state, "encoder.down.0.", "encoder.down.7."),
    "names that are no numbers": lambda state: named(state, "encoder.down.0.block.0", "encoder.down.first.block.x"),
    "a classifier": lambda state: {"layer1.0.conv1.weight": torch.zeros(8, 3, 3, 3), "fc.weight": torch.zeros(10, 8)},
    "a diffusion model": lambda state: (
        {f"model.diffusion_model.{key}": value for key, value in state.items()}
        | {f"first_stage_model.{key}": value for key, value in state.items()}
    ),
    "one number": lambda state: {"x": torch.tensor(1.0)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_other_networks_are_named_as_such(name, state, tmp_path):
    assert "another network" in refused(OTHERS[name](dict(state)), tmp_path)


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.exhaustive)])
def test_any_tensors_under_any_names_and_shapes(count, state, tmp_path):
    """A model, or a UserError that names the file."""
    chance = random.Random(count)
    odd = [torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(2, 2), torch.zeros(1, 0, 3, 3),
           torch.zeros(7, 3, 3, 3), torch.zeros(1).expand(64, 64, 3, 3), torch.zeros(1, 1, 1, 1, 1),
           torch.zeros(3, dtype=torch.int64), torch.zeros(32, 3, 3, 3, dtype=torch.bool)]  # fmt: skip
    keys = list(state)
    for _ in range(count):
        changed = dict(state)
        for key in chance.sample(keys, chance.choice((1, 1, 2, 20))):
            value = changed.pop(key)
            kind = chance.randrange(3)
            if kind == 0:
                changed[key] = chance.choice(odd)
            elif kind == 1:
                changed[key.replace("0", chance.choice(("1", "99999999999", "x", ""))) + chance.choice(("", "x"))] = (
                    value
                )
        torch.save(changed, tmp_path / "weights.bin")
        text = "weights.bin"
        try:
            tamingfast.load_model(tmp_path / "weights.bin")
        except UserError as error:
            text = str(error)
        assert "weights.bin" in text and "\n" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder.conv_in.weight": torch.zeros(1).expand(32 * 10**4, 3, 3, 3)},
        {"quantize.embedding.weight": torch.zeros(1).expand(10**9, 4)},
        {f"encoder.down.0.block.{i}.conv1.weight": torch.zeros(1).expand(32, 32, 3, 3) for i in range(5000)},
        {f"encoder.down.{i}.block.0.conv1.weight": torch.zeros(1).expand(32, 32, 3, 3) for i in range(5000)},
    ],
)
def test_weights_that_ask_for_a_large_network_are_refused_before_it_is_built(changes, state, tmp_path, monkeypatch):
    monkeypatch.setattr("tamingfast.checkpoints.load.instantiate_from_config", lambda config: pytest.fail("was built"))
    refused(dict(state) | changes, tmp_path)


def test_what_weights_do_not_show_is_said(state, tmp_path, caplog):
    torch.save(state, tmp_path / "weights.bin")
    with caplog.at_level(logging.WARNING):
        tamingfast.load_model(tmp_path / "weights.bin")
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "weights.bin" in said and "inferred" in said and "IBQ" in said and "tanh" in said


SIGNS = {
    "a decoder that ends in tanh": {"hyper_parameters": {"ddconfig": {"tanh_out": True, "ch": 32}}},
    "in a Namespace": {"hyper_parameters": argparse.Namespace(ddconfig={"tanh_out": True})},
    "in a config of omegaconf": {"hyper_parameters": OmegaConf.create({"ddconfig": {"tanh_out": True}})},
    "a name of IBQ": {"hyper_parameters": {"target": "src.IBQ.models.ibqgan.IBQ"}},
    "a list of names": {"config": ["a", {"b": ("taming", "IBQ-16384")}]},
    "a setting": {"args": {"use_ibq": False}},
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs_of_another_network_beside_the_weights(name, state, tmp_path):
    assert "expected their config" in refused(state, tmp_path, **SIGNS[name])


def test_the_class_of_an_object_is_a_sign(state, tmp_path, monkeypatch):
    module = types.ModuleType("src.IBQ.models")
    module.Callback = type("Callback", (), {"__module__": "src.IBQ.models"})
    for name in ("src", "src.IBQ", "src.IBQ.models"):
        monkeypatch.setitem(sys.modules, name, module)
    assert "src.IBQ.models.Callback" in refused(state, tmp_path, callbacks={"x": module.Callback()})


@pytest.mark.parametrize(
    "beside",
    [{"hyper_parameters": {"ddconfig": {"tanh_out": False}}}, {"callbacks": {"x": [1, {"tanh_out": None}]}}, {}],
)
def test_what_is_no_sign(beside, state, tmp_path):
    torch.save({"state_dict": state, **beside}, tmp_path / "weights.bin")
    assert type(tamingfast.load_model(tmp_path / "weights.bin")).__name__ == "VQModel"


def test_the_inferred_architecture_is_that_of_the_weights(state):
    params = infer_config(state)["params"]
    assert params["ddconfig"]["ch_mult"] == [1, 1] or len(params["ddconfig"]["ch_mult"]) == 2
    assert infer_config({f"model.{key}": value for key, value in state.items()})["params"] == params


@pytest.mark.parametrize("setting", [{"tanh_out": True}, {"attn_type": "linear"}, {"use_linear_attn": True}])
def test_settings_of_relatives_that_change_the_network_are_refused(setting, tmp_path):
    from tamingfast.checkpoints.config import load_yaml

    config = load_yaml(golden.checkpoint("vqmodel_f2").with_suffix(".yaml"))
    config.model.params.ddconfig.update(setting)
    with pytest.raises(UserError, match=next(iter(setting))):
        tamingfast.load_model(golden.checkpoint("vqmodel_f2"), {"model": OmegaConf.to_container(config.model)})
