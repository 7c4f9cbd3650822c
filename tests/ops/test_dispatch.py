"""Which implementation runs, the message if one cannot, and that torch.compile keeps a single graph."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from nearest import assert_nearest, normal

from tamingfast import ops
from tamingfast.ops import backends, dispatch, info


def test_a_backend_asked_for_runs_or_says_why_not(rng):
    z, codebook = normal(rng, 4, 3), normal(rng, 5, 3)
    with (
        backends.use("native"),
        pytest.raises(
            RuntimeError,
            match=r"^backend: got 'native', which cannot run nearest_code \(.*(float64|tamingfast\._C)",
        ),
    ):
        ops.nearest_code(z.double(), codebook)
    with backends.use("triton"), pytest.raises(RuntimeError, match="got 'triton', which cannot run"):
        ops.nearest_code(z, codebook)
    with (
        pytest.raises(
            ValueError, match="^backend: got 'cuda', expected one of triton, native, sdpa, flash, cudnn, reference"
        ),
        backends.use("cuda"),
    ):
        pass
    assert backends.requested() is None


@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_a_setting_binds_only_the_ops_that_the_backend_has(rng, backend):
    """A whole forward pass works under any setting; ops that the backend lacks give what they give without it."""
    if not backends.status()[backend].available:
        pytest.skip(backends.status()[backend].reason)
    q, z, codebook = normal(rng, 1, 2, 6, 4), normal(rng, 7, 3), normal(rng, 5, 3)
    x, weight, bias = normal(rng, 2, 8, 3, 3), normal(rng, 8), normal(rng, 8)

    def run():
        norm = ops.group_norm_silu(x, weight, bias, groups=4)
        return ops.causal_attention(q, q, q, 3), norm, *ops.quantize(z, codebook), ops.nearest_code(z, codebook)

    free = run()
    with backends.use(backend):
        bound = run()
    assert all(torch.equal(a, b) for a, b in zip(free, bound, strict=True))


@pytest.mark.parametrize(("backend", "fused"), [(None, True), ("sdpa", True), ("native", True), ("reference", False)])
def test_attention_is_torchs_own_unless_the_definition_is_asked_for(rng, backend, fused, monkeypatch):
    q, calls = normal(rng, 1, 1, 4, 4), []
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **kw: calls.append(a) or own(*a, **kw))
    with backends.use(backend):
        ops.causal_attention(q, q, q)
    assert bool(calls) == fused


def test_every_op_is_listed_with_its_backends():
    listed = info.implementations()
    assert set(listed) == set(ops.__all__)
    for names in listed.values():
        assert set(names) <= set(backends.PROBES)
        assert names[-1] == "reference", "which runs everywhere"
    text = info.describe()
    assert "[causal_attention, group_norm_silu, nearest_code, quantize]" in text
    assert "[causal_attention]" in text


def test_use_nests_and_ends_with_an_error():
    with backends.use("reference"):
        with backends.use(None):
            assert backends.requested() is None
        with pytest.raises(KeyError), backends.use("native"):
            raise KeyError
        assert backends.requested() == "reference"
    assert backends.requested() is None


def test_an_automatic_fallback_is_logged_once(rng, caplog):
    dispatch._log_once.cache_clear()
    z = normal(rng, 4, 3, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "tamingfast"):
        for _ in range(3):
            ops.nearest_code(z, z)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("nearest_code runs on the reference backend instead of native: ")


def test_ops_compile_into_one_graph(rng):
    """Codes, straight-through gradient, attention with a prefix, and normalisation, with no graph break."""
    q, codebook, x = normal(rng, 1, 2, 6, 4).requires_grad_(), normal(rng, 9, 4), normal(rng, 2, 8, 3, 3)

    def step(q, codebook, x):
        flat = q.reshape(-1, 4)
        quant = flat + (codebook[ops.nearest_code(flat, codebook)] - flat).detach()
        mixed = ops.causal_attention(q, q, quant.view_as(q), n_unmasked=3)
        return mixed.sum() + ops.group_norm_silu(x, torch.ones(8), torch.zeros(8), groups=4).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager_grad = torch.autograd.grad(step(q, codebook, x), q)[0]
    value = compiled(q, codebook, x)
    torch.testing.assert_close(value, step(q, codebook, x))
    torch.testing.assert_close(torch.autograd.grad(value, q)[0], eager_grad)


def test_models_compile_into_one_graph():
    from tamingfast.models.autoencoder import ResnetBlock
    from tamingfast.models.gpt import GPT
    from tamingfast.models.quantize import VectorQuantizer

    first_stage = torch.nn.Sequential(ResnetBlock(in_channels=32), VectorQuantizer(7, 32, 0.25))
    prior = GPT(11, 8, n_layer=1, n_head=2, n_embd=8, n_unmasked=3)
    for model, x in ((first_stage, torch.randn(2, 32, 4, 4)), (prior, torch.randint(11, (2, 8)))):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out, expected = compiled(x)[0], model(x)[0]
        torch.testing.assert_close(out, expected)
        out.sum().backward()


@pytest.mark.gpu
def test_ops_on_a_gpu_equal_those_on_the_cpu(rng):
    z, codebook = normal(rng, 500, 16), normal(rng, 130, 16)
    assert_nearest(ops.nearest_code(z.cuda(), codebook.cuda()).cpu(), z, codebook)
    q, k, v = (normal(rng, 2, 2, 20, 16) for _ in range(3))
    for n_unmasked in (0, 7):
        out = ops.causal_attention(q.cuda(), k.cuda(), v.cuda(), n_unmasked).cpu()
        torch.testing.assert_close(out, ops.causal_attention(q, k, v, n_unmasked), atol=2e-3, rtol=0)
    x = normal(rng, 2, 8, 4, 4)
    out = ops.group_norm_silu(x.cuda(), torch.ones(8).cuda(), torch.zeros(8).cuda(), groups=4).cpu()
    torch.testing.assert_close(out, F.silu(F.group_norm(x, 4, eps=1e-6)), atol=1e-5, rtol=1e-5)
