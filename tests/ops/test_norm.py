"""Group normalisation with SiLU against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from nearest import normal

from tamingfast import ops


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
