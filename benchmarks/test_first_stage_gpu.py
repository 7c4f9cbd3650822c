"""Tokens to pictures on a GPU: the paper's f=16 decoder by number format, memory format and implementation of its ops.

The floor is the decoder's operations at the measured rate of bfloat16 matrix products.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import gpu
import pytest
import torch

from tamingfast.engines import layers
from tamingfast.models.vqgan import VQModel
from tamingfast.ops import backends

pytestmark = pytest.mark.gpu
SIDE = 16  # of the grid of tokens
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of pictures, relative to the norm of those in float32


def first_stage(dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> VQModel:
    torch.manual_seed(0)
    ddconfig = dict(
        double_z=False, z_channels=256, resolution=16 * SIDE, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 1, 2, 2, 4],
        num_res_blocks=2, attn_resolutions=[SIDE], dropout=0.0,
    )  # fmt: skip
    model = VQModel(ddconfig, {"target": "torch.nn.Identity"}, n_embed=1024, embed_dim=256).eval()
    return model.to("cuda", dtype).to(memory_format=FORMATS[layout])


def decode(model: VQModel, ops: str | None, tokens: torch.Tensor) -> torch.Tensor:
    codes = model.quantize.embedding.weight[tokens].permute(0, 3, 1, 2)
    with backends.use(ops) if ops else nullcontext():
        return model.decode(codes.to(next(model.parameters()).dtype))


def by_options(tokens: list[torch.Tensor], exact: torch.Tensor) -> float:
    """float32 weights, under torch's autocast."""
    model = first_stage()
    options = dict(engine="torch", dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert (model.decode_grid(tokens[0], **options) - exact).norm() <= TOLERANCE[torch.bfloat16] * exact.norm()
    return gpu.milliseconds(functools.partial(model.decode_grid, **options), tokens)


def flop(model: VQModel) -> float:
    shapes = layers.shapes(model.decoder.layers(), (256, SIDE, SIDE))
    return 2.0 * sum(map(layers.work, model.decoder.layers(), shapes[1:]))


@pytest.mark.quick(batch=1)
@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def test_first_stage(batch):
    tokens = [torch.randint(1024, (batch, SIDE, SIDE), device="cuda") for _ in range(4)]
    exact = decode(first_stage(), "reference", tokens[0])

    def milliseconds(dtype: torch.dtype, layout: str, ops: str | None) -> float:
        model = first_stage(dtype, layout)
        got = decode(model, ops, tokens[0]).float()
        assert (got - exact).norm() <= TOLERANCE[dtype] * exact.norm()
        return gpu.milliseconds(functools.partial(decode, model, ops), tokens)

    ways = {
        f"{str(dtype).removeprefix('torch.')}, {layout}, {ops or 'ours'}": functools.partial(
            milliseconds, dtype, layout, ops
        )
        for dtype in TOLERANCE
        for layout in FORMATS
        for ops in (None, "reference")
    }
    ways["options of decode_grid, ours"] = functools.partial(by_options, tokens, exact)
    ours = ways.pop("bfloat16, channels last, ours")
    work = flop(first_stage()) * batch
    times = gpu.compare("pictures", f"f=16, 256x256, batch {batch}", ours, ways, flop=work)
    print(f"\n  {1e3 * batch / times['ours']:.0f} pictures/s", times)
