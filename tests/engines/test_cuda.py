"""The CUDA engine against the torch reference and the CPU engine: on a GPU, and with its kernels run on the CPU."""

from __future__ import annotations

import copy
import gc
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import weakref

import numpy as np
import on_host
import pytest
import torch
import torch.nn.functional as F
from golden import arrays, checkpoint
from gpts import STEPS, all_logits, random_gpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tamingfast
from tamingfast.engines import cpu as engine
from tamingfast.engines import cuda as cuda_engine
from tamingfast.engines.cpu import GPTEngine
from tamingfast.engines.cuda import CudaEngine
from tamingfast.engines.cuda.engine import steps_ahead
from tamingfast.engines.cuda.rows import Group, Rows
from tamingfast.engines.request import Span
from tamingfast.errors import UserError
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.sampling import choose, gumbel_noise, sample_grid, sampler

needs_native = pytest.mark.skipif(backends.native()[0] is None, reason=backends.native()[1])
#: Of logits, by the engine's type, relative to their norm.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.004}
BATCHES = [1, 3, 10]  # one, few: their kernels stream the weights; many: torch's products


class Place:
    """Where the engine runs."""

    def __init__(self, device: str) -> None:
        self.device = device

    def engine(self, gpt: GPT, dtype: str = "float32", slots: int = 3) -> CudaEngine:
        kernels = None if self.device == "cuda" else on_host.module()
        made = CudaEngine(copy.deepcopy(gpt).to(self.device), dtype, kernels)
        made.reserve(slots, gpt.block_size)
        return made


@pytest.fixture
def tiles(monkeypatch) -> None:
    """Attention of like spans takes tiles, however few they are."""
    monkeypatch.setattr("tamingfast.engines.cuda.rows._WORTH_TILES", 0)


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request) -> Place:
    return Place("cpu" if request.param == "host" else "cuda")


def decoded(made: CudaEngine | GPTEngine, sequences: Tensor, steps, **options) -> Tensor:
    """The sequences after a decoding in the first slots, on the CPU; those given stay."""
    sequences = sequences.to(getattr(made, "device", "cpu"), copy=True)
    made.decode(range(len(sequences)), sequences, steps, **options)
    return sequences.cpu()


# --- logits ---------------------------------------------------------------------------------------

SHAPES = {
    "tiny": dict(),
    "one head of 48, prefix": dict(vocab=50, heads=1, width=48, n_unmasked=7),
    "heads of 88": dict(vocab=40, heads=2, width=176, n_unmasked=40, std=0.1),
    "odd everything": dict(vocab=37, block=35, heads=3, width=33, n_unmasked=1),
    "one of each": dict(vocab=1, block=1, layers=1, heads=1, width=1),
    "no layers": dict(layers=0),
}


@pytest.mark.parametrize("dtype", cuda_engine.DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_of_any_geometry(place, shape, dtype):
    gpt = random_gpt(**shape)
    tokens = torch.randint(gpt.config.vocab_size, (gpt.block_size,)).tolist()
    expected = all_logits(gpt, tokens)
    logits = place.engine(gpt, dtype).step([(1, 0, tokens)], "all").cpu()
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    if dtype == "float32":
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", ["class", "unmasked"])
def test_logits_of_the_reference(place, name):
    data, model = arrays(f"net2net_{name}"), tamingfast.load_model(checkpoint(f"net2net_{name}"))
    prefix = data["c_indices"].shape[1]
    sequences = np.concatenate([data["c_indices"], data["z_indices"][:, :-1]], 1).tolist()
    logits = place.engine(model.transformer).step([(i, 0, sequence) for i, sequence in enumerate(sequences)], "all")
    logits = logits.cpu().view(2, len(sequences[0]), -1)[:, prefix - 1 :]
    np.testing.assert_allclose(logits.numpy(), data["logits"], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", ["class", "unmasked"])
def test_greedy_tokens_of_the_reference(place, name):
    data, model = arrays(f"net2net_{name}"), tamingfast.load_model(checkpoint(f"net2net_{name}"))
    known = torch.from_numpy(np.concatenate([data["c_indices"], data["greedy_indices"]], 1))
    count = known.shape[1] - 1 if place.device == "cuda" else data["c_indices"].shape[1] + 12
    sequences = known.clone()
    sequences[:, data["c_indices"].shape[1] :] = 0
    steps = range(data["c_indices"].shape[1], count)
    assert torch.equal(
        decoded(place.engine(model.transformer), sequences, steps, greedy=True)[:, :count], known[:, :count]
    )


@pytest.mark.parametrize("worth", [0, 20000, 10**9], ids=["tiles", "both", "rows"])
def test_a_ragged_step(place, worth, monkeypatch):
    """Prompts alone and together, continuations by one token and by many, of slots in any order."""
    monkeypatch.setattr("tamingfast.engines.cuda.rows._WORTH_TILES", worth)
    gpt = random_gpt(n_unmasked=4, block=150)
    tokens = torch.randint(24, (6, 150)).tolist()
    made = place.engine(gpt, slots=6)
    made.step([(i, 0, tokens[i][:held]) for i, held in ((4, 130), (1, 5), (3, 9))], "none")
    spans = [(5, 0, 7), (0, 0, 7), (2, 0, 1), (4, 130, 1), (1, 5, 60), (3, 4, 100)]
    made.truncate(3, 4)
    spans[2] = (2, 0, 6)
    logits = made.step(
        [(slot, start, tokens[slot][start : start + count]) for slot, start, count in spans], "all"
    ).cpu()
    for (slot, start, count), part in zip(spans, logits.split([span[2] for span in spans]), strict=True):
        expected = all_logits(gpt, tokens[slot][: start + count])[start:]
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-4)
    assert [made.length(slot) for slot in range(6)] == [7, 65, 6, 104, 131, 7]
    flat = torch.tensor(tokens[0][7:9] + tokens[5][7:10], device=place.device)
    last = made.feed(flat, [Span(0, 7, 2), Span(5, 7, 3)]).cpu()
    for row, tokens_so_far in zip(last, (tokens[0][:9], tokens[5][:10]), strict=True):
        torch.testing.assert_close(row, all_logits(gpt, tokens_so_far)[-1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n_unmasked", [0, 3])
@pytest.mark.parametrize("dtype", cuda_engine.DTYPES)
def test_like_spans_behind_a_kept_prefix(place, dtype, n_unmasked, monkeypatch):
    """Tiles and rows see the same; the window's conditioning is fed once, what it is moved over again and again."""
    gpt = random_gpt(n_unmasked=n_unmasked, heads=3, width=33)
    tokens = torch.randint(24, (3, 30))
    expected = torch.stack([all_logits(gpt, row)[-1] for row in tokens.tolist()])
    for worth in (0, 1 << 40):
        monkeypatch.setattr("tamingfast.engines.cuda.rows._WORTH_TILES", worth)
        made = place.engine(gpt, dtype)
        made.step([(i, 0, [7, 7, *row[2:4]]) for i, row in enumerate(tokens.tolist())], "none")
        for start in (0, 4):
            made.step([(2 - i, start, row[start:]) for i, row in enumerate(tokens.tolist())], "none")
        logits = made.step([(2 - i, 3, row[3:]) for i, row in enumerate(tokens.tolist())]).cpu()
        assert (logits - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_how_rows_are_grouped(monkeypatch):
    """Like spans that are many go in tiles, all others next to one another in one launch."""
    spans = [Span(0, 0, 10), Span(1, 0, 10), Span(2, 5, 20), Span(3, 0, 1), Span(4, 90, 10), Span(5, 0, 30)]
    monkeypatch.setattr("tamingfast.engines.cuda.rows._WORTH_TILES", 100 * 100)
    rows = Rows(spans, 0, 100, torch.device("cpu"))
    assert rows.groups == [Group(0, 20, 2, 0, 10), Group(20, 40, 1, 5, 20), Group(40, 51), Group(51, 81, 1, 0, 30)]
    assert rows.ends.tolist() == [9, 19, 39, 40, 50, 80] and rows.longest == 100
    assert Rows(spans, 0, 10, torch.device("cpu")).groups == [Group(0, 81)]
    assert Rows(spans[:1], 10, 200, torch.device("cpu")).groups == [Group(0, 10, 1, 0, 10)], "10 rows see 10 positions"


def test_more_tokens_than_one_pass_takes(place, monkeypatch):
    monkeypatch.setattr("tamingfast.engines.cuda.engine._TOKENS_PER_PASS", 50)
    gpt = random_gpt(n_unmasked=3)
    tokens = torch.randint(24, (3, 40))
    made = place.engine(gpt)
    logits = made.step([(i, 0, row) for i, row in enumerate(tokens.tolist())]).cpu()
    for row, sequence in zip(logits, tokens.tolist(), strict=True):
        torch.testing.assert_close(row, all_logits(gpt, sequence)[-1], rtol=1e-5, atol=1e-4)
    sequences = decoded(made, torch.nn.functional.pad(tokens, (0, 1)), [40], greedy=True)
    assert sequences[:, 40].tolist() == logits.argmax(-1).tolist()


# --- tokens ---------------------------------------------------------------------------------------

OPTIONS = dict(temperature=1.1, top_k=20, top_p=0.97, seed=3)


@needs_native
@pytest.mark.parametrize("shape", [dict(), dict(n_unmasked=5), dict(heads=3, width=33)], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_seeded_tokens_are_those_of_the_cpu_engine(place, shape, batch, record_property):
    gpt = random_gpt(**shape)
    sequences, steps = torch.randint(24, (batch, 30)), [*range(6, 14), 16, 17, 27]
    on_cpu = GPTEngine(gpt)
    on_cpu.reserve(batch, gpt.block_size)
    expected = decoded(on_cpu, sequences, steps, **OPTIONS)
    tokens = decoded(place.engine(gpt, slots=batch), sequences, steps, **OPTIONS)
    mismatches = (tokens != expected).float().mean().item()
    record_property("mismatch_rate", mismatches)
    # A near-tie of two sums may fall either way; none does in these few tokens.
    assert mismatches == 0.0
    assert expected[:, steps].unique().numel() > 3


@pytest.mark.parametrize("dtype", cuda_engine.DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_tokens_are_the_choice_of_the_engines_logits(place, batch, dtype):
    """What the step of a batch computes, by whichever kernels, is what a pass over the tokens computes."""
    gpt = random_gpt(std=0.3)
    made = place.engine(gpt, dtype, slots=batch)
    sequences = decoded(made, torch.full((batch, 12), 3), range(1, 12), images=range(5, 5 + batch), top_k=10, seed=9)
    logits = made.step([(i, 0, row[:-1]) for i, row in enumerate(sequences.tolist())], "all").cpu()
    noise = gumbel_noise(9, torch.arange(5, 5 + batch)[:, None], torch.tensor(0), torch.arange(1, 12), 24)
    expected = choose(logits.view(batch, 11, -1), noise, top_k=10)
    # Sums of half-width numbers in another order may tip a near-tie.
    assert (sequences[:, 1:] == expected).float().mean() >= (1.0 if dtype == "float32" else 0.9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_few_sequences_do_not_depend_on_how_many_there_are(place, dtype):
    gpt = random_gpt(block=200)
    made = place.engine(gpt, dtype, slots=8)
    tokens = torch.randint(24, (1, 152))
    made.step([(0, 0, tokens[0, :150].tolist())], "none")
    for slot in range(1, 8):
        made.copy(0, slot)
    seen = []
    for batch in (1, 2, 3, 8):
        decoded(made, tokens.expand(batch, -1).contiguous(), [151], fed=150)
        seen.append(made._loops[batch].logits.cpu())
        assert made._loops[batch].room["splits"] == 4
    assert all(torch.equal(row, seen[0][0]) for logits in seen for row in logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("batch", BATCHES)
def test_logits_are_not_rounded_to_the_engines_type(place, batch, dtype):
    made = place.engine(random_gpt(), dtype, slots=batch)
    decoded(made, torch.zeros(batch, 3, dtype=torch.int64), [1])
    for logits in (made._loops[batch].logits, made.step([(0, 1, [5])])):
        assert logits.dtype == torch.float32
        assert (logits.to(made.number).float() != logits).float().mean() > 0.5


def test_the_host_looks_often_enough_and_not_more():
    assert [steps_ahead(seconds) for seconds in (0.0, 1e-6, 0.001, 0.02, 0.4)] == [64, 64, 50, 2, 1]


def test_unwanted_steps_keep_their_tokens(place):
    gpt = random_gpt()
    given, wanted = torch.randint(24, (3, 12)), torch.rand(3, 11) < 0.5
    sequences = decoded(place.engine(gpt), given, range(1, 12), wanted=wanted, seed=5)
    assert torch.equal(sequences[:, 1:][~wanted], given[:, 1:][~wanted])
    for i in range(3):
        for step in (wanted[i].nonzero()[:, 0] + 1).tolist():
            noise = gumbel_noise(5, torch.tensor(i), torch.tensor(0), torch.tensor(step), 24)
            assert sequences[i, step] == choose(all_logits(gpt, sequences[i, :step].tolist())[-1], noise)


def test_an_engine_is_used_again_and_again(place):
    """Batches in turn, other options, a kept prefix, a new cache: nothing of an earlier call is left."""
    gpt = random_gpt(n_unmasked=2)
    made = place.engine(gpt, slots=10)
    given = torch.randint(24, (10, 16))
    fresh = {
        (batch, seed): decoded(place.engine(gpt, slots=batch), given[:batch], range(4, 16), seed=seed)
        for batch, seed in ((3, 1), (10, 2), (3, 4))
    }
    for (batch, seed), expected in fresh.items():
        assert torch.equal(decoded(made, given[:batch], range(4, 16), seed=seed), expected)
    kept = decoded(made, given[:3], range(4, 16), seed=1, fed=0)
    assert torch.equal(decoded(made, kept, range(9, 16), seed=1, fed=8), fresh[3, 1])
    made.copy(0, 7)
    assert made.length(7) == made.length(0) == 15
    made.reserve(4, 20)
    assert made.info()["slots"] == 4 and made.length(0) == 0
    assert torch.equal(decoded(made, given[:3], range(4, 16), seed=4), fresh[3, 4])


def test_image_tokens_that_see_each_other(place):
    """Steps inside the unmasked prefix take a whole pass each."""
    gpt = random_gpt(n_unmasked=9)
    sequences = decoded(place.engine(gpt), torch.full((3, 14), 5), range(2, 14), greedy=True)
    for row in sequences.tolist():
        for step in range(2, 14):
            assert row[step] == all_logits(gpt, row[:step])[-1].argmax()


@pytest.mark.parametrize("batch", BATCHES)
def test_an_engine_made_in_inference_mode_works_outside(place, batch):
    """And within again: what lasts from call to call is no inference tensor."""
    gpt, given = random_gpt(), torch.randint(24, (batch, 9))
    with torch.inference_mode():
        made = place.engine(gpt, slots=batch + 1)
        expected = decoded(made, given, range(2, 9), seed=1)
    assert torch.equal(decoded(made, given, range(2, 9), seed=1), expected)
    made.copy(0, batch)
    made.step([(batch, 8, [3])])
    with torch.inference_mode():
        assert torch.equal(decoded(made, given, range(2, 9), seed=1), expected)


# --- the cache ------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_cache_holds_what_its_history_says(place, data):
    """Random feeding, cutting, copying and reuse of slots; logits must be those of a fresh pass over the tokens."""
    n_unmasked = data.draw(st.sampled_from([0, 3]))
    gpt = random_gpt(n_unmasked=n_unmasked)
    made = place.engine(gpt)
    held: list[list[int]] = [[], [], []]
    for _ in range(data.draw(st.integers(1, 8))):
        slot, other = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
        action = data.draw(st.sampled_from(["feed", "feed", "feed", "truncate", "copy"]))
        if action == "truncate":
            length = data.draw(st.integers(0, len(held[slot])))
            made.truncate(slot, length)
            del held[slot][length:]
        elif action == "copy":
            length = data.draw(st.integers(0, len(held[slot])))
            made.copy(slot, other, length)
            held[other] = held[slot][:length]
        else:
            items = []
            for target in {slot, other}:
                start = data.draw(st.integers(0, len(held[target])))
                start = 0 if start < n_unmasked else start
                # A cut inside the unmasked prefix leaves keys that saw the whole prefix; it is fed again from 0.
                least = n_unmasked if start == 0 and n_unmasked else 1
                tokens = data.draw(st.lists(st.integers(0, 23), min_size=least, max_size=5))
                held[target][start:] = tokens
                items.append((target, start, tokens))
            logits = made.step(items, "last").cpu()
            for (target, _, _), row in zip(items, logits, strict=True):
                torch.testing.assert_close(row, all_logits(gpt, held[target])[-1], rtol=1e-5, atol=1e-4)
        assert [made.length(i) for i in range(3)] == [len(tokens) for tokens in held]


def test_memory_that_is_not_there_is_refused_with_its_size(place):
    gpt = random_gpt(block=2**20, layers=1)
    made = CudaEngine(gpt.to(place.device), kernels=None if place.device == "cuda" else on_host.module())
    made.reserve(1, 16)
    before = made.info()
    with pytest.raises(MemoryError, match=rf"^cache: {2 * 2**24 * 2 * 2**20 * 8 * 4} bytes are needed"):
        made.reserve(2**24, 2**20)
    assert made.info() == before
    made.step([(0, 0, [1])])


def test_an_engine_is_freed_with_its_last_name(place):
    made = place.engine(random_gpt())
    decoded(made, torch.zeros(3, 5, dtype=torch.int64), range(1, 5))
    watched = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert watched() is None
    finally:
        gc.enable()


def test_memory_that_runs_out_while_it_works_is_told_alike(place, monkeypatch):
    made = place.engine(random_gpt(), slots=1)

    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(F, "linear", refuse)  # of every pass
    for use in (
        lambda: made.step([(0, 0, [1, 2])]),
        lambda: decoded(made, torch.zeros(1, 9, dtype=torch.int64), [8]),
    ):
        with pytest.raises(MemoryError, match=r"^activations: \d+ bytes are needed"):
            use()
        assert made.length(0) == 0
    monkeypatch.undo()
    with pytest.raises(torch.OutOfMemoryError, match="the caller's own"):
        made.decode([0], torch.zeros(1, 9, dtype=torch.int64, device=place.device), [8], progress=own_failure)


def own_failure(done: int) -> None:
    raise torch.OutOfMemoryError("the caller's own")


# --- working beside others ------------------------------------------------------------------------


def test_progress_and_interruption(place):
    gpt = random_gpt()
    made = place.engine(gpt, slots=2)
    whole = decoded(made, torch.full((2, 13), 7), range(1, 13), seed=2)
    sequences, told = torch.full((2, 13), 7, device=place.device), []

    def progress(done: int) -> None:
        told.append((done, sequences.clone().cpu()))
        with pytest.raises(RuntimeError, match="the engine is working"):
            made.step([(0, 0, [1])])
        if done == 108:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.decode([0, 1], sequences, range(1, 13), seed=2, progress=progress, every=4, before=100)
    assert [done for done, _ in told] == [104, 108]
    for done, seen in told:
        assert torch.equal(seen[:, : done - 99], whole[:, : done - 99]), "what is told is there"
    assert [made.length(slot) for slot in (0, 1)] == [8, 8], "the cache was longer before"
    assert torch.equal(decoded(made, sequences.cpu(), range(9, 13), seed=2, fed=8), whole)


def test_threads_take_turns(place):
    gpt = random_gpt()
    made = place.engine(gpt, slots=3)
    expected = [made.step([(i, 0, [i, i + 1, 5])]).cpu() for i in range(3)]
    results = {}

    def use(i: int) -> None:
        results[i] = [made.step([(i, 0, [i, i + 1, 5])]).cpu() for _ in range(5)]

    workers = [threading.Thread(target=use, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(row, expected[i]) for i in range(3) for row in results[i])


@pytest.mark.gpu
def test_another_stream_and_the_last_device():
    gpt, device = random_gpt(), torch.device("cuda", torch.cuda.device_count() - 1)
    made = CudaEngine(copy.deepcopy(gpt).to(device))
    made.reserve(10, 40)
    given = torch.randint(24, (10, 30))
    expected = decoded(made, given, range(5, 30), seed=1)
    assert torch.equal(decoded(made, given, range(5, 30), seed=1), expected), "from the graph"
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for batch in (10, 3):
            assert torch.equal(decoded(made, given[:batch], range(5, 30), seed=1), expected[:batch])
    cond = torch.tensor([[3], [4]])
    grid = sample_grid(copy.deepcopy(gpt).to(device), cond, 5, 6, seed=1)
    assert grid.device == device
    assert torch.equal(grid.cpu(), sample_grid(gpt, cond, 5, 6, seed=1))


@pytest.mark.gpu
@needs_native
def test_seeded_tokens_of_gpt2_small_geometry(record_property):
    """In float32 against the CPU engine; a token that differs is a near-tie, and what follows it then differs too."""
    torch.manual_seed(0)
    gpt = GPT(1024, 256, n_layer=12, n_head=16, n_embd=768).eval()
    on_cpu, on_gpu = GPTEngine(gpt), CudaEngine(copy.deepcopy(gpt).cuda())
    for batch in (2, 16):
        for made in (on_cpu, on_gpu):
            made.reserve(batch, 256)
        sequences, steps = torch.zeros(batch, 64, dtype=torch.int64), range(1, 64)
        expected = decoded(on_cpu, sequences, steps, top_k=100, seed=1)
        tokens = decoded(on_gpu, sequences, steps, top_k=100, seed=1)
        differs = (tokens != expected).any(1)
        record_property(f"sequences_that_differ_of_{batch}", int(differs.sum()))
        assert differs.float().mean() <= 0.25
        for b in differs.nonzero()[:, 0].tolist():
            step = int((tokens[b] != expected[b]).nonzero()[0])
            logits = on_cpu.step([(0, 0, expected[b, :step].tolist())])[0]
            noise = gumbel_noise(1, torch.tensor(b), torch.tensor(0), torch.tensor(step), 1024)
            scores = torch.stack([logits + noise])[0]
            assert (scores[tokens[b, step]] - scores[expected[b, step]]).abs() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="there is no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_reports_nothing(tool):
    program = """
        import torch
        from tamingfast.models.gpt import GPT
        from tamingfast.engines.cuda import CudaEngine
        for dtype in ("float32", "bfloat16"):
            engine = CudaEngine(GPT(40, 130, n_layer=1, n_head=2, n_embd=48).cuda(), dtype)
            for batch in (1, 3, 10):
                engine.reserve(batch, 130)
                tokens = torch.zeros(batch, 131, dtype=torch.int64, device="cuda")
                engine.decode(range(batch), tokens, [*range(100, 104), 129], top_k=20, top_p=0.9)
        """
    result = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=tamingfast",
         sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


# --- sample_grid ----------------------------------------------------------------------------------


@pytest.fixture
def sampled_here(monkeypatch) -> None:
    """`sample_grid` takes the CUDA engine for a GPT on the CPU."""
    monkeypatch.setattr(engine, "refusal", lambda gpt: None)
    monkeypatch.setattr(engine, "dtypes", lambda gpt: cuda_engine.DTYPES)
    monkeypatch.setattr(engine, "GPTEngine", lambda gpt, dtype: CudaEngine(gpt, dtype, on_host.module()))


@pytest.mark.usefixtures("sampled_here")
@pytest.mark.parametrize("kind", ["prefix", "grid", "bidirectional"])
@pytest.mark.parametrize(
    ("height", "width", "rule"), [(3, 4, "paper"), (5, 6, "paper"), (5, 6, "strided"), (4, 6, "block")]
)
def test_grids_are_those_of_the_torch_backend(kind, height, width, rule):
    gpt = random_gpt(block=40, n_unmasked=3 if kind == "bidirectional" else 0)
    cond = torch.randint(24, (2, height, width) if kind == "grid" else (2, 3))
    start, mask = torch.randint(24, (2, height, width)), torch.rand(height, width) < 0.7
    options = dict(window=4, schedule=rule, stride=2, seed=8, top_k=20, start=start, mask=mask)
    seen = []
    grid = sample_grid(gpt, cond, height, width, backend="native", callback=lambda *a: seen.append(a), **options)
    assert torch.equal(grid, sample_grid(gpt, cond, height, width, backend="torch", **options))
    assert len(seen) > 1


@pytest.mark.usefixtures("sampled_here")
def test_half_width_engines_are_kept_with_the_model():
    gpt, cond = random_gpt(std=0.3), torch.tensor([[3], [4]])
    first = sample_grid(gpt, cond, 3, 3, seed=1, dtype="float16")
    assert torch.equal(sample_grid(gpt, cond, 3, 3, seed=1, dtype="float16"), first)
    assert list(engine._engines[gpt]) == ["float16"]


@pytest.mark.usefixtures("sampled_here")
def test_changed_weights_take_the_place_of_the_old_ones():
    """Two copies are never there at once."""
    gpt, cond = random_gpt(), torch.tensor([[3], [4]])
    sample_grid(gpt, cond, 3, 3, seed=1)
    before = engine._engines[gpt]["float32"][1]
    with torch.no_grad():
        gpt.head.weight.mul_(-1)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine, "GPTEngine", lambda *a: made.append(before.weights is None) or CudaEngine(*a, on_host.module())
        )
        grid = sample_grid(gpt, cond, 3, 3, seed=1)
    assert made == [True]
    assert torch.equal(grid, sample_grid(gpt, cond, 3, 3, seed=1, backend="torch"))


class OnAGpu(GPT):
    """Says so, as far as the choice of a backend asks."""

    def parameters(self, recurse: bool = True):
        real = super().parameters(recurse)
        return iter([type("P", (), dict(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32))(), *real])


def test_a_gpu_without_the_engine_falls_back_and_says_why_once(monkeypatch, caplog):
    monkeypatch.setattr(cuda_engine, "refusal", lambda gpt: "built without CUDA (nvcc was not found)")
    monkeypatch.setattr(engine.backends, "native", lambda: (object(), "here"))
    gpt = OnAGpu(24, 40, n_layer=1, n_head=2, n_embd=16)
    sampler._log_once.cache_clear()
    with caplog.at_level("WARNING", logger="tamingfast.sampling.sampler"):
        for _ in range(2):
            assert sampler.choose_backend("auto", gpt, None) == ("torch", "float32")
    assert [record.message for record in caplog.records] == [
        "the torch backend samples, not the CUDA engine: built without CUDA (nvcc was not found)"
    ]
    with pytest.raises(UserError, match="backend 'native' cannot run here: built without CUDA"):
        sampler.choose_backend("native", gpt, None)
    monkeypatch.setattr(cuda_engine, "refusal", lambda gpt: None)
    assert sampler.choose_backend("auto", gpt, "float16") == ("native", "float16")
    with pytest.raises(UserError, match="dtype 'int8' needs the native engine .it has no int8 weights"):
        sampler.choose_backend("auto", gpt, "int8")
    with backends.use("reference"):
        assert sampler.choose_backend("auto", gpt, None) == ("torch", "float32")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "message"), STEPS.values(), ids=STEPS)
def test_bad_steps_are_named_and_change_nothing(place, items, message):
    made = place.engine(random_gpt(n_unmasked=5))
    made.step([(2, 0, [1] * 9)])
    with pytest.raises(ValueError, match=message):
        made.step(items)
    assert [made.length(i) for i in range(3)] == [0, 0, 9]


DECODINGS = {
    "slot": (dict(slots=[3]), "^slot: got 3, expected 0 to 2"),
    "slot twice": (dict(slots=[1, 1], sequences=torch.zeros(2, 9, dtype=torch.int64)), "^slot: .* at most once"),
    "slots": (dict(slots=[0, 1]), "^slots: got 2, expected one for each of 1 sequences"),
    "sequences": (dict(sequences=torch.zeros(1, 9)), "^sequences: got torch.float32"),
    "step below": (dict(steps=[0, 1]), "^steps: got 0, expected 1 to 8"),
    "step above": (dict(steps=[9]), "^steps: got 9"),
    "falling": (dict(steps=[3, 3]), "^steps: got 3, expected 4 to 8"),
    "past the cache": (dict(steps=[42], sequences=torch.zeros(1, 50, dtype=torch.int64)), "^steps: got 42, .* most 40"),
    "wanted": (dict(wanted=torch.ones(1, 3)), "^wanted: got 3 values, expected 2"),
    "rows": (dict(rows=[1]), "^rows: got 1 values, expected 2"),
    "column": (dict(columns=[1, -1]), "^columns: got -1"),
    "image": (dict(images=[2**32]), "^images: got 4294967296"),
    "fed": (dict(fed=4), "^fed: got 4, expected at most the length"),
    "fed below": (dict(fed=-1), "^fed: got -1"),
    "choices": (dict(choices=25), "^choices: got 25, expected 1 to 24"),
    "temperature": (dict(temperature=0.0), "^temperature: got 0.0"),
    "top_k": (dict(top_k=-1), "^top_k: got -1"),
    "top_p": (dict(top_p=1.5), "^top_p: got 1.5"),
    "seed": (dict(seed=-1), "^seed: got -1"),
    "every": (dict(every=0), "^every: got 0"),
    "token": (dict(sequences=torch.full((1, 9), 24)), "^token: got 24, expected 0 to 23"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), DECODINGS.values(), ids=DECODINGS)
def test_bad_decodings_are_named(place, change, message):
    made = place.engine(random_gpt())
    good = dict(slots=[0], sequences=torch.zeros(1, 9, dtype=torch.int64), steps=[3, 4])
    arguments = good | change
    arguments["sequences"] = arguments["sequences"].to(place.device)
    with pytest.raises(ValueError, match=message):
        made.decode(**arguments)
    assert made.length(0) == 0


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("where", ["head.weight", "blocks.0.mlp.0.weight", "blocks.1.attn.key.bias", "tok_emb.weight"])
def test_broken_weights_are_named(place, batch, where):
    gpt = random_gpt()
    with torch.no_grad():
        gpt.get_parameter(where).view(-1)[0] = float("nan")
    made = place.engine(gpt, slots=batch)
    sequences = torch.zeros(batch, 5, dtype=torch.int64, device=place.device)
    with pytest.raises(ValueError, match="logits hold NaN in some row"):
        made.decode(range(batch), sequences, range(1, 5))
    assert made.length(0) == 0, "what was fed after the error is not what `sequences` holds"


def test_a_closed_engine_and_wrong_types(place):
    made = place.engine(random_gpt())
    with pytest.raises(ValueError, match="^logits: got 'some'"):
        made.step([(0, 0, [1])], "some")
    made.close()
    for use in (lambda: made.step([(0, 0, [1])]), lambda: made.length(0), lambda: made.reserve(1, 1), made.info):
        with pytest.raises(ValueError, match="the engine is closed"):
            use()
    with pytest.raises(ValueError, match="^dtype: got 'int8', expected one of float32, bfloat16, float16"):
        place.engine(random_gpt(), "int8")


def test_an_engine_that_cannot_run_says_why(monkeypatch):
    for reason in ("built without CUDA (TAMINGFAST_CUDA=0 was set)", "no CUDA device (no driver)"):
        monkeypatch.setattr(backends, "cuda", lambda reason=reason: backends.Availability(False, reason))
        with pytest.raises(RuntimeError, match=f"cannot run this transformer: {re.escape(reason)}"):
            CudaEngine(random_gpt())
    monkeypatch.setattr(backends, "cuda", lambda: backends.Availability(True, "pretended"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cuda_engine.refusal(random_gpt()) == "its kernels need compute capability 8.0, and 7.5 is here"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda_engine.refusal(random_gpt()) is None
    assert "heads up to 256 wide, and these are 300 wide" in cuda_engine.refusal(random_gpt(heads=1, width=300))
