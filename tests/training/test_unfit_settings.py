"""Settings that cannot work: the error is one sentence that names the cause, and nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.data import DataLoader

from tamingfast import GPT, cli, load_model
from tamingfast.data import loader

GPT_PARAMS = "model.params.transformer_config.params"


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Path]:
    """The config of a first stage, of a prior, and a run of the former on 8-pixel photographs."""
    root = tmp_path_factory.mktemp("configs")
    made = {"RUN": root / "run"}
    for name, content in (("VQGAN", tiny.VQGAN), ("PRIOR", tiny.PRIOR | {"prior": {"condition": "none"}})):
        made[name] = root / f"{name}.json.yaml"
        made[name].write_text(json.dumps(content))
    words = ["data.length=8", "training.steps=1"]
    assert cli.main(["train", "vqgan", str(made["VQGAN"]), "--out", str(made["RUN"]), *words]) == 0
    return made


def refused(capsys, *words: object) -> str:
    assert cli.main([str(word) for word in words]) == cli.USAGE_ERROR
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training=3", "training: got 3, expected keys below it"),
        ("data=folder", "write for example data.name="),
        ("model.params=3", "model.params: got 3, expected keys"),
        ("prior=class", "prior: got 'class', expected keys"),
        ("model.params.n_embed=0", "n_embed: got 0"),
        ("model.params.embed_dim=-1", "embed_dim: got -1"),
        ("model.params.ddconfig.z_channels=0", "z_channels: got 0"),
        ("model.params.ddconfig.num_res_blocks=-1", "num_res_blocks: got -1"),
        ("model.params.ddconfig.ch_mult=[]", "do not fit"),
        ("model.params.ddconfig.in_channels=1", r"on the first training image \(x: got .*\(1, 3, 8, 8\), expected"),
        (
            "model.params.lossconfig.params.disc_in_channels=1",
            "on the first training image .*to have 1 channels",
        ),
        ("model.params.ddconfig.ch_mult=[1000000]", "memory: got too little"),
    ],
)
def test_first_stages(configs, tmp_path, capsys, override, said):
    out = tmp_path / "run"
    error = refused(capsys, "train", "vqgan", configs["VQGAN"], "--out", out, "data.length=8", override)
    assert re.search(said, error)
    assert not out.exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.params.pkeep=2"], "pkeep: got 2"),
        ([f"{GPT_PARAMS}.n_layer=0"], "n_layer: got 0"),
        ([f"{GPT_PARAMS}.n_layer=-1"], "n_layer: got -1"),
        ([f"{GPT_PARAMS}.block_size=3"], "at most block_size=3"),
        ([f"{GPT_PARAMS}.vocab_size=1"], "model: got an error on the first training image"),
        (["prior.condition=class", "prior.classes=-1"], "prior.classes: got -1"),
        (["prior.class_dropout=2"], "prior.class_dropout: got 2"),
        (["prior.condition=none", "prior.class_dropout=0.1"], "prior.class_dropout: got 0.1 for prior.condition=none"),
        (["model.params.class_dropout=0.1"], "class_dropout: got 0.1 for a condition without a null class"),
    ],
)
def test_priors(configs, tmp_path, capsys, overrides, said):
    out = tmp_path / "run"
    words = ["--first-stage", configs["RUN"], "--out", out, *overrides]
    assert said in refused(capsys, "train", "prior", configs["PRIOR"], *words)
    assert not out.exists()


@pytest.mark.parametrize("words", [["evaluate", "RUN"], ["encode", "RUN", "--out", "OUT"]], ids=["evaluate", "encode"])
def test_images_that_the_first_stage_would_cut(configs, tmp_path, capsys, words):
    given = {"RUN": configs["RUN"], "OUT": tmp_path / "tokens.safetensors"}
    data = ["name=photos", "size=9", "length=4"]
    assert "9x9 pixels" in refused(capsys, *(given.get(word, word) for word in words), *data)
    assert not given["OUT"].exists()


def test_a_prior_takes_its_images_in_the_size_of_its_first_stage(configs, tmp_path):
    words = ["train", "prior", configs["PRIOR"], "--first-stage", configs["RUN"], "--out", tmp_path / "run"]
    words += ["data.name=photos", "data.length=8", "training.steps=1"]
    assert cli.main([str(word) for word in words]) == 0
    model = load_model(tmp_path / "run")
    assert model.config["data"]["size"] == tiny.SIZE and model.transformer.config.block_size == 17


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("CUDA out of memory. Tried 3 GiB\nTraceback")])
def test_too_little_memory_is_one_sentence(configs, capsys, monkeypatch, error):
    def full(*args, **options):
        raise error

    monkeypatch.setattr("tamingfast.tasks.models.load_model", full)
    said = refused(capsys, "evaluate", configs["RUN"])
    assert "memory: got too little" in said and str(error).splitlines()[0] in said


def test_the_trial_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    settings = {"steps": 2, "codebook_from_data": True}  # which draws in training mode, before the first step
    tried = tiny.train("vqgan", tmp_path / "tried", **settings)
    monkeypatch.setattr("tamingfast.training.begin._check_forward", lambda *args: None)
    plain = tiny.train("vqgan", tmp_path / "plain", **settings)
    states = [load_model(run).state_dict() for run in (tried, plain)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_network_of_nothing_is_no_network():
    with pytest.raises(ValueError, match="n_embd: got 0, expected at least 1"):
        GPT(4, 4, n_layer=1, n_head=1, n_embd=0)


def test_no_more_workers_than_processors(monkeypatch):
    asked = []

    class Noted(DataLoader):
        def __init__(self, *args, num_workers, **options):
            asked.append(num_workers)
            super().__init__(*args, num_workers=0, **options)

    monkeypatch.setattr("tamingfast.data.loading.DataLoader", Noted)
    monkeypatch.setattr("tamingfast.data.loading.processors", lambda: 2)
    batches = list(loader(tiny.Noise(4), 2, workers=64))
    assert asked == [2] and len(batches) == 2
