"""Training of the first stage: the original's steps, the shared forward pass, and what a run leaves behind."""

from __future__ import annotations

import math

import golden
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tamingfast import load_model
from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import load_yaml, plain
from tamingfast.training import vqgan
from tamingfast.training.step import step


def test_four_steps_equal_the_reference():
    recorded = golden.arrays("vqgan_training")
    config = plain(load_yaml(golden.path("vqgan_training.yaml")))
    config["model"]["params"]["ckpt_path"] = str(golden.checkpoint("vqgan_training"))
    stage = vqgan.VQGANStage(tiny.build(config).train(), float(recorded["lr"]))
    batch = {"image": torch.from_numpy(recorded["x"]).permute(0, 2, 3, 1)}
    for row in recorded["history"]:
        values = step(stage.optimizers, stage.loss, [batch])
        assert [float(values[name]) for name in recorded["columns"]] == pytest.approx(row.tolist(), abs=1e-4)
        stage.model.global_step += 1


def test_before_its_start_the_discriminator_neither_learns_nor_teaches():
    stage = tiny.vqgan_stage({"disc_start": 5})
    before = {name: value.clone() for name, value in stage.model.named_parameters()}
    values, after = tiny.move(stage, [tiny.images()])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("loss.") for name in moved)
    assert values["disc_factor"] == 0 and values["aeloss"] == pytest.approx(
        float(values["nll_loss"] + values["quant_loss"])
    )


@pytest.mark.parametrize(("shared", "passes"), [(False, 2), (True, 1)], ids=["original", "shared"])
def test_passes_through_the_autoencoder(shared, passes):
    stage, calls = tiny.vqgan_stage(shared=shared), []
    stage.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    values, _ = tiny.move(stage, [tiny.images()])
    assert len(calls) == passes
    assert {"aeloss", "discloss", "d_weight"} <= values.keys()


def test_a_shared_pass_changes_the_discriminator_only():
    batch = tiny.images()
    original, after = tiny.move(tiny.vqgan_stage(), [batch])
    shared, after_shared = tiny.move(tiny.vqgan_stage(shared=True), [batch])
    assert torch.equal(original["aeloss"], shared["aeloss"]) and not torch.equal(
        original["discloss"], shared["discloss"]
    )
    for name in after:
        assert name.startswith("loss.") or torch.equal(after[name], after_shared[name])


@pytest.mark.parametrize("shared", [False, True], ids=["original", "shared"])
def test_gumbel_temperature_follows_the_step(tmp_path, shared):
    config = tiny.config(tiny.VQGAN, {"kl_weight": 1e-3}, steps=3, shared_forward=shared)
    config["model"]["target"] = "taming.models.vqgan.GumbelVQ"
    schedule = {"warm_up_steps": 2, "lr_min": 0.1, "lr_max": 3.0, "lr_start": 1.0, "max_decay_steps": 10}
    config["model"]["params"]["temperature_scheduler_config"] = {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": schedule,
    }  # fmt: skip
    out = vqgan.train(config, tmp_path / "run", device="cpu", datasets=tiny.datasets())
    assert [line["temperature"] for line in run_directory.read_metrics(out, "train")] == pytest.approx([1.0, 2.0, 3.0])
    assert load_model(out).n_embed == 16


def test_segmentation_model_trains_with_its_single_optimizer(tmp_path):
    class Masks(tiny.Noise):
        def __getitem__(self, index):
            labels = (super().__getitem__(index)["image"][..., 0] > 0).long()
            return {"segmentation": torch.nn.functional.one_hot(labels, 5).float()}

    config = tiny.config(
        tiny.VQGAN, {"n_labels": 5, "image_key": "segmentation"}, steps=4, image_every=4, learning_rate=1e-2
    )
    config["model"]["target"] = "taming.models.vqgan.VQSegmentationModel"
    config["model"]["params"]["ddconfig"] |= {"in_channels": 5, "out_ch": 5}
    config["model"]["params"]["lossconfig"] = {"target": "taming.modules.losses.segmentation.BCELossWithQuant"}
    out = vqgan.train(config, tmp_path / "run", device="cpu", datasets=(Masks(8), Masks(3)))
    lines = run_directory.read_metrics(out, "train")
    assert lines[-1]["bce_loss"] < lines[0]["bce_loss"]
    assert (out / "images" / "00000004.png").is_file()


def test_run_directory(tmp_path):
    out = tiny.train("vqgan", tmp_path / "run", steps=8, image_every=8)
    lines = run_directory.read_metrics(out)
    train = [line for line in lines if line["split"] == "train"]
    # 13 images in batches of 2 are epochs of 6 steps.
    assert [(line["step"], line["epoch"]) for line in train] == [(n, (n - 1) // 6) for n in range(1, 9)]
    validation = [line for line in lines if line["split"] == "validation"]
    assert [line["step"] for line in validation] == [6, 8]
    assert {"rec_loss", "codebook_usage", "codebook_perplexity"} <= validation[0].keys()
    assert 1 / 16 <= validation[0]["codebook_usage"] <= 1 <= validation[0]["codebook_perplexity"] <= 16
    with Image.open(out / "images" / "00000008.png") as sheet:  # 2 of a validation batch above their reconstructions
        assert sheet.size == (2 + 2 * (tiny.SIZE + 2), 2 + 2 * (tiny.SIZE + 2))
    model, state = load_model(out), torch.load(out / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 8 and state["progress"]["epoch"] == 1
    assert all(
        torch.equal(value, state["model"][name]) for name, value in model.state_dict().items() if "loss." not in name
    )


def test_learning_lowers_the_loss(tmp_path):
    config = tiny.config(tiny.VQGAN, steps=30, learning_rate=2e-3, codebook_from_data=True, shared_forward=True)
    config["model"]["params"]["ddconfig"]["dropout"] = 0.0
    config["model"]["params"]["lossconfig"]["params"]["disc_start"] = 1000
    data = tiny.Noise(4, seed=2)
    data.set_epoch = lambda epoch: None  # the same four images for ever
    out = vqgan.train(config, tmp_path / "run", device="cpu", datasets=(data, data))
    losses = [line["rec_loss"] for line in run_directory.read_metrics(out, "train")]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_codebook_from_data_takes_latents_of_the_encoder():
    stage = tiny.vqgan_stage()
    batch = tiny.images(4)
    vqgan.start_codebook(stage.model, iter([(0, [batch])] * 8), seed=0)
    with torch.no_grad():
        latents = (
            stage.model.quant_conv(stage.model.encoder(batch["image"].permute(0, 3, 1, 2)))
            .movedim(1, -1)
            .flatten(0, -2)
        )
    distance = (stage.model.quantize.embedding.weight.detach()[:, None] - latents).abs().amax(2).amin(1)
    assert float(distance.max()) < 1e-6


def test_codebook_use():
    assert vqgan.codebook_use(torch.tensor([5, 5, 0, 0])) == pytest.approx(
        {"codebook_usage": 0.5, "codebook_perplexity": 2.0}
    )
    uneven = vqgan.codebook_use(torch.tensor([3, 1]))
    assert uneven["codebook_perplexity"] == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
