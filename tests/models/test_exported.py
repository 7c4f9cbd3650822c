"""The networks themselves go through `torch.export`, with varying shapes, and through `torch.compile` as one graph."""

from __future__ import annotations

import pytest
import torch
from networks import prior
from torch import nn
from torch.export import Dim
from torch.testing import assert_close

BATCH, ROWS, COLUMNS = Dim("batch"), Dim("rows"), Dim("columns")


def parts() -> dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...], dict]]:
    """Network, shape that is traced, another one that must work, and what may vary."""
    model = prior().eval()
    stage = model.first_stage_model
    return {
        "encoder": (stage.encoder, (2, 3, 8, 12), (1, 3, 16, 6), {0: BATCH, 2: 2 * ROWS, 3: 2 * COLUMNS}),
        "decoder": (stage.decoder, (2, 4, 4, 6), (3, 4, 9, 5), {0: BATCH, 2: ROWS, 3: COLUMNS}),
        "transformer": (model.transformer, (2, 7), (1, 17), {0: BATCH, 1: Dim("length", max=17)}),
    }


def made(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 12, shape) if name == "transformer" else torch.randn(shape)


def first(result: object) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", ["encoder", "decoder", "transformer"])
def test_export(name):
    network, traced, other, varies = parts()[name]
    rest = {"embeddings": None, "targets": None} if name == "transformer" else {}
    with torch.no_grad():
        program = torch.export.export(
            network, (made(name, traced),), rest, dynamic_shapes=(varies, *[None] * len(rest))
        )
        x = made(name, other)
        assert_close(first(program.module()(x, **rest)), first(network(x)))
    assert not [
        node for node in program.graph.nodes if "tamingfast" in str(node.target)
    ]  # torch's own operations alone


@pytest.mark.parametrize("name", ["encoder", "decoder", "transformer"])
def test_one_graph(name):
    network, _, other, _ = parts()[name]
    torch._dynamo.reset()
    x = made(name, other)
    assert_close(first(torch.compile(network, fullgraph=True, backend="aot_eager")(x)), first(network(x)))
