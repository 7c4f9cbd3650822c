"""Causal attention against its formula, written out query by query in float64."""

from __future__ import annotations

import pytest
import torch
from nearest import normal

from tamingfast import ops
from tamingfast.ops import backends, reference


def attention_by_rows(q, k, v, n_unmasked, scale):
    """The formula in float64, query by query; it reads visible keys only, so it needs no mask."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    length = q.shape[2]
    for i in range(length):
        end = max(i + 1, min(n_unmasked, length)) if i < n_unmasked else i + 1
        weights = torch.softmax(torch.einsum("bhd,bhjd->bhj", q[:, :, i], k[:, :, :end]) * scale, dim=-1)
        out[:, :, i] = torch.einsum("bhj,bhjd->bhd", weights, v[:, :, :end])
    return out


ATTENTION_SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (1, 16, 33, 48), (2, 2, 130, 64)]


@pytest.mark.parametrize("function", [ops.causal_attention, reference.causal_attention], ids=["ops", "reference"])
@pytest.mark.parametrize("n_unmasked", [0, 1, 2, 6, 500])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_causal_attention_is_its_formula(function, rng, shape, n_unmasked):
    q, k, v = (normal(rng, *shape) for _ in range(3))
    out = function(q, k, v, n_unmasked=n_unmasked)
    expected = attention_by_rows(q, k, v, n_unmasked, shape[-1] ** -0.5)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)
    scaled = function(q, k, v, n_unmasked=n_unmasked, scale=0.1)
    torch.testing.assert_close(scaled.double(), attention_by_rows(q, k, v, n_unmasked, 0.1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_unmasked", [0, 4])
def test_causal_attention_has_the_gradient_of_its_formula(rng, n_unmasked):
    inputs = [normal(rng, 1, 2, 9, 6, dtype=torch.float64).requires_grad_() for _ in range(3)]
    weight = normal(rng, 1, 2, 9, 6, dtype=torch.float64)
    expected = torch.autograd.grad((attention_by_rows(*inputs, n_unmasked, 6**-0.5) * weight).sum(), inputs)
    for name in (None, "reference"):
        with backends.use(name):
            actual = torch.autograd.grad((ops.causal_attention(*inputs, n_unmasked=n_unmasked) * weight).sum(), inputs)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_unmasked", [0, 5])
def test_causal_attention_in_half_precision_errs_as_its_formula(rng, dtype, n_unmasked):
    """The bound: twice the error of the definition in that dtype, plus one rounding step."""
    q, k, v = (normal(rng, 2, 4, 40, 16, dtype=dtype) for _ in range(3))
    exact = attention_by_rows(q, k, v, n_unmasked, 0.25)
    error = (ops.causal_attention(q, k, v, n_unmasked).double() - exact).abs().max()
    own = (reference.causal_attention(q, k, v, n_unmasked).double() - exact).abs().max()
    assert error <= 2 * own + torch.finfo(dtype).eps


@pytest.mark.parametrize("n_unmasked", [0, 5])
def test_gradients_under_autocast_on_a_cpu_err_by_the_rounding_of_their_inputs(rng, n_unmasked):
    """Only inputs, output and gradients are rounded: they are what attention in float32 gives of rounded inputs."""
    inputs = [normal(rng, 2, 4, 40, 24).requires_grad_() for _ in range(3)]
    weight = normal(rng, 2, 4, 40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.causal_attention(*inputs, n_unmasked)
    assert out.dtype == torch.bfloat16
    found = (out, *torch.autograd.grad((out * weight).sum(), inputs))
    rounded = [each.detach().bfloat16().float().requires_grad_() for each in inputs]
    exact = ops.causal_attention(*rounded, n_unmasked)
    expected = (exact, *torch.autograd.grad(exact, rounded, weight.bfloat16().float()))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.float(), theirs.bfloat16().float())
    precise = attention_by_rows(*inputs, n_unmasked, 24**-0.5)
    gradients = torch.autograd.grad((precise * weight).sum(), inputs)
    for mine, theirs in zip(found, (precise, *gradients), strict=True):
        assert (mine - theirs).norm() < 4 * torch.finfo(torch.bfloat16).eps * theirs.norm()


@pytest.mark.parametrize("name", [None, "reference"])
@pytest.mark.parametrize("n_unmasked", [0, 3])
def test_causal_attention_drops_weights(rng, name, n_unmasked):
    """With an identity as values the output is the weights: each is dropped, or doubled."""
    q = normal(rng, 1, 2, 16, 16)
    eye = torch.eye(16).expand(1, 2, 16, 16).contiguous()
    with backends.use(name):
        kept = ops.causal_attention(q, q, eye, n_unmasked)
        dropped = ops.causal_attention(q, q, eye, n_unmasked, dropout_p=0.5)
        assert torch.all(ops.causal_attention(q, q, eye, n_unmasked, dropout_p=1.0) == 0)
    zero = dropped == 0
    torch.testing.assert_close(dropped[~zero], 2 * kept[~zero])
    share = (zero & (kept > 0)).sum() / (kept > 0).sum()
    assert 0.35 < share < 0.65


def test_causal_attention_of_empty_and_strided_inputs(rng):
    assert ops.causal_attention(*[torch.zeros(0, 2, 3, 4)] * 3).shape == (0, 2, 3, 4)
    heads_last = [normal(rng, 2, 9, 3, 8).transpose(1, 2) for _ in range(3)]
    expected = attention_by_rows(*heads_last, 0, 8**-0.5)
    torch.testing.assert_close(ops.causal_attention(*heads_last).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, r"^q: got \(2, 3, 4\)"),
        ({"k": torch.zeros(1, 2, 4, 4)}, ValueError, r"^k: got \(1, 2, 4, 4\)"),
        ({"v": torch.zeros(1, 2, 3, 4).double()}, ValueError, r"^v: got .*float64"),
        ({"v": torch.zeros(1, 2, 3, 4).long()}, TypeError, r"^v: got dtype torch.int64"),
        ({"n_unmasked": -1}, ValueError, r"^n_unmasked: got -1"),
        ({"dropout_p": 1.5}, ValueError, r"^dropout_p: got 1.5"),
    ],
)
def test_causal_attention_names_the_argument_that_is_wrong(change, error, message):
    arguments = {name: torch.zeros(1, 2, 3, 4) for name in "qkv"} | change
    with pytest.raises(error, match=message):
        ops.causal_attention(**arguments)
