"""Moving averages of the weights: their formula, and where a run uses them instead of its weights."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import tiny
import torch
from runs import same_run
from safetensors.torch import load_file

from tamingfast import UserError
from tamingfast.checkpoints import run_directory
from tamingfast.training import loop
from tamingfast.training.averages import Averages


def test_the_formula():
    generator = np.random.default_rng(0)
    history = generator.normal(size=(40, 3))
    tensor = torch.tensor(history[0])
    averages = Averages({"w": tensor}, 0.9)
    expected = history[0]
    for step, value in enumerate(history[1:]):
        tensor.copy_(torch.tensor(value))
        averages.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    np.testing.assert_allclose(averages.values["w"].numpy(), expected, rtol=1e-12)


def test_the_weights_come_back_bit_for_bit():
    tensor = torch.randn(5)
    averages = Averages({"w": tensor}, 0.5)
    own = tensor.add_(1e-7 * torch.randn(5)).clone()
    with contextlib.suppress(KeyError), averages.in_use():
        assert torch.equal(tensor, averages.values["w"]) and not torch.equal(tensor, own)
        raise KeyError
    assert torch.equal(tensor, own)


@pytest.mark.parametrize("stage", ["vqgan", "prior"])
def test_a_run_exports_its_averages_and_resumes_from_its_weights(stage, first_stage, tmp_path, monkeypatch):
    seen = []

    class Noted(loop._Run):
        def advance(self, batches):
            if not self.step:
                seen.append({name: value.clone() for name, value in self.stage.averaged.items()})
            super().advance(batches)
            seen.append({name: value.clone() for name, value in self.stage.averaged.items()})

    monkeypatch.setattr(loop, "_Run", Noted)
    settings = {"ema_decay": 0.5, "codebook_from_data": stage == "vqgan"}
    whole = tiny.train(stage, tmp_path / "whole", first_stage, **settings)
    expected = seen[0]
    for step, weights in enumerate(seen[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in weights.items()}
    exported = load_file(whole / run_directory.WEIGHTS)
    state = torch.load(whole / run_directory.STATE, weights_only=True)
    assert expected and not any(name.startswith(("loss.", "first_stage_model.")) for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value)
        assert torch.equal(state["model"][name], seen[-1][name])
    assert any(not torch.equal(exported[name], state["model"][name]) for name in expected)
    parts = tmp_path / "parts"
    tiny.train(stage, parts, first_stage, steps=3, **settings)
    tiny.train(stage, parts, first_stage, resume=True, steps=6, **settings)
    last = [(out / run_directory.METRICS).read_text().splitlines()[-1] for out in (whole, parts)]
    assert last[0] == last[1]
    again = torch.load(parts / run_directory.STATE, weights_only=True)
    assert all(torch.equal(value, again["averages"][name]) for name, value in state["averages"].items())
    assert all(torch.equal(value, again["model"][name]) for name, value in state["model"].items())


def test_validation_is_that_of_the_averages(tmp_path):
    """A decay of almost 1 and few steps: the averages are close to the beginning, and so is what they validate as."""
    values = {}
    for name, settings in {"none": {}, "kept": {"ema_decay": 0.999}}.items():
        out = tiny.train("vqgan", tmp_path / name, steps=2, learning_rate=3e-2, validate_every=2, **settings)
        values[name] = run_directory.read_metrics(out, "validation")[0]["rec_loss"]
    model = tiny.build(tiny.VQGAN).eval()
    model.load_state_dict(load_file(tmp_path / "kept" / run_directory.WEIGHTS))
    images = torch.stack([tiny.Noise(5, 1)[i]["image"] for i in range(4)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        error = float((model(images)[0] - images).abs().mean())
    assert values["kept"] == pytest.approx(error, rel=1e-4) and values["none"] != pytest.approx(error, rel=1e-3)


def test_a_run_without_averages_cannot_continue_with_them(tmp_path):
    out = tiny.train("vqgan", tmp_path / "run", steps=2)
    with pytest.raises(UserError, match=r"^training.ema_decay: got 0.5, expected None"):
        tiny.train("vqgan", out, resume=True, steps=4, ema_decay=0.5)
    kept = tiny.train("vqgan", tmp_path / "kept", steps=2, ema_decay=0.5)
    state = torch.load(kept / run_directory.STATE, weights_only=True)
    state["averages"].pop("quantize.embedding.weight")
    torch.save(state, kept / run_directory.STATE)
    with pytest.raises(UserError, match="no sound average of quantize.embedding.weight"):
        tiny.train("vqgan", kept, resume=True, steps=4, ema_decay=0.5)


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, "much", True, float("nan")])
def test_decays_that_are_none(tmp_path, value):
    with pytest.raises(UserError, match=r"^training.ema_decay: got .*, expected a number between 0 and 1, or null$"):
        tiny.train("vqgan", tmp_path / "run", ema_decay=value)


def test_without_averages_nothing_changes(first_stage, tmp_path):
    same_run(first_stage, tiny.train("vqgan", tmp_path / "again", steps=2))
