"""The CPU engine's token choice against the reference, interruption, and use from several threads."""

from __future__ import annotations

import copy
import os
import threading

import pytest
import torch
from engine_cases import cpu_engine, decoded, request
from gpts import all_logits, random_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_python

from tamingfast.engines import GPTEngine
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.ops.choice import choose, gumbel_noise

native, reason = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return random_gpt()


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
    engine = cpu_engine(gpt, threads=1, slots=4)
    sequences = torch.tensor([[3, 0], [5, 0], [7, 0], [9, 0]])
    logits = engine.step([(i, 0, row[:1]) for i, row in enumerate(sequences.tolist())])[:, :choices]
    images = torch.tensor([4, 2**32 - 1, 0, 1])
    noise = None if greedy else gumbel_noise(seed, images, torch.tensor(8), torch.tensor(6), choices)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = choose(logits, noise, **options)
    options |= dict(images=images.tolist(), choices=choices, seed=seed, greedy=greedy)
    assert decoded(engine, sequences, [1], rows=[8], columns=[6], **options)[:, 1].tolist() == expected.tolist()


def test_unwanted_steps_keep_their_tokens(gpt):
    given, wanted = torch.randint(24, (3, 30)), torch.rand(3, 29) < 0.5
    sequences = decoded(cpu_engine(gpt), given, range(1, 30), wanted=wanted, seed=5)
    assert torch.equal(sequences[:, 1:][~wanted], given[:, 1:][~wanted])
    for i in range(3):
        for step in (wanted[i].nonzero()[:, 0] + 1).tolist():
            noise = gumbel_noise(5, torch.tensor(i), torch.tensor(0), torch.tensor(step), 24)
            assert sequences[i, step] == choose(all_logits(gpt, sequences[i, :step].tolist())[-1], noise)


@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
@pytest.mark.parametrize("where", ["head.weight", "blocks.0.mlp.0.weight", "blocks.1.attn.key.bias", "tok_emb.weight"])
def test_broken_weights_are_named(gpt, dtype, where):
    broken = copy.deepcopy(gpt)
    with torch.no_grad():
        broken.get_parameter(where).view(-1)[0] = float("nan")
    engine = cpu_engine(broken, dtype, slots=1)
    with pytest.raises(ValueError, match="logits.* NaN"):
        decoded(engine, torch.zeros(1, 5, dtype=torch.int64), range(1, 5))


# --- working beside others ------------------------------------------------------------------------


def test_ctrl_c_stops_and_leaves_the_engine_usable():
    """The signal comes from a timer while C++ decodes; far more tokens are asked for than can be done by then."""
    result = run_python(
        """
        import signal, torch
        from tamingfast.models.gpt import GPT
        from tamingfast.engines import DecodeRequest, GPTEngine
        torch.set_num_threads(2)
        gpt = GPT(512, 4096, n_layer=4, n_head=4, n_embd=256)
        engine = GPTEngine(gpt)
        engine.reserve(8, 4096)
        prompt = torch.zeros(8, 4097, dtype=torch.int64)
        expected = engine.step([(0, 0, [1, 2, 3])])
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for work in (
            lambda: engine.decode(DecodeRequest(slots=range(8), sequences=prompt, steps=range(1, 4097))),
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


def test_the_interpreter_runs_on_while_it_decodes():
    """Another Python thread makes progress between the first and the last token of one call."""
    engine = cpu_engine(random_gpt(vocab=100, block=400, layers=4, width=128), threads=1, slots=4)
    seen, done = [], threading.Event()

    def count() -> None:
        while not done.is_set():
            seen.append(engine_steps[-1])
            done.wait(1e-4)

    engine_steps = [0]
    other = threading.Thread(target=count)
    other.start()
    work = request(torch.zeros(4, 401, dtype=torch.int64), range(1, 401))
    engine.decode(work, progress=engine_steps.append, every=40)
    done.set()
    other.join()
    assert engine_steps == [0, *range(40, 401, 40)]
    assert len(set(seen)) > 2


def test_threads_take_turns(gpt):
    engine = cpu_engine(gpt, slots=4)
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
    engine = cpu_engine(gpt)
    work = request(torch.zeros(1, 30, dtype=torch.int64), range(1, 30))

    def reenter(done: int) -> None:
        engine.step([(0, 0, [1])])

    with pytest.raises(RuntimeError, match="the engine is working"):
        engine.decode(work, progress=reenter)
    with pytest.raises(RuntimeError, match="the engine is working"):
        engine.decode(work, progress=lambda done: engine.close())

    def stop(done: int) -> None:
        raise StopIteration(done)

    with pytest.raises(StopIteration):
        engine.decode(work, progress=stop)
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
    engine = cpu_engine(gpt)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            engine.step([(0, 0, [1])])
            assert engine.info()["threads"] == threads
    finally:
        torch.set_num_threads(before)
