"""`tamingfast reconstruct`, `complete` and `likelihood`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

import tamingfast
from tamingfast import cli


class TestImages:
    def test_reconstruct(self, runs, photo, tmp_path, capsys):
        out = tmp_path / "r.png"
        assert run("reconstruct", runs / "vqgan", photo, photo, "--out", out, "--size", 8) == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[0])
        assert figures["l1"] > 0 and figures["psnr"] > 0 and figures["codes"] >= 1
        assert Image.open(out).size == (2 * 10 + 2, 2 * 10 + 2)

    def test_whole_pictures_of_different_sizes(self, runs, photo, square, tmp_path, caplog):
        Image.open(photo).crop((0, 0, 69, 35)).save(tmp_path / "odd.png")
        out = tmp_path / "r.png"
        assert run("reconstruct", runs / "vqgan", photo, square, tmp_path / "odd.png", "--out", out) == 0
        assert "odd.png from 35x69 to 34x68" in caplog.text
        sheet = Image.open(out)
        assert sheet.size == (2 + 72 + 34 + 70, 2 + 52 + 52)
        photo_pixels = np.asarray(Image.open(photo))
        assert (np.asarray(sheet)[2:52, 2:72] == photo_pixels).all() and (np.asarray(sheet)[40:52, 76:] == 255).all()
        options = ["--schedule", "block", "--stride", 2, "--times", 1, "--out", out]
        assert run("complete", runs / "prior", square, tmp_path / "odd.png", *options) == 0
        found = np.asarray(Image.open(out)).astype(int)
        assert abs(found[2:14, 2:34] - found[38:50, 2:34]).max() <= 1  # the kept half has its own pixels
        assert (found[2:34, 2:34][20:] != found[38:70, 2:34][20:]).any()

    def test_completion_keeps_the_upper_half(self, runs, photo, tmp_path):
        out = tmp_path / "c.png"
        prior = runs / "prior_pixels"  # pixels as tokens: what is kept is kept to the colour
        assert run("complete", prior, photo, "--out", out, "--times", 2, "--size", "8x8", "--reconstruct") == 0
        sheet = np.asarray(Image.open(out)).astype(int)
        given, *completed = (sheet[2 + i * 10 : 10 + i * 10, 2:10] for i in range(3))
        model = tamingfast.load_model(prior).first_stage_model
        x = torch.as_tensor(given / 127.5 - 1).permute(2, 0, 1)[None].float()
        kept = ((model(x)[0][0].permute(1, 2, 0) + 1) * 127.5).round().int().numpy()
        for image in completed:
            assert (image[:4] == kept[:4]).all()
        assert (completed[0][4:] != completed[1][4:]).any()

    def test_likelihood(self, runs, square, tmp_path, capsys):
        words = [square, "--strides", 2, 4, "--plot", tmp_path / "plot.png"]
        assert run("likelihood", runs / "prior", *words) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()[:-1]]
        assert [row["name"] for row in rows] == ["paper", "scene", "strided 2", "strided 4", "block 2", "block 4"]
        assert all(0 < row["nats"] < 20 for row in rows)
        assert Image.open(tmp_path / "plot.png").size[0] > 100

    def test_the_engine_of_the_first_stage(self, runs, square, monkeypatch, capsys):
        """Torch encodes if it is asked for; the likelihoods are the same up to rounding."""
        from tamingfast.engines.cpu_first_stage import FirstStageEngine

        made = []
        begin = FirstStageEngine.__init__
        monkeypatch.setattr(FirstStageEngine, "__init__", lambda *words, **named: made.append(begin(*words, **named)))
        nats, counts = [], []
        for engine in ("native", "torch"):
            assert run("likelihood", runs / "prior", square, "--strides", 4, "--engine", engine, "--device", "cpu") == 0
            nats.append([json.loads(line)["nats"] for line in capsys.readouterr().out.splitlines()])
            counts.append(len(made))
        assert counts[0] > 0 and counts[1] == counts[0]
        assert nats[0] == pytest.approx(nats[1], rel=1e-3)

    def test_a_directory_of_images(self, runs, photo, tmp_path):
        assert run("reconstruct", runs / "vqgan", photo.parent, "--out", tmp_path / "out" / "r.png") == 0

    @pytest.mark.parametrize(
        ("command", "model", "option"),
        [("reconstruct", "vqgan", "--out"), ("complete", "prior", "--out"), ("likelihood", "prior", "--plot")],
    )
    def test_an_image_of_a_directory_is_never_replaced(self, runs, photo, tmp_path, capsys, command, model, option):
        kept = tmp_path / "photos" / "deep" / "0.png"
        kept.parent.mkdir(parents=True)
        kept.write_bytes(photo.read_bytes())
        assert run(command, runs / model, tmp_path / "photos", option, kept) == cli.USAGE_ERROR
        assert f"{option}: got {kept}, expected another file" in capsys.readouterr().err
        assert kept.read_bytes() == photo.read_bytes()

    @pytest.mark.parametrize(("name", "content"), [("none.png", None), ("text.png", b"not an image")])
    def test_unreadable_images_are_named(self, runs, tmp_path, capsys, name, content):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert run("reconstruct", runs / "vqgan", tmp_path / name) == cli.USAGE_ERROR
        assert name in capsys.readouterr().err
