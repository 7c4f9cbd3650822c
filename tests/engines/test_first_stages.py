"""Every first stage that the package has, through the CPU engine of encoders and decoders: taken, and right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

import tamingfast
from tamingfast import UserError, evaluation, tasks
from tamingfast.checkpoints.config import instantiate_from_config
from tamingfast.engines import bands, cpu_first_stage, first_stage
from tamingfast.engines.layers import shapes
from tamingfast.models.autoencoder import Decoder, Encoder
from tamingfast.models.vqgan import VQModel
from tamingfast.ops import backends
from tamingfast.training import prior, vqgan

NATIVE, WHY = backends.native()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=WHY)
CONFIGS = Path(tamingfast.__file__).parent / "configs"
PRESETS = {path.stem: OmegaConf.load(path) for path in sorted(CONFIGS.rglob("*.yaml"))}
#: The networks of the presets, in a fraction of their width.
STAGES: dict[str, dict[str, Any]] = {
    name: OmegaConf.to_container(config, resolve=True)["model"]
    for name, config in PRESETS.items()
    if "ddconfig" in config.get("model", {}).get("params", {})
}
SMALL = STAGES["photos32_vqgan"]


NO_LOSS = {"target": "torch.nn.Identity"}


def changed(base: dict[str, Any], target: str = "", ddconfig: dict[str, Any] | None = None, **params: Any) -> Any:
    made = copy.deepcopy(base)
    made["target"] = target or made["target"]
    made["params"] |= params
    made["params"]["ddconfig"] |= ddconfig or {}
    return made


STAGES |= {
    "gumbel": changed(
        SMALL, "taming.models.vqgan.GumbelVQ", embed_dim=SMALL["params"]["ddconfig"]["z_channels"],
        temperature_scheduler_config={
            "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
            "params": {"warm_up_steps": 0, "max_decay_steps": 10, "lr_start": 1, "lr_max": 1, "lr_min": 0.1},
        },
    ),
    "moving averages": changed(SMALL, "taming.models.vqgan.EMAVQ"),
    "no discriminator": changed(SMALL, "taming.models.vqgan.VQNoDiscModel"),
    "two levels": changed(SMALL, "tamingfast.models.hierarchical.HierarchicalVQModel"),
    "attention everywhere": changed(
        SMALL, ddconfig={"ch_mult": [1, 2, 1], "attn_resolutions": [32, 16, 8], "num_res_blocks": 1}
    ),
    "160 channels": changed(SMALL, ddconfig={"ch": 160, "ch_mult": [1]}),
    "pooling": changed(SMALL, ddconfig={"resamp_with_conv": False, "ch_mult": [1, 3]}),
}  # fmt: skip


def built(described: dict[str, Any], width: int = 32) -> VQModel:
    params = described["params"]
    ddconfig = params["ddconfig"] | {"ch": min(width, params["ddconfig"]["ch"])}
    if params["ddconfig"]["ch"] not in (64, 128):
        ddconfig["ch"] = params["ddconfig"]["ch"]
    torch.manual_seed(0)
    model = instantiate_from_config(
        {
            "target": described["target"],
            "params": params | {"ddconfig": ddconfig, "lossconfig": NO_LOSS},
        }
    ).eval()
    for parameter in model.parameters():  # biases and norms that do something
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def pictures(model: VQModel, count: int = 2, rows: int = 3, columns: int = 5) -> Tensor:
    """Smooth images of rows x columns tokens of one level."""
    generator = torch.Generator().manual_seed(1)
    channels = model.encoder.conv_in.in_channels
    coarse = torch.rand(count, channels, 4, 5, generator=generator) * 2 - 1
    side = model.factor
    return F.interpolate(coarse, (side * rows, side * columns), mode="bicubic") + 0.02 * torch.randn(
        count, channels, side * rows, side * columns, generator=generator
    )


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max())


@torch.no_grad()
def as_exact_as_torch(network: nn.Module, x: Tensor, more: int = 0) -> Tensor:
    """The engine's output; its largest error is at most 4 times torch's, against float64.

    Torch's is the largest on these images and ``more`` others: on few values it may be almost none, by luck. The last
    layer sums numbers of about 1, so that 1e-7 is theirs in any case.
    """
    every = torch.cat((x, torch.randn(more, *x.shape[1:])))
    exact = copy.deepcopy(network).double()(every.double())
    with backends.use("reference"):
        torchs = worst(network(every), exact)
    found = first_stage.run(network, x, engine="native")
    assert worst(found, exact[: len(x)]) <= 4 * max(torchs, 1e-7)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", STAGES)
def test_every_first_stage_runs_in_the_engine(name, monkeypatch):
    model = built(STAGES[name])
    x = pictures(model)
    as_exact_as_torch(model.encoder, x)
    torch.manual_seed(1)  # the Gumbel quantiser draws
    expected = model.encode_grid(x, engine="torch")
    torch.manual_seed(1)
    assert (model.encode_grid(x, engine="native") == expected).float().mean() > 0.98
    torchs = model.decode_grid(expected, engine="torch")
    as_exact_as_torch(model.decoder, model.decoder_input(model.codes_of(expected)))
    torch.testing.assert_close(model.decode_grid(expected, engine="native"), torchs, rtol=1e-3, atol=1e-4)
    used = Calls(monkeypatch)
    model.decode(model.encode(x)[0])
    assert used.count >= 2
    one = model.decode_grid(expected[1:])
    assert torch.equal(one, model.decode_grid(expected)[1:])  # the batch changes no bit
    before = used.count
    model.decode_grid(model.encode_grid(x, engine="torch"), engine="torch")
    assert used.count == before


class Calls:
    """Counts the engine's calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        run = cpu_first_stage.FirstStageEngine.__call__

        def counted(*arguments: Any, **options: Any) -> Tensor:
            self.count += 1
            return run(*arguments, **options)

        monkeypatch.setattr(cpu_first_stage.FirstStageEngine, "__call__", counted)


NETWORKS = st.fixed_dictionaries(
    {
        "ch": st.sampled_from([32, 64, 96]),
        "ch_mult": st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
        "num_res_blocks": st.integers(1, 2),
        "attn_resolutions": st.sets(st.sampled_from([32, 16, 8])).map(tuple),
        "in_channels": st.sampled_from([1, 3, 16]),
        "z_channels": st.sampled_from([1, 4, 48]),
        "resamp_with_conv": st.booleans(),
    }
)


@settings(deadline=None, max_examples=15)
@given(
    options=NETWORKS, kind=st.sampled_from([Encoder, Decoder]), height=st.integers(1, 9), width=st.integers(1, 9),
    images=st.integers(1, 3), seed=st.integers(0, 1000), small=st.booleans(),
)  # fmt: skip
def test_any_network_on_any_size(options, kind, height, width, images, seed, small):
    torch.manual_seed(seed)
    model = kind(**options, out_ch=options["in_channels"], resolution=32, double_z=False).eval()
    scale = 1 if kind is Decoder else 2 ** (len(options["ch_mult"]) - 1)
    x = torch.randn(images, model.conv_in.in_channels, scale * height, scale * width)
    if height * width < 9:  # norms of few pixels may magnify any rounding
        whole = first_stage.run(model, x, engine="native")
        torch.testing.assert_close(whole, first_stage.run(model, x, engine="torch"), rtol=1e-3, atol=1e-3)
    else:
        whole = as_exact_as_torch(model, x, more=8)
    assert torch.equal(first_stage.run(model, x[:1], engine="native"), whole[:1])
    if small:
        engine = first_stage.engine_for(model)
        shape = tuple(x.shape[1:])
        least = 4 * engine.band(shape) + 4 * engine.result(shape)
        assert torch.equal(first_stage.run(model, x, memory=2 * least, engine="native"), whole)


@pytest.fixture(scope="module")
def trained() -> VQModel:
    """An autoencoder after some steps on photographs: weights and activations are not those of a start."""
    model = built(changed(SMALL, ddconfig={"ch": 32, "attn_resolutions": [16]})).train()
    data = torch.from_numpy(np.stack(tiny.photographs(32, 16))).permute(0, 3, 1, 2).float() / 127.5 - 1
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=2e-3), []
    for step in range(60):
        x = data[torch.arange(4) + 4 * (step % 8)]
        loss = (model.decoder(model.post_quant_conv(model.quant_conv(model.encoder(x)))) - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    return model.eval()


@torch.no_grad()
def test_trained_weights(trained):
    """The error bound, and pixels within 0.02 of 255."""
    x = torch.from_numpy(np.stack(tiny.photographs(3, 64))).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = trained.quant_conv(as_exact_as_torch(trained.encoder, x))
    tokens = trained.quantize(latents)[2][2].view(3, 32, 32)
    z = trained.decoder_input(trained.codes_of(tokens))
    found = as_exact_as_torch(trained.decoder, z)
    exact = copy.deepcopy(trained.decoder).double()(z.double())
    assert 127.5 * worst(found, exact) <= 0.02


def replaced(parameter: nn.Parameter) -> None:
    parameter.data = torch.full_like(parameter, 0.01)


def swapped(model: VQModel) -> None:
    """As moving averages take the parameters' place for a while."""
    for parameter in model.decoder.parameters():
        parameter.data, kept[parameter] = 0.9 * parameter.data, parameter.data


def restored(model: VQModel) -> None:
    for parameter in model.decoder.parameters():
        parameter.data = kept[parameter]


kept: dict[nn.Parameter, Tensor] = {}


def stepped(model: VQModel) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.Adam(model.decoder.parameters(), lr=0.1, foreach=True)
        model.decode(torch.ones(1, model.embed_dim, 4, 4)).sum().backward()
        optimizer.step()


#: What changes parameters.
WRITES = {
    "in place": lambda model: model.decoder.conv_in.weight.mul_(1.5),
    "a single value": lambda model: model.decoder.conv_out.weight[0, 3, 1].fill_(2.0),
    "load_state_dict": lambda model: model.load_state_dict({k: 0.9 * v for k, v in model.state_dict().items()}),
    "load_state_dict, assigned": lambda model: model.load_state_dict(
        {k: 0.9 * v for k, v in model.state_dict().items()}, assign=True
    ),
    "to float64 and back": lambda model: (model.double(), model.decoder.conv_in.weight.mul_(1.1), model.float()),
    "data": lambda model: replaced(model.decoder.mid.block_1.conv1.weight),
    "NumPy": lambda model: np.copyto(model.decoder.norm_out.bias.numpy(), 0.3),
    "an optimizer": stepped,
    "moving averages": swapped,
    "and the parameters again": restored,
    "another layer": lambda model: setattr(model.decoder, "conv_out", nn.Conv2d(32, 3, 3, padding=1).eval()),
}


@torch.no_grad()
def test_packed_weights_follow_the_parameters():
    model = built(changed(SMALL, ddconfig={"ch": 32}))
    tokens = torch.arange(24).view(1, 4, 6)
    before = model.decode_grid(tokens, engine="native")
    for name, write in WRITES.items():
        write(model)
        found = model.decode_grid(tokens, engine="native")
        assert not torch.equal(found, before), name
        torch.testing.assert_close(found, model.decode_grid(tokens, engine="torch"), rtol=1e-3, atol=1e-3, msg=name)
        before = found


@torch.no_grad()
def test_parameters_of_a_functional_call_take_part():
    model = built(changed(SMALL, ddconfig={"ch": 32}))
    quant = torch.randn(1, model.embed_dim, 4, 4)
    doubled = {name: 1.1 * value for name, value in model.decoder.named_parameters()}
    z = model.decoder_input(quant)
    found = torch.func.functional_call(Through(model.decoder), {f"inner.{k}": v for k, v in doubled.items()}, (z,))
    assert worst(found, model.decode(quant)) > 1e-3
    torch.testing.assert_close(found, torch.func.functional_call(model.decoder, doubled, (z,)), rtol=1e-3, atol=1e-4)


class Through(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return first_stage.forward(self.inner, x)


@torch.no_grad()
def test_what_the_engine_cannot_run_is_logged_once(caplog):
    model = built(changed(SMALL, ddconfig={"ch": 32})).bfloat16()
    first_stage._logged.cache_clear()
    z = torch.randn(1, model.decoder.conv_in.in_channels, 3, 3, dtype=torch.bfloat16)
    for _ in range(3):
        first_stage.run(model.decoder, z)
    (record,) = caplog.records
    assert "runs in torch instead of the CPU engine" in record.message and "bfloat16" in record.message


class Convolved:
    """The dtypes and layouts in which a network's 3x3 convolutions give their results."""

    def __init__(self, network: nn.Module) -> None:
        self.seen: set[tuple[torch.dtype, bool]] = set()
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.register_forward_hook(self._note)

    def _note(self, _module: nn.Module, _given: tuple[Tensor, ...], out: Tensor) -> None:
        channels_last = out.is_contiguous(memory_format=torch.channels_last)
        if channels_last != out.is_contiguous():  # one of the two
            self.seen.add((out.dtype, channels_last))


@pytest.mark.parametrize("name", ["photos32_vqgan", "gumbel", "two levels"])
def test_decoding_in_half_precision_and_channels_last(name):
    model = built(STAGES[name])
    tokens = model.encode_grid(pictures(model))
    expected = model.decode_grid(tokens, engine="torch")
    convolved = Convolved(model)
    layouts = {False: torch.contiguous_format, True: torch.channels_last}
    for dtype, channels_last in ((torch.bfloat16, False), (torch.bfloat16, True), (None, True)):
        convolved.seen.clear()
        found = model.decode_grid(tokens, engine="torch", dtype=dtype, memory_format=layouts[channels_last])
        assert convolved.seen == {(dtype or torch.float32, channels_last)}
        assert found.dtype == torch.float32 and found.is_contiguous()
        error = (found - expected).norm() / expected.norm()
        assert (1e-5 < error < 3e-2) if dtype else error < 1e-5
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(model.decode_grid(tokens, engine="torch"), expected)


def test_the_layout_is_nothing_to_the_engine_and_bands_decode_in_half_precision(monkeypatch):
    model = built(SMALL)
    tokens, used = model.encode_grid(pictures(model, 1, 6, 8)), Calls(monkeypatch)
    expected = model.decode_grid(tokens, engine="native")
    assert torch.equal(model.decode_grid(tokens, memory_format=torch.channels_last), expected)
    assert used.count == 2
    low = model.decode_grid(tokens, dtype=torch.bfloat16)
    assert used.count == 2, "the engine computes in float32"
    sides = shapes(model.decoder.layers(), (model.decoder.z_shape[1], 6, 8))
    half = 4 * max(map(bands._peak, model.decoder.layers(), sides, sides[1:])) // 2
    in_bands = model.decode_grid(tokens, half, dtype=torch.bfloat16)
    assert in_bands.dtype == torch.float32
    assert (in_bands - low).norm() < 3e-2 * low.norm()


def test_types_that_decoding_cannot_use_are_refused():
    model = built(changed(SMALL, ddconfig={"ch": 32}))
    tokens = torch.zeros(1, 2, 2, dtype=torch.int64)
    for wrong in (torch.float32, torch.int8, "bfloat16"):
        with pytest.raises(UserError, match=r"^dtype: got .*, expected torch\.bfloat16 or torch\.float16, or None"):
            model.decode_grid(tokens, dtype=wrong)
    with pytest.raises(UserError, match=r"^engine: got 'native' beside torch\.bfloat16, expected"):
        model.decode_grid(tokens, engine="native", dtype=torch.bfloat16)


def test_engines_of_a_block_and_of_a_call(monkeypatch):
    model = built(changed(SMALL, ddconfig={"ch": 32}))
    tokens, used = torch.zeros(1, 2, 2, dtype=torch.int64), Calls(monkeypatch)
    with first_stage.using("torch"):
        model.decode_grid(tokens)
        with torch.no_grad():
            model.decode(model.codes_of(tokens))
        with first_stage.using("auto"):  # says nothing
            model.decode_grid(tokens)
        assert used.count == 0
        model.decode_grid(tokens, engine="native")
        assert used.count == 1
    model.decode_grid(tokens)
    assert used.count == 2
    for wrong in ("naive", "", None):
        with pytest.raises(UserError, match="engine: got .*, expected one of auto, native, torch"):
            model.decode_grid(tokens, engine=wrong)
        with pytest.raises(UserError, match="engine: got"), first_stage.using(wrong):
            pass
    with pytest.raises(UserError, match="engine: got 'native', which cannot run here"):
        model.train().decode_grid(tokens, engine="native")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    vqgan.train(tiny.config(tiny.VQGAN, steps=6), out / "vqgan", device="cpu", datasets=tiny.datasets())
    return out


def test_training_and_evaluation_use_it(runs, monkeypatch):
    used = Calls(monkeypatch)
    prior.train(
        tiny.config(tiny.PRIOR, steps=6), runs / "vqgan", runs / "prior", device="cpu", datasets=tiny.datasets()
    )
    assert used.count >= 6  # every batch was encoded
    model, before = tamingfast.load_model(runs / "prior"), used.count
    list(evaluation.reconstructions(model, [tiny.images()["image"].permute(0, 3, 1, 2)]))
    assert used.count >= before + 2
    for engine, expected in (("auto", True), ("native", True), ("torch", False), ("naive", False)):
        before = used.count
        options = tasks.DrawingOptions(engine=engine, top_k=4)
        drawn = tasks.sample(model, 1, options=options)
        tasks.edit(model, drawn.images[0], np.ones((8, 8), bool), options=options)
        tasks.outpaint(model, drawn.images[0], right=2, options=options)
        tasks.complete(model, [drawn.images[0]], 1, options=options)
        model.sample_images(torch.zeros(1, 1, dtype=torch.int64), 4, 4, engine=engine)
        assert (used.count > before) == expected
        if engine != "naive":
            before = used.count
            tasks.reconstruct(model, [drawn.images[0]], engine=engine)
            tasks.encode(model, tiny.Noise(3), runs / "tokens.safetensors", engine=engine)
            assert (used.count > before) == expected
    with pytest.raises(UserError, match="engine: got 'naive', expected one of auto, native, torch"):
        tasks.reconstruct(model, [drawn.images[0]], engine="naive")
