"""Conditional synthesis from the recipes to the samples, on crops of real photographs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from tamingfast import UserError, cli, load_model, tasks
from tamingfast.checkpoints import run_directory
from tamingfast.data import build, loader, shuffled
from tamingfast.data.conditions import Boxes, Coordinates
from tamingfast.sampling import Canvas
from tamingfast.training import loop, prior

SIZE, HEIGHT, WIDTH, FACTOR, LABELS = 32, 40, 48, 8, 4
ROWS_COLUMNS = (HEIGHT // FACTOR, WIDTH // FACTOR)
SMALL = [
    "model.params.embed_dim=8",
    "model.params.n_embed=32",
    "model.params.ddconfig.ch=32",
    "model.params.ddconfig.ch_mult=[1,1,1,1]",
    "model.params.ddconfig.num_res_blocks=1",
    "model.params.ddconfig.attn_resolutions=[]",
    "model.params.ddconfig.z_channels=8",
    "model.params.ddconfig.resolution=32",
    f"data.size={SIZE}",
    "training.batch_size=4",
    "training.precision=float32",
    "training.learning_rate=1e-3",
    "training.codebook_from_data=true",
    "training.log_every=1",
    "training.validation_batches=1",
    "training.workers=0",
]
ADVERSARIAL = [f"model.params.lossconfig.params.{key}" for key in ("disc_num_layers=1", "disc_ndf=8")]
#: kind -> (recipe of its first stage, None without one; settings; key of the batch)
KINDS = {
    "segmentation": ("segmentation_vqgan", [f"data.labels={LABELS}"], "segmentation"),
    "superpixels": ("segmentation_vqgan", [f"data.labels={LABELS}"], "segmentation"),
    "depth": ("depth_vqgan", ADVERSARIAL, "depth"),
    "keypoints": ("keypoints_vqgan", ADVERSARIAL, "keypoints"),
    "edges": ("edges_vqgan", ADVERSARIAL, "edges"),
    "lowres": ("lowres_vqgan", [*ADVERSARIAL, "model.params.lossconfig.params.perceptual_weight=0"], "lowres"),
    "coord": (None, [], "coord"),
    "boxes": (None, ["data.classes=[cat,dog,tree]", "data.objects=3"], "objects_bbox"),
    "centers": (None, ["data.classes=[cat,dog,tree]", "data.objects=3"], "objects_center_points"),
    "class": (None, [], "class_label"),
}
FROM_FILE = {"segmentation": ".png", "depth": ".png", "keypoints": ".json", "boxes": ".json", "centers": ".json"}
#: Tokens of a condition that are not as many as the image's: three objects and the crop.
TOKENS = {"class": 1, "boxes": 11, "centers": 8}


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """For each kind with files a folder of ten photographs and their conditions; "coord" has the photographs alone.

    "class" has each in a folder of its own.
    """
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for number, pixels in enumerate(tiny.photographs(10, WIDTH)):
        pixels = pixels[:HEIGHT]
        labels = pixels[..., 1] // (256 // LABELS)
        made = {"images": pixels, "segmentation": labels, "depth": pixels[..., 1]}
        made = {name: Image.fromarray(array) for name, array in made.items()}
        (root / f"class/{number}").mkdir(parents=True)
        made["images"].save(root / f"class/{number}/photo.png")
        for kind in ("coord", *FROM_FILE):
            (root / kind / "images").mkdir(parents=True, exist_ok=True)
            made["images"].save(root / kind / f"images/{number}.png")
            if kind in FROM_FILE:
                target = root / kind / f"conditions/{number}{FROM_FILE[kind]}"
                target.parent.mkdir(exist_ok=True)
                if kind == "keypoints":
                    people = [(random.random((18, 2)) * [WIDTH, HEIGHT]).tolist()]
                    target.write_text(json.dumps({"width": WIDTH, "height": HEIGHT, "people": people}))
                elif kind in TOKENS:
                    target.write_text(json.dumps(scene(random)))
                else:
                    made[kind].save(target)
    return root


def scene(random):
    """Two objects somewhere in a photograph."""
    corners = (random.random((2, 2)) * [WIDTH / 2, HEIGHT / 2]).tolist()
    names = random.permutation(["cat", "dog", "tree"])
    objects = [{"class": str(name), "box": [*corner, 20, 16]} for name, corner in zip(names, corners, strict=False)]
    return {"width": WIDTH, "height": HEIGHT, "objects": objects}


def folder_of(data, kind):
    return data / (kind if kind in (*FROM_FILE, "class") else "coord")


def photo_of(data, kind):
    return folder_of(data, kind) / ("3/photo.png" if kind == "class" else "images/3.png")


def condition_of(data, kind):
    """Options that name the condition of `photo_of`, for kinds that need any."""
    if kind in FROM_FILE:
        return ["--condition", folder_of(data, kind) / f"conditions/3{FROM_FILE[kind]}"]
    return ["--class", 3] if kind == "class" else []


@pytest.fixture(scope="module")
def first_stage(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "run"
    where = [f"data.path={data / 'coord/images'}", "model.params.lossconfig.params.perceptual_weight=0"]
    assert run("train", "vqgan", "folder_vqgan", "--out", out, *SMALL, *ADVERSARIAL, *where, "training.steps=10") == 0
    return out


@pytest.fixture(scope="module", params=KINDS)
def trained(request, data, first_stage, tmp_path_factory):
    """(kind, run of its first stage, run of the prior), each trained for a few steps by the commands."""
    kind, out = request.param, tmp_path_factory.mktemp(request.param)
    recipe, settings, key = KINDS[kind]
    words = []
    if recipe is not None:
        where = [f"data.path={folder_of(data, kind)}", f"data.kind={kind}", "training.steps=10"]
        assert run("train", "vqgan", recipe, "--out", out / "cond", *SMALL, *settings, *where) == 0
        words = ["--cond-stage", out / "cond"]
    else:
        words = [f"data.path={folder_of(data, kind)}", f"data.size={SIZE}", *settings]
        words += ["data.name=folder"] if kind == "class" else ["data.name=conditions", f"data.kind={kind}"]
    words += [f"prior.condition={kind if kind in TOKENS else key}"]
    words += ["training.steps=3", "training.batch_size=4", "training.image_every=3"]
    assert run("train", "prior", "tiny", "--first-stage", first_stage, "--out", out / "prior", *words) == 0
    return kind, out / "cond", out / "prior"


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

    def test_samples_have_the_size_of_the_condition(self, trained, data, tmp_path, capsys):
        kind, _, out = trained
        picture = tmp_path / "out.png"
        words = ["sample", out, "-n", 2, "--out", picture, *condition_of(data, kind)]
        if kind in ("coord", "class"):
            words += ["--size", f"{HEIGHT}x{WIDTH}"]
        elif kind not in FROM_FILE:
            words += ["--condition-of", photo_of(data, kind)]
        assert run(*words) == 0
        if kind == "class":
            assert size_of(picture) == (2 * WIDTH + 6, HEIGHT + 4)
            return
        with Image.open(picture) as image:  # the condition and two samples, in two columns
            assert image.size == (2 * WIDTH + 6, 2 * HEIGHT + 6)
            pixels = np.asarray(image)
        shown = pixels[2 : 2 + HEIGHT, 2 : 2 + WIDTH]
        if kind == "coord":
            expected = Coordinates().picture(Coordinates().whole((WIDTH, HEIGHT)))
            assert np.abs(shown - (expected + 1) * 127.5).max() <= 1
        assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 1
        if kind == "coord":
            return
        assert run(*words, "--size", "64x32", "--separate", "--seed", 1) == 0
        for name in ("0000", "0001", "condition"):
            assert size_of(tmp_path / f"out-{name}.png") == (32, 64)

    def test_a_photo_is_edited_under_its_condition(self, trained, data, tmp_path):
        kind, _, out = trained
        photo, picture = photo_of(data, kind), tmp_path / "out.png"
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[16:32, 24:40] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        words = [out, photo, "--mask", tmp_path / "mask.png", "--out", picture, *condition_of(data, kind)]
        assert run("edit", *words, "--canvas", tmp_path / "kept.canvas") == 0
        before, after = pixels_of(photo), pixels_of(picture)
        changed = np.abs(after - before).max(2)
        assert changed[16:32, 24:40].mean() > 5 and changed[:8].max() == changed[:, :16].max() == 0
        assert (tmp_path / "out-condition.png").exists() == (kind != "class")
        canvas = Canvas.load(tmp_path / "kept.canvas")
        own = (TOKENS[kind],) if kind in TOKENS else ()
        assert canvas.cond.shape == (1, *(() if kind == "class" else ROWS_COLUMNS), *own)
        # The canvas keeps its condition, and shows what its tokens mean.
        shown = tmp_path / "out-condition.png"
        given = pixels_of(shown) if shown.exists() else None
        again = [out, tmp_path / "kept.canvas", "--mask", tmp_path / "mask.png", "--out", picture, "--seed", 1]
        assert run("edit", *again, "--canvas", tmp_path / "again.canvas") == 0
        assert torch.equal(Canvas.load(tmp_path / "again.canvas").cond, canvas.cond)
        assert given is None or pixels_of(shown).shape == given.shape
        assert run("edit", *again, "-n", 2) == 0
        assert size_of(picture) == ((WIDTH + 2) * 2 + 2, (HEIGHT + 2) * (1 if kind == "class" else 2) + 2)

    def test_a_photo_is_outpainted_under_a_condition_of_the_new_size(self, trained, data, tmp_path, capsys):
        kind, _, out = trained
        photo, picture = photo_of(data, kind), tmp_path / "out.png"
        wide = tmp_path / f"wide{FROM_FILE.get(kind, '.png')}"
        words = ["outpaint", out, photo, "--left", 8, "--right", 16, "--out", picture]
        if kind in ("coord", "class"):
            words += condition_of(data, kind)
        else:
            assert run(*words) == cli.USAGE_ERROR
            assert f"--condition FILE{'' if kind in FROM_FILE else ', or'}" in capsys.readouterr().err
            named = condition_of(data, kind) or ["--condition-of", photo]
            assert run(*words, *named) == cli.USAGE_ERROR
            assert "is of 40x48 pixels, but the canvas of 40x72: give one of its size" in capsys.readouterr().err
            enlarged(named[1], wide)
            words += [named[0], wide]
        assert run(*words, "--canvas", tmp_path / "kept.canvas") == 0
        assert size_of(picture) == (WIDTH + 24, HEIGHT)
        assert (pixels_of(picture)[:, 8 + 8 : 8 + 40] == pixels_of(photo)[:, 8:40]).all()
        if kind != "class":
            assert size_of(tmp_path / "out-condition.png") == (WIDTH + 24, HEIGHT)
            shape = Canvas.load(tmp_path / "kept.canvas").cond.shape
            assert shape[:3] == (1, HEIGHT // FACTOR, WIDTH // FACTOR + 3)

    def test_images_are_completed_under_their_conditions(self, trained, data, tmp_path, capsys):
        kind, _, out = trained
        photos, named = [photo_of(data, kind)] * 2, condition_of(data, kind)
        if kind in FROM_FILE:
            assert run("complete", out, *photos, *named) == cli.USAGE_ERROR
            assert "got 1 conditions for 2 images" in capsys.readouterr().err
            named = [*named, named[1]]
        words = [out, *photos, "--size", f"{HEIGHT}x{WIDTH}", *named]
        assert run("complete", *words, "--times", 2, "--out", tmp_path / "out.png") == 0
        rows = 3 if kind == "class" else 4  # conditions, photos, completions
        assert size_of(tmp_path / "out.png") == (2 * WIDTH + 6, rows * (HEIGHT + 2) + 2)
        capsys.readouterr()
        assert run("likelihood", *words, "--strides", 2) == 0
        found = {line["name"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
        assert found.keys() == {"paper", "scene", "strided 2", "block 2"}
        assert all(0 < line["nats"] < 10 for line in found.values())

    def test_a_canvas_goes_on_under_the_same_condition_only(self, trained, data, tmp_path, capsys):
        kind, _, out = trained
        picture, kept = tmp_path / "out.png", tmp_path / "kept.canvas"
        words = ["sample", out, "-n", 1, "--out", picture, "--canvas", kept, "--size", f"{HEIGHT}x{WIDTH}"]
        named = condition_of(data, kind) or ([] if kind == "coord" else ["--condition-of", photo_of(data, kind)])
        assert run(*words, *named) == 0
        first = pixels_of(picture)
        canvas = Canvas.load(kept)
        canvas.resample(torch.ones(ROWS_COLUMNS, dtype=torch.bool)).save(kept)
        assert run(*words, *named, "--resume") == 0
        assert (pixels_of(picture) == first).all()
        other = ["--size", "40x40"]
        if kind != "coord":
            other = [named[0], 4 if kind == "class" else named[1].with_stem("4")]
        assert run(*words, *other, "--resume") == cli.USAGE_ERROR
        message = "has 5 x 6 tokens, but 5 x 5 are asked for" if kind == "coord" else "begun under another condition"
        assert message in capsys.readouterr().err


def size_of(path):
    with Image.open(path) as image:
        return image.size


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def enlarged(source, target):
    """A condition's file, or a photo, with 8 more columns at its left and 16 at its right."""
    if target.suffix == ".json":
        content = json.loads(source.read_text())
        content["people"] = [[[x + 8, y] for x, y in person] for person in content.get("people", [])]
        for thing in content.get("objects", []):
            thing["box"][0] += 8
        target.write_text(json.dumps(content | {"width": WIDTH + 24}))
    else:
        pixels = pixels_of(source).astype(np.uint8)
        Image.fromarray(np.pad(pixels, ((0, 0), (8, 16), (0, 0))[: pixels.ndim], mode="edge")).save(target)


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
    batch = next(iter(loader(dataset, 4, order=shuffled(len(dataset), 0))))
    return prior.PriorStage(model.train(), 3e-3, (4, 4)), batch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["prior.condition=edges"],
            "expected a first stage for prior.condition=edges; train one with `tamingfast train vqgan edges_vqgan`",
        ),
        (["prior.condition=edgs"], "did you mean 'edges'"),
        (["prior.condition=coord"], "data: got items without 'coord', expected"),
        (
            ["prior.condition=none", "--cond-stage", "FIRST"],
            "--cond-stage: got one for prior.condition=none",
        ),
        (["prior.condition=edges", "--cond-stage", "FIRST"], "got a first stage of 'image', expected one of 'edges'"),
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

    assert "conditions of 'edges', but no first stage" in said("encode", first_stage, "--out", file, *where)
    objects = SimpleNamespace(kind=Boxes(classes=["a"], tokens=32))
    with pytest.raises(UserError, match="token files hold no objects"):
        tasks.encode(load_model(first_stage), objects, file)
    boxes = ["name=conditions", "kind=boxes", f"path={data / 'boxes'}", "classes=[a]", f"size={SIZE}"]
    assert "token files hold no objects" in said("encode", first_stage, "--out", file, *boxes)
    edges = tmp_path / "edges"
    words = ["train", "vqgan", "edges_vqgan", "--out", edges, *SMALL, *ADVERSARIAL, "training.steps=1"]
    assert run(*words, *(f"data.{setting}" for setting in where)) == 0
    plain = ["name=folder", f"path={data / 'coord'}", f"size={SIZE}"]
    message = "stage of conditions is for 'edges', which the data do not hold"
    assert message in said("encode", first_stage, "--cond-stage", edges, "--out", file, *plain)
    assert run("encode", first_stage, "--cond-stage", edges, "--out", file) == 0  # on what that stage was trained on
    words = ["train", "prior", "tiny", "--first-stage", first_stage, "--out", tmp_path / "prior", "training.steps=1"]
    words += ["data.name=tokens", f"data.path={file}", "training.batch_size=2"]
    other = tmp_path / "other"
    assert run("train", "vqgan", "edges_vqgan", "--out", other, *SMALL, *ADVERSARIAL, "training.steps=1",
               "training.seed=9", *(f"data.{setting}" for setting in where)) == 0  # fmt: skip
    assert "another first stage" in said(*words, "prior.condition=edges", "--cond-stage", other)
    assert "data: got items without 'coord', expected" in said(*words, "prior.condition=coord")
    assert not (tmp_path / "prior").exists()


def test_mistakes_in_sampling(trained, data, tmp_path, capsys):
    kind, _, out = trained
    photo = photo_of(data, kind)

    def said(*words):
        assert run("sample", out, "--out", tmp_path / "out.png", *words) == cli.USAGE_ERROR
        return capsys.readouterr().err

    if kind not in ("coord", "class"):
        assert "--condition FILE" in said()
        assert "leave --class out" in said(*(condition_of(data, kind) or ["--condition-of", photo]), "--class", 1)
        assert "multiples of 8" in said("--condition", photo, "--size", "30x30")
        assert "give one of them" in said("--condition", photo, "--condition-of", photo)
    if kind in (*FROM_FILE, "coord"):
        assert "cannot be computed from a photo" in said("--condition-of", photo)
    if kind == "class":
        assert "conditioned on 'class_label'; give no condition" in said("--condition", photo)
        assert "knows 0 to 9" in said("--class", 10)
    else:
        assert "no" in said("--condition", tmp_path / "missing.png")
