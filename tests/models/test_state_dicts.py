"""Names and shapes of the weights: the file format of every published checkpoint."""

from __future__ import annotations

import copy

import golden
import pytest
import torch

from tamingfast.checkpoints.config import instantiate_from_config
from tamingfast.models.gpt import GPT
from tamingfast.models.vqgan import EMAVQ

DUMMY = {"target": "taming.modules.losses.DummyLoss"}


def first_stage(channels: int = 3, n_embed: int = 1024, target: str = "VQModel", **more) -> dict:
    ddconfig = {
        "double_z": False, "z_channels": 256, "resolution": 256, "in_channels": channels, "out_ch": channels, "ch": 128,
        "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0,
    }  # fmt: skip
    params = {"embed_dim": 256, "n_embed": n_embed, "ddconfig": ddconfig, "lossconfig": DUMMY, **more}
    return {"target": f"taming.models.vqgan.{target}", "params": params}


def prior(vocab: int, block: int, layers: int, width: int, stage: dict, cond: dict) -> dict:
    gpt = {"vocab_size": vocab, "block_size": block, "n_layer": layers, "n_head": 16, "n_embd": width}
    params = {
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        "first_stage_config": stage, "cond_stage_config": cond,
    }  # fmt: skip
    return {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}


BOXES = {"target": "taming.models.dummy_cond_stage.DummyCondStage", "params": {"conditional_key": "objects_bbox"}}
COORDINATES = {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 1024, "down_factor": 16}}
# What the original's configs of these names say about the architecture.
CONFIGS = {
    "imagenet_vqgan": first_stage(),
    "imagenetdepth_vqgan": first_stage(1),
    "faceshq_vqgan": first_stage(),
    "custom_vqgan": first_stage(),
    "coco_cond_stage": first_stage(183, target="VQSegmentationModel", n_labels=183),
    "sflckr_cond_stage": first_stage(182, target="VQSegmentationModel", n_labels=182),
    "faceshq_transformer": prior(1024, 512, 24, 1024, first_stage(), COORDINATES),
    "drin_transformer": prior(1024, 512, 24, 1024, first_stage(), first_stage(1)),
    "coco_scene_images_transformer": prior(8192, 348, 40, 1408, first_stage(n_embed=8192), BOXES),
    "open_images_scene_images_transformer": prior(8192, 348, 36, 1536, first_stage(n_embed=8192), BOXES),
}


def test_every_recorded_model_is_covered():
    assert set(CONFIGS) == set(golden.state_dict_shapes())


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_shapes(name):
    expected = {key: tuple(shape) for key, shape in golden.state_dict_shapes()[name].items()}
    with torch.device("meta"):
        model = instantiate_from_config(copy.deepcopy(CONFIGS[name]))
        original = {key: torch.empty(shape) for key, shape in expected.items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    model.load_state_dict(original, strict=True, assign=True)


def test_attention_masks_set_the_unmasked_prefix():
    source, target = (GPT(8, 6, n_layer=2, n_head=1, n_embd=4, n_unmasked=n) for n in (3, 0))
    state = source.state_dict()
    mask = state["blocks.1.attn.mask"]
    assert mask.shape == (1, 1, 6, 6) and mask[0, 0, 0].tolist() == [1, 1, 1, 0, 0, 0]
    assert mask[0, 0, 3:].tolist() == torch.ones(6, 6).tril()[3:].tolist()
    target.load_state_dict(state)
    assert target.config.n_unmasked == 3
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(target(tokens)[0], source(tokens)[0])


def test_a_state_dict_without_masks_keeps_the_constructor_s_prefix():
    model = GPT(8, 6, n_layer=1, n_head=1, n_embd=4, n_unmasked=3)
    model.load_state_dict({key: value for key, value in model.state_dict().items() if "mask" not in key})
    assert model.config.n_unmasked == 3


def test_an_unknown_attention_mask_is_refused():
    model = GPT(8, 6, n_layer=1, n_head=1, n_embd=4)
    state = model.state_dict()
    state["blocks.0.attn.mask"][0, 0, 4, 0] = 0
    with pytest.raises(ValueError, match="blocks.0.attn.mask"):
        model.load_state_dict(state)


def test_ema_codebook_has_the_original_s_parameters():
    model = EMAVQ(n_embed=7, embed_dim=4, lossconfig=DUMMY, ddconfig=golden_ddconfig())
    shapes = {key: tuple(value.shape) for key, value in model.quantize.state_dict().items()}
    assert shapes == {"embedding.weight": (7, 4), "embedding.cluster_size": (7,), "embedding.embed_avg": (7, 4)}


def golden_ddconfig() -> dict:
    return {
        "double_z": False, "z_channels": 4, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
