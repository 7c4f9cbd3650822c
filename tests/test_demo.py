"""The model that comes with the package: its files, its name, and the commands that take it."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import golden
import numpy as np
import pytest
import tiny
import torch
import yaml
from commands import run, size_of
from PIL import Image
from safetensors.torch import load_file

from tamingfast import Net2NetTransformer, UserError, figures, load_model, tasks
from tamingfast.checkpoints import locate
from tamingfast.ops import backends
from tamingfast.tasks.options import DrawingOptions
from tamingfast.training import prior

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tamingfast" / "pretrained" / "demo"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def demo() -> Net2NetTransformer:
    return load_model("demo")


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    return tiny.photographs(3, 32)


@pytest.fixture
def place(photographs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with photographs of two classes and a mask."""
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("cat", "cat", "ship")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(photographs[index]).save(tmp_path / "photos" / name / f"{index}.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


# --- files ------------------------------------------------------------------------------------------------------------


def test_weights_are_bfloat16_and_small():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert files.keys() == {"README.md", "config.json", "figures.json", "model.safetensors"}
    assert sum(files.values()) <= runpy.run_path(str(ROOT / "docs" / "make_demo.py"))["LARGEST"] <= 16e6
    kinds = {value.dtype for value in load_file(FOLDER / "model.safetensors").values() if value.is_floating_point()}
    assert kinds == {torch.bfloat16}


def test_the_card_shows_the_recorded_figures():
    found, card = json.loads((FOLDER / "figures.json").read_text()), (FOLDER / "README.md").read_text()
    assert figures.table(found) in card and found["data"] in card
    about = yaml.safe_load(card.split("---\n")[1])
    shown = {metric["name"]: metric["value"] for metric in about["model-index"][0]["results"][0]["metrics"]}
    assert shown["reconstruction: psnr"] == pytest.approx(found["reconstruction"]["psnr"], abs=1e-6)
    assert found["distances"]["samples"]["frechet_distance"] > found["distances"]["reconstructions"]["frechet_distance"]
    assert [line for line in card.splitlines() if line.startswith("## ")] == [
        f"## {heading}" for heading in ("Use", "Figures", "Data", "Recipe", "Limits", "Licence")
    ]
    assert "/" not in "".join(str(json.loads((FOLDER / "config.json").read_text())["data"].values()))


def test_the_model_has_the_recorded_size_and_classes(demo):
    assert demo.config["classes"] == CLASSES == tasks.class_names_of(demo)
    assert {parameter.dtype for parameter in demo.parameters()} == {torch.float32}
    assert tasks.image_size(demo) == (32, 32)
    rows, columns = tasks.grid_size(demo, 32, 32)
    tokens = json.loads((FOLDER / "figures.json").read_text())["likelihood"]["tokens"]
    assert tokens == rows * columns <= demo.transformer.config.block_size


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not backends.native()[0], reason="the extension is not built")
def test_both_engines_draw_the_same_images_again(demo):
    drawn = [tasks.sample(demo, 20, options=DrawingOptions(engine=engine)) for engine in ("native", "torch", "native")]
    first = drawn[0]
    assert first.images.shape == (20, 3, 32, 32)
    assert first.canvas.cond.flatten().tolist() == [index % 10 for index in range(20)]
    assert len({image.numpy().tobytes() for image in first.images}) == 20
    for other in drawn[1:]:
        assert torch.equal(other.canvas.tokens, first.canvas.tokens)


def test_the_prior_knows_more_than_its_codes_and_its_classes(demo):
    """Tokens of its own samples are likelier than chance, and likelier under their own class than under others."""
    tokens = tasks.sample(demo, 10, options=DrawingOptions(temperature=0.8)).canvas.tokens.flatten(1)
    with torch.no_grad():
        losses = [nats(demo, tokens, torch.arange(10).roll(shift)) for shift in (0, 1, 3)]
    assert losses[0] < 0.9 * math.log(demo.transformer.config.vocab_size)
    assert losses[0] < min(losses[1:])


def nats(demo: Net2NetTransformer, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """Cross entropy of sequences (B, T) under the classes ``labels`` (B,), nats per token."""
    logits = demo.transformer(torch.cat((labels[:, None], tokens[:, :-1]), 1))[0]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))


def test_reconstructions_resemble_photographs(demo, photographs):
    assert tasks.reconstruct(demo, photographs).psnr > 20


# --- its name ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["sample", "demo", "-n", "2", "--class", "cat,3", "--out", "o.png"], "o.png"),
        (["reconstruct", "demo", "photos/cat/0.png", "--out", "o.png"], "o.png"),
        (["complete", "demo", "photos/cat/0.png", "--class", "cat", "--out", "o.png"], "o.png"),
        (["edit", "demo", "photos/cat/0.png", "--mask", "mask.png", "--class", "ship", "--out", "o.png"], "o.png"),
        (["outpaint", "demo", "photos/ship/2.png", "--right", "8", "--class", "8", "--out", "o.png"], "o.png"),
        (["encode", "demo", "--out", "o.safetensors", "name=folder", "path=photos"], "o.safetensors"),
        (["evaluate", "demo", "--data", "photos", "--limit", "2", "--samples", "2", "--out", "o.json"], "o.json"),
        (["convert", "demo", "o.safetensors", "--dtype", "bfloat16"], "o.safetensors"),
        (["likelihood", "demo", "photos/cat/0.png", "--class", "cat"], None),
        (["inspect", "demo", "--json"], None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_take_it(words, written, place, capsys):
    assert run(*words) == 0
    said = capsys.readouterr().out
    if words[0] == "inspect":
        assert json.loads(said)["classes"] == CLASSES
    if words[0] == "outpaint":
        assert size_of(place / "o.png") == (40, 32)
    if words[0] == "convert":
        assert load_model("o.safetensors").config["classes"] == CLASSES
    assert written is None or (place / written).stat().st_size


def test_what_is_here_comes_first(place, demo):
    Path("demo").mkdir()
    with pytest.raises(UserError, match=r"^demo: got a directory without weights.safetensors"):
        load_model("demo")
    Path("demo").rmdir()
    Path("demo").symlink_to(golden.checkpoint("vqmodel_f2"))
    assert type(load_model("demo")).__name__ == "VQModel"
    Path("demo").unlink()
    Path("demo").symlink_to("nothing")
    with pytest.raises(UserError, match="demo: got a link to"):
        load_model("demo")
    Path("demo").unlink()
    for name in ("demo", Path("demo")):
        assert locate.located(name) == FOLDER
    for name in ("./demo/model", "demo/model.safetensors", "demos", "Demo", "", "."):
        assert not locate.names_packaged(name)
    found = Net2NetTransformer.from_pretrained("demo")
    assert all(map(torch.equal, found.parameters(), demo.parameters()))


# --- how it is made ---------------------------------------------------------------------------------------------------


def test_the_script_makes_a_model_with_its_card(place):
    runs = tiny.runs(place / "runs")
    settings = tiny.config(tiny.PRIOR, steps=2)
    prior.train(settings, runs / "vqgan", runs / "classes", False, "cpu", tiny.datasets())
    for name in tiny.Noise.classes:
        (place / "images" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(place / "images" / name / "1.png")
    out = place / "made"
    out.mkdir()
    (out / "old").touch()
    script = runpy.run_path(str(ROOT / "docs" / "make_demo.py"))
    assert script["make"](runs / "classes", runs / "vqgan", place / "images", 2, out) == out
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "figures.json",
        "model.safetensors",
    ]
    found, card = json.loads((out / "figures.json").read_text()), (out / "README.md").read_text()
    assert found["reconstruction"]["images"] == found["likelihood"]["images"] == 2 and figures.table(found) in card
    assert "2 test images of CIFAR10" in card and 'load_model("demo")' in card
    assert "First stage: 4 steps in" in card and "Prior: 2 steps in" in card
    assert str(place) not in card + (out / "config.json").read_text() + json.dumps(found)
    exact, rounded = load_model(runs / "classes").state_dict(), load_model(out).state_dict()
    assert all(torch.equal(value.bfloat16().to(value.dtype), rounded[key]) for key, value in exact.items())


def test_the_script_of_the_pictures_draws_what_they_say(demo, place):
    script = runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))
    chosen = script["photos"](place / "photos", 0)
    assert {name: path.name for name, path in chosen.items()} == {"cat": "0.png", "ship": "2.png"}
    drawn = script["samples"](demo, 2)
    assert list(drawn) == CLASSES and {len(row) for row in drawn.values()} == {2}
    options = tasks.drawing_options(demo, batch=script["BATCH"])
    assert torch.equal(drawn["ship"][1], tasks.sample(demo, 20, options=options).images[18])
    rows = script["completions"](demo, chosen)
    photo, kept, *completed = (torch.stack(row) for row in rows.values())
    assert list(rows) == ["photo", "kept", "completed 1", "completed 2", "completed 3"]
    assert torch.equal(kept[:, :, :16], photo[:, :, :16]) and bool((kept[:, :, 16:] == 1).all())
    # Beside what is drawn, own pixels are blended with it.
    assert all(torch.equal(each[:, :, :8], photo[:, :, :8]) for each in completed)
    strips = script["strips"](demo, chosen)
    for name, number in (("cat", 0), ("ship", 1)):
        assert strips[name][0].shape == (3, 32, 32 + script["ADDED"])
        assert torch.equal(strips[name][0][:, :, :24], photo[number][:, :, :24])
    shown = script["reconstructions"]([demo], chosen)
    assert torch.equal(torch.stack(shown["photo"]), photo)
    assert torch.equal(torch.stack(shown[f"f = {tasks.first_stage_of(demo).factor}"]), tasks.reconstructed(demo, photo))


def test_the_card_and_the_defaults_draw_what_is_recommended(demo, place):
    code = (FOLDER / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "card", "exec"), {})
    options = tasks.recipe_of("samples.png").options
    assert options == tasks.drawing_options(demo) == DrawingOptions(cfg=3.0, top_k=None)
    measured = json.loads((FOLDER / "figures.json").read_text())["sampling"]
    assert measured == options.deciding() | {"engine": "auto"}
