"""The linear layers of GPT2-medium's decoding step in one CUDA graph, for one to eight rows, against torch's products.

The weights of all layers, 0.6 GB in bfloat16, are read once per run and never stay in the L2 cache, so the floor is
their size over the copy bandwidth. Eight rows should cost what one costs: lookahead rests on that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import gpu
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tamingfast.engines import CudaEngine
from tamingfast.engines.cuda.step import Step
from tamingfast.engines.cuda.weights import Norm
from tamingfast.models.gpt import GPT

ROWS = [1, 2, 4, 8]
TOLERANCE = 0.03  # of logits, relative to their norm


@functools.cache
def engine() -> CudaEngine:
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = CudaEngine(GPT(1024, 256, n_layer=24, n_head=16, n_embd=1024).eval(), "bfloat16")
    made.reserve(max(ROWS), 256)
    return made


def ours(step: Step) -> Tensor:
    for layer in step.weights.layers:
        step._linear(step.x, layer.qkv.weight, layer.qkv.bias, "store", step.qkv, layer.ln1)
        step._linear(step.joined, layer.proj.weight, layer.proj.bias, "add", step.x)
        step._linear(step.x, layer.up.weight, layer.up.bias, "gelu", step.inner, layer.ln2)
        step._linear(step.inner, layer.down.weight, layer.down.bias, "add", step.x)
    step._linear(step.x, step.weights.head, None, "store_float", step.logits, step.weights.ln_f)
    return step.logits


def torchs(step: Step) -> Tensor:
    def normed(norm: Norm) -> Tensor:
        return F.layer_norm(step.x, (step.x.shape[1],), norm.gain, norm.shift, norm.epsilon).to(step.qkv.dtype)

    for layer in step.weights.layers:
        F.linear(normed(layer.ln1), layer.qkv.weight, layer.qkv.own_bias)
        step.x += F.linear(step.joined, layer.proj.weight, layer.proj.own_bias)
        inner = F.gelu(F.linear(normed(layer.ln2), layer.up.weight, layer.up.own_bias))
        step.x += F.linear(inner, layer.down.weight, layer.down.own_bias)
    return F.linear(normed(step.weights.ln_f), step.weights.head)


def graph_of(queue: Callable[[Step], Tensor], step: Step) -> Callable[[object], None]:
    """A function that replays the work that ``queue`` queues."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        queue(step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        queue(step)
    return lambda _: graph.replay()


@pytest.mark.gpu
@pytest.mark.quick(rows=8)
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_linear_layers_of_a_step(rows):
    made = engine()
    step = made._step_of(made._parts, rows)
    x, joined = torch.randn(2, *step.x.shape, device="cuda")
    step.joined.copy_(joined)
    found = []
    for queue in (ours, torchs):
        step.x.copy_(x)
        found.append(queue(step).float())
    assert (found[0] - found[1]).norm() <= TOLERANCE * found[1].norm()
    replays = {name: graph_of(queue, step) for name, queue in (("ours", ours), ("torch", torchs))}
    timed = {name: functools.partial(gpu.milliseconds, call, [None]) for name, call in replays.items()}
    case = f"GPT2-medium, {rows} rows"
    gpu.compare("linear_layers", case, timed.pop("ours"), timed, size=made.info()["weight_bytes"])
