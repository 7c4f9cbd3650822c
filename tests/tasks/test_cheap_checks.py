"""What a command can refuse without a model's weights, it refuses before it reads them."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from commands import run
from PIL import Image
from refusals import refused

from tamingfast import tasks
from tamingfast.checkpoints import load

PHOTO, ODD, MASK = "photo.png", "odd.png", "mask.png"


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(tiny.photographs(1, 16)[0]).save(PHOTO)
    Image.fromarray(tiny.photographs(1, 16)[0][:15]).save(ODD)
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(MASK)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "s.canvas").write_bytes(b"of another drawing")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sample PRIOR --size 9", "--size: got 9x9 pixels, expected multiples of 2"),
        ("sample PRIOR --class 3", "--class: got class 3, expected none"),
        ("sample PRIOR --condition photo.png", "--condition: got one, expected none"),
        ("sample PRIOR --from photo.png --scales 1", "--from: got a photo or scales for a prior of one scale"),
        ("sample PRIOR --out s.png", "s.canvas: got a file that already contains a drawing"),
        ("sample PRIOR --canvas s.canvas", "s.canvas: got a damaged file"),
        ("sample PRIOR --schedule strided --stride 5", "--stride: got 5 tokens, expected at most 4"),
        ("sample VQGAN", "model: got a VQModel, which cannot draw"),
        ("edit PRIOR photo.png --mask mask.png", "mask.png: got a mask without a white pixel"),
        ("edit PRIOR photo.png --mask odd.png", "odd.png: got 15x16 pixels, expected 16x16"),
        ("edit PRIOR odd.png --mask mask.png", "odd.png: got 15x16 pixels, expected multiples of 2"),
        ("edit PRIOR text.png --mask mask.png", "text.png"),
        ("outpaint PRIOR photo.png --right 3", "--right: got 3 pixels"),
        ("outpaint PRIOR photo.png --right 2 --schedule block", "--stride: got 8 tokens, expected at most 4"),
        ("complete PRIOR photo.png --schedule block", "--stride: got 8 tokens, expected at most 4"),
        ("outpaint PRIOR photo.png", "--left, --right, --top, --bottom: got 0 pixels each"),
        ("outpaint PRIOR photo.png --right 2 --class 1", "--class: got class 1, expected none"),
        ("reconstruct VQGAN text.png", "text.png"),
        ("reconstruct VQGAN photo.png none.png", "none.png: got no such file"),
        ("complete PRIOR photo.png --size 5", "--size: got 5x5 pixels, expected multiples of 2"),
        ("complete PRIOR photo.png --class 1", "--class: got class 1, expected none"),
        ("complete PRIOR photo.png --condition mask.png mask.png", "--condition: got 2 conditions for 1 images"),
        ("likelihood PRIOR text.png", "text.png"),
        ("likelihood PRIOR photo.png", "--strides: got 8 tokens, expected at most 4"),
        ("encode VQGAN --out t.safetensors name=folder path=none", "none"),
        ("evaluate PRIOR --data none", "none"),
        ("evaluate PRIOR --features nonsense", "--features: got 'nonsense', expected inception or efficientnet-lite0"),
        ("evaluate PRIOR --perceptual-weights random", "--perceptual-weights: got 'random'"),
        ("edit PRIOR photo.png --mask photo.png", "photo.png: got a picture of which"),
    ],
)
def test_before_weights_are_read(line, said, runs, monkeypatch):
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(load, "load_into", read)
    names = {"PRIOR": runs / "prior", "VQGAN": runs / "vqgan"}
    refused(*(names.get(word, word) for word in line.split()), names=said)


def test_the_outline_is_the_model_without_its_weights(runs):
    source = tasks.unread(runs / "prior")
    outline, model = source.outline, source.model
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in outline.state_dict().items()} == shapes
    assert next(outline.parameters()).device.type == "meta" and outline.config == model.config
    assert tasks.unread(model).outline is model


def test_a_checkpoint_without_a_config_has_no_outline(runs, tmp_path):
    state = tasks.opened(runs / "vqgan").state_dict()
    torch.save(state, tmp_path / "plain.pt")
    assert load.outline(tmp_path / "plain.pt") is None
    assert run("reconstruct", tmp_path / "plain.pt", PHOTO, "--out", "r.png") == 0
