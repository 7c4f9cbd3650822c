"""Checkpoints, the original's and ours, are opened, converted, or refused with a one-sentence error."""

from __future__ import annotations

import collections
import json
import shutil
import sys
import types

import golden
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

import tamingfast
from tamingfast import checkpoints, tasks
from tamingfast.checkpoints.config import load_yaml, without_checkpoints
from tamingfast.checkpoints.fingerprint import fingerprint
from tamingfast.checkpoints.weights import read_state_dict
from tamingfast.errors import UserError


@pytest.fixture
def copied(tmp_path):
    """A golden checkpoint and its config in a folder of their own."""
    for suffix in (".ckpt", ".yaml"):
        shutil.copy(golden.path(f"vqmodel_f2{suffix}"), tmp_path / f"vqmodel_f2{suffix}")
    return tmp_path / "vqmodel_f2.ckpt"


def edit(path, change):
    content = torch.load(path, weights_only=True)
    change(content["state_dict"])
    torch.save(content, path)


def sentence(error: pytest.ExceptionInfo) -> None:
    text = str(error.value)
    assert "\n" not in text and not text.endswith("."), text
    assert ": got " in text and ", expected " in text


def test_run_of_the_original(copied, tmp_path):
    run = tmp_path / "2020-01-01T00-00-00_name"
    (run / "checkpoints").mkdir(parents=True)
    (run / "configs").mkdir()
    copied.rename(run / "checkpoints" / "last.ckpt")
    copied.with_suffix(".yaml").rename(run / "configs" / "2020-01-01T00-00-00-project.yaml")
    for opened in (run, run / "checkpoints" / "last.ckpt"):
        model = tamingfast.load_model(opened)
        assert type(model).__name__ == "VQModel" and not model.training


def test_config_given_as_path_or_mapping(copied):
    config = copied.with_suffix(".yaml").rename(copied.with_name("elsewhere.yaml"))
    state = tamingfast.load_model(copied, config).state_dict()
    for key, value in tamingfast.load_model(copied, load_yaml(config)).state_dict().items():
        assert_close(value, state[key])


def test_nested_checkpoint_paths_are_not_followed(copied):
    config = load_yaml(copied.with_suffix(".yaml"))
    config.model.params.ckpt_path = "/nowhere/last.ckpt"
    tamingfast.load_model(copied, config)


def test_dtype_and_device(copied):
    assert next(tamingfast.load_model(copied, dtype="bfloat16", device="cpu").parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", ["vqmodel_f2", "vqmodel_f8_rect", "gumbelvq_f2", "vqsegmentation_f2", "net2net_unmasked"]
)
def test_conversion_keeps_the_model(name, tmp_path):
    path = checkpoints.convert(golden.checkpoint(name), tmp_path / "out.safetensors")
    before, after = tamingfast.load_model(golden.checkpoint(name)), tamingfast.load_model(path)
    assert type(before) is type(after)
    mine, theirs = after.state_dict(), before.state_dict()
    assert set(mine) == set(theirs)
    for key, value in theirs.items():
        assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("name", ["vqmodel_f2", "gumbelvq_f2", "vqsegmentation_f2"])
def test_architecture_inferred_from_weights(name, tmp_path):
    path = shutil.copy(golden.checkpoint(name), tmp_path / "alone.ckpt")
    model, known = tamingfast.load_model(path), tamingfast.load_model(golden.checkpoint(name))
    assert type(model) is type(known)
    latents = torch.randn(1, known.embed_dim, 16, 16)
    assert_close(model.decode(latents), known.decode(latents))


def test_a_prior_without_config_is_refused(tmp_path):
    path = shutil.copy(golden.checkpoint("net2net_class"), tmp_path / "alone.ckpt")
    with pytest.raises(UserError, match="number of heads") as error:
        tamingfast.load_model(path)
    sentence(error)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="none.ckpt: got no file, expected a checkpoint") as error:
        tamingfast.load_model(tmp_path / "none.ckpt")
    sentence(error)


@pytest.mark.parametrize("kept", [0, 10, 1000, 500_000])
def test_truncated_file(copied, kept):
    copied.write_bytes(copied.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"\b{kept} bytes") as error:
        tamingfast.load_model(copied)
    sentence(error)


def test_truncated_safetensors(tmp_path):
    path = checkpoints.convert(golden.checkpoint("vqmodel_f2"), tmp_path / "out.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged") as error:
        tamingfast.load_model(path)
    sentence(error)


def test_a_web_page_is_named_as_such(copied):
    copied.write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(UserError, match="web page"):
        tamingfast.load_model(copied)


def test_wrong_shape_names_the_key(copied):
    edit(copied, lambda state: state.update({"encoder.conv_in.weight": torch.zeros(64, 3, 3, 3)}))
    with pytest.raises(UserError, match=r"got shape \(64, 3, 3, 3\) for 'encoder.conv_in.weight', expected") as error:
        tamingfast.load_model(copied)
    sentence(error)


def test_missing_and_unknown_keys_are_named(copied):
    edit(copied, lambda state: state.pop("quant_conv.bias"))
    with pytest.raises(UserError, match="got no 'quant_conv.bias'"):
        tamingfast.load_model(copied)
    edit(copied, lambda state: state.update({"quant_conv.bias": torch.zeros(16), "extra.weight": torch.zeros(1)}))
    with pytest.raises(UserError, match="got 'extra.weight', which the model lacks"):
        tamingfast.load_model(copied)


def test_non_finite_values_are_named(copied):
    edit(copied, lambda state: state["decoder.conv_out.bias"].fill_(float("nan")))
    with pytest.raises(UserError, match="3 non-finite values of 3 in 'decoder.conv_out.bias'") as error:
        tamingfast.load_model(copied)
    sentence(error)


def test_training_leftovers_are_ignored(copied):
    edit(copied, lambda state: state.update({"loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}))
    tamingfast.load_model(copied)


def test_discriminator_is_loaded_with_its_loss():
    model = tamingfast.load_model(golden.checkpoint("vqgan_training"))
    stored = read_state_dict(golden.checkpoint("vqgan_training"))
    assert_close(model.loss.discriminator.main[0].weight.detach(), stored["loss.discriminator.main.0.weight"])


class _Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_code_in_a_checkpoint_is_not_run(copied, capsys):
    content = torch.load(copied, weights_only=True)
    content["callbacks"] = _Payload()
    torch.save(content, copied)
    tamingfast.load_model(copied)
    torch.save(_Payload(), copied)
    with pytest.raises(UserError, match="no weights but a pickled object of '.*print'") as error:
        tamingfast.load_model(copied)
    sentence(error)
    assert capsys.readouterr().out == ""


def test_what_lightning_leaves_in_a_pickle_is_accepted(copied, monkeypatch):
    for path in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint",
                 "pytorch_lightning.utilities", "pytorch_lightning.utilities.parsing"):  # fmt: skip
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    attributes = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning.utilities.parsing"})
    sys.modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint = callback
    sys.modules["pytorch_lightning.utilities.parsing"].AttributeDict = attributes
    content = torch.load(copied, weights_only=True)
    content["callbacks"] = {callback: {"best_model_score": np.float64(0.5), "best": collections.OrderedDict(a=1)}}
    content["hyper_parameters"] = attributes(lr=1e-3)
    torch.save(content, copied)
    for path in list(sys.modules):
        if path.startswith("pytorch_lightning"):
            monkeypatch.delitem(sys.modules, path)
    tamingfast.load_model(copied)


def test_hyper_parameters_of_a_real_config_are_accepted(copied):
    content = torch.load(copied, weights_only=True)
    config = OmegaConf.create({"a": {"b": [1, 2.0, "x", None, True]}, "c": "${a.b}"})
    content["hyper_parameters"] = {"cfg": config, "n": collections.defaultdict(dict), "array": np.arange(3.0)}
    torch.save(content, copied)
    tamingfast.load_model(copied)


@pytest.mark.parametrize("where", ["metadata", "yaml", "nested"])
def test_configs_cannot_run_functions(where, tmp_path, capfd):
    command = {"target": "os.system", "params": {"command": "echo ran"}}
    path = checkpoints.convert(golden.checkpoint("vqmodel_f2"), tmp_path / "m.safetensors")
    config = without_checkpoints(tamingfast.load_model(path).config)
    if where == "nested":
        config["model"]["params"]["lossconfig"] = command
    else:
        config["model"] = command
    if where == "yaml":
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        given = tmp_path / "config.yaml"
    else:
        given = None
        checkpoints.save_weights(path, read_state_dict(path), {"config": json.dumps(config)})
    with pytest.raises(UserError, match=r"os\.system.*not run") as error:
        tamingfast.load_model(path, given)
    sentence(error)
    assert "ran" not in capfd.readouterr().out.split()


def test_broken_config_inside_a_file(tmp_path):
    checkpoints.save_weights(tmp_path / "m.safetensors", {"a": torch.zeros(1)}, {"config": "{"})
    with pytest.raises(UserError, match="not JSON"):
        tamingfast.load_model(tmp_path / "m.safetensors")


def test_published_model_of_the_original(copied, tmp_path):
    (tmp_path / "run" / "ckpts").mkdir(parents=True)
    (tmp_path / "run" / "configs").mkdir()
    copied.with_suffix(".yaml").rename(tmp_path / "run" / "configs" / "model.yaml")
    copied.rename(tmp_path / "run" / "ckpts" / "last.ckpt")
    for opened in (tmp_path / "run", tmp_path / "run" / "ckpts" / "last.ckpt"):
        assert type(tamingfast.load_model(opened)).__name__ == "VQModel"


@pytest.mark.parametrize(
    ("options", "match"),
    [({"dtype": "float33"}, "float33"), ({"dtype": "int8"}, "int8"), ({"device": "cudaa"}, "cudaa")],
)
def test_wrong_options(copied, options, match):
    with pytest.raises(UserError, match=match):
        tamingfast.load_model(copied, **options)


@pytest.mark.parametrize("content", [{"state_dict": [1, 2]}, {1: torch.zeros(1)}, {"state_dict": {"a": 1}}])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="no weights"):
        read_state_dict(tmp_path / "x.pt")


def test_perceptual_weights_are_dropped_by_a_strict_load():
    model = tamingfast.load_model(golden.checkpoint("vqgan_training"))
    state = {**model.state_dict(), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}
    model.load_state_dict(state)
    tamingfast.load_model(golden.checkpoint("vqmodel_f2")).load_state_dict(state)


def test_ignore_keys(copied):
    model = tamingfast.load_model(copied)
    before = model.quant_conv.bias.detach().clone()
    edit(copied, lambda state: [value.fill_(5.0) for key, value in state.items() if key.startswith("quant_conv")])
    model.init_from_ckpt(copied, ignore_keys=["quant_conv.bias"])
    assert_close(model.quant_conv.bias.detach(), before)
    assert (model.quant_conv.weight == 5.0).all()


def test_description():
    checkpoint = golden.checkpoint("net2net_class")
    facts = tasks.inspect(checkpoint)
    assert facts["values_by_part"].keys() == {"first_stage_model", "transformer"}
    assert facts["tensors"] == len(read_state_dict(checkpoint))
    assert facts["config"] == "beside the file" and facts["model"].endswith("Net2NetTransformer")
    assert facts["condition"] == "class_label" and facts["size"] is None
    assert facts["first_stage"] == fingerprint(tamingfast.load_model(checkpoint).first_stage_model)


def test_description_of_a_file_without_metadata(tmp_path):
    path = tmp_path / "alone.safetensors"
    checkpoints.save_weights(path, {"transformer.head.weight": torch.zeros(2, 3)}, {"step": "many"})
    facts = tasks.inspect(path)
    assert [facts[name] for name in ("global_step", "epoch", "config", "model", "data", "first_stage")] == [None] * 6
    assert facts["values_by_dtype"] == {"float32": 6}
