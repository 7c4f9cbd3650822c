"""A transformer in one file and its first stage in another, as LlamaGen publishes them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from commands import run
from PIL import Image

from tamingfast import LlamaGPT, load_model, tasks
from tamingfast.cli import USAGE_ERROR

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "hidden": 32}


def written(home, codes=16):
    """A transformer's file with its config beside it."""
    torch.manual_seed(0)
    gpt = LlamaGPT(codes, 3, 16, **SIZES)
    for parameter in gpt.parameters():
        parameter.data.mul_(20)
    home.mkdir()
    torch.save({"model": gpt.state_dict()}, home / "gpt.pt")
    arguments = {"dim": 16, "n_layer": 1, "n_head": 2, "block_size": 16, "cls_token_num": 1, "num_classes": 3}
    (home / "config.json").write_text(json.dumps(arguments | {"vocab_size": codes}))
    return home / "gpt.pt"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(transformer, first stage of 16 codes, f = 2)."""
    home = tmp_path_factory.mktemp("parts")
    return written(home / "gpt"), tiny.train("vqgan", home / "vqgan", steps=2)


def test_sample(parts, tmp_path):
    gpt, stage = parts
    for name, words in (("a", []), ("b", ["--batch", 1, "--lookahead", 1]), ("c", ["--engine", "naive"])):
        words = [*words, "--class", 2, "--cfg", 4, "-n", 2, "--out", tmp_path / f"{name}.png", "--separate"]
        assert run("sample", gpt, "--first-stage", stage, *words) == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{name}-0001.png")).astype(int) for name in "abc"]
    assert pictures[0].shape == (8, 8, 3)
    assert all(abs(picture - pictures[0]).max() <= 1 for picture in pictures)


def test_the_tokens_are_those_of_the_transformer(parts):
    gpt, stage = (load_model(part) for part in parts)
    drawing = tasks.sample(
        tasks.paired(gpt, stage), 3, label=[0, 2], options=tasks.DrawingOptions(greedy=True, top_k=None, cfg=2.5)
    )
    for label, tokens in zip((0, 2, 0), drawing.canvas.tokens.flatten(1), strict=True):
        for count in range(16):
            given = tokens[None, :count]
            with torch.no_grad():
                own, null = (gpt(given, torch.tensor([each]))[0][0, -1] for each in (label, 3))
            assert int((null + (own - null) * 2.5).argmax()) == tokens[count]


def test_edits_and_larger_images(parts, tmp_path, runs):
    gpt, stage = parts
    both = ["--first-stage", stage, "--class", 1, "--cfg", 2]
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(tmp_path / "photo.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "mask.png")
    out = tmp_path / "out.png"
    assert run("edit", gpt, tmp_path / "photo.png", "--mask", tmp_path / "mask.png", *both, "--out", out) == 0
    assert run("outpaint", gpt, tmp_path / "photo.png", "--right", 2, *both, "--out", tmp_path / "wide.png") == 0
    assert run("complete", gpt, tmp_path / "photo.png", "--times", 1, *both, "--out", tmp_path / "half.png") == 0
    assert run("likelihood", gpt, tmp_path / "photo.png", "--first-stage", stage, "--class", 1, "--strides", 2) == 0
    assert run("sample", gpt, "-n", 1, "--size", "12x16", *both, "--out", tmp_path / "large.png") == 0
    assert Image.open(tmp_path / "large.png").size == (16, 12)


def test_mistakes_are_one_sentence(parts, tmp_path, capsys, runs):
    gpt, stage = parts
    other = written(tmp_path / "other", codes=20)
    wrong = (
        ([gpt], "--first-stage: got none, expected the file of a first stage"),
        (["none.pt", "--first-stage", "none2.pt"], "none2.pt: got no file"),  # the smaller one is opened first
        ([gpt, "--first-stage", gpt], "got a LlamaGPT, expected a first stage"),
        ([gpt, "--first-stage", runs / "prior"], "--first-stage: got a prior, expected a first stage of 16 codes"),
        ([other, "--first-stage", stage], "--first-stage: got one of 16 codes, expected a first stage of 20 codes"),
        ([runs / "prior", "--first-stage", stage], "--first-stage: got one for a Net2NetTransformer, expected none"),
        ([gpt, "--first-stage", stage, "--size", "8x6"], "size: got"),
        ([gpt, "--first-stage", stage, "--class", "3"], "got class 3"),
    )
    for words, message in wrong:
        assert run("sample", *words, "--out", tmp_path / "x.png") == USAGE_ERROR
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1, error
        assert not (tmp_path / "x.png").exists()
