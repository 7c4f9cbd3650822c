"""Results under any default dtype and device, autocast and inference mode: native code is told both of every buffer."""

from __future__ import annotations

import ast
import copy
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_cases import HostEngine, cpu_engine, decoded
from gpts import random_gpt
from networks import prior
from surroundings import SURROUNDINGS, alike
from torch import Tensor

from tamingfast import ops
from tamingfast.engines import GPTEngine, bands, borrowed_engine, feature_maps
from tamingfast.models.autoencoder import Encoder
from tamingfast.models.gpt import sample, sample_with_past
from tamingfast.ops import backends, check, reference
from tamingfast.ops.choice import choose, gumbel_noise
from tamingfast.sampling import sample_grid
from tamingfast.sampling.likelihood import negative_log_likelihood

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(backends.native()[0] is None, reason=backends.native()[1])

# --- the sources: a buffer without a dtype or a device takes the caller's defaults ----------------------------------

LAYERS = ("tamingfast/engines", "tamingfast/ops", "tamingfast/sampling", "kernels")
FACTORIES = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
KEEP_THEIR_DTYPE = {"as_tensor", "asarray"}  # of what they are given


def unnamed(source: str) -> list[str]:
    """The calls of torch's factories in Python code that do not name dtype and device."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and ast.unparse(call.func).startswith("torch.")):
            continue
        name = ast.unparse(call.func).removeprefix("torch.")
        needed = {"dtype", "device"} if name in FACTORIES else {"device"} if name in KEEP_THEIR_DTYPE else set()
        if needed - {keyword.arg for keyword in call.keywords}:
            found.append(ast.unparse(call))
    return found


def test_every_buffer_names_its_dtype_and_device():
    paths = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    assert len(paths) > 40
    assert {str(path): calls for path in paths if (calls := unnamed(path.read_text(encoding="utf-8")))} == {}
    assert unnamed("torch.empty(3, dtype=x); torch.full((2,), 1, device=y); torch.as_tensor(z)") != []
    assert unnamed("torch.empty(3, dtype=x, device=y); torch.as_tensor(z, device=y)") == []


def test_the_extension_gets_addresses_of_checked_tensors_only():
    """`Tensor.data_ptr` is called where dtype, device and layout are checked, and by what compares or launches."""
    allowed = {"ops/check.py", "engines/cuda/device.py", "engines/lending.py", "checkpoints/weights.py"}
    package = ROOT / "tamingfast"
    calling = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if "data_ptr(" in path.read_text("utf-8")
    }
    assert "ops/check.py" in calling and calling <= allowed


# --- behaviour --------------------------------------------------------------------------------------------------------


GPTS = {n: random_gpt(n_unmasked=n) for n in (0, 3)}
TOKENS = torch.randint(0, 24, (2, 12), generator=torch.Generator().manual_seed(0))
CONDITION = TOKENS[:, :3]
DRAWN = dict(temperature=0.9, top_k=9, top_p=0.95, seed=3)
LATENTS = torch.randn(301, 7, generator=torch.Generator().manual_seed(1))
CODES = torch.randn(50, 7, generator=torch.Generator().manual_seed(2))
BANDED = Encoder(
    ch=32, in_channels=3, out_ch=3, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(), resolution=32,
    z_channels=4, double_z=False,
)  # fmt: skip
IMAGE = torch.randn(1, 3, 97, 150, generator=torch.Generator().manual_seed(4))
PRIOR = prior().eval()
MADE = {
    (kind, dtype, n): engine(GPTS[n], dtype)
    for n in GPTS
    for kind, engine, dtypes in (
        ("cpu", cpu_engine, GPTEngine.DTYPES if backends.native()[0] else ()),
        ("cuda", HostEngine, ("float32", "bfloat16")),
    )
    for dtype in dtypes
}


def steps(engine) -> Iterator[Tensor]:
    """Logits of a step in each way of asking, with all that happens to slots."""
    engine.reserve(4, 30)
    for logits in ("last", "all", "none"):
        yield engine.step([(0, 0, TOKENS[0].tolist()), (2, 0, TOKENS[1, :5].tolist())], logits)
    engine.copy(0, 1, 7)
    engine.truncate(2, 4)
    yield engine.step([(1, 7, [3, 4]), (2, 4, [1])])
    engine.reserve(2, 30)
    yield decoded(engine, torch.cat((CONDITION, torch.zeros_like(TOKENS)), 1), range(3, 9), **DRAWN)


def torch_calls() -> dict[str, Callable[[], object]]:
    gpt, causal = GPTS[3], GPTS[0]
    grid = TOKENS[:, :9].reshape(2, 3, 3)
    mask = grid % 2 == 0
    calls = {
        f"sample_grid {engine}, {schedule}": lambda engine=engine, schedule=schedule: sample_grid(
            gpt, CONDITION, 5, 6, window=4, stride=2, schedule=schedule, engine=engine, **DRAWN
        )
        for engine in ("torch", "naive", *(["native"] if backends.native()[0] else []))
        for schedule in ("paper", "strided")
    }
    return calls | {
        "one window": lambda: sample_grid(gpt, CONDITION, 3, 3, start=grid, mask=mask, greedy=True),
        "lists": lambda: sample_grid(gpt, CONDITION.tolist(), 3, 3, start=[[1, 2], [3, 4]], **DRAWN),
        "borrowed": lambda: _borrowed(causal),
        "likelihood": lambda: negative_log_likelihood(causal, CONDITION, grid),
        "noise": lambda: gumbel_noise(5, TOKENS[:, 0], TOKENS[0, 1], TOKENS[0, 2], 23),
        "choose": lambda: choose(CODES, gumbel_noise(5, CODES[:, 0].long().abs(), TOKENS[0, 1], TOKENS[0, 2], 7)),
        "nearest_code": lambda: ops.nearest_code(LATENTS, CODES),
        "nearest_code of views": lambda: ops.nearest_code(LATENTS.t().contiguous().t()[::3], CODES.half()[:, ::1]),
        "quantize": lambda: ops.quantize(LATENTS, CODES)[:2],
        "reference": lambda: reference.nearest_code(LATENTS, CODES),
        "attention mask": lambda: reference.attention_mask(5, 2, "cpu"),
    }  # fmt: skip


def _borrowed(gpt) -> Tensor:
    with borrowed_engine(gpt, "float32", 1, 30) as engine:
        return engine.step([(0, 0, TOKENS[0].tolist())])


@functools.cache
def expected_steps(case: tuple[str, str, int]) -> list[Tensor]:
    return list(steps(MADE[case]))


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("case", MADE, ids=lambda case: "-".join(map(str, case)))
def test_engines_give_the_same_bits(case, around):
    """One made before and one made inside, which is used outside too, as the other is by the next surroundings."""
    kind, dtype, n = case
    expected = expected_steps(case)
    with SURROUNDINGS[around]():
        alike(expected, list(steps(MADE[case])))
        made = (GPTEngine if kind == "cpu" else HostEngine)(GPTS[n], dtype)
        alike(expected, list(steps(made)))
    alike(expected, list(steps(made)))


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("name", torch_calls())
def test_ops_and_samplers_give_the_same_bits(name, around):
    if around == "autocast" and name == "likelihood":
        pytest.skip("it runs the caller's network as the caller asks")
    call = torch_calls()[name]
    expected = call()
    with SURROUNDINGS[around]():
        got = call()
    alike(expected, got)


@pytest.mark.parametrize("around", [name for name in SURROUNDINGS if name != "autocast"])
def test_images_in_bands_give_the_same_bits(monkeypatch, around):
    """With all feature maps but the last in files."""
    made, new = [], feature_maps.FeatureMaps.new

    def in_files(store, shape, last=False):
        made.append(new(store, shape, last) if last else feature_maps.ScratchMap(store, shape, 4 * math.prod(shape)))
        return made[-1]

    monkeypatch.setattr(feature_maps.FeatureMaps, "new", in_files)
    expected = bands.run(BANDED, IMAGE, 9 << 20)
    with SURROUNDINGS[around]():
        alike(expected, bands.run(BANDED, IMAGE, 9 << 20))
    assert len(made) > 4


@pytest.mark.parametrize("around", [name for name in SURROUNDINGS if name != "autocast"])
def test_the_original_s_samplers_give_the_same_tokens(around):
    def drawn() -> Iterator[Tensor]:
        for sampled in (False, True):
            torch.manual_seed(0)
            yield PRIOR.sample(TOKENS[:, :2] % 12, CONDITION % 12, 5, sample=sampled, top_k=4)
            yield sample(GPTS[0], CONDITION, 5, sample=sampled, top_k=4)
            yield sample_with_past(CONDITION, GPTS[0], 5, sample_logits=sampled, top_k=4, top_p=0.9)

    expected = list(drawn())
    with SURROUNDINGS[around]():
        alike(expected, list(drawn()))


# --- tensors that are not what native code takes ----------------------------------------------------------------------

WRONG = {
    "another dtype": torch.zeros(3, 4, dtype=torch.float64),
    "half": torch.zeros(3, 4, dtype=torch.bfloat16),
    "transposed": torch.zeros(4, 3).t(),
    "strided": torch.zeros(3, 8)[:, ::2],
    "expanded": torch.zeros(1, 4).expand(3, 4),
    "on another device": torch.zeros(3, 4, device="meta"),
    "sparse": torch.zeros(3, 4).to_sparse(),
    "negated": torch._neg_view(torch.zeros(3, 4)),
}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_only_contiguous_tensors_of_the_right_dtype_have_an_address(value):
    with pytest.raises(
        ValueError, match=r"^out: got (non-contiguous )?\(3, 4\) .*, expected a contiguous torch.float32"
    ):
        check.array("out", value, torch.float32)
    good = torch.zeros(3, 4)
    assert check.array("out", good, torch.float32) == (good.data_ptr(), 48)


@needs_native
def test_values_of_views_are_those_that_are_seen():
    """Also where the negation is only a mark on the tensor."""
    negated = torch._neg_view(LATENTS)
    assert torch.equal(ops.nearest_code(negated, CODES), reference.nearest_code(-LATENTS, CODES))
    wide = torch.randn(301, 14, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ops.nearest_code(wide[:, ::2], CODES), reference.nearest_code(wide[:, ::2], CODES))


@pytest.mark.parametrize("engine", [pytest.param(GPTEngine, marks=needs_native), HostEngine])
@pytest.mark.parametrize("size", ["vocab_size", "block_size", "n_embd", "n_layer"])
def test_a_config_that_differs_from_the_parameters_is_refused(engine, size):
    """Native code reads as many values as the config says."""
    gpt = copy.deepcopy(GPTS[0])
    setattr(gpt.config, size, getattr(gpt.config, size) * 2)
    with pytest.raises(ValueError, match=r"^[\w.]+: got .*, expected \(.*\), as the transformer's config says$"):
        engine(gpt)
