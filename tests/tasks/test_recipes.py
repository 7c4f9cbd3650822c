"""Recipes in pictures: what they say, that they repeat a picture to the last byte, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import golden
import numpy as np
import pytest
import tiny
import torch
from commands import pixels_of, run
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from refusals import refused

from tamingfast import UserError, __version__, cli, load_model, tasks
from tamingfast.checkpoints.fingerprint import fingerprint, identity
from tamingfast.data.tokens import write_tokens
from tamingfast.sampling import Canvas
from tamingfast.training import prior

OPTIONS = ["--seed", 2**64 - 1, "--top-k", 5, "--temperature", 1.25, "--batch", 2]


@pytest.fixture(scope="module")
def classes(runs, tmp_path_factory) -> Path:
    """The run of a prior of three classes."""
    folder = tmp_path_factory.mktemp("classes")
    tokens = np.arange(8).repeat(16).reshape(8, 4, 4)
    write_tokens(folder / "t.safetensors", tokens, 16, class_label=[index % 3 for index in range(8)])
    data = {"name": "tokens", "path": str(folder / "t.safetensors")}
    settings = tiny.config(tiny.PRIOR, steps=1) | {"data": data}
    return prior.train(settings, runs / "vqgan", folder / "classes", device="cpu")


@pytest.fixture(scope="module")
def scales(runs, tmp_path_factory) -> Path:
    """The run of a multiscale prior."""
    settings = tiny.config(tiny.PRIOR, {"pkeep": 1.0}, steps=1) | {"data": tiny.CROPS}
    settings |= {"prior": {"condition": "none", "scales": "all"}}
    return prior.train(settings, runs / "vqgan", tmp_path_factory.mktemp("scales") / "scales", device="cpu")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, pixels in enumerate(tiny.photographs(3, 16)):
        Image.fromarray(pixels).save(f"photo{number}.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:12] = 255
    Image.fromarray(mask).save("mask.png")


def facts(path: str) -> dict:
    return tasks.inspect(path)["recipe"]


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "words", [["--size", "8x16"], ["--greedy", "--size", 8], ["--schedule", "block", "--size", 16]]
)
def test_a_sheet_is_repeated_to_the_last_byte(runs, words):
    assert run("sample", runs / "prior", "-n", 5, *OPTIONS, *words, "--stride", 2, "--out", "a.png") == 0
    assert run("sample", runs / "prior", "--like", "a.png", "--out", "b.png") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_each_of_the_numbered_files_is_repeated(classes, caplog):
    assert run("sample", classes, "-n", 5, *OPTIONS, "--class", "2,0", "--out", "a.png", "--separate") == 0
    for number in range(5):
        name = f"a-{number:04d}.png"
        assert facts(name)["image"] == number and facts(name)["classes"] == [2, 0]
        assert run("sample", classes, "--like", name, "--out", "b.png") == 0
        assert (pixels_of("b.png") == pixels_of(name)).all()
        assert run("sample", classes, "--like", "b.png", "--out", "c.png") == 0  # a repeated one once more
        assert (pixels_of("c.png") == pixels_of(name)).all()
    assert not caplog.text


def test_a_drawing_from_python(classes):
    drawing = tasks.sample(classes, 4, options=tasks.DrawingOptions(seed=3), size=(8, 8))
    assert drawing.save("a.png") == [Path("a.png")]
    again = tasks.sample(load_model(classes), like="a.png")
    assert torch.equal(again.images, drawing.images) and torch.equal(again.canvas.tokens, drawing.canvas.tokens)
    assert again.recipe.model is None and again.recipe.weights == drawing.recipe.weights
    assert tasks.recipe_of("a.png") == drawing.recipe
    silent = tasks.sample(classes, 4, options=tasks.DrawingOptions(seed=3), size=(8, 8), metadata=False)
    assert silent.recipe is None and torch.equal(silent.images, drawing.images)


def test_what_a_recipe_says(classes):
    assert run("sample", classes, "-n", 4, *OPTIONS, "--cfg", 1, "--lookahead", 2, "--out", "a.png") == 0
    model = load_model(classes)
    assert facts("a.png") == {
        "format": "tamingfast recipe 1", "version": __version__, "task": "sample", "model": "classes",
        "weights": {"prior": identity(model), "first_stage": fingerprint(model.first_stage_model)},
        "first": 0, "count": 4, "image": None, "size": [8, 8], "classes": [0, 1, 2], "inputs": {}, "arguments": {},
        "options": {
            "temperature": 1.25, "top_k": 5, "top_p": None, "greedy": False, "seed": 2**64 - 1, "batch": 2,
            "schedule": "paper", "stride": 8, "engine": "auto", "dtype": None, "cfg": 1.0,
        },
    }  # fmt: skip


def test_pictures_that_begin_with_others(runs):
    model = runs / "prior"
    edited = ["edit", model, "photo0.png", "--mask", "mask.png", "-n", 2, "--out", "e.png", "--reconstruct"]
    assert run(*edited) == run("outpaint", model, "photo0.png", "--right", 4, "--out", "o.png") == 0
    assert run("complete", model, "photo0.png", "photo1.png", "--times", 2, "--seed", 4, "--out", "c.png") == 0
    photo = {"name": "photo0.png", "sha256": sha256("photo0.png")}
    assert facts("e.png")["inputs"] == {"photo": photo, "mask": {"name": "mask.png", "sha256": sha256("mask.png")}}
    assert facts("e.png")["arguments"] == {"own_pixels": False} and facts("e.png")["count"] == 2
    assert facts("o.png")["inputs"] == {"photo": photo} and facts("o.png")["size"] == [16, 20]
    assert facts("o.png")["arguments"] == {"own_pixels": True, "left": 0, "right": 4, "top": 0, "bottom": 0}
    assert facts("c.png")["inputs"]["images"]["name"] == "2 pictures" and facts("c.png")["options"]["seed"] == 4
    assert facts("c.png")["count"] == 4 and facts("c.png")["arguments"] == {"own_pixels": True, "times": 2}
    for name in ("e.png", "o.png", "c.png"):
        assert str(Path.cwd()).encode() not in (content := Path(name).read_bytes())
        assert str(model.parent).encode() not in content
        assert facts(name)["task"] in refused("sample", model, "--like", name, names=name)


def test_no_metadata(runs):
    model = runs / "prior"
    commands = {
        "sample": ["-n", 3], "edit": ["photo0.png", "--mask", "mask.png"], "outpaint": ["photo0.png", "--top", 2],
        "complete": ["photo0.png", "photo1.png"],
    }  # fmt: skip
    for command, words in commands.items():
        assert run(command, model, *words, "--out", "a.png") == 0
        assert run(command, model, *words, "--out", "b.png", "--no-metadata") == 0
        assert b"tEXt" not in Path("b.png").read_bytes() and facts("a.png")["task"] == command
        assert (pixels_of("a.png") == pixels_of("b.png")).all()
        assert "without a recipe" in refused("inspect", "b.png", names="b.png")


def test_options_beside_a_recipe_replace_its_own_and_are_said(classes, caplog):
    assert run("sample", classes, "-n", 3, *OPTIONS, "--out", "a.png") == 0
    words = ["--seed", 7, "--class", 1, "-n", 2, "--size", "8x12", "--top-k", 5]
    assert run("sample", classes, "--like", "a.png", *words, "--out", "b.png") == 0
    for said in ("seed 18446744073709551615, now with 7", "classes [0, 1, 2], now with [1]", "count 3, now with 2"):
        assert f"a.png: drawn with {said}" in caplog.text
    assert "size (8, 8), now with (8, 12)" in caplog.text and "top_k" not in caplog.text
    recipe = facts("b.png")
    assert (recipe["count"], recipe["size"], recipe["classes"]) == (2, [8, 12], [1])
    assert recipe["options"] == facts("a.png")["options"] | {"seed": 7}
    caplog.clear()
    assert run("sample", classes, "--like", "b.png", "--class", 1, "--seed", 7, "--out", "c.png") == 0
    assert not caplog.text and Path("c.png").read_bytes() == Path("b.png").read_bytes()


def test_the_model_is_found_by_its_name_or_named_anew(runs, classes):
    assert run("sample", runs / "prior", "-n", 1, "--out", "a.png") == 0
    assert "'prior'" in refused("sample", "--like", "a.png", "--out", "b.png", names="model: got none")
    assert "name that model" in refused("sample", classes, "--like", "a.png", "--out", "b.png", names="model: got")
    shutil.copytree(runs / "prior", "runs/prior")
    assert run("sample", "--like", "a.png", "--out", "b.png") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    shutil.rmtree("runs/prior")
    shutil.copytree(classes, "prior")
    refused("sample", "--like", "a.png", "--out", "b.png", names="name that model")
    assert "expected the run" in refused("sample", "--out", "b.png", names="model: got none")


def test_another_first_stage_is_another_model(runs):
    model = load_model(runs / "prior")
    tasks.sample(model, 1).save("a.png")
    first = tasks.recipe_of("a.png").weights["first_stage"]
    assert tasks.sample(model, 1).recipe.weights["first_stage"] == first
    model.first_stage_model.decoder.conv_out.bias.data += 0.1  # which torch does not count as a change
    assert tasks.sample(model, 1).recipe.weights["first_stage"] == fingerprint(model.first_stage_model) != first
    with pytest.raises(UserError, match="model: got one of first_stage .* name that model"):
        tasks.sample(model, like="a.png")


def test_a_photo_s_scales_are_given_again(scales, caplog):
    words = ["-n", 2, "--seed", 5, "--from", "photo0.png", "--scales", 2]
    assert run("sample", scales, *words, "--out", "a.png") == 0
    assert facts("a.png")["arguments"] == {"scales": 2}
    again = ["sample", scales, "--like", "a.png", "--out", "b.png"]
    assert "photo0.png" in refused(*again, names="--from: got none")
    assert run(*again, "--from", "photo0.png") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() and not caplog.text
    assert run(*again, "--from", "photo1.png") == 0
    assert "another photo" in caplog.text and Path("a.png").read_bytes() != Path("b.png").read_bytes()


def test_a_condition_is_given_again():
    model = golden.checkpoint("net2net_seg")
    labels = np.random.default_rng(0).integers(0, 3, (16, 16), dtype=np.uint8)
    Image.fromarray(labels).save("labels.png")
    assert run("sample", model, "--condition", "labels.png", "-n", 2, "--out", "a.png", "--separate") == 0
    recipe = facts("a-0001.png")
    assert recipe["inputs"] == {"condition": {"name": "labels.png", "sha256": sha256("labels.png")}}
    assert set(recipe["weights"]) == {"prior", "first_stage", "cond_stage"}
    again = ["sample", model, "--like", "a-0001.png", "--out", "b.png"]
    assert "labels.png" in refused(*again, names="--condition: got none")
    assert run(*again, "--condition", "labels.png") == 0
    assert Path("a-0001.png").read_bytes() == Path("b.png").read_bytes()


class Interrupted(Exception):
    """Stands for whatever ends a drawing before its last token."""


def interrupted(model: Path, **arguments) -> None:
    def stop(now: object) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Canvas, "sample", lambda self, model, path, **_: (self.save(path), stop(self)))
        with pytest.raises(Interrupted):
            tasks.sample(model, canvas="c.canvas", **arguments)


def test_a_resumed_canvas_has_the_recipe_that_it_was_begun_with(classes):
    options = tasks.DrawingOptions(seed=8, top_k=3, schedule="block", stride=2)
    whole = tasks.sample(classes, 3, size=(8, 16), label=[1, 2], options=options)
    interrupted(classes, count=3, size=(8, 16), label=[1, 2], options=options)
    resumed = tasks.sample(classes, canvas="c.canvas", resume=True)
    assert resumed.recipe == whole.recipe and torch.equal(resumed.images, whole.images)
    with pytest.raises(UserError, match="like: got .*expected one of them"):
        tasks.sample(classes, canvas="c.canvas", resume=True, like=whole.recipe)


def test_a_resumed_canvas_does_not_tell_the_photo_that_it_began_with(scales):
    interrupted(scales, count=2, photo="photo0.png", scales=2)
    shutil.copy("c.canvas", "d.canvas")
    assert tasks.sample(scales, canvas="c.canvas", resume=True).recipe is None
    told = tasks.sample(scales, canvas="d.canvas", resume=True, photo="photo0.png", scales=2).recipe
    assert told == tasks.sample(scales, 2, photo="photo0.png", scales=2).recipe


def picture(text: str | None, kind: str = "text") -> str:
    """A PNG file with this recipe."""
    info = PngInfo()
    if text is not None:
        info.add_text("tamingfast", text, zip=kind == "zip")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save("x.png", pnginfo=info)
    return "x.png"


@pytest.fixture(scope="module")
def valid(runs) -> dict:
    return tasks.sample(runs / "prior", 1, size=(8, 8)).recipe.facts()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "tamingfast recipe 2"}, {"format": None}, {"task": "train"}, {"task": []}, {"version": 1},
        {"model": 5}, {"model": "n" * 300}, {"weights": {}}, {"weights": {"prior": 1, "first_stage": "a"}},
        {"weights": None}, {"first": -1}, {"first": True}, {"count": 0}, {"count": 2**31}, {"count": 1.0},
        {"image": 1}, {"image": "0"}, {"size": [8]}, {"size": [0, 8]}, {"size": "8x8"}, {"size": [8, 2**40]},
        {"classes": []}, {"classes": [-1]}, {"classes": ["cat"]}, {"options": []}, {"options": {"lookahead": 4}},
        {"options": {"temperature": 0}}, {"options": {"temperature": "hot"}}, {"options": {"seed": 2**64}},
        {"options": {"engine": {"a": 1}}}, {"options": {"batch": 0}}, {"options": {"schedule": "__import__"}},
        {"options": {"top_k": 1.5}}, {"inputs": {"photo": "photo.png"}}, {"inputs": {"photo": {"name": "a"}}},
        {"arguments": {"scales": "two"}}, {"arguments": {"scales": [1]}},
    ],
)  # fmt: skip
def test_a_damaged_entry_is_one_sentence(valid, change):
    path = picture(json.dumps(valid | change))
    said = refused("sample", "--like", path, "--out", "y.png", names=path)
    assert "damaged recipe" in said and said == refused("inspect", path)
    assert not Path("y.png").exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "1" * 5000, "[" * 100_000, '{"format": "tamingfast recipe 1"}', "\x00", "NaN",
        '{"format": "tamingfast recipe 1", "count": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["text", "zip"])
def test_a_text_that_is_no_recipe_is_one_sentence(text, kind):
    path = picture(text, kind)
    refused("inspect", path, names=path)
    with pytest.raises(UserError, match=r"x\.png: got .*expected"):
        tasks.recipe_of(path)


def test_long_texts_are_not_unpacked(valid):
    for kind in ("text", "zip"):
        path = picture(json.dumps(valid) + " " * (1 << 26), kind)
        assert "without a recipe" in refused("inspect", path, names=path)


def test_every_cut_of_the_file_is_one_sentence_or_works(valid):
    content = Path(picture(json.dumps(valid))).read_bytes()
    worked = 0
    for length in range(0, len(content), 7):
        Path("x.png").write_bytes(content[:length])
        if cli.main(["inspect", "x.png"]):
            refused("inspect", "x.png", names="x.png: got")
        else:
            worked += 1
    assert worked <= 5  # cuts through the pixels, which are not read


def test_pictures_of_others(runs):
    with pytest.raises(UserError, match="like: got 3, expected a path"):
        tasks.sample(runs / "prior", like=3)
    Image.new("RGB", (4, 4)).save("x.jpg")
    for path, said in (
        (picture(None), "without a recipe"),
        ("x.jpg", "no"),
        ("none.png", "no such file"),
        (".", "dir"),
    ):
        assert said in refused("sample", runs / "prior", "--like", path, names=path)


def test_a_recipe_of_another_version_says_so(valid, runs, caplog):
    path = picture(json.dumps(valid | {"version": "0.0.1"}))
    assert run("sample", runs / "prior", "--like", path, "--out", "y.png") == 0
    assert f"drawn by tamingfast 0.0.1, and this is {__version__}" in caplog.text


@pytest.mark.parametrize("name", ["../prior", "..", ".", "", "/etc", "a/b", "owner/name", "a\\b", None])
def test_a_recorded_name_is_no_path(valid, name):
    Path("a").mkdir()
    Path("a/b").mkdir()
    with pytest.raises(UserError, match="model: got none"):
        tasks.model_named(picture(json.dumps(valid | {"model": name})))
