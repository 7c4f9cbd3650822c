"""Conditional synthesis from the recipes to the samples, on crops of real photographs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tamingfast import cli, load_model
from tamingfast.data import build, loader
from tamingfast.data.kinds import Coordinates
from tamingfast.training import checkpoint, loop, prior

SIZE, HEIGHT, WIDTH, FACTOR, LABELS = 32, 40, 48, 8, 4
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
}
FROM_FILE = {"segmentation": ".png", "depth": ".png", "keypoints": ".json"}


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
    """For each kind with files a folder of ten photographs and their conditions; "coord" has the photographs alone."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for number, pixels in enumerate(tiny.photographs(10, WIDTH)):
        pixels = pixels[:HEIGHT]
        labels = pixels[..., 1] // (256 // LABELS)
        made = {"images": pixels, "segmentation": labels, "depth": pixels[..., 1]}
        made = {name: Image.fromarray(array) for name, array in made.items()}
        for kind in ("coord", *FROM_FILE):
            (root / kind / "images").mkdir(parents=True, exist_ok=True)
            made["images"].save(root / kind / f"images/{number}.png")
            if kind in FROM_FILE:
                target = root / kind / f"conditions/{number}{FROM_FILE[kind]}"
                target.parent.mkdir(exist_ok=True)
                if kind == "keypoints":
                    people = [(random.random((18, 2)) * [WIDTH, HEIGHT]).tolist()]
                    target.write_text(json.dumps({"width": WIDTH, "height": HEIGHT, "people": people}))
                else:
                    made[kind].save(target)
    return root


def folder_of(data, kind):
    return data / (kind if kind in FROM_FILE else "coord")


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
        words = ["data.name=conditions", f"data.kind={kind}", f"data.path={folder_of(data, kind)}", f"data.size={SIZE}"]
    words += [f"prior.condition={key}", "training.steps=3", "training.batch_size=4", "training.image_every=3"]
    assert run("train", "prior", "tiny", "--first-stage", first_stage, "--out", out / "prior", *words) == 0
    return kind, out / "cond", out / "prior"


class TestEveryCondition:
    def test_runs_hold_both_first_stages(self, trained, first_stage):
        kind, cond, out = trained
        model = load_model(out)
        assert model.cond_stage_key == KINDS[kind][2]
        tokens = (SIZE // FACTOR) ** 2
        assert model.transformer.config.block_size == 2 * tokens and model.transformer.config.vocab_size == 32
        parts = {"first_stage_model": first_stage} | ({} if kind == "coord" else {"cond_stage_model": cond})
        for part, source in parts.items():
            for name, value in load_model(source).state_dict().items():
                if not name.startswith("loss."):
                    assert torch.equal(model.state_dict()[f"{part}.{name}"], value)
        if kind != "coord":
            losses = [line["rec_loss" if "rec_loss" in line else "bce_loss"] for line in metrics(cond)]
            assert losses[-1] < losses[0]
        with Image.open(out / "images/00000003.png") as sheet:
            rows = sheet.height // SIZE
        assert rows == 3  # conditions, images, samples

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

    def test_samples_have_the_size_of_the_condition(self, trained, data, tmp_path, capsys):
        kind, _, out = trained
        picture = tmp_path / "out.png"
        words = ["sample", out, "-n", 2, "--out", picture]
        if kind in FROM_FILE:
            words += ["--condition", folder_of(data, kind) / f"conditions/3{FROM_FILE[kind]}"]
        elif kind == "coord":
            words += ["--size", f"{HEIGHT}x{WIDTH}"]
        else:
            words += ["--condition-of", folder_of(data, kind) / "images/3.png"]
        assert run(*words) == 0
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
            with Image.open(tmp_path / f"out-{name}.png") as image:
                assert image.size == (32, 64)


@torch.no_grad()
def both_nlls(stage, batch):
    """Nats per token under the true conditions, and under those of the next image."""
    key = stage.model.cond_stage_key
    return float(stage.nll(batch)), float(stage.nll(batch | {key: batch[key].roll(1, 0)}))


def metrics(out):
    return checkpoint.read_metrics(out, "train")


def stage_and_batch(out):
    model = load_model(out)
    dataset = build(model.config["data"])[0]
    return prior.PriorStage(model.train(), 3e-3, (4, 4)), next(iter(loader(dataset, 4, seed=0, epoch=0)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prior.condition=edges"], "needs a first stage for it; train one with `tamingfast train vqgan edges_vqgan`"),
        (["prior.condition=edgs"], "did you mean 'edges'"),
        (["prior.condition=coord"], "conditioned on 'coord', which the data do not hold"),
        (["prior.condition=none", "--cond-stage", "FIRST"], "prior.condition is 'none', which has none"),
        (["prior.condition=edges", "--cond-stage", "FIRST"], "was trained on 'image', but prior.condition is 'edges'"),
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


def test_mistakes_in_sampling(trained, data, tmp_path, capsys):
    kind, _, out = trained
    photo = folder_of(data, kind) / "images/3.png"

    def said(*words):
        assert run("sample", out, "--out", tmp_path / "out.png", *words) == cli.USAGE_ERROR
        return capsys.readouterr().err

    if kind != "coord":
        assert "--condition FILE" in said()
        assert "multiples of 8" in said("--condition", photo, "--size", "30x30")
        assert "give one of them" in said("--condition", photo, "--condition-of", photo)
    if kind in (*FROM_FILE, "coord"):
        assert "cannot be computed from a photo" in said("--condition-of", photo)
    assert "no" in said("--condition", tmp_path / "missing.png")
