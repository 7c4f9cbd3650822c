"""Fused attention: ours and torch's flash and cuDNN as the op runs them, torch's others; forward, and with backward."""

from __future__ import annotations

import functools

import gpu
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tamingfast import ops
from tamingfast.ops import backends, reference

BY_NAME = {"flash": "flash", "cudnn": "cudnn", "torch's choice": "sdpa"}
GEOMETRY = {"GPT2-small": (16, 48), "GPT2-medium": (16, 64)}  # heads and their width in the paper


@functools.cache
def flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def ours(n_unmasked: int, backend: str = "triton"):
    def run(q, k, v):
        with backends.use(backend):
            return ops.causal_attention(q, k, v, n_unmasked=n_unmasked)

    return run


def by_name(length: int, n_unmasked: int) -> dict:
    """The other implementations that `ops.attention.AUTOMATIC` can choose on a GPU."""
    return {name: ours(n_unmasked, backend) for name, backend in BY_NAME.items()}


def others(length: int, n_unmasked: int) -> dict:
    def efficient(q, k, v):
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    if n_unmasked == 0:
        return {"memory-efficient": efficient}
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(_batch, _head, row, column):
        return (row >= column) | ((row < n_unmasked) & (column < n_unmasked))

    blocks = create_block_mask(visible, None, None, length, length, device="cuda")
    return {"FlexAttention": lambda q, k, v: flex()(q, k, v, block_mask=blocks)}


def forward(attention, inputs: tuple) -> torch.Tensor:
    with torch.no_grad():
        return attention(*inputs[0].unbind(0))


def step(attention, inputs: tuple) -> torch.Tensor:
    projection, weight = inputs
    return torch.autograd.grad(attention(*projection.unbind(0)), projection, weight)[0]


def milliseconds(run, attention, inputs: list, small: tuple, exact: torch.Tensor) -> float:
    """A relative error above 1e-2, about twice flash attention's, fails."""
    error = (run(attention, small).double() - exact).norm() / exact.norm()
    assert error < 1e-2, f"relative error {error:.1e}"
    return gpu.milliseconds(functools.partial(run, attention), inputs)


@pytest.mark.quick(prefix=True)
@pytest.mark.parametrize("prefix", [False, True], ids=["causal", "prefix"])
def test_attention_on_a_cpu(compare, prefix):
    """Forward in float32 against the original's matrix products and against torch's attention with a mask."""
    length, (heads, width), n_unmasked = 512, GEOMETRY["GPT2-small"], 256 if prefix else 0
    q, k, v = torch.randn(3, 1, heads, length, width)
    mask = reference.attention_mask(length, n_unmasked, q.device)
    ours = functools.partial(ops.causal_attention, q, k, v, n_unmasked=n_unmasked)
    rivals = {
        "original": functools.partial(reference.causal_attention, q, k, v, n_unmasked=n_unmasked),
        "torch, mask": functools.partial(F.scaled_dot_product_attention, q, k, v, mask),
    }
    for rival in rivals.values():
        torch.testing.assert_close(ours(), rival())
    compare(ours, rivals, "cpu", flop=4 * heads * width * int(mask.sum()), size=4 * q.nbytes)


@pytest.mark.gpu
@pytest.mark.quick(model="GPT2-small", length=256, batch=8)
@pytest.mark.parametrize("prefix", [False, True], ids=["causal", "prefix"])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("length", [256, 512, 1024])
@pytest.mark.parametrize("model", GEOMETRY)
def test_attention(model, length, batch, prefix):
    if prefix and batch != 8:
        pytest.skip("prefixes are timed at batch 8 only, because FlexAttention compiles for every shape")
    flex.cache_clear()  # else one compiled function collects shapes until it reaches torch's recompilation limit
    torch._dynamo.reset()
    heads, width = GEOMETRY[model]
    n_unmasked = length // 2 if prefix else 0
    elements = batch * heads * length * width

    def draw() -> tuple:
        q = torch.randn(3, batch, length, heads, width, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
        return q.requires_grad_(), torch.randn(batch, length, heads, width, device="cuda", dtype=q.dtype).transpose(
            1, 2
        )

    inputs = [draw() for _ in range(gpu.copies_past_cache(2 * 4 * elements))]
    few = slice(0, 1)  # of the batch: float64 scores of the whole batch would not fit
    true_inputs = (inputs[0][0][:, few].detach().double().requires_grad_(), inputs[0][1][few].double())
    definition = functools.partial(reference.causal_attention, n_unmasked=n_unmasked)
    small = (inputs[0][0][:, few].detach().requires_grad_(), inputs[0][1][few])
    pairs = length * (length + 1) / 2 + n_unmasked * max(n_unmasked - 1, 0) / 2
    case = f"{model}, T {length}, batch {batch}{', prefix' if prefix else ''}"
    # What the op can choose from comes first, before the others are compiled.
    for suffix, group in (("", by_name), (", others", others)):
        attentions = {"ours": ours(n_unmasked)} | group(length, n_unmasked)
        for name, run, products, passes in (("forward", forward, 2, 4), ("forward + backward", step, 7, 12)):
            exact = run(definition, true_inputs)
            timed = {
                key: functools.partial(milliseconds, run, attention, inputs, small, exact)
                for key, attention in attentions.items()
            }
            host = {"ours": gpu.host_milliseconds(functools.partial(run, attentions["ours"]), inputs)}
            gpu.compare(
                "causal_attention", f"{case}, {name}{suffix}", timed.pop("ours"), timed, host=host,
                flop=products * 2 * batch * heads * width * pairs, size=2 * passes * elements,
                target=None if run is forward else 1.5 if prefix else 1.0,
            )  # fmt: skip
