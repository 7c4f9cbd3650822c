"""Kernels under other default dtypes and devices, autocast and inference mode: the same bits."""

from __future__ import annotations

import pytest
import torch
from surroundings import SURROUNDINGS, alike

from tamingfast import ops
from tamingfast.ops import backends

pytestmark = [pytest.mark.usefixtures("on_triton", "poisoned")]
if not backends.interpreted():
    pytestmark.append(pytest.mark.gpu)


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_results_do_not_depend_on_what_is_set_around_a_call(rng, device, around):
    z, codebook = torch.randn(37, 5, generator=rng).to(device), torch.randn(20, 5, generator=rng).to(device)
    q, k, v = torch.randn(3, 1, 2, 19, 16, generator=rng).to(device)
    x, weight, bias = torch.randn(2, 32, 5, 3, generator=rng).to(device), *torch.randn(2, 32, generator=rng).to(device)

    def results() -> tuple:
        found = ops.nearest_code(z, codebook), ops.group_norm_silu(x, weight, bias)
        if around == "autocast":  # asks training for another type of these
            return found
        return *found, ops.quantize(z, codebook), ops.causal_attention(q, k, v, n_unmasked=3)

    expected = results()
    with SURROUNDINGS[around]():
        alike(expected, results())
