"""The config of a prior: what its first stage, its condition and its data determine."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from tamingfast import UserError, load_model
from tamingfast.checkpoints.config import instantiate_from_config
from tamingfast.training import load_config
from tamingfast.training.prior_config import prior_config


def config_on(first_stage, grid=(4, 4), classes=None, **prior_section):
    return prior_config(load_model(first_stage).config, {"prior": prior_section}, grid, classes)


def test_config_without_a_condition(first_stage):
    params = config_on(first_stage)["model"]["params"]
    assert params["cond_stage_config"] == "__is_unconditional__" and params["cond_stage_key"] == "image"
    assert params["transformer_config"]["params"] == {"vocab_size": 16, "block_size": 17}
    assert params["first_stage_config"]["params"]["lossconfig"]["target"].endswith("DummyLoss")
    assert "permuter_config" not in params


def test_vocabulary_holds_the_classes(first_stage):
    params = config_on(first_stage, classes=40, condition="class")["model"]["params"]
    assert params["transformer_config"]["params"]["vocab_size"] == 40
    assert params["cond_stage_config"]["params"] == {"n_classes": 40}
    assert (
        config_on(first_stage, condition="class", classes=3)["model"]["params"]["transformer_config"]["params"][
            "vocab_size"
        ]
        == 16
    )


def test_a_given_condition_stage_is_kept(first_stage):
    coordinates = {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 20, "down_factor": 2}}
    model = {"params": {"cond_stage_config": coordinates, "cond_stage_key": "coord"}}
    params = prior_config(load_model(first_stage).config, {"model": model}, (4, 4))["model"]["params"]
    assert params["cond_stage_config"] == coordinates and params["cond_stage_key"] == "coord"
    assert params["transformer_config"]["params"] == {"vocab_size": 21, "block_size": 32}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"condition": "clas"}, "prior.condition: got 'clas', expected one of none, .*did you mean 'class'"),
        ({"condition": "class"}, "prior.condition: got class for data without labels"),
        ({"ordering": "spiralout"}, "prior.ordering: got 'spiralout', .*did you mean 'spiral_out'"),
    ],
)
def test_unknown_choices(first_stage, section, said):
    with pytest.raises(UserError, match=said):
        config_on(first_stage, **section)


def test_presets_fit_a_first_stage(first_stage):
    for name, size in (("gpt2_small", 85.1e6), ("gpt2_medium", 302.3e6)):
        config = prior_config(load_model(first_stage).config, load_config(name), (16, 16))
        with torch.device("meta"):
            model = instantiate_from_config({key: config["model"][key] for key in ("target", "params")})
        blocks = sum(p.numel() for p in model.transformer.blocks.parameters())
        assert blocks == pytest.approx(size, rel=1e-3)
        assert config["model"]["params"]["transformer_config"]["params"]["block_size"] == 257


def test_the_original_s_unconditional_layout_is_accepted(tmp_path):
    """Its config has a condition stage with a placeholder that is never built, and no number of steps."""
    gpt = {"vocab_size": 16, "block_size": 17, "n_layer": 1, "n_head": 1, "n_embd": 8}
    stage = {
        "embed_dim": 4,
        "n_embed": 16,
        "ckpt_path": "first.ckpt",
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
        "ddconfig": tiny.VQGAN["model"]["params"]["ddconfig"],
    }
    config = {
        "model": {
            "base_learning_rate": 4.5e-6,
            "target": "taming.models.cond_transformer.Net2NetTransformer",
            "params": {
                "first_stage_key": "image",
                "cond_stage_key": "depth",
                "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
                "first_stage_config": {"target": "taming.models.vqgan.VQModel", "params": stage},
                "unconditional": True,
                "cond_stage_config": {"target": "taming.models.vqgan.VQModel", "params": {"dummyparam": 0}},
            },
        },
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": 5,
                "train": {
                    "target": "taming.data.custom.CustomTrain",
                    "params": {"training_images_list_file": "some/training.txt", "size": 256},
                },
            },
        },
    }
    path = tmp_path / "custom_transformer.yaml"
    path.write_text(json.dumps(config))
    loaded = load_config(path)
    assert loaded.training.batch_size == 5 and loaded.data.size == 256
    stage["resolutions"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="first_stage_config.params.resolutions"):
        load_config(path)
