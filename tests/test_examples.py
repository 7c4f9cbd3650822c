"""The scripts in examples/ run, and do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import golden
import torch
from PIL import Image

from tamingfast import images, load_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_gradients_through_the_decoder_move_an_image_to_its_target(tmp_path):
    """A script of the kind that pairs a VQGAN with CLIP, written for the original's names, unchanged on our classes."""
    model = load_model(golden.checkpoint("vqmodel_f2"))
    tokens = torch.randint(0, model.n_embed, (1, 8, 8), generator=torch.Generator().manual_seed(3))
    images.save_png(
        tmp_path / "picture.png", images.to_uint8(model.decode_grid(tokens))[0]
    )  # one that these weights can draw
    command = [sys.executable, "-m", "tamingfast.compat", EXAMPLES / "optimise_latents.py"]
    files = [golden.path("vqmodel_f2.yaml"), golden.checkpoint("vqmodel_f2"), "picture.png", "out.png"]
    done = subprocess.run(
        [*command, *files, "--tokens", "8", "--steps", "31", "--rate", "0.3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"step \d+: (\S+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0], losses
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (16, 16)


def test_a_model_without_its_loss_still_draws():
    model = load_model(golden.checkpoint("vqmodel_f2"))
    del model.loss
    tokens = model.encode_grid(model.decode_grid(model.quantize.embedding.weight.new_zeros(1, 4, 4).long()))
    assert tokens.shape == (1, 4, 4)
