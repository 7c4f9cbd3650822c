"""Training of the first stage: the original's steps, what a run leaves behind, and its configs."""

from __future__ import annotations

import math

import golden
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tamingfast import UserError, load_model
from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import instantiate_from_config, load_yaml, plain
from tamingfast.training import distributed, feed, load_config, loop, presets, prior, settings, vqgan


def build(config):
    return instantiate_from_config({key: config["model"][key] for key in ("target", "params")})


def images(count=4):
    data = tiny.Noise(count)
    return {"image": torch.stack([data[i]["image"] for i in range(count)])}


def test_four_steps_equal_the_reference():
    recorded = golden.arrays("vqgan_training")
    config = plain(load_yaml(golden.path("vqgan_training.yaml")))
    config["model"]["params"]["ckpt_path"] = str(golden.checkpoint("vqgan_training"))
    stage = vqgan.VQGANStage(build(config).train(), float(recorded["lr"]))
    batch = {"image": torch.from_numpy(recorded["x"]).permute(0, 2, 3, 1)}
    for row in recorded["history"]:
        values = loop.step(stage.optimizers, stage.loss, [batch])
        assert [float(values[name]) for name in recorded["columns"]] == pytest.approx(row.tolist(), abs=1e-4)
        stage.model.global_step += 1


def trained(stage, batches, steps=1, **options):
    for _ in range(steps):
        values = loop.step(stage.optimizers, stage.loss, batches, **options)
    return values, {name: value.detach().clone() for name, value in stage.model.named_parameters()}


def stage_with(loss, shared=False, **params):
    config = tiny.config(tiny.VQGAN, params)
    config["model"]["params"]["ddconfig"]["dropout"] = 0.0
    config["model"]["params"]["lossconfig"]["params"] |= loss
    torch.manual_seed(0)
    return vqgan.VQGANStage(build(config).train(), 1e-3, shared)


def test_before_its_start_the_discriminator_neither_learns_nor_teaches():
    stage = stage_with({"disc_start": 5})
    before = {name: value.clone() for name, value in stage.model.named_parameters()}
    values, after = trained(stage, [images()])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("loss.") for name in moved)
    assert values["disc_factor"] == 0 and values["aeloss"] == pytest.approx(
        float(values["nll_loss"] + values["quant_loss"])
    )


def test_each_optimizer_leaves_no_gradient_to_the_other():
    stage = stage_with({})
    left = []

    def check(loss, norm, values):
        left.append({name.split(".")[0] for name, p in stage.model.named_parameters() if p.grad is not None})

    loop.step(stage.optimizers, stage.loss, [images()], check=check)
    assert "loss" not in left[0] and left[1] == {"loss"}
    assert all(parameter.requires_grad for parameter in stage.model.parameters())


def test_accumulation_equals_the_large_batch():
    whole, halves = stage_with({"disc_start": 5}), stage_with({"disc_start": 5})
    for stage in (whole, halves):  # under Adam the first step would be the sign of what may be rounding noise
        stage.optimizers[0] = torch.optim.SGD(stage.model.autoencoder_parameters(), lr=0.1)
    batch = images(4)
    one, expected = trained(whole, [batch])
    two, got = trained(halves, [{"image": batch["image"][:2]}, {"image": batch["image"][2:]}])
    assert float(two["aeloss"]) == pytest.approx(float(one["aeloss"]), rel=1e-5)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("shared", "passes"), [(False, 2), (True, 1)], ids=["original", "shared"])
def test_passes_through_the_autoencoder(shared, passes):
    stage, calls = stage_with({}, shared), []
    stage.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    values, _ = trained(stage, [images()])
    assert len(calls) == passes
    assert {"aeloss", "discloss", "d_weight"} <= values.keys()


def test_a_shared_pass_changes_the_discriminator_only():
    batch = images()
    original, after = trained(stage_with({}), [batch])
    shared, after_shared = trained(stage_with({}, shared=True), [batch])
    assert torch.equal(original["aeloss"], shared["aeloss"]) and not torch.equal(
        original["discloss"], shared["discloss"]
    )
    for name in after:
        assert name.startswith("loss.") or torch.equal(after[name], after_shared[name])


def test_clipping_bounds_the_gradient():
    stage, norms = stage_with({}), []
    stage.optimizers = [torch.optim.SGD(stage.model.autoencoder_parameters(), lr=1.0)]
    before = [p.detach().clone() for p in stage.model.autoencoder_parameters()]
    loop.step(
        stage.optimizers, stage.loss, [images()], grad_clip=1e-3, check=lambda loss, norm, values: norms.append(norm)
    )
    moved = torch.stack(
        [(p.detach() - q).norm() for p, q in zip(stage.model.autoencoder_parameters(), before, strict=True)]
    ).norm()
    assert norms[0] > 1e-2 and float(moved) == pytest.approx(1e-3, rel=1e-2)


def test_gumbel_temperature_follows_the_step(tmp_path):
    config = tiny.config(tiny.VQGAN, {"kl_weight": 1e-3}, steps=3)
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
    # 13 images in batches of 2 are epochs of 6 steps; the end of the run is validated too.
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
    config = tiny.config(tiny.VQGAN, steps=60, learning_rate=2e-3, codebook_from_data=True, shared_forward=True)
    config["model"]["params"]["ddconfig"]["dropout"] = 0.0
    config["model"]["params"]["lossconfig"]["params"]["disc_start"] = 1000
    data = tiny.Noise(4, seed=2)
    data.set_epoch = lambda epoch: None  # the same four images for ever
    out = vqgan.train(config, tmp_path / "run", device="cpu", datasets=(data, data))
    losses = [line["rec_loss"] for line in run_directory.read_metrics(out, "train")]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_codebook_from_data_takes_latents_of_the_encoder():
    stage = stage_with({})
    batch = images(4)
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


def test_learning_rate_rule():
    made = settings.Training(steps=1, batch_size=12, accumulate=2)
    assert loop.learning_rate(made, 4.5e-6, size=4) == pytest.approx(2 * 4 * 12 * 4.5e-6)
    assert loop.learning_rate(settings.Training(steps=1, learning_rate=0.1), 4.5e-6, size=4) == 0.1


def test_each_epoch_sees_each_image_once_and_ranks_share_them():
    made, data = settings.Training(steps=1, batch_size=2, accumulate=2), tiny.Noise(17)

    def paths(rank, size, start, steps):
        batches = feed.step_batches(data, made, distributed.World(rank, size, torch.device("cpu")), start)
        return [[path for batch in next(batches)[1] for path in batch["file_path_"]] for _ in range(steps)]

    alone = paths(0, 1, 0, 4)
    assert len({path for step in alone for path in step}) == 16
    assert paths(0, 1, 2, 4)[:2] == alone[2:]  # starting in the middle
    assert {p for step in paths(0, 1, 4, 4) for p in step} != {
        p for step in alone for p in step
    }  # another part is dropped
    assert paths(0, 1, 4, 4) != alone
    for mine, yours, both in zip(
        paths(0, 2, 0, 2), paths(1, 2, 0, 2), [alone[0] + alone[1], alone[2] + alone[3]], strict=True
    ):
        assert not set(mine) & set(yours) and set(mine) | set(yours) == set(both)


def test_every_preset_loads_and_builds():
    for name in presets():
        config = plain(load_config(name))
        settings.training_settings(config)
        if config["model"]["target"].endswith("VQModel"):
            with torch.device("meta"):
                model = build(config)
            assert model.n_embed in (512, 1024) and model.factor in (2, 4, 16)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainig.steps=3", "'trainig'.*did you mean 'training'"),
        ("training.stpes=3", "training.stpes.*did you mean 'steps'"),
        ("model.params.n_embd=3", "did you mean 'n_embed'"),
        ("model.params.ddconfig.ch_mul=[1]", "did you mean 'ch_mult'"),
        ("model.params.lossconfig.params.disc_strt=1", "did you mean 'disc_start'"),
        ("model.target=taming.models.vqgan.VQModl", "did you mean"),
        ("steps", "key=value"),
    ],
)
def test_unknown_keys_name_the_nearest(override, said):
    with pytest.raises(UserError, match=said):
        load_config("photos32_vqgan", [override])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5, expected a whole number"),
        ({"precision": "float8"}, "float8.*float32, bfloat16"),
        ({"shared_forward": "yes"}, "shared_forward is 'yes', expected true or false"),
        ({"grad_clip": -1.0}, "grad_clip is -1.0, expected more than 0"),
        ({"batch_size": 100}, "13 images, fewer than one step's 100"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changed, said):
    with pytest.raises(UserError, match=said):
        tiny.train("vqgan", tmp_path / "run", **changed)
    assert not (tmp_path / "run").exists()


def test_a_config_of_the_other_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match="describes a prior; train it with `tamingfast train prior`"):
        vqgan.train(load_config("tiny"), tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="describes a first stage"):
        prior.train(load_config("photos32_vqgan"), tmp_path / "first", tmp_path / "run", device="cpu")


def test_unknown_presets_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'photos32_vqgan'"):
        load_config("photo32_vqgan")


ORIGINAL = """
model:
  base_learning_rate: 4.5e-6
  target: taming.models.vqgan.VQModel
  project: "notes of the user"
  params: {{embed_dim: 4, n_embed: 16, ddconfig: {{double_z: False, z_channels: 4, resolution: 8, in_channels: 3,
    out_ch: 3,
    ch: 32, ch_mult: [1, 1], num_res_blocks: 1, attn_resolutions: [4], dropout: 0.0}}, lossconfig: {{target:
    taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator,
    params: {{disc_start: 9, perceptual_weight: 0.0, disc_num_layers: 1}}}}}}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 3
    num_workers: 0
    train:
      target: {target}
      params: {{training_images_list_file: {folder}/train.txt, size: 8}}
    validation:
      target: taming.data.custom.CustomTest
      params: {{test_images_list_file: {folder}/test.txt, size: 8}}
lightning:
  trainer: {{max_steps: 2, accumulate_grad_batches: 2, benchmark: True}}
  callbacks: {{image_logger: {{params: {{batch_frequency: 750}}}}}}
"""


def original_config(folder, target):
    for index in range(8):
        Image.new("RGB", (12, 10), (index * 30, 99, 255 - index * 30)).save(folder / f"{index}.png")
    (folder / "train.txt").write_text("".join(f"{folder}/{index}.png\n" for index in range(6)))
    (folder / "test.txt").write_text("".join(f"{folder}/{index}.png\n" for index in range(6, 8)))
    (folder / "original.yaml").write_text(ORIGINAL.format(folder=folder, target=target))
    return folder / "original.yaml"


def test_a_config_of_the_original_trains_as_it_is(tmp_path):
    config = load_config(original_config(tmp_path, "taming.data.custom.CustomTrain"), ["training.log_every=1"])
    out = vqgan.train(config, tmp_path / "run", device="cpu")
    recorded = plain(load_yaml(out / "config.yaml"))
    assert recorded["training"]["batch_size"] == 3 and recorded["training"]["accumulate"] == 2
    assert (
        len(run_directory.read_metrics(out, "train")) == 2 and len(run_directory.read_metrics(out, "validation")) == 2
    )


def test_a_data_set_of_the_original_that_is_not_here_asks_for_a_folder(tmp_path):
    path = original_config(tmp_path, "taming.data.imagenet.ImageNetTrain")
    with pytest.raises(UserError, match="ImageNetTrain.*data.name=folder data.path=DIRECTORY"):
        vqgan.train(load_config(path), tmp_path / "run", device="cpu")
    config = load_config(
        path, ["data.name=folder", f"data.path={tmp_path}", "data.validation_fraction=0.2", "training.accumulate=1"]
    )
    assert vqgan.train(config, tmp_path / "run", device="cpu").is_dir()
