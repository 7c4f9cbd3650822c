"""Sampling, editing, outpainting and completing with every kind of condition."""

from __future__ import annotations

import json

import numpy as np
import torch
from commands import pixels_of, run, size_of
from conditioned import FACTOR, FROM_FILE, HEIGHT, ROWS_COLUMNS, TOKENS, WIDTH, condition_of, enlarged, photo_of
from PIL import Image

from tamingfast import cli
from tamingfast.data.conditions import Coordinates
from tamingfast.sampling import Canvas


class TestEveryCondition:
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
            assert f"give its file with --condition{'' if kind in FROM_FILE else ', or'}" in capsys.readouterr().err
            named = condition_of(data, kind) or ["--condition-of", photo]
            assert run(*words, *named) == cli.USAGE_ERROR
            assert "got a condition of 40x48 pixels, expected 40x72, the size of the canvas" in capsys.readouterr().err
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
        message = "5 x 5" if kind == "coord" else "condition: got a different one"
        assert message in capsys.readouterr().err


def test_mistakes_in_sampling(trained, data, tmp_path, capsys):
    kind, _, out = trained
    photo = photo_of(data, kind)

    def said(*words):
        assert run("sample", out, "--out", tmp_path / "out.png", *words) == cli.USAGE_ERROR
        return capsys.readouterr().err

    if kind not in ("coord", "class"):
        assert "give its file with --condition" in said()
        assert "leave it out" in said(*(condition_of(data, kind) or ["--condition-of", photo]), "--class", 1)
        assert "multiples of 8" in said("--condition", photo, "--size", "30x30")
        assert "expected one of them" in said("--condition", photo, "--condition-of", photo)
    if kind in (*FROM_FILE, "coord"):
        assert "cannot be computed from a photo" in said("--condition-of", photo)
    if kind == "class":
        assert "conditioned on 'class_label'; leave it out" in said("--condition", photo)
        assert "expected 0 to 9" in said("--class", 10)
    else:
        assert "no" in said("--condition", tmp_path / "missing.png")
