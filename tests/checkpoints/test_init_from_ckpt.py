"""``init_from_ckpt`` and ``ckpt_path`` with the files of relatives: by our names, and never into another network."""

from __future__ import annotations

import pytest
import tiny
import torch
from family_files import FAMILIES
from safetensors.torch import save_file

from tamingfast import UserError, load_model
from tamingfast.checkpoints.config import instantiate_from_config, plain


def published(family, name, folder):
    torch.manual_seed(0)
    return FAMILIES[family][name](folder)


def untrained(model: dict, **changed) -> torch.nn.Module:
    """A network of a config with other weights."""
    torch.manual_seed(9)
    return instantiate_from_config(plain(model) | {"params": plain(model["params"]) | changed})


# Those whose config is beside them.
OPENED = [
    ("latent-diffusion VQ", "plain"), ("latent-diffusion VQ", "averages"),
    ("latent-diffusion VQ", "inside a diffusion model"), ("latent-diffusion VQ", "without attention"),
    ("LlamaGen VQ", "file"), ("LlamaGen VQ", "folder"), ("Janus", "in parts"), ("Open-MAGVIT2", "no config"),
    ("diffusers VQModel", "folder"), ("diffusers VQModel", "aMUSEd"), ("diffusers VQModel", "MoVQ"),
    ("MaskGIT-VQGAN", "file"), ("vqgan-jax", "folder"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), OPENED)
def test_a_network_of_the_family_takes_its_files(family, name, tmp_path):
    made = published(family, name, tmp_path)
    expected = load_model(made.path)
    model = untrained(expected.config["model"]).eval()
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        assert not torch.allclose(model(x)[0], expected(x)[0])
        model.init_from_ckpt(made.path)
        assert torch.equal(model(x)[0], expected(x)[0])
    at_once = untrained(expected.config["model"], ckpt_path=str(made.path))
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in at_once.state_dict().items())


@pytest.mark.parametrize(
    ("family", "name", "setting", "changed"),
    [
        ("LlamaGen VQ", "file", "codes=unit", {"codes": "nearest"}),
        ("LlamaGen VQ", "training without norms", "codes=nearest", {"codes": "unit"}),
        ("diffusers VQModel", "aMUSEd", r"image_range=\[0, 1\]", {"image_range": [-1, 1]}),
        ("latent-diffusion VQ", "without attention", "ddconfig.tanh_out=True", {"tanh_out": False}),
        ("diffusers VQModel", "folder", "ddconfig.num_groups=8", {"num_groups": 4}),
    ],
)
def test_what_weights_do_not_show_must_agree(family, name, setting, changed, tmp_path):
    made = published(family, name, tmp_path)
    model = load_model(made.path).config["model"]
    ddconfig = plain(model["params"]["ddconfig"])
    if changed.keys() & ddconfig.keys():
        changed = {"ddconfig": ddconfig | changed}
    other = untrained(model, **changed)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(UserError, match=rf"got weights \({family}\) of a network with {setting}, expected .*; set "):
        other.init_from_ckpt(made.path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_of_unit_codes_a_quantiser_of_training_is_the_same(tmp_path):
    """`codes: unit` and `CosineQuantizer` are one rule."""
    made = published("LlamaGen VQ", "file", tmp_path)
    expected = load_model(made.path)
    params = {key: value for key, value in expected.config["model"]["params"].items() if key != "codes"}
    cosine = {"target": "tamingfast.models.codebooks.CosineQuantizer"}
    model = untrained({"target": expected.config["model"]["target"], "params": params}, quantizer_config=cosine)
    model.init_from_ckpt(made.path)
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model.eval()(x)[0], expected(x)[0])


def test_other_networks_and_parts_of_weights_are_refused(tmp_path):
    made = published("LlamaGen VQ", "folder", tmp_path)
    other = tiny.build(tiny.config(tiny.VQGAN, {"codes": "unit"}))
    with pytest.raises(UserError, match="got shape"):
        other.init_from_ckpt(made.path)
    model = untrained(load_model(made.path).config["model"])
    state = {name: value for name, value in made.reference.state.items() if name != "quant_conv.bias"}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="quant_conv.bias"):
        model.init_from_ckpt(made.path)
