"""The native engine against the torch reference: logits, the cache, seeded tokens, interruption, bad arguments."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import arrays, checkpoint
from gpts import STEPS, all_logits, random_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_python
from torch import nn

import tamingfast
from tamingfast.engines import cpu as engine
from tamingfast.engines.cpu import GPTEngine
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.sampling import choose, gumbel_noise, sample_grid

native, reason = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)
ISAS = native.build_info()["isas"] if native else []
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return random_gpt()


def made(gpt: GPT, dtype: str = "float32", threads: int | None = None, slots: int = 3) -> GPTEngine:
    made = GPTEngine(gpt, dtype, threads)
    made.reserve(slots, gpt.block_size)
    return made


# --- logits ---------------------------------------------------------------------------------------

SHAPES = {
    "tiny": dict(),
    "one head of 48, prefix": dict(vocab=50, heads=1, width=48, n_unmasked=7),
    "heads of 64": dict(vocab=33, heads=2, width=128, std=0.1),
    "heads of 88": dict(vocab=40, heads=2, width=176, n_unmasked=40, std=0.1),
    "odd everything": dict(vocab=37, block=35, heads=3, width=33, n_unmasked=1),
    "one of each": dict(vocab=1, block=1, layers=1, heads=1, width=1),
    "no layers": dict(layers=0),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_of_any_geometry(shape, isa, monkeypatch):
    monkeypatch.setenv("TAMINGFAST_ISA", isa)
    gpt = random_gpt(**shape)
    tokens = torch.randint(gpt.config.vocab_size, (gpt.block_size,)).tolist()
    expected = all_logits(gpt, tokens)
    logits = made(gpt).step([(1, 0, tokens)], "all")
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    for dtype, most in (("bfloat16", 0.05), ("int8", 0.1)):
        error = made(gpt, dtype).step([(1, 0, tokens)], "all") - expected
        assert error.norm() <= most * expected.norm()
        assert gpt.config.n_layer == 0 or error.abs().max() > 0


@pytest.mark.parametrize("name", ["uncond", "class", "seg", "coord", "unmasked"])
def test_logits_of_the_reference(name):
    data, model = arrays(f"net2net_{name}"), tamingfast.load_model(checkpoint(f"net2net_{name}"))
    prefix = data["c_indices"].shape[1]
    sequences = np.concatenate([data["c_indices"], data["z_indices"][:, :-1]], 1).tolist()
    engine = made(model.transformer, slots=2)
    logits = engine.step([(i, 0, sequence) for i, sequence in enumerate(sequences)], "all")
    logits = logits.view(2, len(sequences[0]), -1)[:, prefix - 1 :]
    np.testing.assert_allclose(logits.numpy(), data["logits"], rtol=0, atol=1e-4)


def test_gpt2_small_geometry():
    """Twelve layers of width 768: logits, then greedy tokens, on several slots at once."""
    torch.manual_seed(0)
    gpt = GPT(1024, 64, n_layer=12, n_head=16, n_embd=768).eval()
    prefix = torch.randint(1024, (2, 9))
    engine = made(gpt, slots=2)
    logits = engine.step([(i, 0, row) for i, row in enumerate(prefix.tolist())], "all").view(2, 9, -1)
    with torch.no_grad():
        torch.testing.assert_close(logits, gpt(prefix)[0], rtol=0, atol=1e-4)
        expected, cache = prefix, gpt.new_cache(2)
        fed = prefix
        for _ in range(6):
            scores = gpt.forward_cached(fed, cache, expected.shape[1] - fed.shape[1])[:, -1]
            fed = scores.argmax(-1, keepdim=True)
            expected = torch.cat([expected, fed], 1)
    sequences = torch.cat([prefix, torch.zeros(2, 6, dtype=torch.int64)], 1)
    engine.decode([0, 1], sequences, range(9, 15), greedy=True)
    assert sequences.tolist() == expected.tolist()


# --- the same bits, however they are computed -----------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", engine.DTYPES)
def test_neither_threads_nor_company_nor_pieces_change_a_bit(dtype, isa, monkeypatch):
    monkeypatch.setenv("TAMINGFAST_ISA", isa)
    gpt = random_gpt(vocab=70, heads=3, width=3 * 22, n_unmasked=5, std=0.2)
    tokens = torch.randint(70, (30, 40)).tolist()
    together = made(gpt, dtype, threads=2, slots=30)
    logits = together.step([(i, 0, row) for i, row in enumerate(tokens)], "all").view(30, 40, -1)
    for slot, threads in ((0, 1), (17, 3)):
        alone = made(gpt, dtype, threads)
        pieces = [alone.step([(2, 0, tokens[slot][:6])], "all")]
        pieces += [alone.step([(2, i, [tokens[slot][i]])]) for i in range(6, 30)]
        pieces += [alone.step([(2, 30, tokens[slot][30:])], "all")]
        assert torch.equal(torch.cat(pieces), logits[slot])


@pytest.mark.parametrize("dtype", engine.DTYPES)
def test_seeded_tokens_are_the_same_for_any_batch_threads_and_instruction_set(dtype, monkeypatch):
    gpt = random_gpt(vocab=300, block=33, heads=4, width=64, std=0.2)
    options = dict(temperature=1.1, top_k=100, top_p=0.97, seed=3)
    grids = []
    for isa in ISAS:
        monkeypatch.setenv("TAMINGFAST_ISA", isa)
        for threads, batch in ((1, 1), (2, 6), (3, 3)):
            engine = made(gpt, dtype, threads, slots=batch)
            sequences = torch.zeros(6, 33, dtype=torch.int64)
            for first in range(0, 6, batch):
                part = sequences[first : first + batch]
                engine.decode(range(batch), part, range(1, 33), images=range(first, first + batch), **options)
            grids.append(sequences)
    assert all(torch.equal(grid, grids[0]) for grid in grids)
    assert grids[0].unique().numel() > 50


def test_more_rows_than_one_pass_takes():
    gpt = random_gpt(block=700, n_unmasked=600, std=0.2)
    tokens = torch.randint(24, (3, 700)).tolist()
    engine = made(gpt)
    logits = engine.step([(i, 0, row) for i, row in enumerate(tokens)], "all").view(3, 700, -1)
    for i, row in enumerate(tokens):
        torch.testing.assert_close(logits[i], all_logits(gpt, row), rtol=1e-5, atol=1e-4)
    again = engine.step([(i, 600, row[600:]) for i, row in enumerate(tokens)])
    assert torch.equal(again, logits[:, -1])


# --- the choice of tokens -------------------------------------------------------------------------

ANSWERS = {  # Random123's known answers
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}  # fmt: skip
word = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "result"), ANSWERS.values(), ids=ANSWERS)
def test_philox_gives_the_published_answers(counter, key, result):
    assert native.philox4x32(counter, key) == result


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), word, word, word, st.integers(1, 70))
def test_noise_is_that_of_the_reference(seed, image, row, column, vocab):
    expected = gumbel_noise(seed, torch.tensor(image), torch.tensor(row), torch.tensor(column), vocab)
    torch.testing.assert_close(torch.tensor(native.gumbel_noise(seed, image, row, column, vocab)), expected,
                               rtol=2e-7, atol=0)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    temperature=st.floats(0.05, 5),
    top_k=st.one_of(st.none(), st.integers(1, 60)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1)),
    seed=st.integers(0, 2**64 - 1),
    choices=st.integers(1, 50),
    greedy=st.booleans(),
)
def test_the_choice_is_that_of_the_reference(temperature, top_k, top_p, seed, choices, greedy):
    gpt = random_gpt(vocab=50, layers=0)
    with torch.no_grad():
        gpt.head.weight[10:20] = gpt.head.weight[:10]  # equal logits
    engine = made(gpt, threads=1, slots=4)
    sequences = torch.tensor([[3, 0], [5, 0], [7, 0], [9, 0]])
    logits = engine.step([(i, 0, row[:1]) for i, row in enumerate(sequences.tolist())])[:, :choices]
    images = torch.tensor([4, 2**32 - 1, 0, 1])
    noise = None if greedy else gumbel_noise(seed, images, torch.tensor(8), torch.tensor(6), choices)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = choose(logits, noise, **options)
    engine.decode(range(4), sequences, [1], rows=[8], columns=[6], images=images.tolist(), choices=choices, seed=seed,
                  greedy=greedy, **options)  # fmt: skip
    assert sequences[:, 1].tolist() == expected.tolist()


def test_unwanted_steps_keep_their_tokens(gpt):
    sequences = torch.randint(24, (3, 30))
    wanted = torch.rand(3, 29) < 0.5
    given = sequences.clone()
    made(gpt).decode(range(3), sequences, range(1, 30), wanted=wanted, seed=5)
    assert torch.equal(sequences[:, 1:][~wanted], given[:, 1:][~wanted])
    for i in range(3):
        for step in (wanted[i].nonzero()[:, 0] + 1).tolist():
            noise = gumbel_noise(5, torch.tensor(i), torch.tensor(0), torch.tensor(step), 24)
            assert sequences[i, step] == choose(all_logits(gpt, sequences[i, :step].tolist())[-1], noise)


@pytest.mark.parametrize("dtype", engine.DTYPES)
@pytest.mark.parametrize("where", ["head.weight", "blocks.0.mlp.0.weight", "blocks.1.attn.key.bias", "tok_emb.weight"])
def test_broken_weights_are_named(gpt, dtype, where):
    broken = copy.deepcopy(gpt)
    with torch.no_grad():
        broken.get_parameter(where).view(-1)[0] = float("nan")
    engine = made(broken, dtype, slots=1)
    with pytest.raises(ValueError, match="logits.* NaN"):
        engine.decode([0], torch.zeros(1, 5, dtype=torch.int64), range(1, 5))


# --- the cache ------------------------------------------------------------------------------------


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


# --- accuracy of the smaller types ----------------------------------------------------------------


def photo_tokens(image: np.ndarray, count: int, seed: int) -> torch.Tensor:
    """Crops of a photograph as 12 x 12 tokens, 32 levels of grey: int64 (count, 144)."""
    rng = np.random.default_rng(seed)
    grey = torch.from_numpy(image).float().mean(-1)[None, None] / 256
    grey = torch.nn.functional.avg_pool2d(grey, 6)[0, 0]
    corners = rng.integers(0, np.array(grey.shape) - 12, (count, 2))
    return torch.stack([(grey[r : r + 12, c : c + 12] * 32).long().flatten() for r, c in corners])


@pytest.fixture(scope="module")
def trained() -> tuple[GPT, torch.Tensor]:
    """A small prior trained on one photograph, and tokens of another."""
    skimage = pytest.importorskip("skimage.data")
    torch.manual_seed(0)
    gpt = GPT(33, 144, n_layer=3, n_head=2, n_embd=96)
    train, test = photo_tokens(skimage.astronaut(), 256, 0), photo_tokens(skimage.chelsea(), 12, 1)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=2e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices
    sos = torch.full((256, 1), 32)
    sequences = torch.cat([sos, train], 1)
    for step in range(60):
        batch = sequences[step * 8 % 256 :][:8]
        loss = gpt(batch[:, :-1], targets=batch[:, 1:].contiguous())[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    assert loss < 3.0, "the prior must have learnt something (a uniform guess is 3.5)"
    return gpt.eval(), torch.cat([sos[: len(test)], test], 1)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 0.005), ("int8", 0.01)])
def test_likelihood_of_real_tokens(trained, dtype, most, record_property):
    gpt, sequences = trained
    with torch.no_grad():
        reference, loss = gpt(sequences[:, :-1], targets=sequences[:, 1:].contiguous())
    items = [(i, 0, row[:-1]) for i, row in enumerate(sequences.tolist())]
    logits = made(gpt, dtype, slots=len(items)).step(items, "all")
    measured = nn.functional.cross_entropy(logits, sequences[:, 1:].flatten())
    agreement = (logits.argmax(-1) == reference.flatten(0, 1).argmax(-1)).float().mean().item()
    record_property("top1_agreement", agreement)
    record_property("nll", measured.item())
    assert abs(measured - loss) <= most * loss
    assert agreement > 0.9


# --- working beside others ------------------------------------------------------------------------


def test_ctrl_c_stops_and_leaves_the_engine_usable():
    """The signal comes from a timer while C++ decodes; far more tokens are asked for than can be done by then."""
    result = run_python(
        """
        import signal, torch
        from tamingfast.models.gpt import GPT
        from tamingfast.engines.cpu import GPTEngine
        torch.set_num_threads(2)
        gpt = GPT(512, 4096, n_layer=4, n_head=4, n_embd=256)
        engine = GPTEngine(gpt)
        engine.reserve(8, 4096)
        prompt = torch.zeros(8, 4097, dtype=torch.int64)
        expected = engine.step([(0, 0, [1, 2, 3])])
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for work in (
            lambda: engine.decode(range(8), prompt, range(1, 4097)),
            lambda: engine.step([(i, 0, [0] * 4096) for i in range(8)], "none"),
        ):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            try:
                work()
                print("finished")
            except KeyboardInterrupt:
                print("stopped", all(engine.length(i) < 4096 for i in range(8)))
        assert torch.equal(engine.step([(0, 0, [1, 2, 3])]), expected)
        print("usable")
        """
    )
    assert result.stdout.split("\n") == ["stopped True", "stopped True", "usable", ""], result.stderr


def test_the_interpreter_runs_on_while_it_decodes(gpt):
    """Another Python thread makes progress between the first and the last token of one call."""
    engine = made(random_gpt(vocab=100, block=400, layers=4, width=128), threads=1, slots=4)
    seen, done = [], threading.Event()

    def count() -> None:
        while not done.is_set():
            seen.append(engine_steps[-1])
            done.wait(1e-4)

    engine_steps = [0]
    other = threading.Thread(target=count)
    other.start()
    engine.decode(
        range(4), torch.zeros(4, 401, dtype=torch.int64), range(1, 401), progress=engine_steps.append, every=40
    )
    done.set()
    other.join()
    assert engine_steps == [0, *range(40, 401, 40)]
    assert len(set(seen)) > 2


def test_threads_take_turns(gpt):
    engine = made(gpt, slots=4)
    expected = [engine.step([(i, 0, [i, i + 1, 5])]) for i in range(4)]
    results = {}

    def use(i: int) -> None:
        results[i] = [engine.step([(i, 0, [i, i + 1, 5])]) for _ in range(50)]

    workers = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(row, expected[i]) for i in range(4) for row in results[i])


def test_a_callback_that_raises_or_reenters(gpt):
    engine = made(gpt)
    sequences = torch.zeros(1, 30, dtype=torch.int64)

    def reenter(done: int) -> None:
        engine.step([(0, 0, [1])])

    with pytest.raises(RuntimeError, match="the engine is working"):
        engine.decode([0], sequences, range(1, 30), progress=reenter)
    with pytest.raises(RuntimeError, match="the engine is working"):
        engine.decode([0], sequences, range(1, 30), progress=lambda done: engine.close())

    def stop(done: int) -> None:
        raise StopIteration(done)

    with pytest.raises(StopIteration):
        engine.decode([0], sequences, range(1, 30), progress=stop)
    engine.step([(0, 0, [1])])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_can_decode():
    """As a data loader's worker may, after the parent has used its threads."""
    result = run_python(
        """
        import os, torch
        from tamingfast.models.gpt import GPT
        from tamingfast.engines.cpu import GPTEngine
        torch.set_num_threads(2)
        engine = GPTEngine(GPT(50, 20, n_layer=2, n_head=2, n_embd=64))
        engine.reserve(1, 20)
        before = engine.step([(0, 0, [1, 2, 3])])
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(engine.step([(0, 0, [1, 2, 3])]), before) else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert result.stdout.strip() == "0", result.stderr


def test_threads_follow_torch(gpt):
    engine = made(gpt)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            engine.step([(0, 0, [1])])
            assert engine.info()["threads"] == threads
    finally:
        torch.set_num_threads(before)


# --- sample_grid ----------------------------------------------------------------------------------


def test_weights_are_packed_once_and_again_after_a_change(monkeypatch):
    gpt, cond = random_gpt(), torch.tensor([[3]])
    packed = []
    monkeypatch.setattr(engine, "GPTEngine", lambda *args: packed.append(args) or GPTEngine(*args))
    first = sample_grid(gpt, cond, 4, 4, seed=1)
    assert torch.equal(sample_grid(gpt, cond, 4, 4, seed=1), first)
    sample_grid(gpt, torch.tensor([[3], [4]]), 4, 4, seed=1)
    assert len(packed) == 1
    for change in (
        lambda: gpt.head.weight.data.mul_(-1),
        lambda: gpt.load_state_dict(random_gpt().state_dict()),
        lambda: setattr(gpt.head, "weight", nn.Parameter(gpt.head.weight.detach() + 1)),
        lambda: setattr(gpt.head.weight, "data", gpt.head.weight.data * 2),
        lambda: stepped(gpt, torch.optim.AdamW(gpt.parameters(), lr=0.1, foreach=True)),
        lambda: gpt.blocks[0].mlp[0].bias.data[1:2].add_(5),
    ):
        before = len(packed)
        change()
        sampled = sample_grid(gpt, cond, 4, 4, seed=1)
        assert len(packed) == before + 1
        assert torch.equal(sampled, sample_grid(gpt, cond, 4, 4, seed=1, backend="torch"))


def stepped(gpt: GPT, optimizer: torch.optim.Optimizer) -> None:
    for value in gpt.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()


def test_unchanged_weights_are_those_they_were():
    """Also where they hold NaN, and where they count no versions."""
    with torch.inference_mode():
        gpt = random_gpt(vocab=500, width=48)
        gpt.head.weight[3, 3] = float("nan")
    snapshot = engine._Snapshot(gpt)
    assert len(snapshot.sample) < 4 * sum(value.numel() for value in gpt.parameters())
    assert snapshot == engine._Snapshot(gpt)
    with torch.inference_mode():
        gpt.pos_emb.mul_(2)
    assert snapshot != engine._Snapshot(gpt)
    assert engine._Snapshot(random_gpt()) != engine._Snapshot(random_gpt().double())


def test_packed_weights_go_with_the_model():
    gpt = random_gpt()
    sample_grid(gpt, torch.tensor([[3]]), 2, 2)
    count = len(engine._engines)
    del gpt
    gc.collect()
    assert len(engine._engines) == count - 1


def test_sampling_inside_a_callback_of_the_same_model():
    gpt, cond = random_gpt(), torch.tensor([[3]])
    expected, inner = sample_grid(gpt, cond, 4, 4, seed=1), []
    outer = sample_grid(gpt, cond, 4, 4, seed=1, callback=lambda *_: inner.append(sample_grid(gpt, cond, 4, 4, seed=1)))
    assert all(torch.equal(grid, expected) for grid in (outer, *inner))
    assert len(inner) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_types_sample_their_own_logits(dtype):
    gpt, cond = random_gpt(std=0.3), torch.tensor([[3], [4]])
    grid = sample_grid(gpt, cond, 4, 4, seed=1, dtype=dtype)
    engine = made(gpt, dtype)
    sequence = torch.cat([cond, grid.flatten(1)], 1)
    logits = engine.step([(i, 0, row[:-1]) for i, row in enumerate(sequence.tolist())], "all").view(2, 16, -1)
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    noise = gumbel_noise(1, torch.arange(2)[:, None], row, column, 24)
    assert torch.equal(choose(logits, noise), grid.flatten(1))


def test_the_reference_that_was_asked_for_is_taken(monkeypatch):
    monkeypatch.setattr(engine, "GPTEngine", None)
    with backends.use("reference"):
        sample_grid(random_gpt(), torch.tensor([[3]]), 2, 2)
        with pytest.raises(ValueError, match="'int8' needs the native engine .the torch reference was asked for"):
            sample_grid(random_gpt(), torch.tensor([[3]]), 2, 2, dtype="int8")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "message"), STEPS.values(), ids=STEPS)
def test_bad_steps_are_named_and_change_nothing(items, message):
    engine = made(random_gpt(n_unmasked=5))
    engine.step([(2, 0, [1] * 9)])
    with pytest.raises(ValueError, match=message):
        engine.step(items)
    assert [engine.length(i) for i in range(3)] == [0, 0, 9]


DECODES = {
    "step 0": (dict(steps=[0]), "^steps: got 0"),
    "steps that fall": (dict(steps=[3, 2]), "^steps: got 2, expected 4 to"),
    "step past the end": (dict(steps=[50]), "^steps: got 50"),
    "slot": (dict(slots=[7]), "^slot: got 7"),
    "slots": (dict(slots=[0, 1]), "^slots: got 2"),
    "wanted": (dict(wanted=torch.ones(1, 9, dtype=torch.bool)), "^wanted: got 9 values, expected 2"),
    "rows": (dict(rows=[1]), "^rows: got 1 values, expected 2"),
    "fed": (dict(fed=1), "^fed: got 1"),
    "fed below": (dict(fed=-1), "^fed: got -1"),
    "choices": (dict(choices=25), "^choices: got 25"),
    "temperature": (dict(temperature=0.0), "^temperature: got 0"),
    "every": (dict(every=0), "^every: got 0"),
    "sequences": (dict(sequences=torch.zeros(1, 10)), "^sequences: got torch.float32"),
    "token": (dict(sequences=torch.full((1, 10), 99)), "^token: got 99"),
}


@pytest.mark.parametrize(("change", "message"), DECODES.values(), ids=DECODES)
def test_bad_decodes_are_named(gpt, change, message):
    good = dict(slots=[0], sequences=torch.zeros(1, 10, dtype=torch.int64), steps=[1, 2])
    with pytest.raises(ValueError, match=message):
        made(gpt).decode(**(good | change))


def construct(gpt: GPT, **change) -> object:
    weights = {name: value.data_ptr() for name, value in gpt.named_parameters()}
    geometry = {name: getattr(gpt.config, name) for name in engine._GEOMETRY}
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
        dict(weights=lambda w: w | {"pos_emb": 0}),
        r"^weights\['pos_emb'\]: got a null pointer, expected an address",
    ),
    "weight unaligned": (
        dict(weights=lambda w: w | {"pos_emb": 3}),
        r"^weights\['pos_emb'\]: got 3, expected an address that is a multiple of 4",
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


def test_a_closed_engine_says_so(gpt):
    engine = made(gpt)
    engine.close()
    engine.close()
    for use in (
        lambda: engine.step([(0, 0, [1])]),
        lambda: engine.length(0),
        lambda: engine.reserve(1, 1),
        engine.info,
    ):
        with pytest.raises(ValueError, match="the engine is closed"):
            use()


def test_slots_are_reserved_first(gpt):
    with pytest.raises(ValueError, match="^slot: got 0, expected 0 to -1"):
        GPTEngine(gpt).step([(0, 0, [1])])
    for slots, length, message in ((0, 5, "^slots: got 0"), (1, 0, "^length: got 0"), (1, 41, "^length: got 41")):
        with pytest.raises(ValueError, match=message):
            GPTEngine(gpt).reserve(slots, length)


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
            draw(st.lists(st.tuples(anything, anything, tokens), max_size=3)),
            draw(st.sampled_from(engine.LOGITS) | anything),
            draw(st.sampled_from([out.data_ptr(), 0, 1, -1])), draw(st.integers(0, 4) | anything),
        ),
        "decode": lambda: raw.decode(
            draw(st.lists(st.integers(-1, 3) | anything, max_size=2)),
            draw(st.sampled_from([sequences.data_ptr(), 0, 1])), draw(st.integers(-1, 10)), draw(anything),
            draw(st.lists(anything, max_size=3)), draw(st.lists(st.integers(0, 1), max_size=6)),
            draw(st.lists(anything, max_size=3)), draw(st.lists(anything, max_size=3)),
            draw(st.lists(anything, max_size=2)), draw(anything), draw(st.booleans()), draw(st.floats()),
            draw(anything), draw(st.floats()), draw(anything),
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

ENGINE_SOURCES = sorted(str(path) for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if path.name != "bindings.cpp")


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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are asked for as GCC on Linux has them")
def test_sanitizers_report_nothing(tmp_path):
    """Address and undefined-behaviour sanitizers over every instruction set, type and odd sizes, without Python."""
    program = tmp_path / "check_engine"
    command = [compiler("g++"), "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += [
        f"-I{ROOT / 'csrc'}",
        str(ROOT / "tests" / "engines" / "check_engine.cpp"),
        *ENGINE_SOURCES,
        "-pthread",
        "-o",
    ]
    built = subprocess.run([*command, str(program)], capture_output=True, text=True, timeout=600)
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("this compiler has no sanitizer libraries")
    assert built.returncode == 0, built.stderr
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("good")
