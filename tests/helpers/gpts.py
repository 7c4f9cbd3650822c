"""Small transformers, and the inputs that several test files feed them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tamingfast.models.gpt import GPT

VOCAB = 24
#: Shapes of conditions for a 7 x 9 grid: the same for every window, a grid, or separate tokens for each window.
SHAPES = {"prefix": (2, 3), "grid": (2, 7, 9), "windows": (2, 7, 9, 3)}


def tiny_gpt(block_size: int = 40, n_unmasked: int = 0, vocab: int = VOCAB, seed: int = 0) -> GPT:
    """A small transformer whose weights are large enough for its tokens to depend on the whole context."""
    gpt = GPT(vocab, block_size, n_layer=2, n_head=2, n_embd=16, n_unmasked=n_unmasked)
    generator = torch.Generator().manual_seed(seed)
    for parameter in gpt.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return gpt.eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def prior(gpt: GPT, order: torch.Tensor | None = None, codes: int | None = None) -> nn.Module:
    """A module with the parts of a `Net2NetTransformer` that `sample_grid` needs."""
    model = nn.Module()
    model.transformer = gpt
    model.permuter = nn.Identity()
    if order is not None:
        model.permuter.register_buffer("forward_shuffle_idx", order)
    model.first_stage_model = nn.Module()
    model.first_stage_model.quantize = SimpleNamespace(re_embed=codes or gpt.config.vocab_size)
    return model


def random_gpt(
    vocab: int = 24, block: int = 40, layers: int = 2, heads: int = 2, width: int = 16, n_unmasked: int = 0,
    std: float = 0.5,
) -> GPT:  # fmt: skip
    """A small transformer whose weights are large enough for its logits to depend on the whole context."""
    gpt = GPT(vocab, block, n_layer=layers, n_head=heads, n_embd=width, n_unmasked=n_unmasked)
    generator = torch.Generator().manual_seed(0)
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return gpt.eval()


def all_logits(gpt: GPT, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return gpt(torch.tensor([tokens]))[0][0]
