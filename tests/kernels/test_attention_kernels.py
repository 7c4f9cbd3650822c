"""Fused attention against its plain-torch definition in float64, forward and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tamingfast import ops
from tamingfast.ops import backends, reference

pytestmark = [pytest.mark.usefixtures("on_triton", "poisoned")]
if not backends.interpreted():
    pytestmark.append(pytest.mark.gpu)

# Batch, heads, length, head width, prefix.
SHAPES = {
    "one position": (1, 1, 1, 16, 0),
    "two positions, all unmasked": (2, 1, 2, 24, 2),
    "shorter than a tile": (2, 3, 23, 16, 0),
    "paper's 48-wide heads": (1, 2, 70, 48, 0),
    "88-wide heads": (1, 1, 66, 88, 5),
    "widest heads": (1, 1, 40, 128, 0),
    "narrow heads": (1, 2, 33, 3, 4),
    "whole tiles": (1, 1, 128, 16, 0),
    "one past a tile": (1, 1, 129, 16, 0),
    "prefix inside a tile": (1, 2, 100, 16, 37),
    "prefix of whole tiles": (1, 1, 150, 16, 64),
    "prefix one past a tile": (1, 1, 150, 16, 129),
    "prefix of everything": (1, 1, 90, 16, 90),
    "prefix longer than the sequence": (1, 1, 70, 16, 500),
}
LARGE = {
    "GPT2-medium": (2, 16, 512, 64, 256),
    "longest": (1, 2, 2048, 48, 300),
}
DTYPES = [torch.float32, torch.bfloat16]  # float16 differs by no line of the kernel
if not backends.interpreted():
    SHAPES |= LARGE
    DTYPES.append(torch.float16)


def fused(rng, batch, heads, length, width, dtype, device) -> torch.Tensor:
    """A projection (B, T, 3, H, D), whose q, k and v are views."""
    return torch.randn(batch, length, 3, heads, width, generator=rng).to(device, dtype).requires_grad_()


def split(projection: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return projection.permute(2, 0, 3, 1, 4).unbind(0)


def run(function, projection, weight, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    out = function(*split(projection), *args, **kwargs)
    return out.detach().double(), torch.autograd.grad(out, projection, weight.to(out.dtype))[0].double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(rng, device, shape, dtype):
    """The bound: twice the error of torch's own attention in that dtype, plus two roundings.

    In float32 also 4 eps √T: torch's own may be more exact than T sums in another order need to be.
    """
    *sizes, n_unmasked = shape
    projection = fused(rng, *sizes, dtype, device)
    weight = torch.randn(sizes, generator=rng).to(device, dtype)
    exact = run(reference.causal_attention, projection.detach().double().requires_grad_(), weight, n_unmasked)
    mask = reference.attention_mask(sizes[2], n_unmasked, device)
    own = run(F.scaled_dot_product_attention, projection, weight, mask)
    ours = run(ops.causal_attention, projection, weight, n_unmasked)
    eps = torch.finfo(dtype).eps
    for name, got, torchs, true in zip(("output", "gradient"), ours, own, exact, strict=True):
        bound = 2 * distance(torchs, true) + 2 * eps * float(true.abs().max())
        bound += 4 * eps * sizes[2] ** 0.5 if dtype == torch.float32 else 0.0
        assert distance(got, true) <= bound, f"{name}: {distance(got, true):.2e}, allowed {bound:.2e}"


def test_the_output_has_the_layout_of_the_projection(rng, device):
    out = ops.causal_attention(*split(fused(rng, 2, 3, 9, 16, torch.float32, device)))
    assert out.transpose(1, 2).is_contiguous(), "the heads of one position must lie side by side for the projection"


def heads(rng, layout: str) -> torch.Tensor:
    """float32 (2, 2, 20, 16) of some layout."""
    if layout == "width not contiguous":
        return torch.randn(2, 2, 16, 20, generator=rng).transpose(2, 3)
    if layout == "one head for all":
        return torch.randn(1, 1, 20, 16, generator=rng).expand(2, 2, 20, 16)
    if layout == "every other column":
        return torch.randn(2, 2, 20, 32, generator=rng)[..., ::2]
    return torch.randn(2, 2, 20, 16, generator=rng)


@pytest.mark.parametrize(
    "layouts",
    [
        ("width not contiguous", "one head for all", "one head for all"),
        ("every other column", "contiguous", "width not contiguous"),
        ("one head for all", "every other column", "contiguous"),
    ],
    ids=str,
)
def test_any_strides(rng, device, layouts):
    """The kernels demand a unit last stride, which the launcher provides."""
    inputs = [heads(rng, layout).to(device).requires_grad_() for layout in layouts]
    weight = heads(rng, "width not contiguous").to(device)
    out = ops.causal_attention(*inputs, 3)
    exact = reference.causal_attention(*(value.double() for value in inputs), 3)
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=0)
    gradients = (torch.autograd.grad(value, inputs, weight.to(value.dtype)) for value in (out, exact))
    for got, true in zip(*gradients, strict=True):
        torch.testing.assert_close(got, true, atol=2e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.7])
def test_any_scale(rng, device, scale):
    projection = fused(rng, 1, 2, 20, 16, torch.float32, device)
    weight = torch.randn(1, 2, 20, 16, generator=rng).to(device)
    exact = run(reference.causal_attention, projection.detach().double().requires_grad_(), weight, 4, 0.0, scale)
    for got, true in zip(run(ops.causal_attention, projection, weight, 4, 0.0, scale), exact, strict=True):
        torch.testing.assert_close(got, true, atol=1e-5, rtol=0)


def test_large_scores_do_not_overflow(rng, device):
    projection = (100 * fused(rng, 1, 1, 40, 16, torch.float32, device)).detach()
    exact = reference.causal_attention(*split(projection.double()))
    torch.testing.assert_close(ops.causal_attention(*split(projection)).double(), exact, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("length", "n_unmasked"), [(16, 0), (50, 34)])
def test_dropout_drops_its_share_and_its_gradient_drops_the_same(rng, device, length, n_unmasked):
    """With an identity as values the output is the weights, which show the mask."""
    width = 64
    projection = fused(rng, 2, 2, length, width, torch.float32, device)
    q, k, _ = split(projection)
    eye = torch.eye(length, width, device=device).expand(2, 2, length, width)

    def dropped(value: torch.Tensor, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return ops.causal_attention(q, k, value, n_unmasked, dropout_p=0.3)

    weights = ops.causal_attention(q, k, eye, n_unmasked)[..., :length].double()
    mask = (dropped(eye, 1) != 0)[..., :length]
    visible = reference.attention_mask(length, n_unmasked, device).expand_as(mask)
    assert not mask[~visible].any()
    drawn = mask[visible]
    sigma = (0.3 * 0.7 / drawn.numel()) ** 0.5
    assert abs(float(drawn.double().mean()) - 0.7) < 4 * sigma
    again = dropped(eye, 1)
    torch.testing.assert_close(again[..., :length].double(), weights * mask / 0.7, atol=1e-6, rtol=0)
    assert (dropped(eye, 2) != again).any()
    # Every head of every image draws its own mask.
    assert not any(
        torch.equal(mask[a], mask[b]) for a, b in itertools.combinations(itertools.product((0, 1), repeat=2), 2)
    )

    def explicit(q, k, v):
        scores = (q @ k.transpose(2, 3) * width**-0.5).masked_fill(~visible, float("-inf"))
        return (torch.softmax(scores, 3) * mask / 0.7) @ v

    weight = torch.randn(2, 2, length, width, generator=rng).to(device)
    exact = run(explicit, projection.detach().double().requires_grad_(), weight)
    torch.manual_seed(1)
    ours = run(ops.causal_attention, projection, weight, n_unmasked, 0.3)
    for got, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, true, atol=5e-6, rtol=0)


def test_dropping_everything_gives_zero(rng, device):
    assert torch.all(ops.causal_attention(*split(fused(rng, 1, 1, 20, 16, torch.float32, device)), 0, 1.0) == 0)


def test_autocast_casts_the_inputs(rng, device):
    q, k, v = split(fused(rng, 1, 1, 20, 16, torch.float32, device))
    with torch.autocast(device.type, torch.bfloat16):
        assert ops.causal_attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (1, 2, 0, 4)], ids=str)
def test_empty_inputs(device, shape):
    empty = torch.zeros(shape, device=device, requires_grad=True)
    out = ops.causal_attention(empty, empty, empty)
    assert out.shape == shape
    out.sum().backward()


def test_what_the_kernel_cannot_do_is_refused_with_the_reason(device):
    wide, double = torch.zeros(1, 1, 2, 130, device=device), torch.zeros(1, 1, 2, 4, device=device).double()
    with pytest.raises(RuntimeError, match="cannot run causal_attention .*130 wide"):
        ops.causal_attention(wide, wide, wide)
    with pytest.raises(RuntimeError, match="cannot run causal_attention .*float64"):
        ops.causal_attention(double, double, double)


@pytest.mark.parametrize(("dropout", "transposed"), [(0.0, False), (0.5, False), (0.0, True)])
def test_registered_as_torch_expects(rng, device, dropout, transposed):
    from tamingfast.kernels import causal_attention as kernel

    q, k, v = split(fused(rng, 1, 1, 5, 16, torch.float32, device))
    if transposed:
        q, v = (value.transpose(2, 3).contiguous().transpose(2, 3) for value in (q, v))
    seed = torch.zeros(1, dtype=torch.int64, device=device) if dropout else None
    leaves = [value.detach().requires_grad_() for value in (q, k, v)]
    torch.library.opcheck(kernel._forward, (*leaves, seed, 0, dropout, 0.25))
