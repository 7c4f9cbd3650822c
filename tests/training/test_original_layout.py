"""Configs in the original's layout: what is followed, what is refused by name, and what may be ignored."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
from PIL import Image

from tamingfast import UserError, cli
from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import plain
from tamingfast.training import load_config

DATA = {
    "target": "main.DataModuleFromConfig",
    "params": {
        "batch_size": 2,
        "num_workers": 0,
        "train": {
            "target": "taming.data.custom.CustomTrain",
            "params": {"training_images_list_file": "list.txt", "size": 8},
        },
        "validation": {
            "target": "taming.data.custom.CustomTest",
            "params": {"test_images_list_file": "list.txt", "size": 8},
        },
    },
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a config with this ``lightning`` section, and changes of its ``data.params``."""
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        Image.new("RGB", (12, 10), (number * 30, 99, 255 - number * 30)).save(f"{number}.png")
    (tmp_path / "list.txt").write_text("".join(f"{number}.png\n" for number in range(8)))

    def written(lightning: object = None, **more: object) -> str:
        config = {"model": tiny.VQGAN["model"], "data": copy.deepcopy(DATA)} | more
        if lightning is not None:
            config["lightning"] = lightning
        (tmp_path / "vq.yaml").write_text(json.dumps(config))
        return "vq.yaml"

    return written


def settings(name: str, *overrides: str) -> dict:
    return plain(load_config(name, overrides))["training"]


@pytest.mark.parametrize(
    ("trainer", "ours"),
    [
        ({"max_steps": 7}, {"steps": 7}),
        ({"max_steps": -1}, {}),
        ({"max_steps": None}, {}),
        ({"max_epochs": 3}, {"epochs": 3}),
        ({"max_epochs": -1, "max_steps": 4}, {"steps": 4}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"}, {"grad_clip": 0.5}),
        ({"gradient_clip_val": 0}, {}),
        ({"precision": 32}, {"precision": "float32"}),
        ({"precision": "32-true"}, {"precision": "float32"}),
        ({"precision": "bf16"}, {"precision": "bfloat16"}),
        ({"precision": "bf16-mixed"}, {"precision": "bfloat16"}),
        ({"val_check_interval": 1.0}, {}),
        ({"val_check_interval": 6, "accumulate_grad_batches": 3}, {"validate_every": 2, "accumulate": 3}),
        ({"limit_val_batches": 1.0}, {}),
        ({"limit_val_batches": 5}, {"validation_batches": 5}),
        ({"log_every_n_steps": 3}, {"log_every": 3}),
        ({"limit_train_batches": 1.0, "check_val_every_n_epoch": 1, "overfit_batches": 0.0, "min_epochs": 1}, {}),
        ({"sync_batchnorm": False, "fast_dev_run": False, "resume_from_checkpoint": None, "max_time": None}, {}),
        ({"gpus": "0,1,", "accelerator": "ddp", "benchmark": True, "logger": False, "callbacks": [], "devices": 2}, {}),
        ({"progress_bar_refresh_rate": 20, "num_sanity_val_steps": 0, "deterministic": True, "profiler": "simple"}, {}),
        ({}, {}),
        (None, {}),
    ],
)
def test_arguments_of_the_trainer_are_followed(write, trainer, ours):
    assert settings(write({"trainer": trainer})) == {"batch_size": 2, "workers": 0} | ours


REFUSED = [
    ("precision", 16), ("precision", "16-mixed"), ("precision", 64), ("precision", "half"), ("precision", [32]),
    ("max_epochs", "many"), ("max_epochs", 0), ("max_epochs", -2), ("max_epochs", True), ("max_epochs", 1.5),
    ("max_steps", 0), ("max_steps", {"a": 1}), ("accumulate_grad_batches", {0: 1, 5: 4}), ("gradient_clip_val", -1),
    ("gradient_clip_val", "x"), ("gradient_clip_algorithm", "value"), ("limit_train_batches", 0.5),
    ("limit_train_batches", 10), ("limit_train_batches", 1), ("limit_val_batches", 0), ("limit_val_batches", 0.1),
    ("val_check_interval", 0.25), ("val_check_interval", 0), ("val_check_interval", True), ("val_check_interval", "x"),
    ("check_val_every_n_epoch", 5), ("overfit_batches", 10), ("fast_dev_run", True), ("fast_dev_run", 1),
    ("max_time", "00:12:00:00"), ("min_steps", 100), ("min_epochs", 10), ("auto_lr_find", True),
    ("auto_scale_batch_size", "power"), ("stochastic_weight_avg", True), ("sync_batchnorm", True),
    ("resume_from_checkpoint", "last.ckpt"), ("amp_level", "O2"), ("train_percent_check", 0.1),
    ("use_distributed_sampler", False), ("truncated_bptt_steps", 4), ("log_every_n_steps", 0),
    ("max_step", 3), ("epochs", 3), ("something_new", None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=str)
@pytest.mark.parametrize("where", ["file", "override"])
def test_what_would_change_the_training_is_refused_by_name(write, key, value, where):
    name = write({"trainer": {key: value}} if where == "file" else None)
    overrides = [f"lightning.trainer.{key}={json.dumps(value)}"] if where == "override" else []
    with pytest.raises(UserError, match=rf"lightning\.trainer\.{key}: got ") as error:
        load_config(name, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lightning", "said"),
    [
        (3, "lightning: got 3"),
        ([], r"lightning: got \[\]"),
        ({"trainer": 3}, "lightning.trainer: got 3"),
        ({"trainr": {}}, "lightning.trainr: .*did you mean 'lightning.trainer'"),
        ({"callbacks": 3}, "lightning.callbacks: got 3"),
        ({"callbacks": {"stop": {"target": "pytorch_lightning.callbacks.EarlyStopping"}}}, "EarlyStopping"),
        ({"trainer": {"callbacks": [{"target": "lightning.callbacks.StochasticWeightAveraging"}]}}, "StochasticWeight"),
    ],
)
def test_sections_of_another_shape(write, lightning, said):
    with pytest.raises(UserError, match=said):
        load_config(write(lightning))


@pytest.mark.parametrize(
    "callback",
    [
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}, {"_target_": "x.EarlyStopping"}, "x.EarlyStopping",
        {"target": "mine.EMACallback"}, {"target": "mine.EMA"}, {"target": "x.WeightAveraging"},
        {"target": "x.BackboneFinetuning"}, {"target": "x.ModelPruning"}, {"target": "x.BatchSizeFinder"},
        {"target": "x.QuantizationAwareTraining"}, {"target": "x.FreezeEncoder"},
    ],
)  # fmt: skip
def test_callbacks_that_train_are_refused_however_they_are_written(write, callback):
    for callbacks in ({"some": callback}, [callback]):
        with pytest.raises(UserError, match=r"lightning\.callbacks\.(some|0): got "):
            load_config(write({"callbacks": callbacks}))
    with pytest.raises(UserError, match=r"lightning\.callbacks\.early_stopping: got "):
        load_config(write({"callbacks": {"early_stopping": {"params": {"patience": 3}}}}))


def test_keys_of_the_model_that_nothing_reads_are_named(write, caplog):
    load_config(write(model=tiny.VQGAN["model"] | {"learning_rate": 1.0, "notes": "x"}))
    assert "model.learning_rate, model.notes: nothing reads this" in caplog.text


@pytest.mark.parametrize("key", ["training.steps", "lightning.trainer.max_steps", "model.base_learning_rate"])
def test_overrides_without_a_value(write, key):
    with pytest.raises(UserError, match=rf"override: got '{key}= *' without a value, .*{key}=null"):
        load_config(write({"trainer": {"max_steps": 4}}), [f"{key}= "])


def test_callbacks_and_loggers_may_be_ignored(write):
    section = {
        "callbacks": {"image_logger": {"target": "main.ImageLogger", "params": {"batch_frequency": 750}}},
        "logger": {"target": "pytorch_lightning.loggers.WandbLogger"},
        "modelcheckpoint": {"params": {"every_n_train_steps": 5}},
    }
    assert settings(write(section)) == {"batch_size": 2, "workers": 0}


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("data.params.batch_size=4", "training", "batch_size", 4),
        ("data.params.num_workers=3", "training", "workers", 3),
        ("data.params.train.params.size=16", "data", "size", 16),
        ("data.train.params.size=16", "data", "size", 16),
        ("lightning.trainer.max_steps=3", "training", "steps", 3),
        ("lightning.trainer.precision=bf16", "training", "precision", "bfloat16"),
        ("training.steps=5", "training", "steps", 5),
        ("training.batch_size=5", "training", "batch_size", 5),
    ],
)
def test_overrides_mean_what_the_file_would(write, override, section, key, value):
    name = write({"trainer": {"max_steps": 9}})
    overrides = [override, "data.params.validation.params.size=16"]
    assert plain(load_config(name, overrides))[section][key] == value


def test_the_command_line_wins_over_the_file_in_either_layout(write):
    assert settings(write(None, training={"steps": 9}), "lightning.trainer.max_steps=3")["steps"] == 3
    assert settings("tiny", "lightning.trainer.max_steps=3")["steps"] == 3
    with pytest.raises(UserError, match=r"lightning.trainer.max_steps: got 4 beside training.steps=9"):
        load_config(write({"trainer": {"max_steps": 4}}, training={"steps": 9}))
    with pytest.raises(UserError, match=r"lightning.trainer.max_steps: got 4 beside training.steps=9"):
        load_config(write(), ["training.steps=9", "lightning.trainer.max_steps=4"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.path=no-such-folder", "data.path: got 'no-such-folder', .*data.name=folder"),
        ("data.size=16", "data.size: got 16, expected 8 as in data.train.params"),
        ("data.flip=true", "data.flip"),
        ("data.params.batchsize=4", "data.params.batchsize: .*did you mean 'data.params.batch_size'"),
        ("data.params.batch_size=many", "data.params.batch_size: got 'many'"),
        ("data.params.batch_size=0", "data.params.batch_size: got 0"),
        ("data.params=3", "data.params: got 3"),
        ("data.params.train.parms.size=4", "data.train.parms: .*did you mean 'data.train.params'"),
        ("data.target=sgm.data.Loader", "data.target: got 'sgm.data.Loader'"),
        ("model.projct=x", "model.projct: got a key that nothing reads"),
        ("modle.params.n_embed=3", "modle: .*did you mean 'model'"),
        ("training.stpes=3", "training.stpes: .*did you mean 'training.steps'"),
    ],
)
def test_overrides_that_nothing_reads(write, override, said):
    with pytest.raises(UserError, match=said):
        load_config(write(), [override])


def test_settings_of_the_original_beside_data_of_ours():
    with pytest.raises(UserError, match=r"data\.params"):
        load_config("photos32_vqgan", ["data.params.batch_size=4"])


def test_references_are_resolved_after_the_command_line(write):
    name = write(None, data={**DATA, "params": {**DATA["params"], "batch_size": "${training.accumulate}"}})
    text = Path(name).read_text().replace('"z_channels": 4', '"z_channels": "${model.params.embed_dim}"')
    text = text.replace('"size": 8', '"size": "${model.params.ddconfig.resolution}"')
    Path(name).write_text(text)
    config = plain(load_config(name, [
        "model.params.embed_dim=8", "model.params.ddconfig.resolution=16", "training.accumulate=3",
        "training.seed=${model.params.n_embed}", "model.params.monitor=a/${.image_key}", "model.params.image_key=image",
    ]))  # fmt: skip
    assert config["model"]["params"]["ddconfig"]["z_channels"] == 8 and config["data"]["size"] == 16
    assert config["training"] == {"accumulate": 3, "batch_size": 3, "workers": 0, "seed": 16}
    assert config["model"]["params"]["monitor"] == "a/image"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_of_epochs_ends(write, resumed, tmp_path):
    words = ["--out", "run", "--device", "cpu"]
    name = write({"trainer": {"max_epochs": 1 if resumed else 2}})
    assert cli.main(["train", "vqgan", name, *words]) == 0
    if resumed:
        assert cli.main(["train", "vqgan", "--resume", *words, "lightning.trainer.max_epochs=2"]) == 0
    progress = run_directory.progress("run")
    assert (progress["step"], progress["epoch"]) == (8, 2)
