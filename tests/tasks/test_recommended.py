"""What a model's config recommends for drawing: taken where nothing else is given, by tasks, commands and training."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
import yaml
from commands import run
from PIL import Image

from tamingfast import UserError, cli, evaluation, load_model, tasks
from tamingfast.tasks import DrawingOptions, drawing_options
from tamingfast.training import prior, vqgan

SECTION = {"cfg": 3.0, "top_k": 1, "temperature": 0.9}
OPTIONS = DrawingOptions(cfg=3.0, top_k=1, temperature=0.9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of a prior with a null class, trained from a config with the section."""
    folder = tmp_path_factory.mktemp("recommended")
    first_stage = tiny.train("vqgan", folder / "vqgan", steps=2)
    config = tiny.config(tiny.PRIOR, steps=4) | {"prior": {"condition": "class", "class_dropout": 0.5}}
    config["training"] |= {"image_every": 4}
    return prior.train(
        config | {"sampling": SECTION}, first_stage, folder / "prior", device="cpu", datasets=tiny.datasets()
    )


@pytest.fixture
def photo(tmp_path):
    side = 16
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def with_section(trained, folder, section):
    """A copy of the run with another section, or with none."""
    shutil.copytree(trained, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"sampling": section}
    (folder / "config.yaml").write_text(yaml.safe_dump({key: value for key, value in config.items() if value}))
    return folder


def test_tasks_take_what_is_recommended(trained, photo):
    model = load_model(trained, device="cpu")
    assert model.config["sampling"] == SECTION and drawing_options(trained) == drawing_options(model) == OPTIONS
    mask = np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    for task in (
        lambda **how: tasks.sample(model, 4, **how).canvas.tokens,
        lambda **how: tasks.edit(model, photo, mask, 4, label=1, **how).canvas.tokens,
        lambda **how: tasks.outpaint(model, photo, right=8, count=4, label=1, **how).canvas.tokens,
        lambda **how: torch.stack(tasks.complete(model, [photo], 4, label=1, **how).completed),
    ):
        assert torch.equal(task(), task(options=OPTIONS))
        assert not torch.equal(task(), task(options=DrawingOptions()))


def test_evaluation_draws_as_recommended(trained):
    found = evaluation.evaluate_model(trained, tiny.datasets()[1], limit=4, samples=2)
    assert found["sampling"] == OPTIONS.deciding() | {"engine": "auto"}


def test_options_that_are_given_come_first(trained, tmp_path):
    assert drawing_options(trained, top_k=5, seed=2) == DrawingOptions(cfg=3.0, top_k=5, temperature=0.9, seed=2)
    for words, wanted in (
        ([], OPTIONS),
        (["--top-k", 5], DrawingOptions(cfg=3.0, top_k=5, temperature=0.9)),
        (["--cfg", 1, "--top-k", 0, "--temperature", 1], DrawingOptions(cfg=1.0, top_k=None)),
    ):
        assert run("sample", trained, "-n", 2, "--out", tmp_path / "out.png", *words) == 0
        assert tasks.recipe_of(tmp_path / "out.png").options == wanted
    with pytest.raises(UserError, match="top_k: got 0"):
        drawing_options("nowhere", top_k=0)


def test_a_repeated_picture_and_a_resumed_canvas_keep_their_own(trained, tmp_path):
    out, canvas = tmp_path / "plain.png", tmp_path / "plain.canvas"
    plain = DrawingOptions(seed=1, top_k=5)
    first = tasks.sample(trained, 2, options=plain, canvas=canvas)
    first.save(out)
    assert torch.equal(tasks.sample(trained, like=out).canvas.tokens, first.canvas.tokens)
    assert torch.equal(tasks.sample(trained, canvas=canvas, resume=True).canvas.tokens, first.canvas.tokens)
    assert run("sample", trained, "--like", out, "--out", tmp_path / "again.png") == 0
    assert tasks.recipe_of(tmp_path / "again.png").options == plain


def test_without_the_section_the_paper_is_followed(trained, tmp_path):
    model = load_model(with_section(trained, tmp_path / "plain", None), device="cpu")
    assert drawing_options(model) == DrawingOptions() and drawing_options(model.first_stage_model) == DrawingOptions()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"topk": 3}, "sampling.'?topk'?: got a setting that no model recommends, expected some of temperature, top_k"),
        ({"seed": 3}, "got a setting that no model recommends"),
        ({"engine": "naive"}, "got a setting that no model recommends"),
        ({"top_k": 0}, "sampling.top_k: got 0"),
        ({"top_k": "many"}, "sampling.top_k: got 'many'"),
        ({"temperature": float("nan")}, "sampling.temperature: got nan"),
        ({"temperature": {"a": 1}}, "sampling.temperature: got"),
        ({"cfg": -1}, "sampling.cfg: got -1"),
        ({"cfg": "4:up"}, "sampling.cfg: got '4:up'"),
        ({"schedule": "zigzag"}, "sampling.schedule: got"),
        ({"greedy": True}, "got a setting that no model recommends"),
        ({"stride": 0.5}, "sampling.stride: got 0.5"),
        ({3: 4}, "got a setting that no model recommends"),
        ([1, 2], r"sampling: got \[1, 2\], expected settings such as"),
        ("all", "sampling: got 'all'"),
    ],
)
def test_a_damaged_section_is_one_sentence_and_loses_nothing(trained, tmp_path, capsys, section, message):
    folder = with_section(trained, tmp_path / "damaged", section)
    with pytest.raises(UserError, match=message):
        drawing_options(folder)
    assert run("sample", folder, "-n", 1, "--out", tmp_path / "out.png") == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--top-k" not in said.split(",")[0] and not (tmp_path / "out.png").exists()
    tasks.sample(folder, 1, options=DrawingOptions())  # nobody asks what it recommends
    assert str(load_model(folder, device="cpu").config["sampling"]) == str(section)  # nan is not itself


def test_guidance_is_not_recommended_to_priors_that_have_none(trained, tmp_path):
    config = tiny.config(tiny.PRIOR, steps=1) | {"prior": {"condition": "class"}}
    first_stage = tiny.train("vqgan", tmp_path / "vqgan", steps=1)
    out = prior.train(config, first_stage, tmp_path / "prior", device="cpu", datasets=tiny.datasets())
    with pytest.raises(UserError, match="cfg: got 3.0, expected None or 1, as this prior has no null class"):
        tasks.sample(with_section(out, tmp_path / "guided", {"cfg": 3.0}), 1)


def test_training_shows_such_samples_and_checks_the_section(trained, tmp_path):
    kept = yaml.safe_load((trained / "config.yaml").read_text())
    assert kept["sampling"] == SECTION
    config = tiny.config(tiny.PRIOR, steps=1) | {"prior": {"condition": "class", "class_dropout": 0.5}}
    with pytest.raises(UserError, match="sampling.top_k: got 0"):
        prior.train(config | {"sampling": {"top_k": 0}}, "nowhere", tmp_path / "a", device="cpu")
    stage = tiny.config(tiny.VQGAN, steps=1) | {"sampling": SECTION}
    with pytest.raises(UserError, match="sampling: got settings for a first stage"):
        vqgan.train(stage, tmp_path / "b", device="cpu", datasets=tiny.datasets())


def test_a_key_that_nothing_reads_is_told_with_the_nearest(tmp_path, capsys):
    config = tmp_path / "prior.yaml"
    config.write_text(json.dumps({"sampling": {"topk": 3}}))
    assert run("train", "prior", config, "--first-stage", "nowhere", "--out", tmp_path / "out") == cli.USAGE_ERROR
    assert "did you mean 'sampling.top_k'" in capsys.readouterr().err


def test_fine_tuning_and_publishing_keep_it(trained, tmp_path):
    config = {"training": tiny.config(tiny.PRIOR, steps=1)["training"]}
    out = prior.train(config, None, tmp_path / "tuned", device="cpu", datasets=tiny.datasets(), start=trained)
    assert load_model(out, device="cpu").config["sampling"] == SECTION
    from tamingfast.checkpoints.pretrained import save_pretrained

    folder = save_pretrained(load_model(trained, device="cpu"), tmp_path / "published")
    assert drawing_options(folder) == OPTIONS
