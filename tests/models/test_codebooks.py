"""Quantisers of today against independent formulas, and what their exported weights hold."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tamingfast import ops
from tamingfast.checkpoints.weights import folded
from tamingfast.models.codebooks import FSQ, LFQ, CosineQuantizer, SimVQ, TableQuantizer, rotated
from tamingfast.models.quantize import VectorQuantizer

SHAPE = (2, 4, 3, 5)


def rows(x: torch.Tensor) -> torch.Tensor:
    """(B, D, *) -> (N, D) in float64."""
    return x.detach().movedim(1, -1).reshape(-1, x.shape[1]).double()


def scattered(quantizer: VectorQuantizer) -> VectorQuantizer:
    """The quantiser with codes as far apart as the latents."""
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


class TestRotation:
    def test_the_gradient_is_rotated_and_scaled(self):
        z = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
        q, g = torch.randn(2, *SHAPE, dtype=torch.float64)
        out = rotated(z, q)
        assert torch.equal(out, q)
        out.backward(g)
        for e, code, upper, found in zip(rows(z), rows(q), rows(g), rows(z.grad), strict=True):
            # In the plane of both unit vectors a and b: the rotation by their angle, written with a basis of it.
            a, b = e / e.norm(), code / code.norm()
            cos = a @ b
            side = (b - cos * a) / (b - cos * a).norm()
            sin = side @ b
            plane = torch.stack((a, side), 1)
            turn = torch.stack((torch.stack((cos, -sin)), torch.stack((sin, cos))))
            rotation = torch.eye(4, dtype=torch.float64) + plane @ (turn - torch.eye(2)) @ plane.T
            assert_close(rotation @ a, b)
            assert_close(torch.linalg.det(rotation), torch.ones((), dtype=torch.float64))
            assert_close(found, code.norm() / e.norm() * rotation.T @ upper)

    def test_where_a_rotation_is_not_defined(self):
        z = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 1.0]], requires_grad=True)
        out = rotated(z, torch.tensor([[1.0, 1.0], [-1.0, -2.0], [0.0, 0.0]]))
        out.sum().backward()
        assert out.isfinite().all() and z.grad.isfinite().all()

    def test_only_the_gradient_differs(self):
        plain, turned = (scattered(TableQuantizer(9, 4, gradient=name)) for name in ("straight_through", "rotation"))
        turned.load_state_dict(plain.state_dict())
        z = [torch.randn(SHAPE).requires_grad_(), None]
        z[1] = z[0].detach().clone().requires_grad_()
        weights = torch.randn(SHAPE)
        found = []
        for quantizer, x in zip((plain, turned), z, strict=True):
            z_q, loss, (_, _, indices) = quantizer(x)
            (z_q * weights).sum().backward()
            found.append((z_q, loss, indices))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(z[0].grad, weights) and not torch.allclose(z[1].grad, weights)


class TestRestart:
    def test_unused_codes_become_latents(self):
        quantizer = TableQuantizer(6, 4, restart_below=0.5, restart_decay=0.5).train()
        z = torch.randn(SHAPE)
        with torch.no_grad():
            quantizer.embedding.weight.fill_(100.0)
            quantizer.embedding.weight[:2] = rows(z)[:2].float()
        usage, weight = np.full(6, 1 / 6), quantizer.embedding.weight.detach().clone()
        for _ in range(4):
            dead = usage < 0.5 / 6
            usage[dead] = 1 / 6
            _, _, (_, _, indices) = quantizer(z)
            counts = np.bincount(indices.numpy(), minlength=6)
            usage = 0.5 * usage + 0.5 * counts / counts.sum()
            assert_close(quantizer.usage.double(), torch.tensor(usage), rtol=1e-5, atol=1e-7)
            now = quantizer.embedding.weight.detach()
            assert torch.equal(now[~dead], weight[~dead])
            for code in now[dead]:
                assert (rows(z).float() == code).all(1).any()
            weight = now.clone()
        assert (weight < 100).all() and quantizer.usage.min() > 0

    def test_nothing_restarts_outside_training(self):
        quantizer = TableQuantizer(6, 4, restart_below=0.5).eval()
        quantizer.usage.zero_()
        before = quantizer.embedding.weight.detach().clone()
        quantizer(torch.randn(SHAPE))
        assert torch.equal(quantizer.embedding.weight, before) and not quantizer.usage.any()

    def test_two_passes_and_a_backward_pass(self):
        quantizer = TableQuantizer(6, 4, restart_below=0.9, restart_decay=0.0).train()
        quantizer(torch.randn(SHAPE))
        z_q, loss, _ = quantizer(torch.randn(SHAPE, requires_grad=True))
        (z_q.sum() + loss).backward()
        assert quantizer.embedding.weight.grad.isfinite().all()


class TestCosine:
    def test_by_formula(self):
        quantizer = scattered(CosineQuantizer(11, 4))
        z = torch.randn(SHAPE, requires_grad=True)
        z_q, loss, (_, _, indices) = quantizer(z)
        codes = quantizer.embedding.weight.detach().double()
        codes = codes / codes.norm(dim=1, keepdim=True)
        similarity = rows(z) @ codes.T / rows(z).norm(dim=1, keepdim=True)
        assert torch.equal(indices, similarity.argmax(1))
        assert_close(rows(z_q), codes[indices], rtol=1e-6, atol=1e-6)
        # |a - b|^2 = 2 - 2 cos for unit vectors; the mean is over four channels, the factor that of both terms.
        best = similarity.gather(1, indices[:, None])
        assert_close(loss.double(), 1.25 * (2 - 2 * best).mean() / 4, rtol=1e-5, atol=1e-6)

    def test_a_plain_codebook_gives_the_same_tokens(self):
        quantizer = scattered(CosineQuantizer(50, 4))
        plain = VectorQuantizer(50, 4, 0.25)
        plain.load_state_dict(folded(quantizer, quantizer.state_dict()))
        z = torch.randn(8, 4, 16, 16) * torch.rand(8, 1, 16, 16) * 100
        assert torch.equal(plain(z)[2][2], quantizer(z)[2][2])
        assert_close(plain(z)[0], quantizer(z)[0])


class TestSimVQ:
    def test_by_formula(self):
        quantizer = SimVQ(11, 4)
        z = torch.randn(SHAPE, requires_grad=True)
        z_q, loss, (_, _, indices) = quantizer(z)
        weight, bias = (value.detach().double() for value in quantizer.projection.parameters())
        codes = quantizer.embedding.weight.double() @ weight.T + bias
        assert torch.equal(indices, torch.cdist(rows(z), codes).argmin(1))
        assert_close(rows(z_q), codes[indices], rtol=1e-5, atol=1e-6)
        error = (rows(z) - codes[indices]).square().mean()
        assert_close(loss.double(), 1.25 * error, rtol=1e-5, atol=1e-6)
        loss.backward()
        # Of the codebook term, a quarter of the loss here: its gradient for the map, by the chain rule.
        upper = -2 * (rows(z) - codes[indices]) / z.numel()
        expected = 0.25 * upper.T @ quantizer.embedding.weight[indices].double()
        assert_close(quantizer.projection.weight.grad.double(), expected, rtol=1e-4, atol=1e-6)
        assert [name for name, _ in quantizer.named_parameters()] == ["projection.weight", "projection.bias"]

    def test_it_starts_from_latents(self):
        quantizer, latents = SimVQ(11, 4), torch.randn(11, 4)
        quantizer.start(latents)
        assert torch.equal(quantizer.codes(), latents)


LEVELS = [(8, 5, 5, 5), (3, 3), (2, 4, 7), (16,)]


class TestFSQ:
    @pytest.mark.parametrize("levels", LEVELS)
    def test_the_table_holds_all_combinations(self, levels):
        table = FSQ(math.prod(levels), len(levels), levels).codes()
        axes = [[(k - level // 2) / (level // 2) for k in range(level)] for level in levels]
        expected = [list(reversed(row)) for row in itertools.product(*reversed(axes))]  # the first changes fastest
        assert_close(table, torch.tensor(expected))

    @pytest.mark.parametrize("levels", LEVELS)
    def test_tokens_are_the_nearest_entries_of_the_table(self, levels):
        quantizer = FSQ(math.prod(levels), len(levels), levels)
        z = 3 * torch.randn(2, len(levels), 16, 16, generator=torch.Generator().manual_seed(0))
        z_q, loss, (_, _, indices) = quantizer(z)
        scale = torch.tensor([level // 2 for level in levels], dtype=torch.float64)
        bounded = torch.stack([bound(rows(z)[:, i], level) for i, level in enumerate(levels)], 1)
        # Nearest where each axis counts in its own levels, as rounding does.
        assert torch.equal(ops.nearest_code(bounded, quantizer.codes() * scale), indices)
        assert torch.equal(rows(z_q).float(), quantizer.codes()[indices]) and loss == 0
        assert len(indices.unique()) > math.prod(levels) // 5

    def test_all_levels_are_reached_and_no_other(self):
        for level in range(2, 12):
            quantizer = FSQ(level, 1, [level])
            z = torch.linspace(-50, 50, 20001).view(1, 1, 1, -1)
            assert quantizer(z)[2][2].unique().tolist() == list(range(level))

    def test_the_gradient_is_that_of_the_bound(self):
        z = torch.randn(2, 2, 3, 3, requires_grad=True)
        weights = torch.randn(2, 2, 3, 3)
        (FSQ(20, 2, [4, 5])(z)[0] * weights).sum().backward()
        other = z.detach().double().requires_grad_()
        parts = torch.stack((bound(other[:, 0], 4) / 2, bound(other[:, 1], 5) / 2), 1)
        (parts * weights).sum().backward()
        assert_close(z.grad, other.grad.float())

    @pytest.mark.parametrize(
        ("n_embed", "embed_dim", "levels"), [(19, 2, [4, 5]), (20, 3, [4, 5]), (4, 2, [4, 1]), (1, 0, [])]
    )
    def test_levels_that_do_not_fit(self, n_embed, embed_dim, levels):
        with pytest.raises(ValueError, match="^levels: got"):
            FSQ(n_embed, embed_dim, levels)


def bound(z: torch.Tensor, level: int) -> torch.Tensor:
    """The paper's listing 1 for one channel."""
    half = (level - 1) * (1 + 1e-3) / 2
    offset = 0.0 if level % 2 else 0.5
    return torch.tanh(z + math.atanh(offset / half)) * half - offset


class TestLFQ:
    def test_tokens_are_the_nearest_entries_of_the_table(self):
        quantizer = LFQ(32, 5)
        z = torch.randn(2, 5, 8, 8)
        z[0, :, 0, 0] = 0.0  # a tie goes to the lowest index
        z_q, _, (_, _, indices) = quantizer(z)
        assert torch.equal(ops.nearest_code(rows(z), quantizer.codes()), indices) and indices[0] == 0
        assert torch.equal(rows(z_q).float(), quantizer.codes()[indices])

    def test_the_loss_by_formula(self):
        quantizer = LFQ(8, 3, beta=0.5, entropy_weight=0.2, temperature=0.7)
        z = torch.randn(2, 3, 4, 4, requires_grad=True)
        z_q, loss, _ = quantizer(z)
        table = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
        shares = torch.softmax(-(torch.cdist(rows(z), table) ** 2) / 0.7, 1)
        each = torch.distributions.Categorical(shares).entropy().mean()
        whole = torch.distributions.Categorical(shares.mean(0)).entropy()
        commitment = (rows(z) - rows(z_q)).square().mean()
        assert_close(loss.double(), 0.5 * commitment + 0.2 * (each - whole), rtol=1e-5, atol=1e-6)
        weights = torch.randn_like(z_q)
        (gradient,) = torch.autograd.grad((z_q * weights).sum(), z)
        assert torch.equal(gradient, weights)

    def test_the_entropy_is_least_where_latents_decide_for_all_codes(self):
        quantizer = LFQ(8, 3)
        spread = quantizer.codes().T.reshape(1, 3, 2, 4)
        assert_close(quantizer.entropy(spread), torch.tensor(-math.log(8)))
        assert quantizer.entropy(torch.ones(1, 3, 2, 4)) == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(quantizer.entropy(torch.zeros(1, 3, 2, 4)), torch.zeros(()), rtol=0, atol=1e-5)

    def test_numbers_that_do_not_fit(self):
        with pytest.raises(ValueError, match="^n_embed: got 9, expected 2"):
            LFQ(9, 3)


QUANTIZERS = {
    "table": lambda: scattered(TableQuantizer(16, 4, gradient="rotation", restart_below=0.1)),
    "cosine": lambda: scattered(CosineQuantizer(16, 4)),
    "simvq": lambda: SimVQ(16, 4),
    "lfq": lambda: LFQ(16, 4),
    "fsq": lambda: FSQ(16, 4, [2, 2, 2, 2]),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_exported_weights_are_a_codebook(name):
    quantizer = QUANTIZERS[name]().eval()
    exported = folded(quantizer, quantizer.state_dict())
    assert list(exported) == ["embedding.weight"] and exported["embedding.weight"].shape == (16, 4)
    plain, again = VectorQuantizer(16, 4, 0.25), QUANTIZERS[name]()
    plain.load_state_dict(exported)
    again.load_state_dict(dict(exported))
    z, tokens = torch.randn(4, 4, 8, 8), torch.arange(16)
    z_q, _, (_, _, indices) = quantizer(z)
    for other in (plain, again.eval()):
        assert_close(other.get_codebook_entry(tokens, None), quantizer.get_codebook_entry(tokens, None))
        if other is again or quantizer.folds_to_plain:
            assert torch.equal(other(z)[2][2], indices)
            assert_close(other(z)[0], z_q)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_all_kinds_take_half_precision_latents(name):
    quantizer = QUANTIZERS[name]().train()
    z = torch.randn(2, 4, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    z_q, loss, (_, _, indices) = quantizer(z)
    (z_q.float().sum() + loss).backward()
    assert z_q.isfinite().all() and indices.shape == (32,) and z.grad.isfinite().all()
