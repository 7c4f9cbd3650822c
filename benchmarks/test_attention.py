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

GEOMETRY = {"GPT2-small": (16, 48), "GPT2-medium": (16, 64)}  # heads and their width in the paper


@functools.cache
def flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


#: The implementations that `ops.attention.AUTOMATIC` chooses from on a GPU; "ours" is the kernel of this package.
BY_NAME = {"ours": "triton", "flash": "flash", "cudnn": "cudnn", "torch's choice": "sdpa"}


def implementations(n_unmasked: int) -> dict:
    def named(backend):
        def run(q, k, v):
            with backends.use(backend):
                return ops.causal_attention(q, k, v, n_unmasked=n_unmasked)

        return run

    return {name: named(backend) for name, backend in BY_NAME.items()}


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


def available(runs: dict, inputs: tuple, exact: tuple) -> dict:
    """The implementations that run here; a relative error above 1e-2, about twice flash attention's, fails."""
    found = {}
    for name, attention in runs.items():
        try:
            results = forward(attention, inputs), step(attention, inputs)
        except RuntimeError as error:
            if name == "ours":
                raise
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        for got, true in zip(results, exact, strict=True):
            error = (got.double() - true).norm() / true.norm()
            assert error < 1e-2, f"{name}: relative error {error:.1e}"
        found[name] = attention
    return found


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
    exact = forward(definition, true_inputs), step(definition, true_inputs)
    small = (inputs[0][0][:, few].detach().requires_grad_(), inputs[0][1][few])
    pairs = length * (length + 1) / 2 + n_unmasked * max(n_unmasked - 1, 0) / 2
    measured: dict[str, dict] = {}
    # Ours are recorded before the others are compiled.
    for suffix, group in (("", implementations(n_unmasked)), (", others", others(length, n_unmasked))):
        runs = available(group, small, exact)
        for name, run, products, passes in (("forward", forward, 2, 4), ("forward + backward", step, 7, 12)):
            bound = {key: functools.partial(run, attention) for key, attention in runs.items()}
            times = measured.get(name, {}) | {key: gpu.milliseconds(call, inputs) for key, call in bound.items()}
            measured.setdefault(name, {"ours": times["ours"]})
            gpu.record(
                "causal_attention", f"{model}, T {length}, batch {batch}{', prefix' if prefix else ''}, {name}{suffix}",
                times, [key for key in runs if key != "ours"],
                flop=products * 2 * batch * heads * width * pairs, size=2 * passes * elements,
                target=None if run is forward else 1.5 if prefix else 1.0,
                host={key: gpu.host_milliseconds(call, inputs) for key, call in bound.items()},
            )  # fmt: skip
