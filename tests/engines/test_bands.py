"""Encoding and decoding in bands of rows against the whole image, and the memory and disk space that they need."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tamingfast import UserError, VQModel
from tamingfast.engines import bands, feature_maps, layers
from tamingfast.models.autoencoder import Decoder, Encoder
from tamingfast.ops.backends import use

GEOMETRY = dict(
    ch=32, in_channels=3, out_ch=3, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=32,
    z_channels=4, double_z=False,
)  # fmt: skip
OPTIONS = [{}, {"ch_mult": (1, 2, 1, 2), "attn_resolutions": ()}, {"resamp_with_conv": False}]


def network(kind: type = Decoder, **options) -> nn.Module:
    torch.manual_seed(0)
    model = kind(**GEOMETRY | options)
    for parameter in model.parameters():  # biases and norms that do something
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(kind: type, count: int = 1) -> torch.Tensor:
    """An odd number of columns, and for the encoder an odd number of rows too."""
    channels, height, width = (4, 24, 37) if kind is Decoder else (3, 97, 150)
    x = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))
    return x * torch.linspace(0.2, 2, width) + 3


def peak(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that the network needs at its peak when it runs whole."""
    shapes = layers.shapes(model.layers(), tuple(x.shape[1:]))
    return 4 * max(map(bands._peak, model.layers(), shapes, shapes[1:]))


@torch.no_grad()
@pytest.mark.parametrize("place", ["in memory", "in files"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [Decoder, Encoder])
def test_bands_are_the_whole_image(monkeypatch, place, options, kind):
    model, x, made = network(kind, **options), inputs(kind, 2), []
    new = feature_maps.FeatureMaps.new

    def in_files(store, shape, last=False):
        made.append(new(store, shape, last) if last else feature_maps.ScratchMap(store, shape, 4 * math.prod(shape)))
        return made[-1]

    if place == "in files":
        monkeypatch.setattr(feature_maps.FeatureMaps, "new", in_files)
    seen = []
    out = bands.run(model, x, int(peak(model, x) * 0.8), lambda *progress: seen.append(progress))
    assert seen == sorted(seen) and len(seen) > 20 and seen[-1][0] == pytest.approx(seen[-1][1], rel=1e-6)
    assert (len(made) > 4) == (place == "in files")
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_maps_beyond_memory_go_to_files(monkeypatch, tmp_path):
    model, z = network(give_pre_end=True, attn_resolutions=()), inputs(Decoder)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    sizes, init = [], feature_maps.ScratchMap.__init__
    monkeypatch.setattr(
        feature_maps.ScratchMap, "__init__", lambda self, *given: (sizes.append(given[2]), init(self, *given))[1]
    )
    for share, expected in ((0.9, 0), (0.6, 1)):
        torch.testing.assert_close(bands.run(model, z, int(peak(model, z) * share)), model(z), rtol=1e-4, atol=1e-5)
        assert bool(sizes) == bool(expected)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_first_stages_give_the_same_tokens_and_images():
    torch.manual_seed(0)
    loss = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    stage = VQModel(GEOMETRY, loss, n_embed=32, embed_dim=4).eval()
    x = torch.nn.functional.interpolate(torch.randn(1, 3, 12, 12), (96, 120), mode="bilinear")
    tokens = stage.encode_grid(x)
    assert tokens.shape == (1, 24, 30) and len(tokens.unique()) > 3
    assert torch.equal(tokens, stage.encode(x)[2][2].view(1, 24, 30))
    assert torch.equal(stage.encode_grid(x, peak(stage.encoder, x) // 2), tokens)
    image = stage.decode_grid(tokens)
    assert torch.equal(image, stage.decode_code(tokens))
    z = torch.empty(1, 4, 24, 30)
    for backend in ("reference", None):  # torch, and whatever is chosen here
        with use(backend):
            in_bands = stage.decode_grid(tokens, peak(stage.decoder, z) // 2)
            torch.testing.assert_close(in_bands, image, rtol=1e-4, atol=5e-5)


@torch.no_grad()
def test_means_far_from_zero_keep_their_variance():
    """A plain sum of squares in float32 would lose it."""
    model, z = network(attn_resolutions=()), inputs(Decoder)
    model.conv_in.bias += 1000
    for block in (model.mid.block_1, model.mid.block_2, model.mid.attn_1):
        block.register_forward_hook(lambda block, given, out: given[0])  # they would bring it back to their scale
    for shortcut in (module for name, module in model.named_modules() if name.endswith("nin_shortcut")):
        shortcut.weight.fill_(1 / 64)
    expected = model.double()(z.double())
    whole, banded = (
        float((out - expected).abs().max()) for out in (model.float()(z), bands.run(model, z, peak(model, z) // 3))
    )
    assert banded < 3 * whole + 1e-6


@torch.no_grad()
def test_what_fits_runs_whole(monkeypatch):
    model, z = network(), inputs(Decoder)
    monkeypatch.setattr(bands, "_one", None)
    assert torch.equal(bands.run(model, z), model(z))
    assert torch.equal(bands.run(model, z, peak(model, z)), model(z))
    two = inputs(Decoder, 2)
    assert torch.equal(bands.run(model, two, peak(model, z)), torch.cat([model(one[None]) for one in two]))


@torch.no_grad()
@pytest.mark.parametrize("share", [2.0, 1.0, 0.6], ids=["at once", "one at a time", "in bands"])
def test_progress_moves_in_small_steps_to_the_end_and_changes_nothing(monkeypatch, share):
    """Whole images report too, and attention over many places in parts."""
    monkeypatch.setattr(layers, "REPORTED", 1)
    monkeypatch.setattr(bands, "REPORTED", 1)
    model, z = network(attn_resolutions=()), torch.randn(2, 4, 40, 48)
    seen = []
    memory = int(peak(model, z) * share)
    out = bands.run(model, z, memory, lambda *progress: seen.append(progress))
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1
    done, total = seen[-1]
    assert done == pytest.approx(total, rel=1e-6)
    assert max(after - before for (before, _), (after, _) in zip([(0, 0), *seen], seen, strict=False)) < total / 4
    torch.testing.assert_close(out, bands.run(model, z, memory), rtol=1e-5, atol=1e-6)


def test_too_little_memory():
    model, z = network(), inputs(Decoder)
    for memory in (300_000, 1_500_000):  # too little for bands, and for attention
        with pytest.raises(UserError, match=r"^memory: got [01] MiB, expected at least \d+ MiB"):
            bands.run(model, z, memory)


def test_a_full_disk(monkeypatch, tmp_path):
    model, z = network(), inputs(Decoder)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with monkeypatch.context() as patch:  # it fills while it is written to
        patch.setattr(feature_maps.tempfile, "TemporaryFile", lambda **options: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
        with pytest.raises(UserError, match=rf"^{tmp_path}: got too little free disk space, expected \d+ MiB"):
            bands.run(model, z, int(peak(model, z) * 0.35))
    usage = feature_maps.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        feature_maps.shutil, "disk_usage", lambda path: usage._replace(free=1000) if path == str(tmp_path) else usage
    )
    with pytest.raises(UserError, match=rf"^{tmp_path}: got too little free disk space, expected \d+ MiB"):
        bands.run(model, z, int(peak(model, z) * 0.35))
    assert not list(tmp_path.iterdir())


SCRIPT = """
import resource, sys, torch
from tamingfast.engines import bands
from tamingfast.models.autoencoder import Decoder, Encoder
from tamingfast.ops.backends import use
torch.set_num_threads(1)
kind = Decoder if sys.argv[1] == "decode" else Encoder
model = kind(ch=32, in_channels=3, out_ch=3, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=1, attn_resolutions=(16,),
             resolution=256, z_channels=8).eval()
x = torch.randn(1, 8, 32, 48) if kind is Decoder else torch.randn(1, 3, 512, 768)
bands.run(model, x[:, :, : x.shape[2] // 4, : x.shape[3] // 4], 10 << 20)  # warms up
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = bands.run(model, x, int(sys.argv[2]))
assert out.isfinite().all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


ATTENTION = """
import resource, torch
from tamingfast.models.autoencoder import AttnBlock
torch.set_num_threads(1)
block = AttnBlock(32)
with torch.no_grad():
    block(torch.randn(1, 32, 8, 8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    block(torch.randn(1, 32, 64, 64))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_attention_does_not_store_the_scores_of_all_pairs():
    run = subprocess.run([sys.executable, "-c", ATTENTION], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64**4 * 4 / 5


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_memory_stays_within_the_budget(way):
    """The feature maps of the image are seven times the budget; the networks have the geometry of f = 16."""
    budget = 40 << 20
    # glibc keeps freed blocks below 32 MiB. With realistic budgets of gigabytes, bands are larger than that.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", SCRIPT, way, str(budget)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(run.stdout) < 1.1 * budget
