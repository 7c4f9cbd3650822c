"""`tamingfast sample`."""

from __future__ import annotations

import golden
import numpy as np
import pytest
from commands import run
from PIL import Image

from tamingfast import cli


class TestSample:
    def test_count_and_determinism(self, runs, tmp_path):
        prior = runs / "prior"
        for name, batch in (("a", 3), ("b", 1)):
            out = tmp_path / f"{name}.png"
            assert run("sample", prior, "-n", 3, "--batch", batch, "--out", out, "--seed", 5, "--separate") == 0
        for number in range(3):
            first, second = (np.asarray(Image.open(tmp_path / f"{name}-{number:04d}.png")).astype(int) for name in "ab")
            assert first.shape == (8, 8, 3)
            # The same tokens, whose decoding sums in an order that depends on the batch: a pixel may be rounded up
            # in one and down in the other, while one other token shows in every pixel around it.
            assert abs(first - second).max() <= 1
            assert (first != second).mean() < 0.01

    def test_larger_than_trained(self, runs, tmp_path):
        out = tmp_path / "wide.png"
        assert (
            run(
                "sample", runs / "prior", "-n", 1, "--size", "32x40", "--out", out, "--schedule", "block", "--stride", 2
            )
            == 0
        )
        assert Image.open(out).size == (40, 32)

    def test_lookahead_does_not_change_a_pixel(self, runs, tmp_path):
        for width in (1, 6):
            words = ["-n", 2, "--out", tmp_path / f"{width}.png", "--lookahead", width, "--drafts"]
            assert run("sample", runs / "prior", *words) == 0
        assert (tmp_path / "1.png").read_bytes() == (tmp_path / "6.png").read_bytes()

    def test_pixels(self, runs, tmp_path):
        assert run("sample", runs / "prior_pixels", "-n", 1, "--size", "8x8", "--out", tmp_path / "p.png") == 0

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--size", "33"], "multiples of 2"),
            (["--size", "big"], "--size: got big, expected HEIGHTxWIDTH"),
            (["--class", "1"], "unconditional"),
            (["-n", "0"], "count: got 0, expected at least 1"),
            (["--temperature", "0"], "temperature"),
            (["--schedule", "zigzag"], "zigzag"),
            (["--dtype", "int8", "--engine", "torch"], "int8"),
            (["--cfg", "4"], "--cfg: got 4.0, expected None or 1, as this prior has no null class"),
            (["--lookahead", "0"], "--lookahead: got 0, expected at least 1"),
            (["--device", "warp"], "warp"),
            (["--top-k", "-1"], "0 to keep all"),
            (["--out", "."], "directory"),
            (["--out", "x.jpg"], ".png"),
        ],
    )
    def test_mistakes_are_one_sentence(self, runs, tmp_path, capsys, monkeypatch, words, message):
        monkeypatch.chdir(tmp_path)  # what is drawn before a name turns out to be wrong is kept beside it
        code = run("sample", runs / "prior", "--out", tmp_path / "x.png", *words)
        error = capsys.readouterr().err.strip()
        assert code == cli.USAGE_ERROR
        assert message in error and len(error.splitlines()) == 1 and "Traceback" not in error
        assert not (tmp_path / "x.png").exists()

    def test_a_first_stage_cannot_draw(self, runs, capsys):
        assert run("sample", runs / "vqgan") == cli.USAGE_ERROR
        assert "train prior" in capsys.readouterr().err

    def test_original_checkpoints(self, tmp_path):
        out = tmp_path / "s.png"
        for name, label in (("net2net_class", ["--class", "3"]), ("net2net_uncond", [])):
            assert run("sample", golden.checkpoint(name), "-n", 1, "--out", out, "--size", "8x8", *label) == 0

    def test_spatial_conditions_are_pointed_elsewhere(self, capsys):
        assert run("sample", golden.checkpoint("net2net_seg")) == cli.USAGE_ERROR
        assert "segmentation" in capsys.readouterr().err
