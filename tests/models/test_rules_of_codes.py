"""How codes are chosen: by distance, cosine, dot product or sign."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tamingfast.errors import UserError
from tamingfast.models.codebooks import LFQ
from tamingfast.models.lookup_free import DepthToSpace
from tamingfast.models.quantize import RULES, VectorQuantizer


def scores(z: torch.Tensor, codebook: torch.Tensor, rule: str) -> torch.Tensor:
    """What the rule makes as large as possible, in float64: (N, K)."""
    z, codebook = z.double(), codebook.double()
    if rule == "nearest":
        return -torch.cdist(z, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    if rule in ("unit", "cosine"):
        z, codebook = (y / y.norm(dim=1, keepdim=True) for y in (z, codebook))
    return z @ codebook.T


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_the_best_entry_is_chosen(rule, scale):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(300, 5, beta=0.25, rule=rule)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.randn(300, 5) * torch.rand(300, 1) * scale)
    z = torch.randn(2, 5, 9, 7) * scale
    quant, _, (_, _, indices) = quantizer(z)
    flat, codebook = z.movedim(1, -1).reshape(-1, 5), quantizer.embedding.weight.detach()
    found = scores(flat, codebook, rule)
    best = found.max(1).values
    chosen = found.gather(1, indices[:, None])[:, 0]
    assert ((best - chosen) <= 2e-6 * found.abs().max()).all() and (indices == found.argmax(1)).float().mean() > 0.99
    expected = F.normalize(codebook, dim=1)[indices] if rule == "unit" else codebook[indices]
    torch.testing.assert_close(quant.movedim(1, -1).reshape(-1, 5), expected)
    torch.testing.assert_close(quantizer.get_codebook_entry(indices, None), expected)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_go_straight_through_and_reach_the_codebook(rule):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(12, 4, beta=0.25, rule=rule)
    z = torch.randn(1, 4, 3, 3, requires_grad=True)
    quant, loss, _ = quantizer(z)
    (quant.square().sum() + loss).backward()
    assert z.grad.abs().sum() > 0 and quantizer.embedding.weight.grad.abs().sum() > 0


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="^codes: got 'best', expected one of nearest, unit, cosine, dot$"):
        VectorQuantizer(4, 2, beta=0.25, rule="best")


@pytest.mark.parametrize(("lowest_first", "tokens"), [(True, [0b011, 0b100]), (False, [0b110, 0b001])])
def test_signs_are_bits(lowest_first, tokens):
    quantizer = LFQ(8, 3, entropy_weight=0.0, lowest_first=lowest_first, table=False)
    assert not quantizer.state_dict()
    z = torch.tensor([[0.1, 0.2, -0.3], [0.0, -5.0, 1.0]]).T.reshape(1, 3, 1, 2)
    quant, _, (_, _, indices) = quantizer(z)
    assert indices.tolist() == tokens
    torch.testing.assert_close(quant[0, :, 0].T, torch.tensor([[1.0, 1, -1], [-1, -1, 1]]))
    torch.testing.assert_close(quantizer.get_codebook_entry(indices, (1, 1, 2, 3)), quant)
    with pytest.raises(ValueError, match="embed_dim: got 63"):
        LFQ(2**63, 63)


def test_depth_to_space_orders_pixels_before_channels():
    layer = DepthToSpace(2)
    layer.conv = torch.nn.Identity()
    x = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert layer(x)[0].tolist() == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
