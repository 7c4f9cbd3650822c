"""LlamaGPT in torch: the public code's logits and tokens, and its caches."""

from __future__ import annotations

import llamagen
import pytest
import torch
from torch.testing import assert_close

from tamingfast import LlamaGPT, load_model
from tamingfast.engines.request import Span
from tamingfast.models.llama_gpt import turns_of
from tamingfast.ops import backends
from tamingfast.sampling import sample_grid

ENGINES = ("naive", "torch", *(["native"] if backends.native()[0] else []))


@pytest.fixture(scope="module")
def published() -> LlamaGPT:
    return load_model(llamagen.checkpoint())


@torch.no_grad()
def test_logits(published):
    found = llamagen.outputs()
    labels = found["class_labels"]
    for name, of in (("cond", labels), ("null", torch.full_like(labels, int(found["null_label"])))):
        logits, loss = published(found["tokens"], of)
        assert loss is None
        assert_close(logits, found[f"logits_{name}"], atol=1e-4, rtol=0)
    begun = torch.cat((published.class_tokens(labels), found["tokens"]), dim=1)
    assert_close(published(begun)[0], found["logits_cond"], atol=1e-4, rtol=0)


def test_positions():
    assert_close(turns_of(5, 16), llamagen.outputs()["freqs_cis"], atol=0, rtol=0)


@pytest.mark.parametrize("lookahead", [1, 4, None])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", ["1.0", "1.5"])
def test_greedy_tokens_under_guidance(published, engine, lookahead, scale):
    found = llamagen.outputs()
    cond = published.class_tokens(found["class_labels"])
    grids = sample_grid(
        llamagen.prior(published), cond, 5, 5, window=5, greedy=True, cfg=float(scale), engine=engine,
        lookahead=lookahead,
    )  # fmt: skip
    assert torch.equal(grids.flatten(1), found[f"greedy_cfg_{scale}"])


@torch.no_grad()
def test_caches_give_the_logits_of_a_whole_pass():
    gpt = llamagen.tiny_llama()
    tokens = torch.cat((gpt.class_tokens(torch.tensor([1, 5])), torch.randint(llamagen.CODES, (2, 20))), dim=1)
    expected = gpt(tokens)[0]
    cache = gpt.new_cache(2)
    parts = [gpt.forward_cached(tokens[:, first:last], cache, first) for first, last in ((0, 3), (3, 4), (4, 21))]
    assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)
    slots = gpt.new_slots(3, 2, 21)
    gpt.forward_ragged(tokens[:, :5], slots, [Span(2, 0, 5)])
    fed = torch.cat((tokens[:, 5:9], tokens[:, :7]), dim=1)
    found = gpt.forward_ragged(fed, slots, [Span(2, 5, 4), Span(0, 0, 7)], [2, 1])
    assert_close(found, expected[:, [7, 8, 6]], atol=1e-4, rtol=1e-4)


def test_a_cast_does_not_round_positions():
    gpt = llamagen.tiny_llama().to(torch.bfloat16)
    assert gpt.turns.dtype == torch.float32
    assert gpt(torch.tensor([[llamagen.CODES, 1, 2]]))[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 24}, "block_size: got 24, expected a square"),
        ({"n_embd": 26}, "n_head: got 2 for n_embd=26, expected heads of a width divisible by 4"),
        ({"n_classes": 0}, "n_classes: got 0"), ({"hidden": 0}, "hidden: got 0"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(arguments, message):
    sizes = {"vocab_size": 8, "n_classes": 2, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
    with pytest.raises(ValueError, match=f"^{message}"):
        LlamaGPT(**sizes | arguments)


def test_sequences_that_are_too_long():
    gpt = llamagen.tiny_llama()
    with pytest.raises(ValueError, match="^length: got 26 tokens, expected at most block_size=25"):
        gpt(torch.zeros(1, 26, dtype=torch.int64))
    with pytest.raises(ValueError, match="^idx: got positions up to 3, expected at most 2"):
        gpt.forward_cached(torch.zeros(1, 2, dtype=torch.int64), gpt.new_cache(1, 3), 2)
