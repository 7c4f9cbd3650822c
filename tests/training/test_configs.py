"""Configs: presets, overrides, the original's files, and settings that are refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from PIL import Image

from tamingfast import UserError
from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import load_yaml, plain
from tamingfast.training import load_config, presets, prior, settings, vqgan


def test_every_preset_loads_and_builds():
    for name in presets():
        config = plain(load_config(name))
        settings.training_settings(config)
        if config["model"]["target"].endswith("VQModel"):
            with torch.device("meta"):
                model = tiny.build(config)
            assert model.n_embed in (512, 1024) and model.factor in (2, 4, 16)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainig.steps=3", "trainig: got a key that nothing reads, expected .*did you mean 'training'"),
        ("training.stpes=3", "training.stpes: .*did you mean 'training.steps'"),
        ("model.params.n_embd=3", "did you mean 'model.params.n_embed'"),
        ("model.params.ddconfig.ch_mul=[1]", "did you mean 'model.params.ddconfig.ch_mult'"),
        ("model.params.lossconfig.params.disc_strt=1", "did you mean 'model.params.lossconfig.params.disc_start'"),
        ("data.lenght=3", "did you mean 'data.length'"),
        # Keys that stand elsewhere.
        ("perceptual_weights=random", "did you mean 'model.params.lossconfig.params.perceptual_weights'"),
        ("steps=3", "^steps: got a key that nothing reads, .*did you mean 'training.steps'"),
        ("data.batch_size=3", "did you mean 'training.batch_size'"),
        ("training.base_learning_rate=1", "did you mean 'model.base_learning_rate'"),
        ("model.ch_mult=[1]", "did you mean 'model.params.ddconfig.ch_mult'"),
        ("training.size=64", "did you mean 'data.size'"),
        (
            "flavour=3",
            "flavour: got a key that nothing reads, expected one of model, data, training, prior, classes, sampling$",
        ),
        # Of another data set.
        (
            "data.path=pictures",
            "^data.path: got a key that data.name=photos does not have, expected it with "
            "data.name=folder or .*; add data.name=folder, or leave it out$",
        ),
        ("data.kind=edges", "add data.name=conditions"),
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
        ({"batch_size": 0}, "training.batch_size: got 0, expected an integer of at least 1$"),
        ({"batch_size": 2.5}, "training.batch_size: got 2.5, expected an integer of at least 1$"),
        ({"batch_size": "3"}, "training.batch_size: got '3', expected an integer"),
        ({"batch_size": None}, "training.batch_size: got None, expected an integer"),
        ({"workers": -1}, "training.workers: got -1, expected an integer of at least 0, or auto$"),
        ({"steps": True}, "training.steps: got True, expected an integer of at least 1, or null$"),
        ({"precision": "float8"}, "training.precision: got 'float8', expected one of auto, float32, bfloat16$"),
        ({"precision": 32}, "training.precision: got 32, expected one of"),
        ({"shared_forward": "yes"}, "training.shared_forward: got 'yes', expected true or false$"),
        ({"shared_forward": 1}, "training.shared_forward: got 1, expected true or false$"),
        ({"grad_clip": -1.0}, "training.grad_clip: got -1.0, expected a number above 0, or null$"),
        ({"seconds": "long"}, "training.seconds: got 'long', expected a number above 0, or null$"),
        ({"accumulate": 100}, "data: got 13 training images, expected at least 100 for one step"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changed, said):
    with pytest.raises(UserError, match=said):
        tiny.train("vqgan", tmp_path / "run", **changed)
    assert not (tmp_path / "run").exists()


def test_whole_numbers_are_numbers():
    made = settings.training_settings({"training": {"seconds": 3, "learning_rate": 1, "grad_clip": None}})
    assert (made.seconds, made.learning_rate, made.grad_clip) == (3, 1, None)
    assert made == settings.Training(seconds=3, learning_rate=1)


def test_a_config_of_the_other_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match="config: got one for a prior, .* use `tamingfast train prior`"):
        vqgan.train(load_config("tiny"), tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="config: got one for a first stage"):
        prior.train(load_config("photos32_vqgan"), tmp_path / "first", tmp_path / "run", device="cpu")


def test_faults_of_the_data_name_the_whole_key(tmp_path):
    for override, said in (
        ("data.path=missing", "^data.path=missing: got a path that does not exist"),
        ("data.size=-1", "^data.size: got -1"),
        ("data.validation_fraction=2", "^data.validation_fraction: got 2"),
    ):
        Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
        config = load_config("folder_vqgan", [f"data.path={tmp_path}", override])
        with pytest.raises(UserError, match=said):
            vqgan.train(config, tmp_path / "run", device="cpu")


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
        len(run_directory.read_metrics(out, "train")) == 2 and len(run_directory.read_metrics(out, "validation")) == 1
    )


def test_a_data_set_of_the_original_that_is_not_here_asks_for_a_folder(tmp_path):
    path = original_config(tmp_path, "taming.data.imagenet.ImageNetTrain")
    with pytest.raises(UserError, match="ImageNetTrain.*data.name=folder data.path=DIRECTORY"):
        vqgan.train(load_config(path), tmp_path / "run", device="cpu")
    config = load_config(
        path, ["data.name=folder", f"data.path={tmp_path}", "data.validation_fraction=0.2", "training.accumulate=1"]
    )
    assert vqgan.train(config, tmp_path / "run", device="cpu").is_dir()
