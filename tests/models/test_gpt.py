"""The GPT with its caches, and the functions of the original that sample from it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tamingfast.models.gpt import GPT, sample, sample_with_past, top_k_logits, top_k_top_p_filtering


def test_the_mask_that_other_code_reads():
    mask = GPT(9, 5, n_layer=1, n_head=1, n_embd=4, n_unmasked=2).blocks[0].attn.mask
    assert mask[0, 0].tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1] * 5]


class TestCache:
    @pytest.mark.parametrize("n_unmasked", [0, 4])
    @pytest.mark.parametrize("chunks", [[10], [4, 1, 1, 4], [5, 5]])
    @torch.no_grad()
    def test_pieces_equal_the_whole(self, n_unmasked, chunks):
        model = GPT(9, 12, n_layer=2, n_head=2, n_embd=16, n_unmasked=n_unmasked).eval()
        torch.nn.init.normal_(model.pos_emb)
        tokens = torch.randint(0, 9, (3, 10))
        cache, start, pieces = model.new_cache(3, 10), 0, []
        for length in chunks:
            pieces.append(model.forward_cached(tokens[:, start : start + length], cache, start))
            start += length
        assert_close(torch.cat(pieces, 1), model(tokens)[0])

    def test_errors(self):
        model = GPT(9, 12, n_layer=1, n_head=1, n_embd=4, n_unmasked=4)
        cache = model.new_cache(1, 6)
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match="start: got 2, expected 0 or at least 4"):
            model.forward_cached(tokens, cache, 2)
        with pytest.raises(ValueError, match="positions up to 6, expected at most 5"):
            model.forward_cached(tokens, cache, 5)
        with pytest.raises(ValueError, match="at most block_size=12"):
            model.new_cache(1, 13)
        with pytest.raises(ValueError, match="n_embd: got 16, expected a multiple of n_head=3"):
            GPT(9, 12, n_head=3, n_embd=16)


class TestPast:
    """The functions that the original's fast sampling script uses."""

    @torch.no_grad()
    def test_pieces_equal_the_whole(self):
        model = GPT(9, 12, n_layer=2, n_head=2, n_embd=16).eval()
        torch.nn.init.normal_(model.pos_emb)
        tokens = torch.randint(0, 9, (3, 7))
        logits, _, present = model.forward_with_past(tokens[:, :4])
        assert present.shape == (2, 2, 3, 2, 4, 8)
        past, pieces = [present], [logits]
        for n in range(4, 7):
            logits, loss, present = model.forward_with_past(tokens[:, n : n + 1], past=past, past_length=n)
            past.append(present)
            pieces.append(logits)
        assert loss is None
        assert_close(torch.cat(pieces, 1), model(tokens)[0])
        with pytest.raises(ValueError, match="past_length: got 3, expected 7"):
            model.forward_with_past(tokens[:, :1], past=past, past_length=3)

    def test_embeddings_come_first(self):
        model = GPT(9, 12, n_layer=1, n_head=2, n_embd=16).eval()
        tokens = torch.randint(0, 9, (2, 5))
        logits, loss, _ = model.forward_with_past(
            tokens[:, 2:], embeddings=model.tok_emb(tokens[:, :2]), targets=tokens
        )
        assert_close(logits, model(tokens)[0])
        assert_close(loss, model(tokens, targets=tokens)[1])

    def test_both_samplers_are_greedy_alike(self):
        model = GPT(9, 12, n_layer=2, n_head=2, n_embd=16).eval()
        x = torch.randint(0, 9, (2, 3))
        cached = sample_with_past(x, model, steps=6, sample_logits=False)
        assert_close(torch.cat((x, cached), 1), sample(model, x, steps=6))

    def test_filters_may_keep_all(self):
        logits = torch.randn(3, 9)
        assert torch.equal(top_k_logits(logits, 9), logits) and torch.equal(top_k_logits(logits, 10**9), logits)
        assert torch.equal(top_k_top_p_filtering(logits, 0, 1.0), logits)
        assert top_k_logits(logits, 2).isfinite().sum(-1).tolist() == [2, 2, 2]

    def test_filters_are_the_original_s(self):
        model = GPT(9, 12, n_layer=1, n_head=2, n_embd=16).eval()
        x = torch.zeros(500, 1, dtype=torch.int64)
        drawn = sample_with_past(x, model, steps=1, top_k=2, top_p=0.99)
        best = model(x[:1])[0][0, -1].topk(2).indices
        assert set(drawn.unique().tolist()) <= set(best.tolist())
