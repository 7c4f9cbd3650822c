"""What the models accept: images that are no float tensors of the right shape are refused in one sentence."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from networks import prior

MISTAKES = {
    "8-bit": (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8 of shape (2, 3, 8, 8)"),
    "double": (torch.zeros(2, 3, 8, 8).double(), "torch.float64 of shape (2, 3, 8, 8)"),
    "half": (torch.zeros(2, 3, 8, 8).half(), "torch.float16 of shape (2, 3, 8, 8)"),
    "channels last": (torch.zeros(2, 8, 8, 3), "torch.float32 of shape (2, 8, 8, 3)"),
    "one image": (torch.zeros(3, 8, 8), "torch.float32 of shape (3, 8, 8)"),
    "gray": (torch.zeros(2, 1, 8, 8), "torch.float32 of shape (2, 1, 8, 8)"),
    "smaller than a token": (torch.zeros(2, 3, 1, 8), "torch.float32 of shape (2, 3, 1, 8)"),
    "NumPy": (np.zeros((8, 8, 3), np.uint8), "ndarray"),
    "a list": ([[0.0]], "list"),
}


@pytest.mark.parametrize("method", ["encode", "encode_grid", "forward"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_first_stage_says_what_it_takes(name, method):
    x, got = MISTAKES[name]
    message = (
        f"x: got {got}, expected a torch.float32 tensor (B, 3, H, W) in [-1, 1], H and W at least 2; from 8-bit pixels "
        "(H, W, C): torch.as_tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(prior().first_stage_model, method)(x)


def test_the_conversion_that_the_message_gives_is_right():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    converted = torch.as_tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    assert converted.min() >= -1 and converted.max() <= 1
    prior().first_stage_model.encode(converted)


def test_autocast_converts_floating_point_only():
    stage = prior().first_stage_model
    with torch.autocast("cpu", torch.bfloat16):
        stage.encode(torch.zeros(1, 3, 8, 8).bfloat16())
        with pytest.raises(ValueError, match=r"torch\.uint8"):
            stage.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_drawn_images_are_in_their_range():
    model = prior().eval()
    with torch.no_grad():
        model.first_stage_model.decoder.conv_out.weight *= 1000
    images = model.sample_images(torch.zeros(2, 1, dtype=torch.int64), 4, 4)
    assert images.min() == -1 and images.max() == 1


def test_targets_may_be_a_slice():
    gpt, x = prior().transformer, torch.randint(12, (3, 9))
    loss = gpt(x[:, :-1], targets=x[:, 1:])[1]
    assert loss == gpt(x[:, :-1], targets=x[:, 1:].contiguous())[1]
