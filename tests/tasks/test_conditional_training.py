"""Training of conditional priors from the recipes, on crops of real photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from commands import pixels_of, run
from conditioned import (
    ADVERSARIAL,
    FACTOR,
    HEIGHT,
    KINDS,
    SIZE,
    SMALL,
    TOKENS,
    WIDTH,
    condition_of,
    folder_of,
    photo_of,
)
from PIL import Image
from safetensors.torch import load_file

from tamingfast import UserError, cli, load_model, tasks
from tamingfast.checkpoints import run_directory
from tamingfast.data import build, loader, shuffled
from tamingfast.data.conditions import Boxes
from tamingfast.training import loop
from tamingfast.training.prior_stage import PriorStage


class TestEveryCondition:
    def test_runs_hold_both_first_stages(self, trained, first_stage):
        kind, cond, out = trained
        model = load_model(out)
        assert model.cond_stage_key == KINDS[kind][2]
        tokens = (SIZE // FACTOR) ** 2
        room = tokens + TOKENS.get(kind, tokens)
        assert model.transformer.config.block_size == room and model.transformer.config.vocab_size == 32
        own = KINDS[kind][0] is not None
        parts = {"first_stage_model": first_stage} | ({"cond_stage_model": cond} if own else {})
        for part, source in parts.items():
            for name, value in load_model(source).state_dict().items():
                if not name.startswith("loss."):
                    assert torch.equal(model.state_dict()[f"{part}.{name}"], value)
        if own:
            losses = [line["rec_loss" if "rec_loss" in line else "bce_loss"] for line in metrics(cond)]
            assert losses[-1] < losses[0]
        with Image.open(out / "images/00000003.png") as sheet:
            rows = sheet.height // SIZE
        assert rows == (2 if kind == "class" else 3)  # conditions, images, samples

    def test_one_batch_is_learned_by_heart_and_only_under_its_conditions(self, trained):
        stage, batch = stage_and_batch(trained[2])
        for _ in range(250):
            value = loop.step(stage.optimizers, stage.loss, [batch], grad_clip=1.0)["loss"]
            if value < 0.01:
                break
        stage.model.eval()
        true, shuffled = both_nlls(stage, batch)
        # Four images, equally likely without their conditions: what these tell about the first token is not in others.
        assert true < 0.02 < np.log(4) / (SIZE // FACTOR) ** 2
        assert shuffled > 2 * true + 0.05

    def test_token_files_give_the_same_batches(self, trained, first_stage, data, tmp_path, capsys):
        """Without crops and flips, which a token file draws once."""
        kind, cond, out = trained
        if kind in TOKENS:
            pytest.skip("labels in token files are tested with folders, and objects are kept in none")
        where = ["name=conditions", f"kind={kind}", f"path={folder_of(data, kind)}", f"size={SIZE}"]
        where += [setting.removeprefix("data.") for setting in KINDS[kind][1] if setting.startswith("data.")]
        where += ["flip=false", "random_crop=false"]
        stages = ["--cond-stage", cond] if kind != "coord" else []
        files = {split: tmp_path / f"{split}.safetensors" for split in ("train", "validation")}
        for split, file in files.items():
            assert run("encode", first_stage, *stages, "--out", file, "--split", split, *where) == 0
        written = load_file(files["train"])
        assert written["conditions"].shape == written["indices"].shape == (len(written["indices"]), 4, 4)
        words = ["train", "prior", "tiny", "--first-stage", first_stage, *stages, f"prior.condition={KINDS[kind][2]}"]
        words += ["training.steps=4", "training.batch_size=4", "training.log_every=1", "training.image_every=4"]
        encoded = ["data.name=tokens", f"data.path={files['train']}", f"data.validation_path={files['validation']}"]
        assert run(*words, "--out", tmp_path / "plain", *(f"data.{setting}" for setting in where)) == 0
        assert run(*words, "--out", tmp_path / "tokens", *encoded) == 0
        plain, tokens = (run_directory.read_metrics(tmp_path / name) for name in ("plain", "tokens"))
        assert len(plain) > 4
        for one, other in zip(plain, tokens, strict=True):
            assert {key: one[key] for key in ("step", "split")} == {key: other[key] for key in ("step", "split")}
            for key in {"loss", "nll"} & one.keys():
                assert one[key] == pytest.approx(other[key], rel=1e-5)
        sheets = [pixels_of(tmp_path / name / "images/00000004.png") for name in ("plain", "tokens")]
        assert sheets[0].shape == sheets[1].shape
        # The run knows its condition as if it had been trained on the images.
        settings = [tasks.kind_of(load_model(path)) for path in (out, tmp_path / "tokens")]
        assert settings[0] == settings[1]
        named = condition_of(data, kind) or (["--condition-of", photo_of(data, kind)] if stages else [])
        size = ["--size", f"{HEIGHT}x{WIDTH}"]
        assert run("sample", tmp_path / "tokens", "-n", 1, *size, "--out", tmp_path / "s.png", *named) == 0


@torch.no_grad()
def both_nlls(stage, batch):
    """Nats per token under the true conditions, and under those of the next image."""
    key = stage.model.cond_stage_key
    return float(stage.nll(batch)), float(stage.nll(batch | {key: batch[key].roll(1, 0)}))


def metrics(out):
    return run_directory.read_metrics(out, "train")


def stage_and_batch(out):
    model = load_model(out)
    dataset = build(model.config["data"])[0]
    return PriorStage(model.train(), 3e-3, (4, 4)), next(iter(loader(dataset, 4, order=shuffled(len(dataset), 0, 0))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["prior.condition=edges"],
            "expected a first stage for prior.condition=edges; train one with `tamingfast train vqgan edges_vqgan`",
        ),
        (["prior.condition=edgs"], "did you mean 'edges'"),
        (["prior.condition=coord"], "data: got items without 'coord'"),
        (["prior.condition=none", "--cond-stage", "FIRST"], "--cond-stage: got one for prior.condition=none"),
        (
            ["prior.condition=edges", "--cond-stage", "FIRST"],
            "--cond-stage: got a first stage of 'image', expected one of 'edges'",
        ),
    ],
)
def test_mistakes_in_training(first_stage, tmp_path, capsys, words, message):
    words = [first_stage if word == "FIRST" else word for word in words]
    assert (
        run("train", "prior", "tiny", "--first-stage", first_stage, "--out", tmp_path / "run", *words)
        == cli.USAGE_ERROR
    )
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_mistakes_in_token_files(first_stage, data, tmp_path, capsys):
    where = ["name=conditions", "kind=edges", f"path={data / 'coord'}", f"size={SIZE}"]
    file = tmp_path / "tokens.safetensors"

    def said(*words):
        capsys.readouterr()
        assert run(*words) == cli.USAGE_ERROR
        return capsys.readouterr().err

    assert "conditions of 'edges' without a first stage" in said("encode", first_stage, "--out", file, *where)
    objects = type("Objects", (list,), {"kind": Boxes(classes=["a"], tokens=32)})()
    with pytest.raises(UserError, match="got 'boxes', whose order changes"):
        tasks.encode(load_model(first_stage), objects, file)
    boxes = ["name=conditions", "kind=boxes", f"path={data / 'boxes'}", "classes=[a]", f"size={SIZE}"]
    assert "got 'boxes', whose order changes" in said("encode", first_stage, "--out", file, *boxes)
    edges = tmp_path / "edges"
    words = ["train", "vqgan", "edges_vqgan", "--out", edges, *SMALL, *ADVERSARIAL, "training.steps=1"]
    assert run(*words, *(f"data.{setting}" for setting in where)) == 0
    plain = ["name=folder", f"path={data / 'coord'}", f"size={SIZE}"]
    message = "data: got no 'edges', expected it"
    assert message in said("encode", first_stage, "--cond-stage", edges, "--out", file, *plain)
    assert run("encode", first_stage, "--cond-stage", edges, "--out", file) == 0  # on what that stage was trained on
    words = ["train", "prior", "tiny", "--first-stage", first_stage, "--out", tmp_path / "prior", "training.steps=1"]
    words += ["data.name=tokens", f"data.path={file}", "training.batch_size=2"]
    other = tmp_path / "other"
    assert run("train", "vqgan", "edges_vqgan", "--out", other, *SMALL, *ADVERSARIAL, "training.steps=1",
               "training.seed=9", *(f"data.{setting}" for setting in where)) == 0  # fmt: skip
    assert "another first stage" in said(*words, "prior.condition=edges", "--cond-stage", other)
    assert "data: got items without 'coord'" in said(*words, "prior.condition=coord")
    assert not (tmp_path / "prior").exists()
