"""How exact encoders and decoders are in the CPU engine, on every instruction set, in wide and in narrow networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.engines import cpu_first_stage, first_stage
from tamingfast.models.autoencoder import Decoder
from tamingfast.ops import backends

NATIVE, WHY = backends.native()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=WHY)
ISAS = NATIVE.build_info()["isas"] if NATIVE is not None else []


def decoder(seed: int, **geometry) -> nn.Module:
    torch.manual_seed(seed)
    options = dict(in_channels=3, out_ch=3, attn_resolutions=(), resolution=256, double_z=False)
    return Decoder(**options | geometry).eval()


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max())


@pytest.fixture(scope="module")
def wide() -> tuple[nn.Module, Tensor, Tensor, float]:
    """The decoder of the f = 16 models, latents, the exact images, and torch's error."""
    model = decoder(0, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), z_channels=256)
    z = torch.randn(1, 256, 4, 4)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(z.double())
        return model, z, exact, worst(first_stage.run(model, z, engine="torch"), exact)


@torch.no_grad()
@pytest.mark.parametrize("isa", ISAS)
def test_a_wide_network_is_as_exact_as_torch(wide, isa, monkeypatch):
    monkeypatch.setenv("TAMINGFAST_ISA", isa)
    model, z, exact, torchs = wide
    assert worst(cpu_first_stage.FirstStageEngine(model)(z), exact) <= 3 * torchs


def smooth(seed: int) -> nn.Module:
    """A narrow decoder whose enlargement and last layer are low-pass filters, and whose branches add little.

    So the errors of the layers before average out, as they do in trained networks, and the last one's own remains.
    """
    model = decoder(seed, ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=16)
    tap = torch.tensor([1.0, 2.0, 1.0]) / 4
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or module.kernel_size != (3, 3):
            continue
        if "upsample" in name or name == "conv_out":
            mix = torch.randn(module.weight.shape[:2]) / module.in_channels**0.5
            module.weight.data = mix[:, :, None, None] * torch.outer(tap, tap)
        elif "conv2" in name:
            module.weight.data *= 0.1
    return model


@torch.no_grad()
@pytest.mark.parametrize("isa", ISAS)
def test_narrow_layers_take_no_large_tiles(isa, monkeypatch):
    """By the rule that is used the engine rounds about as torch does; by large tiles, 1.5 to 3 times as much."""
    monkeypatch.setenv("TAMINGFAST_ISA", isa)
    ratios = {(cpu_first_stage.FEW, cpu_first_stage.NARROW): [], (0, 0): []}
    for seed in range(4):
        model = smooth(seed)
        z = F.interpolate(torch.randn(1, 16, 16, 16) ** 3, (24, 24), mode="bicubic")
        exact = copy.deepcopy(model).double()(z.double())
        torchs = worst(first_stage.run(model, z, engine="torch"), exact)
        for rule, found in ratios.items():
            monkeypatch.setattr(cpu_first_stage, "FEW", rule[0])
            monkeypatch.setattr(cpu_first_stage, "NARROW", rule[1])
            found.append(worst(cpu_first_stage.FirstStageEngine(model)(z), exact) / torchs)
    used, tiles = (torch.tensor(found).log().mean().exp() for found in ratios.values())
    assert max(ratios[32, 64 * 64]) <= 1.5
    assert tiles > 1.3 * used
