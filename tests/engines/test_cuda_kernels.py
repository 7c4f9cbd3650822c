"""The CUDA engine's kernels, run on the CPU (tests/cuda_on_host), against plain torch and against the CPU's code."""

from __future__ import annotations

import os
import subprocess
import sys

import on_host
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tamingfast.ops import backends
from tamingfast.sampling import choose, gumbel_noise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Of the rounding of outputs, relative; sums are float32 everywhere.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}


class Kernels:
    """The kernels' functions at one place; tensors become addresses, None the null pointer."""

    def __init__(self, module, device: str) -> None:
        self.module, self.device = module, device

    def __getattr__(self, name: str):
        def call(**arguments):
            cuda = self.device == "cuda"
            place = dict(device=0, stream=torch.cuda.current_stream().cuda_stream if cuda else 0)
            values = {
                key: 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value
                for key, value in (place | arguments).items()
            }
            assert all(v.device.type == self.device for v in arguments.values() if isinstance(v, Tensor))
            return getattr(self.module, name)(**values)

        return call

    def options(self, **values) -> Tensor:
        return torch.frombuffer(bytearray(self.module.options_bytes(**values)), dtype=torch.uint8).to(self.device)


@pytest.fixture(params=["host", "host, threads reversed", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request):
    """On the CPU in both orders of a block's threads, which shows a missing barrier; and on a GPU."""
    if request.param == "cuda":
        torch.set_default_device("cuda")
        yield Kernels(backends.native()[0].cuda, "cuda")
        torch.set_default_device(None)
        return
    module = on_host.module()
    module.set_reversed(request.param != "host")
    yield Kernels(module, "cpu")
    module.set_reversed(False)


@pytest.fixture
def rng(kernels) -> torch.Generator:
    return torch.Generator(kernels.device).manual_seed(0)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def close(got: Tensor, expected: Tensor, dtype: str, magnitude: float = 1.0) -> None:
    """Each element within the type's rounding, and float32 sums' at the given magnitude."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=tolerance, atol=max(2e-6, tolerance / 8) * magnitude
    )


# --- linear layers --------------------------------------------------------------------------------


def run_linear(kernels, dtype: str, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, out: Tensor,
               norm: tuple[Tensor, Tensor] | None = None) -> None:  # fmt: skip
    gain, shift = norm if norm else (None, None)
    kernels.linear(
        dtype=dtype, rows=len(x), inner=weight.shape[1], columns=len(weight), x=x, ldx=x.stride(0), gain=gain,
        shift=shift, epsilon=1e-5, weight=weight, bias=bias, epilogue=epilogue, out=out, ldo=out.stride(0),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("inner", "columns"), [(8, 1), (48, 17), (1032, 9), (4096, 3)])
def test_linear(kernels, dtype, rows, inner, columns, rng):
    """Of one to eight rows, over widths below, at and beyond what a block covers in one step."""
    number = DTYPES[dtype]
    x, weight = (torch.randn(n, inner, generator=rng).to(number) for n in (rows, columns))
    bias = torch.randn(columns, generator=rng)
    expected = F.linear(x.double(), weight.double(), bias.double())
    out = poisoned(rows + 1, columns + 3, dtype=number)
    run_linear(kernels, dtype, x, weight, bias, "store", out[:, :columns])
    close(out[:rows, :columns], expected, dtype, inner**0.5)
    assert out[rows:].isnan().all() and out[:, columns:].isnan().all(), "what lies beside stays"
    activated = poisoned(rows, columns, dtype=number)
    run_linear(kernels, dtype, x, weight, bias, "gelu", activated)
    close(activated, F.gelu(expected), dtype, inner**0.5)
    logits = poisoned(rows, columns)
    run_linear(kernels, dtype, x, weight, None, "store_float", logits)
    close(logits, expected - bias, "float32", inner**0.5)
    residual = torch.randn(rows, columns, generator=rng)
    added = residual.clone()
    run_linear(kernels, dtype, x, weight, bias, "add", added)
    close(added, residual + expected, "float32", inner**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 7])
@pytest.mark.parametrize(("inner", "columns"), [(16, 20), (1544, 11)])
def test_norm_and_linear(kernels, dtype, rows, inner, columns, rng):
    number = DTYPES[dtype]
    x = torch.randn(rows, inner + 8, generator=rng)[:, :inner] * 3 + 100  # a mean that a single pass would not survive
    weight = torch.randn(columns, inner, generator=rng).to(number)
    gain, shift = torch.randn(2, inner, generator=rng)
    out = poisoned(rows, columns)
    run_linear(kernels, dtype, x, weight, None, "store_float", out, (gain, shift))
    normalised = F.layer_norm(x.double(), (inner,), gain.double(), shift.double())
    rounded = F.linear(normalised.to(number).double(), weight.double())
    assert (out - rounded).norm() <= 8 * TOLERANCE[dtype] * rounded.norm()
    assert (out - rounded).abs().max() <= 8 * TOLERANCE[dtype] * rounded.abs().max() * rows**0.5


def test_nan_in_one_row_stays_there(kernels, rng):
    x, weight = torch.randn(3, 64, generator=rng), torch.randn(10, 64, generator=rng)
    x[1, 5] = float("nan")
    out = poisoned(3, 10)
    run_linear(kernels, "float32", x, weight, None, "store", out)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


# --- attention ------------------------------------------------------------------------------------


class Cache:
    """Keys and values of `slots` sequences, random up to a length each, and poison behind."""

    def __init__(self, dtype: str, slots: int, heads: int, width: int, capacity: int, rng: torch.Generator) -> None:
        self.dtype, self.heads, self.width, self.capacity = dtype, heads, width, capacity
        self.stride = (width + 7) // 8 * 8
        shape = (2, slots, heads, capacity, self.stride)
        self.cache = torch.randn(shape, generator=rng).to(DTYPES[dtype])
        self.cache[..., width:] = 0

    def run(self, kernels, qkv: Tensor, slot: Tensor, position: Tensor, last: Tensor, splits: int, append: bool):
        rows = len(qkv)
        out = poisoned(rows, self.heads * self.width, dtype=qkv.dtype)
        self.partial = poisoned(rows, self.heads, splits, self.stride + 2)
        self.arrived = torch.zeros(rows, self.heads, dtype=torch.int32)
        kernels.attention(
            **self.common(qkv, slot, position), last=last, splits=splits, append=append,
            partial=self.partial, arrived=self.arrived, out=out, ldo=out.stride(0),
        )  # fmt: skip
        assert not self.arrived.any(), "ready for the next launch"
        return out

    def common(self, qkv: Tensor, slot: Tensor, position: Tensor) -> dict:
        return dict(
            dtype=self.dtype, rows=len(qkv), heads=self.heads, width=self.width, stride=self.stride,
            capacity=self.capacity, qkv=qkv, ldq=qkv.stride(0), slot=slot,
            position=position, keys=self.cache[0], values=self.cache[1],
        )  # fmt: skip

    def expected(self, qkv: Tensor, slot: Tensor, last: Tensor) -> Tensor:
        outputs = []
        for row, s, end in zip(qkv.double(), slot.tolist(), last.tolist(), strict=True):
            q = row.view(3, self.heads, 1, self.width)[0]
            k, v = self.cache[:, s, :, : end + 1, : self.width].double()
            outputs.append(F.scaled_dot_product_attention(q, k, v).flatten())
        return torch.stack(outputs)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


HEADS = {
    "16 wide": (2, 16),
    "paper's 48": (3, 48),
    "64 wide": (1, 64),
    "88 wide": (2, 88),
    "odd": (2, 11),
    "200": (1, 200),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("beside", [5, 8], ids=["unaligned", "aligned"])
def test_attention_appends_and_attends(kernels, dtype, heads, width, splits, beside, rng):
    """Ragged positions: the first, one around each border between splits, and the last."""
    positions = ints(0, 1, 63, 64, 65, 127, 200, 299)
    rows = len(positions)
    cache = Cache(dtype, rows + 1, heads, width, 300, rng)
    qkv = torch.randn(rows, 3 * heads * width + beside, generator=rng).to(DTYPES[dtype])[:, : 3 * heads * width]
    slots = ints(*reversed(range(1, rows + 1)))
    before = cache.cache.clone()
    out = cache.run(kernels, qkv, slots, positions, positions, splits, True)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        appended = qkv[row].view(3, heads, width)[1:]
        assert torch.equal(cache.cache[:, slot, :, position, :width], appended)
        before[:, slot, :, position, :width] = appended
    assert torch.equal(cache.cache, before), "all else stays"
    close(out, cache.expected(qkv, slots, positions), dtype)


def test_attention_over_the_unmasked_prefix(kernels, rng):
    """Rows of one slot that see positions behind their own, after an append of its own."""
    cache = Cache("float32", 2, 2, 24, 100, rng)
    cache.cache[:] = float("nan")
    cache.cache[..., 24:] = 0
    qkv = torch.randn(70, 3 * 48, generator=rng)
    slot, position = torch.ones(70, dtype=torch.int32), torch.arange(70, dtype=torch.int32)
    last = position.clamp(min=40 - 1)
    kernels.append(**cache.common(qkv, slot, position))
    out = cache.run(kernels, qkv, slot, position, last, 2, False)
    close(out, cache.expected(qkv, slot, last), "float32")
    assert cache.cache[:, 0, :, :, :24].isnan().all(), "the other slot stays"


def test_attention_does_not_hide_what_is_not_a_number(kernels, rng):
    cache = Cache("float32", 1, 1, 16, 256, rng)
    qkv, at = torch.randn(1, 48, generator=rng), ints(255)
    cache.cache[0, 0, 0, 130, 3] = float("nan")
    assert cache.run(kernels, qkv, ints(0), at, at, 4, False).isnan().all()


def test_more_splits_than_are_joined_at_once(kernels, rng):
    cache = Cache("float32", 1, 2, 136, 40 * 64, rng)
    cache.cache[0] *= torch.linspace(0, 3, 40 * 64)[:, None]  # the largest scores come last
    qkv = torch.randn(1, 3 * 272, generator=rng)
    for at in (ints(40 * 64 - 1), ints(17 * 64)):
        close(cache.run(kernels, qkv, ints(0), at, at, 40, False), cache.expected(qkv, ints(0), at), "float32")


def test_large_scores_do_not_overflow(kernels, rng):
    cache = Cache("float32", 1, 1, 16, 256, rng)
    cache.cache[0] *= 100
    qkv, at = torch.randn(1, 48, generator=rng) * 100, ints(255)
    for splits in (1, 4):
        out = cache.run(kernels, qkv, ints(0), at, at, splits, False)
        torch.testing.assert_close(out.double(), cache.expected(qkv, ints(0), at), rtol=1e-3, atol=1e-3)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 768])
def test_residual_and_norm(kernels, dtype, width, rng):
    number = DTYPES[dtype]
    x, y = torch.randn(3, width, generator=rng) * 5 + 20, torch.randn(3, width, generator=rng).to(number)
    bias, gain, shift = torch.randn(3, width, generator=rng)
    for with_y in (True, False):
        after, out = x.clone(), poisoned(3, width, dtype=number)
        kernels.add_norm(
            dtype=dtype, rows=3, width=width, x=after, ldx=width,
            y=y if with_y else None, ldy=width, bias=bias, gain=gain,
            shift=shift, epsilon=1e-5, out=out, ldo=width,
        )  # fmt: skip
        expected = x.double() + (y.double() + bias if with_y else 0)
        torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-6)
        close(out, F.layer_norm(after.double(), (width,), gain.double(), shift.double()), dtype, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "stride"), [(5, 5), (64, 64), (64, 67), (2056, 2056)])
def test_bias_and_gelu(kernels, dtype, width, stride, rng):
    x, bias = (torch.randn(4, stride, generator=rng) * 3).to(DTYPES[dtype]), torch.randn(width, generator=rng)
    out = x.clone()
    kernels.bias_gelu(dtype=dtype, rows=4, width=width, x=out, ldx=stride, bias=bias)
    close(out[:, :width], F.gelu(x[:, :width].double() + bias), dtype)
    assert torch.equal(out[:, width:], x[:, width:])


@pytest.mark.gpu
def test_more_rows_than_a_grid_is_high():
    x, bias = torch.randn(70000, 8, device="cuda"), torch.randn(8, device="cuda")
    out = x.clone()
    Kernels(backends.native()[0].cuda, "cuda").bias_gelu(dtype="float32", rows=70000, width=8, x=out, ldx=8, bias=bias)
    close(out, F.gelu(x.double() + bias), "float32")


# --- the choice of tokens -------------------------------------------------------------------------


def run_choose(kernels, logits: Tensor, images: list[int], at: int, place: tuple[int, int] = (0, 0),
               wanted: list[bool] | None = None, choices: int | None = None, **options):  # fmt: skip
    """One choice for each row at position `at` of sequences of length `at` + 3: (sequences, position, x, errors)."""
    rows, vocab = logits.shape
    chosen = dict(greedy=False, temperature=1.0, top_k=0, top_p=1.0, seed=0) | {
        name: value for name, value in options.items() if value is not None
    }
    shared = kernels.options(choices=vocab if choices is None else choices, **chosen)
    length = at + 3
    places = torch.full((2, length), -1)
    places[:, at + 1] = torch.tensor(place)
    keep = torch.ones(rows, length, dtype=torch.bool)
    if wanted is not None:
        keep[:, at + 1] = torch.tensor(wanted)
    sequences, position = torch.full((rows, length), 2), torch.full((rows,), at, dtype=torch.int32)
    tok_emb, pos_emb = torch.arange(vocab).float()[:, None].expand(-1, 3).contiguous(), torch.arange(at + 2).float()
    pos_emb = (pos_emb[:, None] * torch.tensor([0, 1000.0, 0])).contiguous()
    x, errors = poisoned(rows, 3), torch.zeros(1, dtype=torch.int32)
    images = torch.tensor(images)
    kernels.choose(
        dtype=next(name for name, value in DTYPES.items() if value == logits.dtype), rows=rows,
        vocab=vocab, logits=logits, ldl=logits.stride(0), options=shared,
        images=images, places=places, wanted=keep, sequence=sequences,
        length=length, position=position, tok_emb=tok_emb, pos_emb=pos_emb,
        positions=len(pos_emb), width=3, x=x, ldx=3, errors=errors,
    )  # fmt: skip
    return sequences, position, x, errors.item()


def test_a_chosen_token_becomes_the_next_input(kernels, rng):
    logits = torch.randn(3, 50, generator=rng)
    sequences, position, x, errors = run_choose(kernels, logits, [0, 1, 2], 4, wanted=[True, False, True], greedy=True)
    token = torch.tensor([logits[0].argmax(), 2, logits[2].argmax()])
    assert errors == 0
    assert position.tolist() == [5, 5, 5]
    assert sequences[:, 5].equal(token) and (sequences[:, :5] == 2).all() and (sequences[:, 6:] == 2).all()
    assert x.equal(torch.stack([token, token + 5000, token], 1).float())


choices_of = dict(
    temperature=st.floats(0.05, 5),
    top_k=st.one_of(st.none(), st.integers(1, 330)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1)),
    seed=st.integers(0, 2**64 - 1),
    vocab=st.sampled_from([1, 3, 50, 300]),
    levels=st.sampled_from([2, 7, 100, 10**6]),
    greedy=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**choices_of)
def test_the_choice_is_that_of_the_reference(kernels, temperature, top_k, top_p, seed, vocab, levels, greedy, dtype):
    """Also where many logits are equal, at both borders of the filters."""
    generator = torch.Generator(kernels.device).manual_seed(seed % 2**63)
    logits = torch.randint(levels, (3, vocab), generator=generator) * (8 / levels) - 4
    logits = logits.to(DTYPES[dtype])
    images, choices = [4, 2**32 - 1, 0], max(1, vocab - seed % 3)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    noise = None if greedy else gumbel_noise(seed, torch.tensor(images), torch.tensor(8), torch.tensor(6), choices)
    expected = choose(logits[:, :choices], noise, **options)
    sequences, _, _, errors = run_choose(
        kernels, logits, images, 1, (8, 6), choices=choices, greedy=greedy, seed=seed, **options
    )
    assert errors == 0
    assert sequences[:, 2].tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, dict(top_k=100), dict(top_p=0.9), dict(top_k=4000, top_p=0.99)], ids=str)
@pytest.mark.parametrize("vocab", [16384, 50001], ids=["scores in shared memory", "scores in the logits' place"])
def test_large_vocabularies(kernels, options, vocab, rng):
    logits = torch.randn(2, vocab, generator=rng) * 3
    noise = gumbel_noise(7, torch.tensor([5, 6]), torch.tensor(0), torch.tensor(0), vocab)
    sequences, _, _, errors = run_choose(kernels, logits, [5, 6], 1, seed=7, **options)
    assert errors == 0
    assert sequences[:, 2].tolist() == choose(logits, noise, **options).tolist()


@pytest.mark.parametrize("vocab", [1000, 16384])
def test_equal_logits_everywhere(kernels, vocab):
    """The nucleus then is the first so many entries; and no sum of probabilities can be larger."""
    logits = torch.zeros(1, vocab)
    for top_p in (0.001, 0.3, 0.9991):
        noise = gumbel_noise(1, torch.tensor([0]), torch.tensor(0), torch.tensor(0), vocab)
        sequences, _, _, _ = run_choose(kernels, logits, [0], 1, seed=1, top_p=top_p)
        assert sequences[:, 2].tolist() == choose(logits, noise, top_p=top_p).tolist()


@pytest.mark.parametrize("options", [dict(greedy=True), {}, dict(top_k=2), dict(top_p=0.5)], ids=str)
def test_what_cannot_be_chosen_is_found(kernels, options):
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 2.0], [1.0, 2.0, 3.0]])
    sequences, _, _, errors = run_choose(kernels, logits, [0, 1, 2], 1, **options)
    assert errors == 1 and sequences[1, 2] == 0
    assert run_choose(kernels, logits, [0, 1, 2], 1, wanted=[True, False, True], **options)[3] == 0
    assert run_choose(kernels, logits, [0, 1, 2], 1, choices=1, **options)[3] == 0
    nothing = torch.full((1, 4), float("-inf"))
    assert run_choose(kernels, nothing, [0], 1, **options)[3] == 2
    nothing[0, 3] = float("inf")
    assert run_choose(kernels, nothing, [0], 1, **options)[0][0, 2] == 3


# --- mistakes -------------------------------------------------------------------------------------


def test_wrong_arguments_are_named(kernels, rng):
    x, weight, out = (torch.zeros(2, 16) for _ in range(3))
    with pytest.raises(ValueError, match="^inner: got 15, expected a multiple of 8"):
        run_linear(kernels, "float32", x, weight[:, :15], None, "store", out)
    with pytest.raises(ValueError, match="^x: got .*, expected an address that is a multiple of 16"):
        run_linear(kernels, "float32", x[:, 1:], weight, None, "store", out)
    with pytest.raises(ValueError, match="^rows: got 9, expected 1 to 8"):
        run_linear(kernels, "float32", torch.zeros(9, 16), weight, None, "store", out)
    with pytest.raises(ValueError, match="^dtype: got 'int8', expected one of bfloat16, float16, float32"):
        run_linear(kernels, "int8", x, weight, None, "store", out)
    with pytest.raises(ValueError, match="^epilogue: got 'relu'"):
        run_linear(kernels, "float32", x, weight, None, "relu", out)
    with pytest.raises(ValueError, match="^rows: got nothing, expected an integer"):
        kernels.attention(dtype="float32")


def test_a_refused_launch_names_the_kernel(kernels):
    x, bias = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(RuntimeError, match="kernel .bias and GELU. could not be launched in 2 x 1 x 1 .*: invalid dev"):
        kernels.bias_gelu(dtype="float32", rows=2, width=8, x=x, ldx=8, bias=bias, device=99)
    kernels.bias_gelu(dtype="float32", rows=2, width=8, x=x, ldx=8, bias=bias)


@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's library")
def test_kernels_under_sanitizers():
    """Addresses and undefined behaviour, in one pass over the tests above that reach every kernel."""
    if os.environ.get("TAMINGFAST_SANITIZED"):
        pytest.skip("this is that pass")
    built = on_host.build(on_host.SANITIZE)
    compiler = os.environ.get("CXX", "g++").split()[0]
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("the compiler has no address sanitizer")
    names = "(test_linear and 48-17-3 or norm_and or appends or gelu or residual or found) and host and not reversed"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names],
        env=os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "TAMINGFAST_SANITIZED": str(built)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
