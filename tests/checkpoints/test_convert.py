"""The way back: the original's ``.ckpt`` and YAML, which its code loads."""

from __future__ import annotations

import golden
import pytest
import torch
import yaml
from commands import run
from refusals import refused, unchanged

from tamingfast import UserError, checkpoints, load_model
from tamingfast.checkpoints import compat
from tamingfast.checkpoints.targets import descriptions
from tamingfast.checkpoints.weights import read_state_dict

NAMES = [
    "vqmodel_f2", "vqmodel_f8_rect", "gumbelvq_f2", "vqsegmentation_f2", "net2net_uncond", "net2net_class",
    "net2net_coord", "net2net_seg", "net2net_unmasked",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_original_s_files_come_back(name, tmp_path):
    """By way of ours: every key, shape and value that the original wrote, without losses, and its own class names."""
    ours = checkpoints.convert(golden.checkpoint(name), tmp_path / "ours.safetensors")
    theirs = checkpoints.convert(ours, tmp_path / "theirs.ckpt")
    recorded = torch.load(golden.checkpoint(name), weights_only=True)["state_dict"]
    written = torch.load(theirs, weights_only=True)
    assert written.keys() == {"state_dict"}
    expected = {key: value for key, value in recorded.items() if "loss." not in key}
    assert written["state_dict"].keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in written["state_dict"].items())
    config = yaml.safe_load((tmp_path / "theirs.yaml").read_text())
    own = yaml.safe_load(golden.path(f"{name}.yaml").read_text())
    assert config["model"]["target"] == own["model"]["target"] and config.keys() == {"model"}
    assert all(described["target"].startswith("taming.") for _, described in descriptions(config, "config"))
    model = load_model(theirs)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in expected.items())


def test_names_of_ours_become_the_original_s(tmp_path):
    config = yaml.safe_load(golden.path("vqmodel_f2.yaml").read_text())
    config["model"]["target"] = "tamingfast.models.vqgan.VQModel"
    config["model"]["params"]["lossconfig"] = {"target": "tamingfast.losses.DummyLoss"}  # an older name
    config["model"]["params"]["ckpt_path"] = "/nowhere.ckpt"
    out = checkpoints.convert(golden.checkpoint("vqmodel_f2"), tmp_path / "t.ckpt", config)
    written = yaml.safe_load(out.with_suffix(".yaml").read_text())["model"]
    assert written["target"] == "taming.models.vqgan.VQModel" and "ckpt_path" not in written["params"]
    assert written["params"]["lossconfig"]["target"] == "taming.modules.losses.vqperceptual.DummyLoss"


def test_every_class_of_a_config_has_its_way_back():
    for module, names in compat.NAMES.items():
        for name, home in names.items():
            if module.startswith("taming.") and home.startswith("tamingfast.models."):
                back = compat.original_name(home.replace(":", "."))
                assert back is not None and compat.resolve(back) is compat.resolve(f"{module}.{name}")
    assert compat.original_name("tamingfast.models.hierarchical.HierarchicalVQModel") is None
    assert compat.original_name("taming.nothing.Here") is None


def test_what_the_original_lacks_is_refused(tmp_path):
    config = yaml.safe_load(golden.path("vqmodel_f2.yaml").read_text())
    model = load_model(golden.checkpoint("vqmodel_f2"), config)
    write = checkpoints.convert.__globals__["_write_original"]
    with unchanged(tmp_path):
        for change, said in (
            ({"target": "tamingfast.models.multiscale.MultiscaleTransformer"}, "which the original lacks"),
            ({"params": {"ddconfig": {"ch": 32, "tanh_out": True}}}, "model.params.ddconfig.tanh_out: got True"),
        ):
            model.config = {"model": config["model"] | change}
            with pytest.raises(UserError, match=said):
                write(model, model.config["model"], tmp_path / "x.ckpt", torch.float32)


def test_the_command(tmp_path):
    assert run("convert", golden.checkpoint("vqmodel_f2"), tmp_path / "t.ckpt") == 0
    assert (tmp_path / "t.yaml").is_file()
    refused("convert", golden.checkpoint("vqmodel_f2"), tmp_path / "t.pt", names=".safetensors or .ckpt")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_rounded_to_a_type(dtype, tmp_path):
    checkpoint = golden.checkpoint("net2net_class")
    exact, wanted = load_model(checkpoint), getattr(torch, dtype)
    for name in ("m.safetensors", "m.ckpt"):
        assert run("convert", checkpoint, tmp_path / name, "--dtype", dtype) == 0
        stored = read_state_dict(tmp_path / name)
        found = load_model(tmp_path / name)
        for key, value in exact.state_dict().items():
            if not key.endswith(".attn.mask"):
                assert stored[key].dtype == (wanted if value.is_floating_point() else value.dtype), key
                assert torch.equal(found.state_dict()[key], value.to(stored[key].dtype).to(value.dtype)), key
    folder = exact.save_pretrained(tmp_path / "hub", dtype=dtype)
    assert {value.dtype for value in read_state_dict(folder / "model.safetensors").values()} <= {wanted, torch.int64}
    for key, value in load_model(folder).state_dict().items():
        assert torch.equal(value, found.state_dict()[key]), key


def test_weights_that_a_type_cannot_hold(tmp_path):
    model = load_model(golden.checkpoint("vqmodel_f2"))
    model.quantize.embedding.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"^weights in float16: got 1 non-finite values"):
        model.save_pretrained(tmp_path / "m", dtype="float16")
    assert not (tmp_path / "m").exists()
    refused("convert", golden.checkpoint("vqmodel_f2"), tmp_path / "t.safetensors", "--dtype", "int8", names="--dtype")
