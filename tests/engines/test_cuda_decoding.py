"""The CUDA engine's tokens against the CPU engine and the reference: on a GPU, and with its kernels run on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_cases import BATCHES, cpu_engine, decoded, request
from gpts import all_logits, random_gpt

from tamingfast.engines import CudaEngine, GPTEngine
from tamingfast.engines.cuda.decoding import steps_ahead
from tamingfast.engines.cuda.step import Step
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.ops.choice import choose, gumbel_noise

needs_native = pytest.mark.skipif(backends.native()[0] is None, reason=backends.native()[1])
OPTIONS = dict(temperature=1.1, top_k=20, top_p=0.97, seed=3)


def step_of(engine: CudaEngine, batch: int) -> Step:
    return engine._parts.steps[batch]


@needs_native
@pytest.mark.parametrize("shape", [dict(), dict(n_unmasked=5), dict(heads=3, width=33)], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_seeded_tokens_are_those_of_the_cpu_engine(place, shape, batch, record_property):
    gpt = random_gpt(**shape)
    sequences, steps = torch.randint(24, (batch, 30)), [*range(6, 14), 16, 17, 27]
    expected = decoded(cpu_engine(gpt, slots=batch), sequences, steps, **OPTIONS)
    tokens = decoded(place.engine(gpt, slots=batch), sequences, steps, **OPTIONS)
    mismatches = (tokens != expected).float().mean().item()
    record_property("mismatch_rate", mismatches)
    # A near-tie of two sums may fall either way; none does in these few tokens.
    assert mismatches == 0.0
    assert expected[:, steps].unique().numel() > 3


@pytest.mark.parametrize("dtype", CudaEngine.DTYPES)
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
        seen.append(step_of(made, batch).logits.cpu())
        assert step_of(made, batch).split.splits == 4
    assert all(torch.equal(row, seen[0][0]) for logits in seen for row in logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("batch", BATCHES)
def test_logits_are_not_rounded_to_the_engines_type(place, batch, dtype):
    made = place.engine(random_gpt(), dtype, slots=batch)
    decoded(made, torch.zeros(batch, 3, dtype=torch.int64), [1])
    for logits in (step_of(made, batch).logits, made.step([(0, 1, [5])])):
        assert logits.dtype == torch.float32
        assert (logits.to(getattr(torch, dtype)).float() != logits).float().mean() > 0.5


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


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("where", ["head.weight", "blocks.0.mlp.0.weight", "blocks.1.attn.key.bias", "tok_emb.weight"])
def test_broken_weights_are_named(place, batch, where):
    gpt = random_gpt()
    with torch.no_grad():
        gpt.get_parameter(where).view(-1)[0] = float("nan")
    made = place.engine(gpt, slots=batch)
    sequences = torch.zeros(batch, 5, dtype=torch.int64, device=place.device)
    with pytest.raises(ValueError, match="^logits: got NaN in a row"):
        made.decode(request(sequences, range(1, 5)))
    assert made.length(0) == 0, "what was fed after the error is not what `sequences` holds"


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
            scores = logits + noise
            assert (scores[tokens[b, step]] - scores[expected[b, step]]).abs() < 1e-3
