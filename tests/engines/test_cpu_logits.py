"""The CPU engine's logits: equal to the reference for any geometry, and the same bits however they are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_cases import cpu_engine, decoded, request
from golden import arrays, checkpoint
from gpts import all_logits, random_gpt
from torch import nn

import tamingfast
from tamingfast.engines import GPTEngine
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.sampling.lookahead import WIDEST

native, reason = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)
ISAS = native.build_info()["isas"] if native else []

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
    logits = cpu_engine(gpt).step([(1, 0, tokens)], "all")
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    for dtype, most in (("bfloat16", 0.05), ("int8", 0.1)):
        error = cpu_engine(gpt, dtype).step([(1, 0, tokens)], "all") - expected
        assert error.norm() <= most * expected.norm()
        assert gpt.config.n_layer == 0 or error.abs().max() > 0


@pytest.mark.parametrize("name", ["uncond", "class", "seg", "coord", "unmasked"])
def test_logits_of_the_reference(name):
    data, model = arrays(f"net2net_{name}"), tamingfast.load_model(checkpoint(f"net2net_{name}"))
    prefix = data["c_indices"].shape[1]
    sequences = np.concatenate([data["c_indices"], data["z_indices"][:, :-1]], 1).tolist()
    engine = cpu_engine(model.transformer, slots=2)
    logits = engine.step([(i, 0, sequence) for i, sequence in enumerate(sequences)], "all")
    logits = logits.view(2, len(sequences[0]), -1)[:, prefix - 1 :]
    np.testing.assert_allclose(logits.numpy(), data["logits"], rtol=0, atol=1e-4)


def test_gpt2_small_geometry():
    """Twelve layers of width 768: logits, then greedy tokens, on several slots at once."""
    torch.manual_seed(0)
    gpt = GPT(1024, 64, n_layer=12, n_head=16, n_embd=768).eval()
    prefix = torch.randint(1024, (2, 9))
    engine = cpu_engine(gpt, slots=2)
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
    assert torch.equal(decoded(engine, sequences, range(9, 15), greedy=True), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
def test_neither_threads_nor_company_nor_pieces_change_a_bit(dtype, isa, monkeypatch):
    monkeypatch.setenv("TAMINGFAST_ISA", isa)
    gpt = random_gpt(vocab=70, heads=3, width=3 * 22, n_unmasked=5, std=0.2)
    tokens = torch.randint(70, (30, 40)).tolist()
    together = cpu_engine(gpt, dtype, threads=2, slots=30)
    logits = together.step([(i, 0, row) for i, row in enumerate(tokens)], "all").view(30, 40, -1)
    for slot, threads in ((0, 1), (17, 3)):
        alone = cpu_engine(gpt, dtype, threads)
        pieces = [alone.step([(2, 0, tokens[slot][:6])], "all")]
        pieces += [alone.step([(2, i, [tokens[slot][i]])]) for i in range(6, 30)]
        pieces += [alone.step([(2, 30, tokens[slot][30:])], "all")]
        assert torch.equal(torch.cat(pieces), logits[slot])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
def test_every_width_that_lookahead_may_choose_gives_the_same_bits(dtype, isa, monkeypatch):
    """Alone, and beside a sequence that shares the rows of the pass, after tokens of which the last is fed again."""
    monkeypatch.setenv("TAMINGFAST_ISA", isa)
    gpt = random_gpt(vocab=70, block=80, heads=3, width=3 * 22, std=0.2)
    tokens = torch.randint(70, (2, 80)).tolist()
    engine = cpu_engine(gpt, dtype, threads=1)
    logits = engine.step([(i, 0, row) for i, row in enumerate(tokens)], "all").view(2, 80, -1)
    for width in range(1, WIDEST + 1):
        first, beside = 80 - WIDEST, WIDEST + 1 - width
        alone = engine.step([(0, first, tokens[0][first : first + width])], "all")
        assert torch.equal(alone, logits[0, first : first + width])
        both = engine.step([(i, first, tokens[i][first : first + n]) for i, n in enumerate((width, beside))], "all")
        assert torch.equal(both, torch.cat((logits[0, first : first + width], logits[1, first : first + beside])))


@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
def test_seeded_tokens_are_the_same_for_any_batch_threads_and_instruction_set(dtype, monkeypatch):
    gpt = random_gpt(vocab=300, block=33, heads=4, width=64, std=0.2)
    options = dict(temperature=1.1, top_k=100, top_p=0.97, seed=3)
    grids = []
    for isa in ISAS:
        monkeypatch.setenv("TAMINGFAST_ISA", isa)
        for threads, batch in ((1, 1), (2, 6), (3, 3)):
            engine = cpu_engine(gpt, dtype, threads, slots=batch)
            sequences = torch.zeros(6, 33, dtype=torch.int64)
            for first in range(0, 6, batch):
                part = sequences[first : first + batch]
                engine.decode(request(part, range(1, 33), images=range(first, first + batch), **options))
            grids.append(sequences)
    assert all(torch.equal(grid, grids[0]) for grid in grids)
    assert grids[0].unique().numel() > 50


def test_more_rows_than_one_pass_takes():
    gpt = random_gpt(block=700, n_unmasked=600, std=0.2)
    tokens = torch.randint(24, (3, 700)).tolist()
    engine = cpu_engine(gpt)
    logits = engine.step([(i, 0, row) for i, row in enumerate(tokens)], "all").view(3, 700, -1)
    for i, row in enumerate(tokens):
        torch.testing.assert_close(logits[i], all_logits(gpt, row), rtol=1e-5, atol=1e-4)
    again = engine.step([(i, 600, row[600:]) for i, row in enumerate(tokens)])
    assert torch.equal(again, logits[:, -1])


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
    logits = cpu_engine(gpt, dtype, slots=len(items)).step(items, "all")
    measured = nn.functional.cross_entropy(logits, sequences[:, 1:].flatten())
    agreement = (logits.argmax(-1) == reference.flatten(0, 1).argmax(-1)).float().mean().item()
    record_property("top1_agreement", agreement)
    record_property("nll", measured.item())
    assert abs(measured - loss) <= most * loss
    assert agreement > 0.9
