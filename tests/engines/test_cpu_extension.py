"""The CPU engine's interface to C++: its cache, memory, raw arguments, other compilers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from gpts import all_logits, random_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

from tamingfast.engines import GPTEngine
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends

native, reason = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)
ROOT = Path(__file__).parents[2]

GEOMETRY = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_unmasked")


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return random_gpt()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_cache_holds_what_its_history_says(data):
    """Random feeding, cutting, copying and reuse of slots; logits must be those of a fresh pass over the tokens."""
    n_unmasked = data.draw(st.sampled_from([0, 3]))
    gpt, engine = HISTORY[n_unmasked]
    engine.reserve(3, 12)
    held: list[list[int]] = [[], [], []]
    for _ in range(data.draw(st.integers(1, 12))):
        slot, other = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
        action = data.draw(st.sampled_from(["feed", "feed", "feed", "truncate", "copy"]))
        if action == "truncate":
            length = data.draw(st.integers(0, len(held[slot])))
            engine.truncate(slot, length)
            del held[slot][length:]
        elif action == "copy":
            length = data.draw(st.integers(0, len(held[slot])))
            engine.copy(slot, other, length)
            held[other] = held[slot][:length]
        else:
            items = []
            for target in {slot, other}:
                start = data.draw(st.integers(0, min(len(held[target]), 11)))
                start = 0 if start < n_unmasked else start
                # A cut inside the unmasked prefix leaves keys that saw the whole prefix; it is fed again from 0.
                least = n_unmasked if start == 0 and n_unmasked else 1
                tokens = data.draw(st.lists(st.integers(0, 23), min_size=least, max_size=12 - start))
                held[target][start:] = tokens
                items.append((target, start, tokens))
            logits = engine.step(items, "last")
            for (target, _, _), row in zip(items, logits, strict=True):
                torch.testing.assert_close(row, all_logits(gpt, held[target])[-1], rtol=1e-5, atol=1e-4)
        assert [engine.length(i) for i in range(3)] == [len(tokens) for tokens in held]


HISTORY = {}
if native:
    for _n in (0, 3):
        _gpt = random_gpt(n_unmasked=_n)
        HISTORY[_n] = (_gpt, GPTEngine(_gpt, threads=1))


def test_memory_that_is_not_there_is_refused_with_its_size():
    gpt = random_gpt(block=2**20, layers=1)
    engine = GPTEngine(gpt)
    engine.reserve(1, 16)
    before = engine.info()
    needed = 2**20 * 16 * 2 * 4 * 2**20  # positions, width, keys and values, float32, slots; heads are padded to 16
    with pytest.raises(MemoryError, match=r"^cache: \d+ bytes are needed, but only \d+ bytes are free") as error:
        engine.reserve(2**20, 2**20)
    assert int(str(error.value).split()[1]) >= needed
    assert engine.info() == before
    engine.step([(0, 0, [1])])


@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
def test_what_a_slot_held_before_leaves_no_trace(dtype):
    """Not even NaN, in the positions that kernels read without using them."""
    gpt = random_gpt()
    with torch.no_grad():
        gpt.tok_emb.weight[5] = float("nan")
    engine = GPTEngine(gpt, dtype, threads=1)
    for count in range(1, 9):
        engine.reserve(1, 20)
        expected = engine.step([(0, 0, range(6, 6 + count))])
        engine.truncate(0, 0)
        assert engine.step([(0, 0, [5] * 20)]).isnan().all()
        engine.truncate(0, 0)
        assert torch.equal(engine.step([(0, 0, range(6, 6 + count))]), expected)


# --- raw arguments: C++ guards itself -------------------------------------------------------------


def construct(gpt: GPT, **change) -> object:
    weights = {name: (value.data_ptr(), value.nbytes) for name, value in gpt.named_parameters()}
    geometry = {name: getattr(gpt.config, name) for name in GEOMETRY}
    good = dict(weights=weights, geometry=geometry, dtype="float32", threads=1)
    return native.GPTEngine(
        **{key: value(good[key]) if callable(value) else value for key, value in (good | change).items()}
    )


CONSTRUCTIONS = {
    "weight missing": (
        dict(weights=lambda w: {k: v for k, v in w.items() if k != "ln_f.bias"}),
        "^weights: got no 'ln_f.bias', expected every parameter",
    ),
    "weight null": (
        dict(weights=lambda w: w | {"pos_emb": (0, 40 * 16 * 4)}),
        r"^weights\['pos_emb'\]: got a null pointer",
    ),
    "weight short": (
        dict(weights=lambda w: w | {"pos_emb": (64, 39 * 16 * 4)}),
        r"^weights\['pos_emb'\]: got 2496, expected 2560 bytes, 40 x 16 elements of 4",
    ),
    "longer block": (
        dict(geometry=lambda g: g | {"block_size": 41}),
        r"^weights\['pos_emb'\]: got 2560, expected 2624 bytes",
    ),
    "weight unaligned": (
        dict(weights=lambda w: w | {"pos_emb": (3, 40 * 16 * 4)}),
        r"^weights\['pos_emb'\]: got 3, .*multiple of 4",
    ),
    "geometry missing": (dict(geometry={}), "^geometry: got no 'vocab_size', expected every size"),
    "heads": (dict(geometry=lambda g: g | {"n_head": 3}), "^n_head: got 3, expected a divisor of n_embd=16"),
    "layers": (dict(geometry=lambda g: g | {"n_layer": 10**9}), "^n_layer: got 1000000000, expected 0 to"),
    "more layers": (dict(geometry=lambda g: g | {"n_layer": 3}), "^weights: got no 'blocks.2.ln1.weight'"),
    "width": (dict(geometry=lambda g: g | {"n_embd": -16}), "^n_embd: got -16"),
    "vocabulary": (dict(geometry=lambda g: g | {"vocab_size": 0}), "^vocab_size: got 0"),
    "prefix": (dict(geometry=lambda g: g | {"n_unmasked": 99}), "^n_unmasked: got 99"),
    "dtype": (dict(dtype="float8"), "^dtype: got 'float8', expected one of bfloat16, float32, int8"),
    "threads": (dict(threads=0), "^threads: got 0"),
    "isa": (dict(isa="z80"), "^isa: got 'z80'"),
}


@pytest.mark.parametrize(("change", "message"), CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_bad_constructions_are_named(gpt, change, message):
    construct(gpt)
    with pytest.raises(ValueError, match=message):
        construct(gpt, **change)


anything = st.one_of(st.none(), st.integers(-(2**70), 2**70), st.integers(-2, 50), st.floats(), st.text(max_size=3))

tokens = st.lists(anything, max_size=4) | st.lists(st.integers(0, 23), max_size=4)

FUZZED = GPTEngine(random_gpt(), threads=1) if native else None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_arguments_crash(data):
    raw, draw = FUZZED._native, data.draw
    FUZZED.reserve(2, 20)
    out, sequences = torch.zeros(4, 24), torch.zeros(2, 10, dtype=torch.int64)
    calls = {
        "step": lambda: raw.step(
            draw(st.lists(st.tuples(anything, anything, tokens, st.integers(0, 4) | anything), max_size=3)),
            (draw(st.sampled_from([out.data_ptr(), 0, 1, -1])), draw(st.sampled_from([0, 96, 192, 384]) | anything)),
        ),
        "decode": lambda: raw.decode(
            draw(st.lists(st.integers(-1, 3) | anything, max_size=2)),
            (draw(st.sampled_from([sequences.data_ptr(), 0, 1])), draw(st.sampled_from([0, 80, 160]) | anything)),
            draw(st.integers(-1, 10)), draw(anything),
            draw(st.lists(anything, max_size=3)), draw(st.lists(st.integers(0, 1), max_size=6)),
            draw(st.lists(anything, max_size=3)), draw(st.lists(anything, max_size=3)),
            draw(st.lists(anything, max_size=2)), draw(anything), draw(st.booleans()), draw(st.floats()),
            draw(anything), draw(st.floats()), draw(anything), draw(st.integers(0, 9) | anything),
        ),
        "reserve": lambda: raw.reserve(draw(anything), draw(anything)),
        "truncate": lambda: raw.truncate(draw(anything), draw(anything)),
        "copy": lambda: raw.copy(draw(anything), draw(anything), draw(anything)),
        "length": lambda: raw.length(draw(anything)),
        "threads": lambda: raw.set_threads(draw(st.integers(-5, 0) | st.integers(257, 2**70))),
    }  # fmt: skip
    name = draw(st.sampled_from(sorted(calls)))
    try:
        calls[name]()
    except (TypeError, ValueError, MemoryError):
        return


# --- other compilers ------------------------------------------------------------------------------

ENGINE_SOURCES = sorted(
    str(path) for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if not path.name.endswith("bindings.cpp")
)


def compiler(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_it_compiles_for_arm():
    """Through the generic path, checked by a cross compiler; nothing is run."""
    command = [compiler("aarch64-linux-gnu-g++"), "-std=c++17", "-fopenmp", "-Wall", "-Werror", "-fsyntax-only"]
    result = subprocess.run([*command, *ENGINE_SOURCES], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("flags", "amx"), [([], True), (["-DTAMINGFAST_NO_AMX"], False)])
def test_compilers_without_amx_build_the_other_kernels(flags, amx, tmp_path):
    if platform.machine() != "x86_64":
        pytest.skip("these kernels are for x86-64")
    source, made = ROOT / "csrc" / "cpu" / "kernels_avx512bf16.cpp", tmp_path / "kernels.s"
    command = [compiler("g++"), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fopenmp", *flags, "-S", source]
    result = subprocess.run([*command, "-o", made], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert ("tdpbf16ps" in made.read_text()) == amx
