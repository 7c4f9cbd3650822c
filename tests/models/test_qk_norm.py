"""QK-norm: an option of the GPT, in all its ways to compute and in the CPU engine; without it nothing changes."""

from __future__ import annotations

import gpts
import pytest
import tiny
import torch
from torch import Tensor
from torch.testing import assert_close

from tamingfast import GPT, load_model
from tamingfast.checkpoints import run_directory
from tamingfast.engines import CudaEngine, GPTEngine
from tamingfast.engines.request import Span
from tamingfast.ops import backends
from tamingfast.sampling import sample_grid
from tamingfast.training import prior


def normed_gpt(n_unmasked: int = 0) -> GPT:
    gpt = GPT(gpts.VOCAB, 40, n_layer=2, n_head=2, n_embd=16, n_unmasked=n_unmasked, qk_norm=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return gpt.eval()


def by_the_formula(gpt: GPT, tokens: Tensor) -> Tensor:
    """Logits (B, T, V), computed from the state dict alone."""
    w = gpt.state_dict()
    x = w["tok_emb.weight"][tokens] + w["pos_emb"][0, : tokens.shape[1]]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    for block in ("blocks.0", "blocks.1"):
        y = layer_norm(f"{block}.ln1", x)
        q, k, v = (linear(f"{block}.attn.{n}", y).unflatten(-1, (2, 8)) for n in ("query", "key", "value"))
        q, k = (
            each / (each.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{block}.attn.{name}_norm.weight"]
            for name, each in (("query", q), ("key", k))
        )
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5
        hidden = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
        seen = torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(2)
        x = x + linear(f"{block}.attn.proj", seen)
        inner = linear(f"{block}.mlp.0", layer_norm(f"{block}.ln2", x))
        x = x + linear(f"{block}.mlp.2", inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
    return layer_norm("ln_f", x) @ w["head.weight"].T


@torch.no_grad()
def test_every_way_to_compute():
    gpt, tokens = normed_gpt(), gpts.tokens(2, 30)
    expected = by_the_formula(gpt, tokens)
    assert_close(gpt(tokens)[0], expected, atol=1e-4, rtol=1e-4)
    cache = gpt.new_cache(2)
    parts = [gpt.forward_cached(tokens[:, first:last], cache, first) for first, last in ((0, 7), (7, 8), (8, 30))]
    assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)
    found = gpt.forward_ragged(tokens, gpt.new_slots(1, 2, 30), [Span(0, 0, 30)], [3])
    assert_close(found, expected[:, -3:], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(backends.native()[0] is None, reason=str(backends.native()[1]))
def test_the_cpu_engine():
    gpt, tokens = normed_gpt(), gpts.tokens(2, 30)
    engine = GPTEngine(gpt)
    engine.reserve(2, 30)
    found = engine.step([(slot, 0, row) for slot, row in enumerate(tokens.tolist())], "all").view(2, 30, -1)
    assert_close(found, by_the_formula(gpt, tokens), atol=1e-4, rtol=1e-4)
    cond = gpts.tokens(2, 3)
    grids = [
        sample_grid(gpt, cond, 7, 9, window=4, engine=name, lookahead=lookahead, dtype=dtype)
        for name, lookahead, dtype in (
            ("naive", 1, None), ("torch", None, None), ("native", 1, None), ("native", 6, None),
            ("native", 1, "int8"), ("native", 6, "int8"),
        )
    ]  # fmt: skip
    assert all(torch.equal(grid, grids[0]) for grid in grids[1:4])
    assert torch.equal(grids[4], grids[5])
    assert CudaEngine.refusal(gpt) is not None


def test_without_it_nothing_changes():
    plain, normed = (set(GPT(8, 4, n_layer=1, qk_norm=on).state_dict()) for on in (False, True))
    assert normed - plain == {"blocks.0.attn.query_norm.weight", "blocks.0.attn.key_norm.weight"}
    assert not plain - normed


def test_training(tmp_path):
    first_stage = tiny.train("vqgan", tmp_path / "vqgan", steps=2)
    config = tiny.config(tiny.PRIOR, {"pkeep": 1.0}, steps=30, learning_rate=1e-2, batch_size=4)
    config["model"]["params"]["transformer_config"]["params"]["qk_norm"] = True
    data = tiny.Noise(4)
    data.set_epoch = lambda epoch: None
    out = prior.train(config, first_stage, tmp_path / "run", device="cpu", datasets=(data, data))
    model = load_model(out)
    assert model.transformer.config.kind.qk_norm
    gain = model.transformer.blocks[0].attn.query_norm.weight
    assert gain.std() > 0, "it is trained"
    losses = [line["loss"] for line in run_directory.read_metrics(out, "train")]
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
