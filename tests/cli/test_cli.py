"""The command line, on a reproduction small enough to make in a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import golden
import numpy as np
import pytest
import torch
from PIL import Image

import tamingfast
from tamingfast import cli, sampling
from tamingfast.data.tokens import TokenDataset
from tamingfast.reproduce import settings


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def reproduced(everything):
    """The smoke preset's output for the default experiment."""
    return everything / "pixels"


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


class TestSample:
    def test_count_and_determinism(self, reproduced, tmp_path):
        prior = reproduced / "prior_latents"
        for name, batch in (("a", 3), ("b", 1)):
            out = tmp_path / f"{name}.png"
            assert run("sample", prior, "-n", 3, "--batch", batch, "--out", out, "--seed", 5, "--separate") == 0
        for number in range(3):
            first, second = (np.asarray(Image.open(tmp_path / f"{name}-{number:04d}.png")).astype(int) for name in "ab")
            assert first.shape == (32, 32, 3)
            # The same tokens, whose decoding sums in an order that depends on the batch: a pixel may be rounded up
            # in one and down in the other, while one other token shows in every pixel around it.
            assert abs(first - second).max() <= 1
            assert (first != second).mean() < 0.01

    def test_larger_than_trained(self, reproduced, tmp_path):
        out = tmp_path / "wide.png"
        assert (
            run("sample", reproduced / "prior_latents", "-n", 1, "--size", "32x40", "--out", out, "--schedule", "block")
            == 0
        )
        assert Image.open(out).size == (40, 32)

    def test_pixels(self, reproduced, tmp_path):
        assert run("sample", reproduced / "prior_pixels", "-n", 1, "--size", "8x8", "--out", tmp_path / "p.png") == 0

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--size", "33"], "multiples of 2"),
            (["--size", "big"], "expected HEIGHTxWIDTH"),
            (["--class", "1"], "unconditional"),
            (["-n", "0"], "at least 1"),
            (["--temperature", "0"], "greedy"),
            (["--schedule", "zigzag"], "zigzag"),
            (["--dtype", "int8", "--backend", "torch"], "native engine"),
            (["--device", "warp"], "device 'warp'"),
            (["--top-k", "-1"], "0 to keep all"),
            (["--out", "."], "got a directory, expected the name of a file"),
            (["--out", "x.jpg"], "ends in .png"),
        ],
    )
    def test_mistakes_are_one_sentence(self, reproduced, tmp_path, capsys, monkeypatch, words, message):
        monkeypatch.chdir(tmp_path)  # what is drawn before a name turns out to be wrong is kept beside it
        code = run("sample", reproduced / "prior_latents", "--out", tmp_path / "x.png", *words)
        error = capsys.readouterr().err.strip()
        assert code == cli.USAGE_ERROR
        assert message in error and len(error.splitlines()) == 1 and "Traceback" not in error
        assert not (tmp_path / "x.png").exists()

    def test_a_first_stage_cannot_draw(self, reproduced, capsys):
        assert run("sample", reproduced / "vqgan") == cli.USAGE_ERROR
        assert "train prior" in capsys.readouterr().err

    def test_original_checkpoints(self, tmp_path):
        out = tmp_path / "s.png"
        for name, label in (("net2net_class", ["--class", "3"]), ("net2net_uncond", [])):
            assert run("sample", golden.checkpoint(name), "-n", 1, "--out", out, "--size", "8x8", *label) == 0

    def test_spatial_conditions_are_pointed_elsewhere(self, capsys):
        assert run("sample", golden.checkpoint("net2net_seg")) == cli.USAGE_ERROR
        assert "segmentation" in capsys.readouterr().err


class TestCanvas:
    @pytest.fixture
    def square(self, photo, tmp_path):
        path = tmp_path / "square.png"
        Image.open(photo).crop((0, 0, 32, 32)).save(path)
        return path

    @pytest.fixture
    def mask(self, tmp_path):
        pixels = np.zeros((32, 32), np.uint8)
        pixels[10:20, 12:24] = 255
        path = tmp_path / "mask.png"
        Image.fromarray(pixels).save(path)
        return path

    def test_edit_keeps_what_is_not_masked(self, reproduced, square, mask, tmp_path):
        out = tmp_path / "e.png"
        assert run("edit", reproduced / "prior_latents", square, "--mask", mask, "--out", out) == 0
        before, after = (np.asarray(Image.open(path)).astype(int) for path in (square, out))
        changed = np.abs(after - before).max(2)
        assert changed[10:20, 12:24].mean() > 5
        assert changed[:8].max() == changed[22:].max() == changed[:, :10].max() == changed[:, 26:].max() == 0
        assert not list(tmp_path.glob("*.canvas"))

    def test_outpaint_and_go_on(self, reproduced, square, tmp_path, capsys):
        prior, out, kept = reproduced / "prior_latents", tmp_path / "o.png", tmp_path / "o.canvas"
        words = ["--out", out, "--canvas", kept, "--schedule", "block", "--preview", tmp_path / "p.png"]
        assert run("outpaint", prior, square, "--right", 8, "--bottom", 4, *words) == 0
        before, after = (np.asarray(Image.open(path)).astype(int) for path in (square, out))
        assert after.shape == (36, 40, 3)
        assert (after[:30, :30] == before[:30, :30]).all()
        assert len(np.unique(after[:, 32:])) > 3
        wider, canvas = tmp_path / "w.png", kept.read_bytes()
        assert run("outpaint", prior, kept, "--left", 4, "--out", wider) == 0
        assert Image.open(wider).size == (44, 36)
        assert kept.read_bytes() == canvas and not (tmp_path / "w.canvas").exists()
        assert run("outpaint", prior, square, "--top", 2, "-n", 2, "--out", wider, "--reconstruct") == 0
        assert Image.open(wider).size == (2 * 34 + 2, 34 + 4)
        assert run("outpaint", prior, square, "--top", 2, "-n", 2, "--out", wider, "--separate") == 0
        assert Image.open(tmp_path / "w-0001.png").size == (32, 34)
        assert capsys.readouterr().out.endswith("w-0000.png to w-0001.png\n")

    def test_no_canvas_and_no_photo_is_lost(self, reproduced, square, mask, tmp_path, capsys):
        prior, kept, out = reproduced / "prior_latents", tmp_path / "k.canvas", tmp_path / "k.png"
        assert run("sample", prior, "-n", 1, "--size", "32x40", "--canvas", kept, "--out", out) == 0
        canvas, photo = kept.read_bytes(), square.read_bytes()
        edited = ["edit", prior, square, "--mask", mask, "--out"]
        assert run(*edited, out) == cli.USAGE_ERROR  # its own canvas would stand in that place
        assert "holds a drawing already; go on with it by --resume" in capsys.readouterr().err
        assert run(*edited, tmp_path / "n.png", "--canvas", square) == cli.USAGE_ERROR
        assert "is no canvas" in capsys.readouterr().err
        assert (kept.read_bytes(), square.read_bytes()) == (canvas, photo)

    def test_a_canvas_is_resumed_to_the_same_image(self, reproduced, tmp_path, monkeypatch, capsys):
        prior, out = reproduced / "prior_latents", tmp_path / "s.png"
        words = ["sample", prior, "-n", 1, "--size", "32x40", "--out", out]
        assert run(*words) == 0
        expected = out.read_bytes()
        out.unlink()

        class Stopped(sampling.canvas._Regularly):
            def tick(self):
                super().tick()
                self.ticks = getattr(self, "ticks", 0) + 1
                if self.ticks == 50:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(sampling.canvas, "_Regularly", Stopped)
            assert run(*words) == cli.INTERRUPTED
        assert not out.exists() and (tmp_path / "s.canvas").exists()
        assert run(*words) == run(*words, "--canvas", tmp_path / "s.canvas") == cli.USAGE_ERROR
        changes = (["--seed", 9], ["--top-k", 3], ["--greedy"], ["-n", 2], ["--schedule", "block"], ["--size", "32x32"])
        for change in changes:
            capsys.readouterr()
            assert run(*words, "--resume", *change) == cli.USAGE_ERROR, change
            assert "go on" in capsys.readouterr().err
        assert run(*words, "--resume", "--seed", 0) == 0
        assert out.read_bytes() == expected
        assert run(*words, "--resume") == cli.USAGE_ERROR

    def test_likelihood(self, reproduced, square, tmp_path, capsys):
        words = [square, "--strides", 4, 8, "--plot", tmp_path / "plot.png"]
        assert run("likelihood", reproduced / "prior_latents", *words) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()[:-1]]
        assert [row["name"] for row in rows] == ["paper", "scene", "strided 4", "strided 8", "block 4", "block 8"]
        assert all(0 < row["nats"] < 20 for row in rows)
        assert Image.open(tmp_path / "plot.png").size[0] > 100

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["edit", "square.png", "--mask", "photo.png"], "photo.png is 50x70 pixels, but the photo is 32x32"),
            (["edit", "square.png", "--mask", "black.png"], "no white pixel"),
            (["edit", "none.png", "--mask", "black.png"], "no image at"),
            (["outpaint", "photo.png", "--right", 3], "--right 3; this model needs multiples of 2"),
            (["outpaint", "odd.png", "--right", 2], "got a size of 31x31 pixels; this model needs multiples of 2"),
            (["outpaint", "square.png"], "nothing to draw"),
            (["outpaint", "square.png", "--right", 8, "--schedule", "block", "--stride", 99], "stride is 99"),
            (["outpaint", "square.png", "--right", 8, "--resume"], "no canvas at"),
            (["outpaint", "square.png", "--right", 8, "--out", "o.jpg"], "o.jpg: got the suffix '.jpg', expected .png"),
            (["outpaint", "square.png", "--right", 8, "--preview", "p.jpg"], "p.jpg: got the suffix '.jpg'"),
            (["complete", "square.png", "--out", "c.jpg"], "c.jpg: got the suffix '.jpg', expected .png"),
            (["sample", "-n", 1, "--size", "80000x80000"], "GiB to be planned and held"),
        ],
    )
    def test_mistakes_are_one_sentence(self, reproduced, square, photo, capsys, words, message, monkeypatch):
        monkeypatch.chdir(square.parent)
        Image.new("RGB", (32, 32)).save("black.png")
        Image.open(square).crop((0, 0, 31, 31)).save("odd.png")
        command, *rest = words
        assert run(command, reproduced / "prior_latents", *rest) == cli.USAGE_ERROR
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1


class TestImages:
    def test_reconstruct(self, reproduced, photo, tmp_path, capsys):
        out = tmp_path / "r.png"
        assert run("reconstruct", reproduced / "vqgan", photo, photo, "--out", out) == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[0])
        assert figures["l1"] > 0 and figures["psnr"] > 0 and figures["codes"] >= 1
        assert Image.open(out).size == (2 * 34 + 2, 2 * 34 + 2)

    def test_completion_keeps_the_upper_half(self, reproduced, photo, tmp_path):
        out = tmp_path / "c.png"
        prior = reproduced / "prior_pixels"  # pixels as tokens: what is kept is kept to the colour
        assert run("complete", prior, photo, "--out", out, "--times", 2, "--size", "8x8") == 0
        sheet = np.asarray(Image.open(out)).astype(int)
        given, *completed = (sheet[2 + i * 10 : 10 + i * 10, 2:10] for i in range(3))
        model = tamingfast.load_model(prior).first_stage_model
        x = torch.as_tensor(given / 127.5 - 1).permute(2, 0, 1)[None].float()
        kept = ((model(x)[0][0].permute(1, 2, 0) + 1) * 127.5).round().int().numpy()
        for image in completed:
            assert (image[:4] == kept[:4]).all()
        assert (completed[0][4:] != completed[1][4:]).any()

    def test_a_directory_of_images(self, reproduced, photo, tmp_path):
        assert run("reconstruct", reproduced / "vqgan", photo.parent, "--out", tmp_path / "out" / "r.png") == 0

    @pytest.mark.parametrize(("name", "content"), [("none.png", None), ("text.png", b"not an image")])
    def test_unreadable_images_are_named(self, reproduced, tmp_path, capsys, name, content):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert run("reconstruct", reproduced / "vqgan", tmp_path / name) == cli.USAGE_ERROR
        assert name in capsys.readouterr().err


class TestEncodeAndTrain:
    def test_token_file_feeds_the_prior(self, reproduced, photo, tmp_path):
        folder = tmp_path / "data"
        for label in ("cat", "dog"):
            (folder / label).mkdir(parents=True)
            for i in range(6):
                Image.open(photo).rotate(30 * i).save(folder / label / f"{i}.png")
        tokens = tmp_path / "tokens.safetensors"
        data = ["name=folder", f"path={folder}", "size=32", "flip=false", "validation_fraction=0.2"]
        assert run("encode", reproduced / "vqgan", "--out", tokens, *data) == 0
        dataset = TokenDataset(tokens)
        assert dataset.grid == (16, 16) and list(dataset.classes) == ["cat", "dog"]
        out = tmp_path / "prior"
        words = ["train", "prior", "tiny", "--first-stage", reproduced / "vqgan", "--out", out]
        words += ["data.name=tokens", f"data.path={tokens}", "prior.condition=class", "training.steps=2"]
        words += ["training.batch_size=2", "--seed", 3, "training.image_every=null"]
        assert run(*words) == 0
        model = tamingfast.load_model(out)
        assert model.cond_stage_model.n_classes == 2
        assert model.config["training"]["seed"] == 3
        assert run("sample", out, "-n", 2, "--size", "8x8", "--out", tmp_path / "s.png") == 0
        original = tamingfast.load_model(reproduced / "vqgan").state_dict()
        inside = model.first_stage_model.state_dict()
        assert all(torch.equal(inside[key], original[key]) for key in inside)

    def test_vqgan_by_preset_and_overrides(self, tmp_path):
        words = [
            "train",
            "vqgan",
            "photos32_vqgan",
            "--out",
            tmp_path / "run",
            "training.steps=1",
            "training.batch_size=2",
        ]
        words += [
            "model.params.ddconfig.ch=32",
            "data.length=8",
            "training.validation_batches=1",
            "training.image_every=1",
        ]
        assert run(*words) == 0
        assert list((tmp_path / "run" / "images").glob("*.png"))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["photos32_vqgan", "training.step=3"], "did you mean 'steps'"),
            (["photos32_vqgan", "data.name=fotos"], "photos"),
            (["nonsense"], "presets:"),
        ],
    )
    def test_mistakes(self, tmp_path, capsys, words, message):
        assert run("train", "vqgan", "--out", tmp_path / "x", *words) == cli.USAGE_ERROR
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1

    def test_tokens_of_another_first_stage_are_refused(self, reproduced, tmp_path, capsys):
        tokens, other = tmp_path / "tokens.safetensors", tmp_path / "other"
        assert run("encode", reproduced / "vqgan", "--out", tokens, "name=photos", "size=32", "length=8") == 0
        small = ["training.steps=1", "training.batch_size=2", "training.validation_batches=1", "data.length=8"]
        preset = settings.load_preset("pixels", "smoke")["vqgan"]
        (tmp_path / "other.yaml").write_text(json.dumps(preset | {"data": {"name": "photos", "size": 32}}))
        assert run("train", "vqgan", tmp_path / "other.yaml", "--out", other, *small) == 0
        words = ["--out", tmp_path / "p", "data.name=tokens", f"data.path={tokens}", "training.steps=1"]
        assert run("train", "prior", "tiny", "--first-stage", other, *words) == cli.USAGE_ERROR
        assert "another first stage" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["vqgan", "photos32_vqgan", "data.size=33"], "multiple of the first stage's 2"),
            (["vqgan", "photos32_vqgan", "model.params.ddconfig.ch=33"], "do not fit"),
            (["vqgan", "photos32_vqgan", "model.params.n_embed=abc"], "do not fit"),
            (["prior", "tiny"], "--first-stage"),
            (["prior", "tiny", "--first-stage", "RUN", "data.name=photos", "data.size=36", "prior.ordering=subsample"],
             "subsample"),
        ],
    )  # fmt: skip
    def test_models_that_cannot_be_built(self, reproduced, tmp_path, capsys, words, message):
        words = [str(reproduced / "vqgan") if word == "RUN" else word for word in words]
        assert run("train", *words, "--out", tmp_path / "x", "training.steps=1") == cli.USAGE_ERROR
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
        assert not (tmp_path / "x").exists()


class TestFiles:
    def test_inspect(self, capsys):
        assert run("inspect", golden.checkpoint("net2net_seg")) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["values_by_part"]["cond_stage_model"] > 0 and facts["condition"] == "segmentation"

    def test_inspect_a_run_its_converted_file_and_the_tokens_it_learned(self, everything, tmp_path, capsys):
        def inspected(path):
            assert run("inspect", path) == 0
            return json.loads(capsys.readouterr().out)

        prior, stage, converted = (
            everything / "orderings/z_curve_0",
            everything / "orderings/vqgan",
            tmp_path / "c.safetensors",
        )
        facts, tokens = inspected(prior), inspected(everything / "orderings/train.safetensors")
        steps = settings.load_preset("orderings", "smoke")["prior"]["training"]["steps"]
        assert facts["global_step"] == steps == inspected(prior / "state.pt")["global_step"]
        assert facts["epoch"] is not None and facts["config"] == "beside the file"
        assert facts["size"] == tokens["size"] == "32x32"
        assert facts["model"].endswith("Net2NetTransformer") and facts["ordering"].endswith("ZCurve")
        assert facts["condition"] is None and facts["transformer"]["n_layer"] == 1 and facts["data"]["name"] == "photos"
        assert tokens["images"] == 48 and tokens["grid"] == [8, 8]
        assert "photographs" in tokens["data"]
        assert tokens["first_stage"] == facts["first_stage"] == inspected(stage)["first_stage"]
        assert run("convert", prior, converted) == 0
        capsys.readouterr()
        again = inspected(converted)
        assert again["config"] == "in the file" and again["global_step"] is None
        same = ("model", "size", "data", "transformer", "first_stage", "ordering", "values_by_part")
        assert {name: again[name] for name in same} == {name: facts[name] for name in same}

    def test_convert(self, reproduced, tmp_path, capsys):
        out = tmp_path / "m.safetensors"
        assert run("convert", reproduced / "prior_latents", out) == 0
        assert run("sample", out, "-n", 1, "--size", "8x8", "--out", tmp_path / "s.png") == 0
        assert run("convert", reproduced / "prior_latents", tmp_path / "m.bin") == cli.USAGE_ERROR
        assert ".safetensors" in capsys.readouterr().err

    def test_info(self, capsys):
        assert run("info") == 0
        text = capsys.readouterr().out
        assert all(word in text for word in ("torch", "native", "triton", "gpu"))


def test_unknown_words_are_refused(capsys):
    for words in (["sample", "x", "--colour", "red"], ["info", "extra"], ["nonsense"]):
        with pytest.raises(SystemExit) as stopped:
            run(*words)
        assert stopped.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_interrupt_and_closed_pipe(reproduced):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tamingfast.cli", "inspect", str(golden.checkpoint("net2net_seg"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait()
