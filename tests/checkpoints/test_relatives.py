"""Checkpoints of relatives, and of authors whose files stayed at home, open when their weights are those of ours."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import tiny
import torch
import yaml

import tamingfast
from tamingfast import checkpoints
from tamingfast.errors import UserError

DUMMY = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}


def config(target: str = "taming.models.vqgan.VQModel", loss: dict = DUMMY, **params) -> dict:
    made = copy.deepcopy({key: tiny.VQGAN["model"][key] for key in ("target", "params")})
    made["params"] |= {"lossconfig": copy.deepcopy(loss), **params}
    return made | {"target": target}


@pytest.fixture
def used(tmp_path):
    """The file of the codebook entries in use."""
    np.save(tmp_path / "used.npy", np.arange(0, 16, 2))
    return tmp_path / "used.npy"


def write(path, state, described) -> None:
    torch.save({"state_dict": state}, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": described}))


# --- remap -----------------------------------------------------------------------------------------------------------


def test_the_used_entries_are_those_of_the_weights(used, tmp_path):
    made = tiny.build({"model": config(remap=str(used))})
    write(tmp_path / "vq.ckpt", made.state_dict(), config(remap="/home/somebody/used.npy"))
    torch.save(made.state_dict(), tmp_path / "alone.ckpt")
    used.unlink()
    converted = checkpoints.convert(tmp_path / "vq.ckpt", tmp_path / "vq.safetensors")
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    tokens = made.eval().encode(x)[2][2]
    for path in (tmp_path / "vq.ckpt", tmp_path / "alone.ckpt", converted):
        model = tamingfast.load_model(path)
        assert model.n_embed == 8 and torch.equal(model.quantize.used, torch.arange(0, 16, 2))
        found = model.encode(x)[2][2]
        assert found.shape == tokens.shape and int(found.max()) < 8
        known = torch.isin(model.quantize.unmap_to_all(found), model.quantize.used)
        assert known.all()
    assert torch.equal(tamingfast.load_model(converted).state_dict()["quantize.used"], made.quantize.used)


@pytest.mark.parametrize("kind", ["taming.models.vqgan.EMAVQ", "taming.models.vqgan.GumbelVQ"])
def test_the_used_entries_of_other_quantisers(kind, used, tmp_path):
    schedule = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": dict.fromkeys(
        ("warm_up_steps", "max_decay_steps", "lr_start", "lr_max", "lr_min"), 1)}  # fmt: skip
    more = {"temperature_scheduler_config": schedule} if "Gumbel" in kind else {}
    made = tiny.build({"model": config(kind, remap=str(used), **more)})
    write(tmp_path / "vq.ckpt", made.state_dict(), config(kind, remap="/home/somebody/used.npy", **more))
    assert tamingfast.load_model(tmp_path / "vq.ckpt").n_embed == 8


def test_a_file_of_used_entries_that_the_weights_lack_is_still_asked_for(used, tmp_path):
    write(tmp_path / "vq.ckpt", tiny.build({"model": config()}).state_dict(), config(remap=str(used)))
    with pytest.raises(UserError, match=r"vq\.ckpt: got no 'quantize\.used'"):
        tamingfast.load_model(tmp_path / "vq.ckpt")


@pytest.mark.parametrize(
    "entries", [torch.tensor([0, 16]), torch.tensor([-1, 3]), torch.zeros(2, 2, dtype=torch.long), torch.zeros(3),
                torch.zeros(0, dtype=torch.long), torch.tensor(3)],
)  # fmt: skip
def test_used_entries_that_cannot_be(entries, tmp_path):
    state = dict(tiny.build({"model": config()}).state_dict()) | {"quantize.used": entries}
    write(tmp_path / "vq.ckpt", state, config())
    with pytest.raises(UserError, match=r"vq\.ckpt.*quantize\.used.*0 to 15"):
        tamingfast.load_model(tmp_path / "vq.ckpt")


@pytest.mark.parametrize(
    "content",
    [None, b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n", np.array([{}], dtype=object),
     np.zeros((2, 2)), np.array([0, 16]), np.array([-1]), np.array([0.5]), np.array([], dtype=int), np.array(["a"])],
)  # fmt: skip
def test_remap_files_that_cannot_be(content, tmp_path):
    path = tmp_path / "used.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=r"remap: got .*used\.npy.*, expected [^\n]*$"):
        tiny.build({"model": config(remap=str(path))})


def test_a_remap_file_that_says_it_is_huge_or_is_a_pipe(tmp_path):
    np.save(tmp_path / "used.npy", np.arange(8))
    content = (tmp_path / "used.npy").read_bytes()
    (tmp_path / "used.npy").write_bytes(content.replace(b"(8,), }          ", b"(8000000000000,),"))
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("used.npy", "pipe.npy"):
        with pytest.raises(UserError, match=name):
            tiny.build({"model": config(remap=str(tmp_path / name))})


def test_a_run_begins_with_the_used_entries_of_a_file(used, tmp_path):
    made = tiny.build({"model": config(remap=str(used))})
    torch.save(made.state_dict(), tmp_path / "vq.ckpt")
    used.unlink()
    assert tiny.build({"model": config(ckpt_path=str(tmp_path / "vq.ckpt"))}).n_embed == 8


# --- latent-diffusion ------------------------------------------------------------------------------------------------

LOSSES = {
    "none": {"target": "torch.nn.Identity"},
    "its own": {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {"n_classes": 8192}},
    "the original's": {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {"disc_start": 1},
    },
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_first_stages_of_latent_diffusion(loss, tmp_path):
    state = dict(tiny.build({"model": config()}).state_dict())
    more = {"monitor": "val/rec_loss", "batch_resize_range": [64, 128], "scheduler_config": {"target": "x.Y"},
            "lr_g_factor": 2.0, "use_ema": True}  # fmt: skip
    described = config("ldm.models.autoencoder.VQModel", LOSSES[loss], **more)
    described["params"]["ddconfig"] |= {"attn_type": "vanilla", "tanh_out": False}
    write(tmp_path / "model.ckpt", state | {"model_ema.decay": torch.zeros(())}, described)
    (tmp_path / "model.yaml").rename(tmp_path / "config.yaml")
    model = tamingfast.load_model(tmp_path / "model.ckpt")
    assert type(model) is tamingfast.VQModel
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items())
    again = tamingfast.load_model(checkpoints.convert(tmp_path / "model.ckpt", tmp_path / "x.safetensors"))
    assert torch.equal(again.quantize.embedding.weight, model.quantize.embedding.weight)


@pytest.mark.parametrize("name", ["AutoencoderKL", "IdentityFirstStage", "Nothing"])
def test_other_classes_of_latent_diffusion_are_refused(name, tmp_path):
    write(tmp_path / "vq.ckpt", tiny.build({"model": config()}).state_dict(), config(f"ldm.models.autoencoder.{name}"))
    with pytest.raises(UserError, match=name):
        tamingfast.load_model(tmp_path / "vq.ckpt")


@pytest.mark.parametrize("target", ["losses.my.Loss", "movqgan.modules.losses.vqperceptual.WithDiscriminator", None])
def test_losses_of_relatives_are_not_needed(target, tmp_path):
    state = dict(tiny.build({"model": config()}).state_dict())
    described = config() if target else config(lossconfig=None)
    if target:
        described["params"]["lossconfig"] = {"target": target, "params": {"n_classes": 3}}
    write(tmp_path / "vq.ckpt", state, described)
    assert type(tamingfast.load_model(tmp_path / "vq.ckpt").loss).__name__ == "DummyLoss"


def test_schedules_of_latent_diffusion_are_the_originals(tmp_path):
    schedule = {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "params": dict.fromkeys(
        ("warm_up_steps", "max_decay_steps", "lr_start", "lr_max", "lr_min"), 1)}  # fmt: skip
    described = config("taming.models.vqgan.GumbelVQ", temperature_scheduler_config=schedule)
    write(tmp_path / "vq.ckpt", tiny.build({"model": described}).state_dict(), described)
    assert type(tamingfast.load_model(tmp_path / "vq.ckpt")) is tamingfast.GumbelVQ


@pytest.mark.parametrize("target", ["os.system", "torch.nn.Linear", "ldm2.x", "sys.exit"])
def test_other_losses_are_not_run(target, tmp_path, capfd):
    loss = {"target": target, "params": {"command": "echo ran"}}
    write(tmp_path / "vq.ckpt", tiny.build({"model": config()}).state_dict(), config(loss=loss))
    with pytest.raises(UserError, match=target):
        tamingfast.load_model(tmp_path / "vq.ckpt")
    assert "ran" not in capfd.readouterr().out.split()
