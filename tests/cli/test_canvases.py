"""`tamingfast edit` and `outpaint`, and saving and resuming canvases."""

from __future__ import annotations

import re

import numpy as np
import pytest
from commands import run
from PIL import Image

from tamingfast import cli, sampling


class TestCanvas:
    def test_edit_keeps_what_is_not_masked(self, runs, square, mask, tmp_path):
        out = tmp_path / "e.png"
        assert run("edit", runs / "prior", square, "--mask", mask, "--out", out) == 0
        before, after = (np.asarray(Image.open(path)).astype(int) for path in (square, out))
        changed = np.abs(after - before).max(2)
        assert changed[10:20, 12:24].mean() > 5
        assert changed[:8].max() == changed[22:].max() == changed[:, :10].max() == changed[:, 26:].max() == 0
        assert not list(tmp_path.glob("*.canvas"))

    def test_outpaint_and_go_on(self, runs, square, tmp_path, capsys):
        prior, out, kept = runs / "prior", tmp_path / "o.png", tmp_path / "o.canvas"
        words = ["--out", out, "--canvas", kept, "--schedule", "block", "--stride", 2, "--preview", tmp_path / "p.png"]
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

    def test_no_canvas_and_no_photo_is_lost(self, runs, square, mask, tmp_path, capsys):
        prior, kept, out = runs / "prior", tmp_path / "k.canvas", tmp_path / "k.png"
        assert run("sample", prior, "-n", 1, "--size", "32x40", "--canvas", kept, "--out", out) == 0
        canvas, photo = kept.read_bytes(), square.read_bytes()
        edited = ["edit", prior, square, "--mask", mask, "--out"]
        assert run(*edited, out) == cli.USAGE_ERROR  # its own canvas would stand in that place
        assert "a file that already contains a drawing" in capsys.readouterr().err
        assert run(*edited, tmp_path / "n.png", "--canvas", square) == cli.USAGE_ERROR
        assert "square.png" in capsys.readouterr().err
        assert (kept.read_bytes(), square.read_bytes()) == (canvas, photo)

    def test_a_canvas_is_resumed_to_the_same_image(self, runs, tmp_path, monkeypatch, capsys):
        prior, out = runs / "prior", tmp_path / "s.png"
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
            assert re.search(r": got .*, expected .*; ", capsys.readouterr().err)
        assert run(*words, "--resume", "--seed", 0) == 0
        assert out.read_bytes() == expected
        assert run(*words, "--resume") == cli.USAGE_ERROR

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ["edit", "square.png", "--mask", "photo.png"],
                "photo.png: got 50x70 pixels, expected 32x32, the photo's size",
            ),
            (["edit", "square.png", "--mask", "black.png"], "black.png: got a mask without a white pixel"),
            (["edit", "none.png", "--mask", "black.png"], "none.png: got no such file"),
            (["outpaint", "photo.png", "--right", 3], "right: got 3 pixels, expected 0 or a multiple of 2"),
            (["outpaint", "odd.png", "--right", 2], "got 31x31 pixels, expected multiples of 2"),
            (["outpaint", "square.png"], "expected something to draw"),
            (["outpaint", "square.png", "--right", 8, "--schedule", "block", "--stride", 99], "stride"),
            (["outpaint", "square.png", "--right", 8, "--resume"], "outpainted.canvas"),
            (["outpaint", "square.png", "--right", 8, "--out", "o.jpg"], "o.jpg"),
            (["outpaint", "square.png", "--right", 8, "--preview", "p.jpg"], "p.jpg"),
            (["complete", "square.png", "--out", "c.jpg"], "c.jpg"),
            (["sample", "-n", 1, "--size", "80000x80000"], "GiB"),
        ],
    )
    def test_mistakes_are_one_sentence(self, runs, square, photo, capsys, words, message, monkeypatch):
        monkeypatch.chdir(square.parent)
        Image.new("RGB", (32, 32)).save("black.png")
        Image.open(square).crop((0, 0, 31, 31)).save("odd.png")
        command, *rest = words
        assert run(command, runs / "prior", *rest) == cli.USAGE_ERROR
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
