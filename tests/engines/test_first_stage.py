"""What runs an encoder or a decoder, and the CPU engine against torch in float64."""

from __future__ import annotations

import copy
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from tamingfast import UserError, VQModel
from tamingfast.engines import cpu_first_stage, cpu_maps, feature_maps, first_stage
from tamingfast.models.autoencoder import Decoder, Encoder, ResnetBlock
from tamingfast.models.hierarchical import HierarchicalVQModel
from tamingfast.ops import backends

NATIVE, WHY = backends.native()
needs_extension = pytest.mark.skipif(NATIVE is None, reason=WHY)
GEOMETRY = dict(
    ch=32, in_channels=3, out_ch=3, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=32,
    z_channels=4, double_z=False,
)  # fmt: skip
OPTIONS = [
    {}, {"ch_mult": (1, 2, 1, 2), "attn_resolutions": ()}, {"resamp_with_conv": False}, {"give_pre_end": True},
    {"ch": 96, "ch_mult": (1,), "z_channels": 5}, {"in_channels": 1, "out_ch": 12, "double_z": True},
    {"attn_resolutions": (8, 16, 32), "num_res_blocks": 2},
]  # fmt: skip
LOSS = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}


def network(kind: type = Decoder, **options) -> nn.Module:
    torch.manual_seed(0)
    model = kind(**GEOMETRY | options)
    for parameter in model.parameters():  # biases and norms that do something
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(model: nn.Module, count: int = 2) -> Tensor:
    """Odd numbers of rows and columns."""
    height, width = (13, 19) if isinstance(model, Decoder) else (61, 75)
    x = torch.randn(count, model.conv_in.in_channels, height, width, generator=torch.Generator().manual_seed(1))
    return x * torch.linspace(0.2, 2, width) + 1


def in_files(x: Tensor) -> feature_maps.FeatureMaps:
    """Room for no feature map and the smallest bands."""
    store = feature_maps.FeatureMaps(1 << 30, 0, 1, x)
    store.free, store.band = 0, 1
    return store


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [Decoder, Encoder])
def test_the_engine_is_as_exact_as_torch(monkeypatch, kind, options):
    model = network(kind, **options)
    x = inputs(model)
    expected = copy.deepcopy(model).double()(x.double())
    engine = cpu_first_stage.FirstStageEngine(model)
    found = engine(x)
    assert found.shape == expected.shape and found.is_contiguous()
    torchs = (model(x) - expected).abs().max()
    assert (found - expected).abs().max() <= 4 * torchs
    assert torch.equal(engine(x[1:]), found[1:])  # the batch changes nothing
    assert torch.equal(engine(x[1:], in_files(x)), found[1:])  # nor do bands and files
    monkeypatch.setattr(cpu_first_stage, "BAND", 1)
    assert torch.equal(engine(x[1:]), found[1:])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(engine(x), found)


@needs_extension
def test_the_engine_runs_wherever_no_gradient_is_wanted(monkeypatch):
    used = []
    monkeypatch.setattr(first_stage, "_run", lambda engine, x, *rest: used.append(1) or torch.zeros(1))
    model = network()
    x = inputs(model)
    first_stage.forward(model, x)
    assert not used  # gradients
    with torch.no_grad():
        first_stage.forward(model.train(), x)
        first_stage.forward(network().double(), x.double())
        with torch.autocast("cpu"):
            first_stage.forward(model.eval(), x)
        for backend in ("reference", "sdpa"):
            with backends.use(backend):
                first_stage.forward(model, x)
        hook = model.mid.register_forward_hook(lambda *a: None)
        first_stage.forward(model, x)
        hook.remove()
        first_stage.run(model, x, engine="torch")
        assert not used
        first_stage.forward(model, x)
        first_stage.run(model, x)
        with backends.use("native"):
            first_stage.forward(model, x)
    assert len(used) == 3


@torch.no_grad()
def test_an_engine_that_cannot_run_says_why():
    model = network()
    model.conv_in = nn.Conv2d(4, 64, 5, padding=2)
    x = inputs(model)
    with pytest.raises(UserError, match="engine: got 'native'"):
        first_stage.run(model, x, engine="native")
    assert torch.equal(first_stage.run(model, x), model(x))
    with pytest.raises(UserError, match="engine: got 'fast', expected one of auto, native, torch"):
        first_stage.run(model, x, engine="fast")


class Doubled(nn.Module):
    """A module around another, as adapters are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


class Shifted(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class ShiftedBlock(ResnetBlock):
    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return super().forward(x, temb) + 1


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


def with_plain_weight(model: nn.Module) -> None:
    weight = model.conv_in.weight.detach().clone()
    del model.conv_in._parameters["weight"]
    model.conv_in.weight = weight


#: What programs do to a network that they were given.
CHANGES = {
    "a replaced forward": lambda model: replace_forward(model),
    "a replaced forward of a block": lambda model: replace_forward(model.mid.block_1),
    "a replaced forward of a convolution": lambda model: replace_forward(model.conv_out),
    "another block": lambda model: setattr(model.mid, "block_1", ShiftedBlock(in_channels=64).eval()),
    "a wrapped convolution": lambda model: setattr(model, "conv_out", Doubled(model.conv_out)),
    "a wrapped block": lambda model: setattr(model.mid, "block_2", Doubled(model.mid.block_2)),
    "no attention": lambda model: setattr(model.mid, "attn_1", nn.Identity()),
    "no norm": lambda model: setattr(model, "norm_out", nn.Identity()),
    "torch's norm": lambda model: setattr(model.mid.block_1, "norm1", nn.GroupNorm(32, 64)),
    "another activation": lambda model: setattr(model.mid.block_1, "dropout", nn.Tanh()),
    "a norm with another eps": lambda model: setattr(model.mid.block_1.norm1, "eps", 1.0),
    "a norm without its activation": lambda model: setattr(model.mid.block_1.norm1, "silu", False),
    "blocks in another order": lambda model: setattr(model.mid, "block_1", model.mid.block_2),
    "more channels": lambda model: setattr(model.conv_out, "weight", nn.Parameter(torch.ones(3, 32, 3, 3))),
    "a weight that is no parameter": with_plain_weight,
    "a weight seen negated": lambda model: setattr(
        model.conv_in, "weight", nn.Parameter(torch.full((64, 4, 3, 3), 1j).conj().imag)
    ),
    "a parametrization": lambda model: parametrizations.weight_norm(model.conv_in),
    "a pruned norm": lambda model: prune.l1_unstructured(model.norm_out, "weight", 0.5),
    "a channel that is zeroed": lambda model: model.mid.block_1.conv1.weight.data[:, 5].zero_(),
    "a weight written by NumPy": lambda model: model.conv_in.weight.detach().numpy().__setitem__((0, 3, 1, 1), 50),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_a_program_has_changed_computes_what_it_computes_in_torch(change):
    model = network()
    x = inputs(model)
    first_stage.forward(model, x)
    CHANGES[change](model)
    torch.testing.assert_close(first_stage.forward(model, x), model(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_subclass_computes_what_it_computes_in_torch():
    model = Shifted(**GEOMETRY).eval()
    torch.testing.assert_close(first_stage.forward(model, inputs(model)), model(inputs(model)), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_dropout_that_was_left_on_takes_part():
    model = network(dropout=0.5)
    model.mid.block_1.dropout.train()
    x = inputs(model)
    first, second = (first_stage.forward(model, x) for _ in range(2))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_whoever_watches_torch_sees_the_network():
    model = network()
    x, z = inputs(model), inputs(model)[:, None]
    plain = model(x)
    torch.testing.assert_close(torch.func.vmap(lambda x: first_stage.forward(model, x))(z)[:, 0], plain)
    with FlopCounterMode(display=False) as counted:
        first_stage.forward(model, x)
    assert counted.get_total_flops() > 0
    traced = make_fx(lambda x: first_stage.forward(model, x))(x)
    torch.testing.assert_close(traced(x + 1), model(x + 1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert first_stage.forward(model, torch.empty(x.shape)).shape == plain.shape
    with torch.device("meta"):
        described = Decoder(**GEOMETRY).eval()
        assert first_stage.forward(described, torch.empty(x.shape)).shape == plain.shape
    seen = []
    handle = register_module_forward_hook(lambda module, given, out: seen.append(module))
    try:
        first_stage.forward(model, x)
    finally:
        handle.remove()
    assert model.conv_in in seen


@needs_extension
@torch.no_grad()
def test_changed_weights_are_packed_again():
    model = network()
    x = inputs(model)
    before = first_stage.run(model, x)
    engine = first_stage.engine_for(model)
    assert first_stage.engine_for(model) is engine
    model.conv_out.bias += 1
    torch.testing.assert_close(first_stage.run(model, x), before + 1)
    assert first_stage.engine_for(model) is not engine


@needs_extension
@torch.no_grad()
def test_little_memory_changes_nothing_but_the_bands():
    model = network()
    x = inputs(model)
    whole, seen = first_stage.run(model, x), []
    engine = first_stage.engine_for(model)
    shape = tuple(x.shape[1:])
    enough = engine.peak(shape) + 4 * engine.result(shape)
    assert torch.equal(first_stage.run(model, x, enough), whole)  # one image at a time
    least = 4 * engine.band(shape) + 4 * engine.result(shape)
    assert least < enough
    in_bands = first_stage.run(model, x, least, lambda done, total: seen.append((done, total)))
    assert torch.equal(in_bands, whole)
    assert all(before[0] <= after[0] for before, after in itertools.pairwise(seen))
    assert seen[-1] == (seen[-1][1], sum(engine.work(shape)) * 2)
    for less in (least - 1, least // 4, 0):
        with pytest.raises(UserError, match=r"memory: got \d+ MiB, expected at least \d+ MiB"):
            first_stage.run(model, x, less)


@needs_extension
@torch.no_grad()
def test_little_memory_has_room_for_the_packed_weights_of_one_layer(monkeypatch):
    """They are at most twice the checkpoint's at any time; where all fit, or are there already, they are kept."""
    model = network()
    x = inputs(model)
    shape = tuple(x.shape[1:])
    plan = cpu_first_stage.FirstStageEngine(model, keep=False)
    least = 4 * plan.band(shape) + 4 * plan.result(shape)
    pack, alive, most = cpu_first_stage._pack, [0], [0]

    def counted(convs):
        packed = pack(convs)
        alive[0] += packed.native.bytes
        most[0] = max(most[0], alive[0])
        weakref.finalize(packed, lambda size: alive.__setitem__(0, alive[0] - size), packed.native.bytes)
        return packed

    monkeypatch.setattr(cpu_first_stage, "_pack", counted)
    found = first_stage.run(model, x, least)
    checkpoint = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert 0 < most[0] <= 2 * checkpoint and alive[0] == 0
    assert torch.equal(first_stage.run(model, x), found)
    assert alive[0] == first_stage.engine_for(model).info()["weight_bytes"] > 0
    monkeypatch.setattr(cpu_first_stage, "_pack", None)  # nothing is packed twice
    assert torch.equal(first_stage.run(model, x, least), found)


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("kind", [VQModel, HierarchicalVQModel])
def test_models_use_it(monkeypatch, kind):
    torch.manual_seed(0)
    stage = kind(GEOMETRY, LOSS, n_embed=32, embed_dim=4).eval()
    x = F.interpolate(torch.randn(2, 3, 12, 12), (64, 96), mode="bilinear")
    with backends.use("reference"):
        expected = stage.encode_grid(x)
        picture = stage.decode_grid(expected)
    tokens = stage.encode_grid(x)
    assert (tokens == expected).float().mean() > 0.99
    calls = []
    run = cpu_first_stage.FirstStageEngine.__call__
    monkeypatch.setattr(
        cpu_first_stage.FirstStageEngine, "__call__", lambda *a, **k: calls.append(1) or run(*a, **k)
    )  # fmt: skip
    torch.testing.assert_close(stage.decode_grid(expected), picture, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stage.decode(stage.codes_of(expected)), picture, rtol=1e-3, atol=1e-4)
    assert len(calls) >= 2


@needs_extension
@torch.no_grad()
def test_default_dtypes_and_devices_change_nothing():
    model = network()
    x = inputs(model)
    expected = first_stage.run(model, x)
    for dtype in (torch.bfloat16, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(cpu_first_stage.FirstStageEngine(model)(x), expected)
        finally:
            torch.set_default_dtype(before)
    with torch.device("meta"):
        assert torch.equal(cpu_first_stage.FirstStageEngine(model)(x), expected)


@needs_extension
@torch.no_grad()
def test_not_a_number_and_no_images():
    model = network()
    x = inputs(model)
    x[0, 0, 3, 3] = math.nan
    found = first_stage.run(model, x)
    assert found[0].isnan().any() and not found[1].isnan().any()
    assert first_stage.run(model, x[:0]).shape == (0, *found.shape[1:])


@needs_extension
@torch.no_grad()
def test_compiled_and_copied_models_work():
    model = network()
    x = inputs(model)
    expected = first_stage.run(model, x)
    assert torch.equal(first_stage.forward(copy.deepcopy(model), x), expected)
    stage = torch.compile(lambda x: first_stage.forward(model, x), backend="eager", fullgraph=True)
    torch.testing.assert_close(stage(x), expected, rtol=1e-3, atol=1e-4)


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("kind", [Decoder, Encoder])
def test_bands_count_what_they_read(kind, monkeypatch):
    """A picture has few channels, so its rows are short; those that they are computed from are not."""
    model = network(kind, ch=64, resolution=96)
    x = torch.randn(1, *((4, 24, 24) if kind is Decoder else (3, 96, 96)))
    engine, shape, read, window = first_stage.engine_for(model), tuple(x.shape[1:]), [], cpu_maps.InFile.window

    def counted(self, top, bottom):
        rows, begin = window(self, top, bottom)
        read.append(rows.nbytes)
        return rows, begin

    monkeypatch.setattr(cpu_maps.InFile, "window", counted)
    whole, least = first_stage.run(model, x), 4 * engine.band(shape) + 4 * engine.result(shape)
    assert torch.equal(first_stage.run(model, x, least), whole)
    assert max(read) <= 1.5 * engine.band(shape)
