"""`tamingfast encode` and `train`."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from commands import run
from PIL import Image

import tamingfast
from tamingfast import cli
from tamingfast.data.tokens import TokenDataset


class TestEncodeAndTrain:
    def test_token_file_feeds_the_prior(self, runs, photo, tmp_path):
        folder = tmp_path / "data"
        for label in ("cat", "dog"):
            (folder / label).mkdir(parents=True)
            for i in range(6):
                Image.open(photo).rotate(30 * i).save(folder / label / f"{i}.png")
        tokens = tmp_path / "tokens.safetensors"
        data = ["name=folder", f"path={folder}", "size=32", "flip=false", "validation_fraction=0.2"]
        assert run("encode", runs / "vqgan", "--out", tokens, *data) == 0
        dataset = TokenDataset(tokens)
        assert dataset.grid == (16, 16) and list(dataset.classes) == ["cat", "dog"]
        out = tmp_path / "prior"
        words = ["train", "prior", "tiny", "--first-stage", runs / "vqgan", "--out", out]
        words += ["data.name=tokens", f"data.path={tokens}", "prior.condition=class", "training.steps=2"]
        words += ["training.batch_size=2", "--seed", 3, "training.image_every=null"]
        assert run(*words) == 0
        model = tamingfast.load_model(out)
        assert model.cond_stage_model.n_classes == 2
        assert model.config["training"]["seed"] == 3
        assert run("sample", out, "-n", 2, "--size", "8x8", "--out", tmp_path / "s.png") == 0
        original = tamingfast.load_model(runs / "vqgan").state_dict()
        inside = model.first_stage_model.state_dict()
        assert all(torch.equal(inside[key], original[key]) for key in inside)

    def test_vqgan_by_preset_and_overrides(self, tmp_path):
        words = ["train", "vqgan", "photos32_vqgan", "--out", tmp_path / "run", "training.steps=1"]
        words += ["training.batch_size=2", "training.validation_batches=1", "training.image_every=1"]
        words += ["model.params.ddconfig.ch=32", "data.length=8"]
        assert run(*words) == 0
        assert list((tmp_path / "run" / "images").glob("*.png"))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["photos32_vqgan", "training.step=3"], "did you mean 'training.steps'"),
            (["photos32_vqgan", "data.name=fotos"], "photos"),
            (["nonsense"], "expected a YAML file or a preset, one of"),
        ],
    )
    def test_mistakes(self, tmp_path, capsys, words, message):
        assert run("train", "vqgan", "--out", tmp_path / "x", *words) == cli.USAGE_ERROR
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1

    def test_tokens_of_another_first_stage_are_refused(self, runs, tmp_path, capsys):
        tokens, other = tmp_path / "tokens.safetensors", tmp_path / "other"
        assert run("encode", runs / "vqgan", "--out", tokens, "name=photos", "size=32", "length=8") == 0
        small = ["training.steps=1", "training.batch_size=2", "training.validation_batches=1", "data.length=8"]
        (tmp_path / "other.yaml").write_text(json.dumps(tiny.VQGAN))
        assert run("train", "vqgan", tmp_path / "other.yaml", "--out", other, *small) == 0
        words = ["--out", tmp_path / "p", "data.name=tokens", f"data.path={tokens}", "training.steps=1"]
        assert run("train", "prior", "tiny", "--first-stage", other, *words) == cli.USAGE_ERROR
        assert "another first stage" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["vqgan", "photos32_vqgan", "data.size=33"], "expected multiples of 2, the pixels per token"),
            (["vqgan", "photos32_vqgan", "model.params.ddconfig.ch=33"], "do not fit"),
            (["vqgan", "photos32_vqgan", "model.params.n_embed=abc"], "n_embed: got 'abc', expected a whole number"),
            (["prior", "tiny"], "--first-stage"),
            (["prior", "tiny", "--first-stage", "RUN", "data.name=photos", "data.size=36", "prior.ordering=subsample"],
             "subsample"),
        ],
    )  # fmt: skip
    def test_models_that_cannot_be_built(self, runs, tmp_path, capsys, words, message):
        words = [str(runs / "vqgan") if word == "RUN" else word for word in words]
        assert run("train", *words, "--out", tmp_path / "x", "training.steps=1") == cli.USAGE_ERROR
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
        assert not (tmp_path / "x").exists()
