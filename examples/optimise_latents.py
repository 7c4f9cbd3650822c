"""Draws an image by gradients through the decoder, as the scripts that pair a VQGAN with CLIP do.

    python -m tamingfast.compat examples/optimise_latents.py model.yaml model.ckpt picture.png out.png

It is written for the original's classes and runs on ours unchanged. The latents are moved until the decoded image has
the layout and the colours of a small picture; a score of CLIP, or any other with gradients, takes the place of `score`.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from taming.models.vqgan import VQModel


class ClampWithGrad(torch.autograd.Function):
    """Clamps to a range, outside which gradients pass only if they lead back into it."""

    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x, low, high)
        return torch.maximum(torch.minimum(x, high), low)

    @staticmethod
    def backward(ctx, gradient):
        x, low, high = ctx.saved_tensors
        clamped = torch.maximum(torch.minimum(x, high), low)
        return gradient * (gradient * (x - clamped) >= 0), None, None


def load(config, checkpoint):
    """The model without its loss, which only training needs."""
    with open(config) as stream:
        model = VQModel(**yaml.safe_load(stream)["model"]["params"])
    model.eval().requires_grad_(False)
    model.init_from_ckpt(checkpoint)
    del model.loss
    return model


def nearest(z, codebook):
    """The nearest codes of latents (B, D, h, w), with the gradient passed straight through."""
    rows = z.movedim(1, 3)
    distances = rows.square().sum(-1, keepdim=True) + codebook.square().sum(1) - 2 * rows @ codebook.T
    codes = F.embedding(distances.argmin(-1), codebook).movedim(3, 1)
    return z + (codes - z).detach()


def synthesise(model, z):
    """Latents -> an image in [0, 1]."""
    decoded = model.decode(nearest(z, model.quantize.embedding.weight))
    return decoded.add(1).div(2).clamp(0, 1)


def score(image, target):
    """How far the image's layout is from the picture's, at the picture's size."""
    return F.mse_loss(F.interpolate(image, target.shape[2:], mode="area"), target)


def main():
    parser = argparse.ArgumentParser()
    for name in ("config", "checkpoint", "picture", "out"):
        parser.add_argument(name)
    parser.add_argument("--tokens", type=int, default=16, help="tokens a side")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=0.1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = load(arguments.config, arguments.checkpoint)
    codebook = model.quantize.embedding.weight
    low, high = (edge.values[None, :, None, None] for edge in (codebook.min(dim=0), codebook.max(dim=0)))
    with Image.open(arguments.picture) as picture:
        small = np.asarray(picture.convert("RGB").resize((8, 8), Image.Resampling.BOX))
    target = torch.tensor(small).permute(2, 0, 1)[None] / 255

    chosen = torch.randint(len(codebook), (1, arguments.tokens, arguments.tokens))
    z = F.embedding(chosen, codebook).movedim(3, 1).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=arguments.rate)
    for step in range(arguments.steps):
        optimizer.zero_grad()
        loss = score(synthesise(model, ClampWithGrad.apply(z, low, high)), target)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            z.copy_(z.maximum(low).minimum(high))
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step}: {loss.item():.5f}")
    with torch.no_grad():
        image = synthesise(model, z)[0].permute(1, 2, 0).mul(255).round().byte().numpy()
    Image.fromarray(image).save(arguments.out)


if __name__ == "__main__":
    main()
