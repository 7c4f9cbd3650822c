"""Logits near the largest float, infinite ones and NaN: every sampler chooses the same token, or says the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import yaml
from commands import run
from engine_cases import HostEngine, cpu_engine, decoded
from networks import DDCONFIG, DUMMY, prior
from torch import Tensor, nn

from tamingfast.checkpoints import convert
from tamingfast.errors import UserError
from tamingfast.models.gpt import GPT, sample, sample_with_past
from tamingfast.ops import backends
from tamingfast.ops.choice import choose, gumbel_noise
from tamingfast.sampling import sample_grid

INF, NAN = float("inf"), float("nan")
#: Rows of logits, and the tokens that may come of them at any temperature up to 1.
ROWS = {
    "the largest float": ([0.0, 3e38, -3e38, 1.0], {1}),
    "equal and large": ([3.4e38, 0.0, 3.4e38, -3.4e38], {0, 2}),
    "the lowest floats": ([-3.4e38, -3.4e38, -INF, -3.4e38], {0, 1, 3}),
    "one infinite": ([0.0, 3e38, INF, -INF], {2}),
    "several infinite": ([INF, 3e38, INF, 0.0], {0, 2}),
    "the smallest": ([0.0, 1e-45, -1e-45, -0.0], {0, 1, 2, 3}),
    "one entry": ([-INF, -INF, -3e38, -INF], {2}),
}
BROKEN = {
    "NaN": ([0.0, NAN, 1.0, 2.0], "NaN"),
    "NaN and infinite": ([INF, NAN, -INF, 2.0], "NaN"),
    "nothing": ([-INF] * 4, "only -inf"),
}
OPTIONS = [
    {}, dict(temperature=1.2e-38), dict(temperature=1e-20), dict(temperature=0.5), dict(top_k=1), dict(top_k=3),
    dict(top_k=10**18), dict(top_p=1e-300), dict(top_p=0.5), dict(temperature=0.7, top_k=2, top_p=0.9),
    dict(greedy=True),
]  # fmt: skip


def gpt_of(row: list[float]) -> GPT:
    """A transformer whose logits are the same row, exactly, whatever it is fed."""
    gpt = GPT(len(row), 12, n_layer=1, n_head=1, n_embd=8).eval()
    with torch.no_grad():
        gpt.ln_f.weight.zero_()
        gpt.ln_f.bias.copy_(torch.eye(8)[0])
        gpt.head.weight.zero_()[:, 0] = torch.tensor(row)
    return gpt


CONDITION = torch.zeros(3, 1, dtype=torch.int64)


def by_engine(make: Callable) -> Callable:
    blank = torch.zeros(3, 5, dtype=torch.int64)
    shared = dict(steps=range(1, 5), columns=range(4), seed=1)
    return lambda gpt, options: decoded(make(gpt), blank, **shared, **options)[:, 1:]


def by_grid(engine: str) -> Callable:
    return lambda gpt, options: sample_grid(gpt, CONDITION, 1, 4, engine=engine, seed=1, **options)[:, 0]


def host_engine(gpt: GPT) -> HostEngine:
    made = HostEngine(gpt)
    made.reserve(3, 12)
    return made


SAMPLERS = {
    "torch": by_grid("torch"), "naive": by_grid("naive"), "cuda": by_engine(host_engine),
    **({"cpu": by_engine(cpu_engine), "native": by_grid("native")} if backends.native()[0] else {}),
}  # fmt: skip


def reference(row: list[float], options: dict) -> Tensor:
    """Tokens (images, steps) by the definition."""
    options = dict(options)
    noise = None
    if not options.pop("greedy", False):
        images, steps = torch.arange(3)[:, None], torch.arange(4)
        noise = gumbel_noise(1, images, torch.zeros_like(steps), steps, len(row))
    return choose(torch.tensor(row).expand(3, 4, -1), noise, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("row", "allowed"), ROWS.values(), ids=ROWS)
def test_every_sampler_chooses_the_same(row, allowed, options):
    expected = reference(row, options)
    assert set(expected.flatten().tolist()) <= allowed
    gpt = gpt_of(row)
    assert {name: sampler(gpt, options).tolist() for name, sampler in SAMPLERS.items()} == dict.fromkeys(
        SAMPLERS, expected.tolist()
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("row", "found"), BROKEN.values(), ids=BROKEN)
def test_every_sampler_says_the_same(row, found, options):
    said = set()
    for sampler in (*SAMPLERS.values(), lambda gpt, options: reference(row, options)):
        with pytest.raises(UserError) as caught:
            sampler(gpt_of(row), options)
        said.add(str(caught.value))
    assert said == {f"logits: got {found} in a row, expected numbers to choose a token from; check the weights"}


def test_distances_are_those_of_the_softmax():
    """Shifting a row changes no draw: with large offsets, the tokens are those of the distances."""
    distances = torch.tensor([0.0, -1e36, -2e36, -0.5e36])
    noise = gumbel_noise(3, torch.arange(400)[:, None], torch.zeros(1).long(), torch.arange(2), 4)
    scale = 1e36  # in units of the temperature the distances are 0, 1, 2 and a half
    plain = choose((distances / scale).expand(400, 2, -1), noise)
    shifted = choose((distances + 3e38).expand(400, 2, -1), noise, temperature=scale)
    below = choose((distances - 3e38).expand(400, 2, -1), noise, temperature=scale)
    for other in (shifted, below):
        assert (other == plain).float().mean() > 0.99  # the offset rounds the distances
    assert plain.unique().numel() == 4


# --- the original's samplers ------------------------------------------------------------------------------------------


def prior_of(row: list[float]) -> nn.Module:
    model = prior().eval()
    model.transformer = gpt_of([*row, *[-INF] * 8])
    return model


#: Each draws 4 tokens of a prior; with ``greedy``, the best.
ORIGINALS = {
    "model.sample": lambda model, greedy=False, **options: model.sample(
        CONDITION[:, :0], CONDITION, 4, sample=not greedy, **options
    ),
    "sample": lambda model, greedy=False, **options: sample(
        model.transformer, CONDITION, 4, sample=not greedy, **options
    )[:, 1:],
    "sample_with_past": lambda model, greedy=False, **options: sample_with_past(
        CONDITION, model.transformer, 4, sample_logits=not greedy, **options
    ),
}
OUTSIDE = [("temperature", 0.0), ("temperature", 1e-38), ("temperature", NAN), ("top_k", -1), ("top_k", 1.5)]


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("options", [each for each in OPTIONS if "top_p" not in each], ids=str)
@pytest.mark.parametrize(("row", "allowed"), ROWS.values(), ids=ROWS)
def test_the_original_s_samplers_choose_among_the_best(row, allowed, options, name):
    tokens = ORIGINALS[name](prior_of(row), **options)
    assert tokens.shape == (3, 4)
    assert set(tokens.flatten().tolist()) <= allowed


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize(("row", "found"), BROKEN.values(), ids=BROKEN)
def test_the_original_s_samplers_name_unusable_logits(row, found, name):
    for greedy in (True, False):
        with pytest.raises(UserError, match=f"^logits: got {found} in a row"):
            ORIGINALS[name](prior_of(row), greedy=greedy)


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize(("option", "value"), OUTSIDE)
def test_the_original_s_samplers_name_options_outside_their_range(option, value, name):
    with pytest.raises(UserError, match=f"^{option}: got {value}, expected "):
        ORIGINALS[name](prior_of(ROWS["the smallest"][0]), **{option: value})


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "torch", "naive"])
def test_a_checkpoint_with_extreme_weights_draws_or_ends_in_one_sentence(tmp_path, capsys, engine):
    config = {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": {
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": dict(
            vocab_size=12, block_size=17, n_layer=2, n_head=2, n_embd=16)},
        "first_stage_config": {"target": "taming.models.vqgan.VQModel", "params": dict(
            ddconfig=DDCONFIG, lossconfig=DUMMY, n_embed=12, embed_dim=4)},
        "cond_stage_config": "__is_unconditional__",
    }}  # fmt: skip
    (tmp_path / "prior.yaml").write_text(yaml.safe_dump({"model": config}))
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    for embedded, code in ((0.0, 0), (3e38 * signs, 2)):  # the norm of the second is NaN
        model = prior()
        with torch.no_grad():
            model.transformer.tok_emb.weight.copy_(torch.as_tensor(embedded).expand(12, 16))
            model.transformer.head.weight.copy_(1e38 * signs)
        torch.save({"state_dict": model.state_dict()}, tmp_path / "prior.ckpt")
        out = tmp_path / "out.png"
        convert(tmp_path / "prior.ckpt", tmp_path / "prior.safetensors", tmp_path / "prior.yaml")
        words = ["sample", tmp_path / "prior.safetensors", "--out", out, "--size", "8", "-n", 1, "--engine", engine]
        assert run(*words, "--temperature", "0.5", "--top-p", "0.9") == code
        if code:
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("tamingfast: error: logits: got NaN in a row, expected ")
        else:
            assert capsys.readouterr().out
            out.unlink()
    assert not out.exists()
