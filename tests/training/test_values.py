"""Values that a setting cannot have: exit code 2, one line that names the key, and nothing written; or it trains."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
from PIL import Image

from tamingfast import UserError, cli
from tamingfast.checkpoints.config import plain
from tamingfast.training import load_config, settings, vqgan
from tamingfast.training.datasets import datasets_of
from tamingfast.training.settings import Training

BAD = ("-1", "0", str(10**30), "1.5", "true", "null", ".nan", ".inf", "-.inf", "abc", "''", "[]", "[x]", "{a: 1}")
SETTINGS = [f"training.{field.name}" for field in dataclasses.fields(Training)]
MODEL = [
    *("embed_dim", "n_embed", "image_key", "ignore_keys", "colorize_nlabels", "monitor", "sane_index_shape"),
    *(f"ddconfig.{key}" for key in (
        "double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks",
        "attn_resolutions", "dropout", "resamp_with_conv", "give_pre_end",
    )),
    *(f"lossconfig.params.{key}" for key in (
        "disc_start", "codebook_weight", "pixelloss_weight", "disc_num_layers", "disc_in_channels", "disc_factor",
        "disc_weight", "perceptual_weight", "use_actnorm", "disc_conditional", "disc_ndf", "disc_loss",
    )),
    "ddconfig", "lossconfig", "lossconfig.target", "lossconfig.params",
]  # fmt: skip
SECTIONS = (
    "model",
    "data",
    "training",
    "prior",
    "lightning",
    "model.params",
    "model.target",
    "model.base_learning_rate",
)
DATA = ("name", "size", "seed", "length", "flip", "crop")
KEYS = [*SETTINGS, *(f"model.params.{key}" for key in MODEL), *SECTIONS, *(f"data.{key}" for key in DATA)]


@pytest.fixture
def config(tmp_path) -> Path:
    limits = {"steps": 1, "seconds": 2, "batch_size": 2, "validation_batches": 1}
    data = {"name": "photos", "size": 8, "length": 4}
    (tmp_path / "c.yaml").write_text(json.dumps(tiny.VQGAN | {"training": limits, "data": data}))
    return tmp_path / "c.yaml"


def attempt(capsys, *words: object) -> str | None:
    """What the command said when it refused, None if it trained."""
    code = cli.main(["train", "vqgan", *map(str, words), "--device", "cpu"])
    error = capsys.readouterr().err
    assert code in (0, cli.USAGE_ERROR) and "Traceback" not in error
    said = [line for line in error.splitlines() if line.startswith("tamingfast: error:")]
    assert len(said) == (code != 0)
    return said[0] if said else None


def names(error: str, key: str) -> bool:
    # What only fails in the network is said of the network or its part.
    return key.rpartition(".")[2] in error or ("model." in key and "model" in error)


@pytest.mark.parametrize("value", ["-1", "abc", ".nan", "[x]"])
@pytest.mark.parametrize("key", [*SETTINGS, *SECTIONS, *(f"data.{key}" for key in DATA)])
def test_values_in_short(key, value, config, tmp_path, capsys):
    error = attempt(capsys, config, "--out", tmp_path / "run", f"{key}={value}")
    assert error is None or (names(error, key) and not (tmp_path / "run").exists())


@pytest.mark.exhaustive
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("key", KEYS)
def test_every_value_of_every_key(key, value, config, tmp_path, capsys):
    error = attempt(capsys, config, "--out", tmp_path / "run", f"{key}={value}")
    assert error is None or names(error, key)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Training)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, [], {}, "x", 10**30, b"x", Path("x")], ids=str)
def test_the_settings_take_no_nonsense(name, value):
    with pytest.raises(UserError, match=f"training.{name}: got "):
        settings.training_settings({"training": {name: value}})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.path=2024", "2024: got a path that does not exist"),
        ("data.path=007", "007: got a path that does not exist"),
        ("data.path=2024-01-02", "2024-01-02: got a path"),
        ("data.path=1e5", "1e5: got a path"),
        ("data.path=yes", "yes: got a path"),
        ("data.path=[x]", r"data.path: got \['x'\], expected a path"),
        ("data.path={a: 1}", "data.path: got"),
        ("data.path=null", "data.path: got none"),
    ],
)
def test_a_number_is_a_path(override, said):
    with pytest.raises(UserError, match=said):
        datasets_of(load_config("folder_vqgan", [override]))


@pytest.mark.parametrize("value", [2024, 20.5, [1], True, {"a": 1}])
def test_a_number_is_a_path_in_a_file(value, tmp_path):
    config = plain(load_config("folder_vqgan"))
    config["data"]["path"] = value
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    if isinstance(value, int | float) and value is not True:
        assert load_config(tmp_path / "c.yaml").data.path == str(value)
    else:
        with pytest.raises(UserError, match=r"data\.path: got .*, expected a path"):
            load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"target": "taming.modules.losses.vqperceptual.DummyLoss"}, "lossconfig: got '.*DummyLoss', .*not trained"),
        ({"target": "torch.nn.Identity"}, "lossconfig: got 'torch.nn.Identity', .*not trained"),
        ({"target": "taming.modules.losses.segmentation.BCELoss"}, "lossconfig: got .*BCELoss', .*not trained"),
        ({"target": "taming.modules.losses.segmentation.BCELossWithQuant"}, "lossconfig: .*not trained"),
        (None, "lossconfig: got None"),
    ],
)
def test_a_loss_that_cannot_train_is_named(loss, said, config, tmp_path, capsys):
    content = json.loads(config.read_text())
    content["model"]["params"]["lossconfig"] = loss
    config.write_text(json.dumps(content))
    assert re.search(said, attempt(capsys, config, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


GPT = "model.params.transformer_config.params"
PRIOR = [
    *(f"model.params.{key}" for key in (
        "pkeep", "sos_token", "downsample_cond_size", "first_stage_key", "cond_stage_key", "unconditional",
        "permuter_config", "cond_stage_config", "transformer_config", "ignore_keys", "class_dropout",
    )),
    *(f"{GPT}.{key}" for key in (
        "n_layer", "n_head", "n_embd", "vocab_size", "block_size", "embd_pdrop", "resid_pdrop", "attn_pdrop",
        "n_unmasked",
    )),
    "prior", "prior.classes", "prior.class_dropout",
]  # fmt: skip


@pytest.mark.parametrize("value", ["abc", ".nan", "[3]", "{a: 1}"])
@pytest.mark.parametrize("key", PRIOR)
def test_settings_of_priors_take_no_nonsense(key, value):
    if key.endswith("_key") and value == "abc":
        assert load_config("tiny", [f"{key}={value}"]).model.params[key.rpartition(".")[2]] == "abc"
        return
    with pytest.raises(UserError, match=re.escape(key)):
        load_config("tiny", [f"{key}={value}"])


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    made = tiny.config(tiny.VQGAN, steps=2) | {"data": tiny.CROPS}
    return vqgan.train(made, tmp_path_factory.mktemp("begun") / "run", device="cpu")


EDITS = {
    "not YAML": lambda text: text + "\n  [",
    "empty": lambda text: "",
    "a list": lambda text: "- 1",
    "binary": lambda text: "\0\1\2",
    "cut": lambda text: text[: len(text) // 2],
    "a key twice": lambda text: text + "\ntraining: {}",
    "another width": lambda text: text.replace("embed_dim: 4", "embed_dim: 8"),
    "another loss": lambda text: text.replace("VQLPIPSWithDiscriminator", "DummyLoss"),
    "a loss that is a function": lambda text: text.replace(
        "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "os.system"
    ),
    "a huge network": lambda text: text.replace("num_res_blocks: 1", "num_res_blocks: 100000000"),
    "a key that nothing reads": lambda text: text.replace("embed_dim:", "embed_dims:"),
    "no model": lambda text: text[text.index("data:") :],
    "words for numbers": lambda text: text.replace("batch_size: 2", "batch_size: two"),
    "no number": lambda text: text.replace("batch_size: 2", "batch_size: .nan"),
    "a resolver": lambda text: text.replace("seed: 0", "seed: ${oc.env:HOME}"),
    "a reference to nothing": lambda text: text.replace("seed: 0", "seed: ${nothing}"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_config_that_was_edited_in_its_run(edit, begun, tmp_path, capsys):
    run = shutil.copytree(begun, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    edited = EDITS[edit](text)
    assert edited != text
    (run / "config.yaml").write_text(edited)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert attempt(capsys, "--resume", "--out", run, "training.steps=3") is not None
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.params.embed_dim=8", "model.params.embed_dim: got 8, expected 4"),
        ("model.params.lossconfig.target=os.system", "os.system"),
        ("training.batch_size=many", "training.batch_size: got 'many'"),
        ("training.seed=${oc.env:HOME}", "training.seed"),
        ("data.size=16", "data.size: got 16, expected 8"),
        ("training.stepss=3", "did you mean 'training.steps'"),
        ("lightning.trainer.precision=16", "lightning.trainer.precision"),
        ("training.steps=[3]", "training.steps: got"),
    ],
)
def test_a_resumed_run_with_other_settings(override, said, begun, tmp_path, capsys):
    before = (begun / "config.yaml").read_bytes()
    assert said in attempt(capsys, "--resume", "--out", begun, override)
    assert (begun / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("inside", ["", "../photos", "a/.."])
def test_a_run_is_not_written_into_its_data(inside, tmp_path, capsys):
    data = tmp_path / "photos"
    data.mkdir()
    for number, pixels in enumerate(tiny.photographs(4, 8)):
        Image.fromarray(pixels).save(data / f"{number}.png")
    content = tiny.config(tiny.VQGAN, steps=1) | {"data": {"name": "folder", "path": str(data), "size": 8}}
    (tmp_path / "c.yaml").write_text(json.dumps(content))
    before = sorted(data.rglob("*"))
    assert "the directory of data.path" in attempt(capsys, tmp_path / "c.yaml", "--out", data / inside)
    assert sorted(data.rglob("*")) == before
    assert attempt(capsys, tmp_path / "c.yaml", "--out", tmp_path / "run") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1}}}, "model.target"),
        ({"model": {"target": "taming.modules.transformer.mingpt.GPT", "params": {"vocab_size": 3}}}, "model.target"),
        ({"model": {"target": "torch.utils.data.TensorDataset"}}, "model.target"),
        ({"data": {"train": {"target": "torch.utils.data.TensorDataset"}}}, "data.train"),
        ({"data": {"train": {"target": "torch.utils.data.Dataset"}}}, "data.train.target"),
        ({"data": {"train": {"target": "torch.utils.data.IterableDataset"}}}, "IterableDataset"),
        ({"data": {"train": {"target": "torch.nn.Identity"}}}, "data.train.target"),
    ],
    ids=str,
)
def test_classes_in_the_place_of_others(change, said, config, tmp_path, capsys):
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert said in attempt(capsys, config, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
