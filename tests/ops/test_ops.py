"""Every op against its plain-torch definition and against formulas written out here in float64."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tamingfast import ops
from tamingfast.ops import backends, reference

NEAREST_BACKENDS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not backends.status()["native"].available, reason=backends.status()["native"].reason),
    ),
]


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def distances(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared distances (N, K) in float64, from the differences."""
    codes = codebook.double()
    return torch.stack([(row - codes).square().sum(1) for row in z.double()])


def assert_nearest(index: torch.Tensor, z: torch.Tensor, codebook: torch.Tensor) -> None:
    """Each index is the first whose float64 distance is the least, up to float64 rounding."""
    assert index.dtype == torch.int64
    assert index.shape == z.shape[:1]
    if not len(z):
        return
    true = distances(z, codebook)
    chosen = true.gather(1, index[:, None])
    assert torch.all(chosen <= true.min(1, keepdim=True).values * (1 + 1e-13))
    first_equal = (codebook[index][:, None] == codebook).all(2).int().argmax(1)
    assert torch.equal(index, first_equal), "of equal codes the first must win"


@pytest.fixture(params=NEAREST_BACKENDS)
def backend(request: pytest.FixtureRequest):
    with backends.use(request.param):
        yield request.param


@pytest.mark.parametrize("d", [1, 3, 16, 256])
@pytest.mark.parametrize("k", [1, 3, 512, 1024])
@pytest.mark.parametrize("n", [0, 1, 7, 200])
def test_nearest_code_of_any_shape(backend, rng, n, k, d):
    z, codebook = normal(rng, n, d), normal(rng, k, d)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


def test_nearest_code_over_many_chunks(backend, rng):
    z, codebook = normal(rng, 5000, 8), normal(rng, 700, 8)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
def test_nearest_code_of_near_duplicates(backend, rng, offset):
    """Codes one float32 step apart, where the expanded square has no digits left."""
    base = normal(rng, 40, 24) + offset
    codebook = torch.cat([base, torch.nextafter(base, torch.tensor(math.inf)), base])
    codebook[40:80, 1:] = base[:, 1:]
    z = torch.cat([codebook, codebook + 1e-3 * normal(rng, *codebook.shape)])
    index = ops.nearest_code(z, codebook)
    assert_nearest(index, z, codebook)
    assert torch.equal(index[:80], torch.arange(80))  # each code is nearest to itself
    assert torch.equal(index[80:120], torch.arange(40))  # and a copy to its first occurrence


def test_nearest_code_with_more_rivals_than_are_kept(backend, rng):
    """Every code within the rounding error of the scan, the best anywhere among them."""
    center = 100.0 * normal(rng, 1, 64)
    codebook = center + 1e-5 * normal(rng, 333, 64)
    z = torch.cat([codebook.flip(0), center + normal(rng, 50, 64)])
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


def test_nearest_code_of_equal_codes_is_the_first(backend, rng):
    z = normal(rng, 300, 5)
    assert torch.equal(ops.nearest_code(z, normal(rng, 1, 5).repeat(200, 1)), torch.zeros(300, dtype=torch.int64))


def test_nearest_code_on_an_exact_tie_between_different_codes(backend):
    codebook = torch.tensor([[4.0], [1.0], [-1.0]]).repeat(1, 3)
    assert ops.nearest_code(torch.zeros(2, 3), codebook).tolist() == [1, 1]
    assert ops.nearest_code(torch.zeros(2, 3), codebook.flip(0)).tolist() == [0, 0]


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e15, 1e18, 1e30])
def test_nearest_code_where_float32_squares_overflow_or_vanish(backend, rng, size):
    z, codebook = size * normal(rng, 60, 16), size * normal(rng, 90, 16)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nearest_code_of_other_dtypes(rng, dtype):
    z, codebook = normal(rng, 65, 32, dtype=dtype), normal(rng, 100, 32, dtype=dtype)
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)
    assert_nearest(ops.nearest_code(z, codebook.float()), z, codebook.float())


def test_nearest_code_of_strided_inputs(backend, rng):
    z, codebook = normal(rng, 12, 40).t(), normal(rng, 70, 24)[:, ::2]
    assert not z.is_contiguous()
    assert_nearest(ops.nearest_code(z, codebook), z, codebook)


finite = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nearest_code_of_any_values(data):
    d = data.draw(st.integers(1, 5))
    vectors = st.lists(st.lists(finite, min_size=d, max_size=d), min_size=1, max_size=60)
    z, codebook = torch.tensor(data.draw(vectors)), torch.tensor(data.draw(vectors))
    # Rows repeated and moved into each other's neighbourhood are what random draws seldom give.
    codebook = torch.cat([codebook, codebook.flip(0), z])
    for name in ("native", "reference") if backends.status()["native"].available else ("reference",):
        with backends.use(name):
            assert_nearest(ops.nearest_code(z, codebook), z, codebook)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["z", "codebook"])
def test_nearest_code_names_the_argument_that_is_not_finite(backend, rng, name, bad):
    values = {"z": normal(rng, 210, 9), "codebook": normal(rng, 130, 9)}
    values[name][107, 4] = bad
    with pytest.raises(ValueError, match=rf"^{name}: got NaN or infinity"):
        ops.nearest_code(**values)


@pytest.mark.parametrize(
    ("z", "codebook", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(2, 3), ValueError, r"^z: got shape \(3,\)"),
        (torch.zeros(3, 0), torch.zeros(2, 0), ValueError, r"^z: got shape \(3, 0\)"),
        (torch.zeros(3, 2), torch.zeros(2, 3), ValueError, r"^codebook: got shape \(2, 3\), expected \(K, 2\)"),
        (torch.zeros(3, 2), torch.zeros(0, 2), ValueError, r"^codebook: got shape \(0, 2\)"),
        (torch.zeros(3, 2).int(), torch.zeros(2, 2), TypeError, r"^z: got dtype torch.int32"),
        (torch.zeros(3, 2), torch.zeros(2, 2).bool(), TypeError, r"^codebook: got dtype torch.bool"),
        ([[1.0]], torch.zeros(2, 1), TypeError, r"^z: got list"),
        (torch.zeros(3, 2), torch.zeros(2, 2, device="meta"), ValueError, r"^codebook: got device meta"),
    ],
)
def test_nearest_code_names_the_argument_that_is_wrong(z, codebook, error, message):
    with pytest.raises(error, match=message):
        ops.nearest_code(z, codebook)


def test_nearest_code_passes_the_checks_of_a_custom_op(rng):
    torch.library.opcheck(torch.ops.tamingfast.nearest_code.default, (normal(rng, 6, 4), normal(rng, 5, 4)))


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


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (7, 5)], ids=str)
def test_quantize_is_the_formula_of_the_original(backend, rng, shape):
    """Channels to the back, nearest rows, two mean squares, straight through; codes and counts beside."""
    z, codebook = normal(rng, *shape), normal(rng, 9, 5)
    ours, theirs = ([t.clone().requires_grad_() for t in (z, codebook)] for _ in range(2))
    z_q, indices, to_codes, to_latents, counts = ops.quantize(*ours)

    latents = theirs[0].movedim(1, -1)
    flat = latents.reshape(-1, 5)
    expected_indices = distances(flat.detach(), codebook).argmin(1)
    codes = theirs[1][expected_indices].view(latents.shape)
    expected_to_codes = ((codes.detach() - latents) ** 2).mean()
    expected_to_latents = ((codes - latents.detach()) ** 2).mean()
    straight = (latents + (codes - latents).detach()).movedim(-1, 1)

    assert torch.equal(indices, expected_indices)
    assert torch.equal(z_q.movedim(1, -1).reshape(-1, 5), codebook[indices]), "the codes themselves, not nearly"
    assert z_q.is_contiguous()
    torch.testing.assert_close(to_codes, expected_to_codes)
    torch.testing.assert_close(to_latents, expected_to_latents)
    assert torch.equal(counts, torch.bincount(indices, minlength=9))
    weight = normal(rng, *shape)
    actual = torch.autograd.grad((z_q * weight).sum() + to_codes + 0.25 * to_latents, ours)
    expected = torch.autograd.grad((straight * weight).sum() + expected_to_codes + 0.25 * expected_to_latents, theirs)
    for got, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, true)


def test_quantize_names_the_argument_that_is_wrong():
    with pytest.raises(ValueError, match=r"^codebook: got shape \(3, 4\), expected \(K, 5\)"):
        ops.quantize(torch.zeros(2, 5, 3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"^z: got shape \(5,\)"):
        ops.quantize(torch.zeros(5), torch.zeros(3, 5))


def test_models_compile_into_one_graph():
    from tamingfast.models.gpt import GPT
    from tamingfast.models.quantize import VectorQuantizer
    from tamingfast.models.vqgan import ResnetBlock

    first_stage = torch.nn.Sequential(ResnetBlock(in_channels=32), VectorQuantizer(7, 32, 0.25))
    prior = GPT(11, 8, n_layer=1, n_head=2, n_embd=8, n_unmasked=3)
    for model, x in ((first_stage, torch.randn(2, 32, 4, 4)), (prior, torch.randint(11, (2, 8)))):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out, expected = compiled(x)[0], model(x)[0]
        torch.testing.assert_close(out, expected)
        out.sum().backward()


def attention_by_rows(q, k, v, n_unmasked, scale):
    """The formula, query by query, in float64, with nothing masked because nothing hidden is read."""
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
    """The bound: twice the error that the definition itself makes in that type, plus one step of it."""
    q, k, v = (normal(rng, 2, 4, 40, 16, dtype=dtype) for _ in range(3))
    exact = attention_by_rows(q, k, v, n_unmasked, 0.25)
    error = (ops.causal_attention(q, k, v, n_unmasked).double() - exact).abs().max()
    own = (reference.causal_attention(q, k, v, n_unmasked).double() - exact).abs().max()
    assert error <= 2 * own + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", [None, "reference"])
@pytest.mark.parametrize("n_unmasked", [0, 3])
def test_causal_attention_drops_weights(rng, name, n_unmasked):
    """Through an identity value matrix the weights can be read: each is 0 or twice what it was."""
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


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("shape", "groups"), [((2, 64, 5, 3), 32), ((1, 6, 1, 1), 2), ((3, 4, 7, 9), 4)], ids=str)
def test_group_norm_silu_is_its_formula(rng, shape, groups, channels_last, silu):
    channels = shape[1]
    x, weight, bias = 3 * normal(rng, *shape) + 1, normal(rng, channels), normal(rng, channels)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    grouped = inputs[0].reshape(shape[0], groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped - mean).square().mean(2, keepdim=True)
    y = ((grouped - mean) / torch.sqrt(variance + 1e-6)).reshape(shape)
    y = y * inputs[1][:, None, None] + inputs[2][:, None, None]
    expected = y / (1 + torch.exp(-y)) if silu else y

    out = ops.group_norm_silu(x, weight, bias, groups=groups, silu=silu)
    torch.testing.assert_close(out.double(), expected, atol=5e-5, rtol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    ours = ops.group_norm_silu(*inputs, groups=groups, silu=silu)
    weights = normal(rng, *shape, dtype=torch.float64)
    actual_grad = torch.autograd.grad((ours * weights).sum(), inputs)
    expected_grad = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, e in zip(actual_grad, expected_grad, strict=True):
        torch.testing.assert_close(a, e, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"^x: got shape \(2, 8\)"),
        ({"groups": 3}, r"^groups: got 3"),
        ({"weight": torch.zeros(4)}, r"^weight: got shape \(4,\)"),
        ({"bias": torch.zeros(8, 1)}, r"^bias: got shape \(8, 1\)"),
    ],
)
def test_group_norm_silu_names_the_argument_that_is_wrong(change, message):
    arguments = {"x": torch.zeros(2, 8, 2, 2), "weight": torch.ones(8), "bias": torch.zeros(8), "groups": 4} | change
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(**arguments)


def test_a_backend_asked_for_runs_or_says_why_not(rng):
    z, codebook = normal(rng, 4, 3), normal(rng, 5, 3)
    q = normal(rng, 1, 1, 2, 2)
    with backends.use("native"):
        with pytest.raises(RuntimeError, match="native backend .* causal_attention: it has no kernel"):
            ops.causal_attention(q, q, q)
        with pytest.raises(RuntimeError, match=r"cannot run nearest_code: .*(float64|tamingfast\._C)"):
            ops.nearest_code(z.double(), codebook)
    with backends.use("triton"), pytest.raises(RuntimeError, match="triton backend was asked for"):
        ops.nearest_code(z, codebook)
    with pytest.raises(ValueError, match="^backend: got 'cuda'"), backends.use("cuda"):
        pass
    assert backends.requested() is None


def test_use_nests_and_ends_with_an_error():
    with backends.use("reference"):
        with backends.use(None):
            assert backends.requested() is None
        with pytest.raises(KeyError), backends.use("native"):
            raise KeyError
        assert backends.requested() == "reference"
    assert backends.requested() is None


def test_an_automatic_fallback_is_logged_once(rng, caplog):
    backends.log_fallback.cache_clear()
    z = normal(rng, 4, 3, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "tamingfast"):
        for _ in range(3):
            ops.nearest_code(z, z)
    assert len(caplog.records) == 1
    assert "float64" in caplog.text


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


def test_the_gradient_of_codes_is_the_same_every_time():
    """With several threads, too: training is to be repeatable."""
    z = torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    codebook = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = [torch.autograd.grad(ops.quantize(z, codebook)[3], codebook)[0] for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
