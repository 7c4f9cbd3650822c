"""Decoding in tiles against decoding whole, and what it needs of memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tamingfast.models import tiled
from tamingfast.models.vqgan import Decoder


def decoder(ch_mult=(1, 1, 2), seed: int = 0, attn_resolutions=(8,), **options) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(
        ch=32, out_ch=3, ch_mult=ch_mult, num_res_blocks=1, attn_resolutions=attn_resolutions, resolution=32,
        z_channels=4, **options,
    )  # fmt: skip
    for parameter in model.parameters():  # biases and norms that do something
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def latents(h: int, w: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, h, w, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 2, w)


def peak(model: Decoder, z: torch.Tensor) -> int:
    return max(tiled._peaks(tiled._units(model), z))


OPTIONS = [{}, {"ch_mult": (1, 2)}, {"give_pre_end": True}, {"resamp_with_conv": False}]


@pytest.fixture
def tiles(monkeypatch) -> list[int]:
    """Numbers of tiles of every partition made."""
    counts, partition = [], tiled._partition

    def counted(*arguments):
        regions = partition(*arguments)
        counts.append(len(regions))
        return regions

    monkeypatch.setattr(tiled, "_partition", counted)
    return counts


OPTIONS = [{}, {"ch_mult": (1, 2)}, {"give_pre_end": True}, {"resamp_with_conv": False}]


@torch.no_grad()
@pytest.mark.parametrize("two_maps", [0.0, 0.6], ids=["all units at once", "units one by one"])
@pytest.mark.parametrize("share", [0.9, 0.5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tiles_are_the_whole_image(monkeypatch, tiles, share, options, two_maps):
    monkeypatch.setattr(tiled, "TWO_MAPS", two_maps)
    model, z = decoder(**options), latents(24, 37, 2)
    out = tiled.decode(model, z, int(peak(model, z) * share))
    assert max(tiles) > 1, "it was not tiled"
    torch.testing.assert_close(out, model(z), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_statistics_of_some_tiles_come_close(monkeypatch, tiles):
    monkeypatch.setattr(tiled, "TWO_MAPS", 0.0)
    model, z = decoder(), latents(48, 64)
    whole = model(z)
    deviations = []
    for share in (0.25, 0.9):
        out = tiled.decode(model, z, int(peak(model, z) * share), exact=False)
        deviations.append(float((out - whole).square().mean().sqrt() / whole.std()))
    assert max(tiles) > 8
    assert deviations[1] < min(deviations[0], 0.05), deviations


@torch.no_grad()
def test_what_fits_is_decoded_whole(monkeypatch):
    model, z = decoder(), latents(8, 8)
    monkeypatch.setattr(tiled, "_decode_one", None)
    assert torch.equal(tiled.decode(model, z), model(z))
    assert torch.equal(tiled.decode(model, z, peak(model, z)), model(z))


def test_too_little_memory_is_said():
    model, z = decoder(), latents(24, 24)
    with pytest.raises(ValueError, match=r"needs \d+ MiB or more"):
        tiled.decode(model, z, 300_000)


@torch.no_grad()
def test_the_reach_is_that_of_the_convolutions():
    """Beyond it nothing changes, and some pixel within it does, when the normalisation is fixed."""
    units = tiled._units(decoder(attn_resolutions=()))[4:]
    reach = tiled._reach(units)

    def run(x):
        for unit in units:
            x = tiled._run(unit, x, lambda module, h: torch.tanh(h))
        return x

    x = torch.randn(1, 64, 4 * reach, 3)
    changed = x.clone()
    changed[:, :, 0] += 5
    rows = (run(x) - run(changed)).abs().amax((0, 1, 3)).nonzero().flatten()
    assert rows.max() // 4 in (reach - 1, reach)


SCRIPT = """
import resource, sys, torch
from tamingfast.models import tiled
from tamingfast.models.vqgan import Decoder
torch.set_num_threads(1)
model = Decoder(ch=32, out_ch=3, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=1, attn_resolutions=(16,), resolution=256,
                z_channels=8).eval()
tiled.decode(model, torch.randn(1, 8, 16, 16), 40 << 20)  # loads what is loaded on first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
z = torch.randn(1, 8, int(sys.argv[1]), int(sys.argv[2]))
out = tiled.decode(model, z, int(sys.argv[3]))
assert out.isfinite().all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_stays_within_the_budget():
    """An image whose maps are four times the budget, of a decoder with the f = 16 geometry."""
    budget = 200 << 20
    # glibc keeps what is freed below 32 MiB; maps are larger under budgets of gigabytes, which this stands for.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", SCRIPT, "48", "64", str(budget)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(run.stdout) < 1.1 * budget
