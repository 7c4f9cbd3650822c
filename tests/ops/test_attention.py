"""Causal attention against its formula, written out query by query in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from nearest import normal

from tamingfast import ops
from tamingfast.ops import attention, backends, dispatch, reference

# torch's kernels by name: on a CPU the calls are the same as on a GPU, but torch computes them by other kernels.
IN_TWO_CALLS = {"flash": attention._flash, "cudnn": attention._cudnn}


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


def in_two_calls(name, q, k, v, n_unmasked=0, dropout_p=0.0, scale=None):
    return IN_TWO_CALLS[name](q, k, v, n_unmasked, dropout_p, scale)


@pytest.mark.parametrize("name", IN_TWO_CALLS)
@pytest.mark.parametrize("n_unmasked", [0, 1, 2, 6, 32, 33, 500])
def test_a_prefix_in_two_calls_is_its_formula_with_its_gradient(name, rng, n_unmasked):
    heads_last = [normal(rng, 2, 33, 3, 16, dtype=torch.float64).requires_grad_() for _ in range(3)]
    weight = normal(rng, 2, 3, 33, 16, dtype=torch.float64)
    for scale in (None, 0.3):
        out = in_two_calls(name, *(value.transpose(1, 2) for value in heads_last), n_unmasked, 0.0, scale)
        expected = attention_by_rows(
            *(value.transpose(1, 2) for value in heads_last), n_unmasked, 0.25 if scale is None else scale
        )
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        gradients = [torch.autograd.grad((value * weight).sum(), heads_last) for value in (out, expected)]
        for actual, exact in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, exact, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", IN_TWO_CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prefix_in_two_calls_errs_as_the_definition(name, rng, dtype):
    q, k, v = (normal(rng, 2, 4, 16, 40, dtype=dtype).transpose(2, 3) for _ in range(3))  # no unit stride at the end
    exact = attention_by_rows(q, k, v, 5, 0.25)
    out = in_two_calls(name, q, k, v, 5)
    assert out.dtype == dtype
    own = (reference.causal_attention(q, k, v, 5).double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 2 * own + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", IN_TWO_CALLS)
@pytest.mark.parametrize("n_unmasked", [0, 7, 40])
def test_two_calls_drop_their_share_of_visible_weights(name, rng, n_unmasked):
    """With an identity as values the output is the weights, each dropped or scaled."""
    q = normal(rng, 4, 2, 40, 64)
    eye = torch.eye(40, 64).expand(4, 2, 40, 64)
    kept = in_two_calls(name, q, q, eye, n_unmasked)[..., :40]
    dropped = in_two_calls(name, q, q, eye, n_unmasked, 0.25)[..., :40]
    visible = reference.attention_mask(40, n_unmasked).expand_as(kept)
    zero = dropped == 0
    assert zero[~visible].all()
    torch.testing.assert_close(dropped[~zero], kept[~zero] / 0.75)
    for rows in (slice(0, max(n_unmasked, 1)), slice(n_unmasked, 40)):
        drawn = zero[..., rows, :][visible[..., rows, :]].double()
        assert drawn.numel() < 50 or abs(float(drawn.mean()) - 0.25) < 4 * (0.25 * 0.75 / drawn.numel()) ** 0.5


@pytest.mark.parametrize("name", IN_TWO_CALLS)
def test_two_calls_give_rows_in_the_layout_of_the_projection(name, rng):
    q, k, v = normal(rng, 2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4)
    assert in_two_calls(name, q, k, v, 4).transpose(1, 2).is_contiguous()


def test_cudnn_refuses_where_torch_must_be_deterministic(rng):
    q = normal(rng, 1, 1, 4, 4)
    assert attention._cudnn_refusal(q, q, q, 0, 0.0, None) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in attention._cudnn_refusal(q, q, q, 0, 0.0, None)
    finally:
        torch.use_deterministic_algorithms(False)


def test_flash_compiles_into_one_graph(rng):
    q = normal(rng, 1, 2, 12, 16).requires_grad_()
    with backends.use("flash"):
        compiled = torch.compile(lambda x: ops.causal_attention(x, x, x, 5), fullgraph=True, backend="aot_eager")
        out = ops.causal_attention(q, q, q, 5)
        torch.testing.assert_close(compiled(q), out)
        (expected,) = torch.autograd.grad(out.square().sum(), q)
        torch.testing.assert_close(torch.autograd.grad(compiled(q).square().sum(), q)[0], expected)


def test_the_table_decides_the_automatic_choice(rng, monkeypatch):
    """By mask and gradient; a name asked for counts more."""
    ran = []
    names = ("sdpa", "flash", "reference")
    implementations = tuple(
        dispatch.Implementation(name, lambda *args, name=name: ran.append(name) or args[0]) for name in names
    )
    monkeypatch.setattr(
        attention, "CAUSAL_ATTENTION", dataclasses.replace(attention.CAUSAL_ATTENTION, implementations=implementations)
    )
    for key, name in {("prefix", "inference"): "flash", ("causal", "training"): "reference"}.items():
        monkeypatch.setitem(attention.AUTOMATIC, key, ("triton", name, "sdpa"))
    q = normal(rng, 1, 1, 4, 4)
    for n_unmasked in (0, 1, 2):
        for value in (q, q.clone().requires_grad_()):
            ops.causal_attention(value, q, q, n_unmasked)
    with backends.use("reference"):
        ops.causal_attention(q, q, q, 2)
    assert ran == ["sdpa", "reference"] * 2 + ["flash", "sdpa", "reference"]


def test_the_table_names_what_there_is_and_ends_with_what_refuses_nothing():
    known = {each.backend: each.refusal for each in attention.CAUSAL_ATTENTION.implementations}
    assert set(attention.AUTOMATIC) == set(itertools.product(("causal", "prefix"), ("inference", "training")))
    for order in attention.AUTOMATIC.values():
        assert set(order) <= set(known)
        assert known[order[-1]] is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", IN_TWO_CALLS)
@pytest.mark.parametrize(("n_unmasked", "dropout_p"), [(0, 0.0), (100, 0.0), (300, 0.0), (100, 0.2)])
def test_torchs_kernels_by_name_on_a_gpu(name, rng, n_unmasked, dropout_p):
    q, k, v = (normal(rng, 2, 3, 300, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    with backends.use(name):
        out = ops.causal_attention(q, k, v, n_unmasked, dropout_p)
        found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        with pytest.raises(RuntimeError, match=f"got '{name}', which cannot run causal_attention .*float32"):
            ops.causal_attention(q.float(), k.float(), v.float())
    exact = reference.causal_attention(*(value.double() for value in (q, k, v)), n_unmasked)
    expected = torch.autograd.grad(exact.square().sum(), (q, k, v))
    for got, true in zip((out, *found), (exact, *expected), strict=True):
        assert got.isfinite().all()
        assert dropout_p or (got.double() - true).norm() < 2e-2 * true.norm()


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
