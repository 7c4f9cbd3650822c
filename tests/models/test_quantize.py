"""Quantisers beyond the recorded outputs of the reference: losses, gradients, remaps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tamingfast.models.quantize import EMAVectorQuantizer, GumbelQuantize, OneHotVectorQuantizer, VectorQuantizer


@pytest.mark.parametrize("legacy", [True, False])
def test_loss_and_gradients_by_formula(legacy):
    quantizer = VectorQuantizer(5, 3, beta=0.25, legacy=legacy)
    z = torch.randn(2, 3, 4, 6, requires_grad=True)
    z_q, loss, (_, _, indices) = quantizer(z)
    flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    codes = quantizer.embedding.weight.detach()
    assert_close(indices, torch.cdist(flat.double(), codes.double()).argmin(1))
    mse = ((flat - codes[indices]) ** 2).mean()
    assert_close(loss.detach(), 1.25 * mse)
    on_z, on_codes = (1.0, 0.25) if legacy else (0.25, 1.0)
    (z_q.sum() * 0 + loss).backward()
    difference = (flat - codes[indices]) * 2 / flat.numel()
    assert_close(z.grad.permute(0, 2, 3, 1).reshape(-1, 3), on_z * difference)
    by_code = torch.zeros_like(codes).index_add_(0, indices, -difference * on_codes)
    assert_close(quantizer.embedding.weight.grad, by_code)


def test_straight_through():
    quantizer = VectorQuantizer(5, 3, beta=0.25)
    z = torch.randn(1, 3, 2, 2, requires_grad=True)
    weights = torch.randn(1, 3, 2, 2)
    (quantizer(z)[0] * weights).sum().backward()
    assert_close(z.grad, weights)


def test_shapes_of_indices():
    z = torch.randn(2, 3, 4, 6)
    assert VectorQuantizer(5, 3, 0.25)(z)[2][2].shape == (48,)
    assert VectorQuantizer(5, 3, 0.25, sane_index_shape=True)(z)[2][2].shape == (2, 4, 6)


@pytest.mark.parametrize("unknown", ["random", "extra", 1])
def test_remap(tmp_path, unknown):
    used = np.array([7, 2, 9])
    np.save(tmp_path / "used.npy", used)
    quantizer = VectorQuantizer(10, 3, 0.25, remap=tmp_path / "used.npy", unknown_index=unknown)
    assert quantizer.re_embed == (4 if unknown == "extra" else 3)
    new = quantizer.remap_to_used(torch.tensor([[7, 2, 9, 0]]))
    assert new[0, :3].tolist() == [0, 1, 2]
    last = int(new[0, 3])
    assert {"extra": last == 3, "random": 0 <= last < 3, 1: last == 1}[unknown]
    assert quantizer.unmap_to_all(torch.tensor([[0, 1, 2]])).tolist() == [used.tolist()]
    entries = quantizer.get_codebook_entry(torch.tensor([0, 1, 2, 0]), (1, 2, 2, 3))
    assert_close(entries[0, :, 0, 1], quantizer.embedding.weight[2])


def test_the_original_s_first_version_returns_more():
    quantizer = OneHotVectorQuantizer(5, 3, 0.25)
    _, _, (perplexity, encodings, indices) = quantizer(torch.randn(2, 3, 4, 4))
    assert indices.shape == (32, 1) and encodings.shape == (32, 5)
    assert_close(encodings.argmax(1), indices[:, 0])
    share = torch.bincount(indices[:, 0], minlength=5) / 32
    assert_close(perplexity, torch.exp(-torch.special.xlogy(share, share).sum()))


def test_gumbel_s_arguments_are_refused():
    with pytest.raises(ValueError, match="GumbelQuantize"):
        VectorQuantizer(5, 3, 0.25)(torch.randn(1, 3, 2, 2), temp=0.5)


def test_ema_codebook_moves_to_the_means():
    quantizer = EMAVectorQuantizer(2, 3, beta=0.25, decay=0.5)
    before = quantizer.embedding.weight.clone()
    z = torch.randn(2, 3, 4, 4)
    indices = quantizer(z)[2][2]
    flat = z.permute(0, 2, 3, 1).reshape(-1, 3)
    counts = torch.bincount(indices, minlength=2).float()
    sums = torch.zeros(2, 3).index_add_(0, indices, flat)
    size, average = 0.5 * counts, 0.5 * before + 0.5 * sums
    smoothed = (size + 1e-5) / (size.sum() + 2e-5) * size.sum()
    assert_close(quantizer.embedding.weight.detach(), average / smoothed[:, None])
    moved = quantizer.embedding.weight.clone()
    quantizer.eval()(z)
    assert_close(quantizer.embedding.weight, moved)


def test_gumbel_kl_and_remap(tmp_path):
    np.save(tmp_path / "used.npy", np.array([4, 1]))
    quantizer = GumbelQuantize(3, 4, 6, kl_weight=0.1, remap=tmp_path / "used.npy")
    z = torch.randn(2, 3, 5, 5)
    z_q, loss, (_, _, indices), logits = quantizer(z, return_logits=True)
    assert logits.shape == (2, 2, 5, 5) and set(indices.unique().tolist()) <= {0, 1}
    q = logits.softmax(1)
    assert_close(loss, 0.1 * (q * (q * 6 + 1e-10).log()).sum(1).mean())
    assert_close(z_q, quantizer.get_codebook_entry(indices.reshape(-1), (2, 5, 5, 4)))
