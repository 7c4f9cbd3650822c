"""Gradient checkpointing and compilation change the cost of a run, not what it learns."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import tiny
import torch
from runs import same_run
from torch import nn

from tamingfast import UserError
from tamingfast.checkpoints import run_directory
from tamingfast.training import acceleration, health, loop, prior, vqgan
from tamingfast.training.settings import Training


@pytest.mark.parametrize("stage", ["vqgan", "prior"])
def test_checkpointing_changes_no_bit(stage, first_stage, tmp_path):
    plain = tiny.train(stage, tmp_path / "plain", first_stage, steps=3)
    same_run(plain, tiny.train(stage, tmp_path / "kept", first_stage, steps=3, gradient_checkpointing=True))


def test_a_resumed_run_may_turn_checkpointing_on(tmp_path):
    whole = tiny.train("vqgan", tmp_path / "whole")
    parts = tiny.train("vqgan", tmp_path / "parts", steps=3)
    tiny.train("vqgan", parts, resume=True, steps=6, gradient_checkpointing=True)
    same_run(whole, parts)


def kept_bytes(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters apart."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*inputs)
    del out
    return sum(seen.values())


def test_checkpointing_keeps_less_in_memory():
    for build, inputs in (
        (lambda: tiny.build(tiny.VQGAN).train(), (tiny.images()["image"].permute(0, 3, 1, 2),)),
        (lambda: gpt().train(), (torch.zeros(2, 64, dtype=torch.int64),)),
    ):
        plain, saving = build(), build()
        acceleration.accelerate(saving, Training(gradient_checkpointing=True))
        assert kept_bytes(saving, *inputs) < 0.5 * kept_bytes(plain, *inputs)


def gpt() -> nn.Module:
    from tamingfast.models.gpt import GPT

    return GPT(16, 64, n_layer=6, n_head=2, n_embd=32)


@pytest.mark.parametrize("stage", ["vqgan", "prior"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiled_steps_are_those_of_torch(stage, backend, first_stage, tmp_path, monkeypatch):
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    with torch._functorch.config.patch(donated_buffer=True):  # restores it
        for name, on in (("plain", False), ("compiled", True)):
            out = without_dropout(stage, tmp_path / name, first_stage, compile=on, gradient_checkpointing=on)
            found.append(run_directory.read_metrics(out))
    # The encoder, the decoder and the discriminator, or the transformer.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= (3 if stage == "vqgan" else 1)
    for mine, theirs in zip(*found, strict=True):
        assert mine.pop("split") == theirs.pop("split")
        assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-5)


def without_dropout(
    stage: str, out: Path, first_stage: Path, resume: bool = False, steps: int = 3, **settings: bool
) -> Path:
    """A run of a few steps; a compiled network draws other random numbers."""
    made = tiny.config(tiny.VQGAN if stage == "vqgan" else tiny.PRIOR, steps=steps, **settings)
    params = made["model"]["params"]
    if stage == "vqgan":
        params["ddconfig"]["dropout"] = 0.0
        return vqgan.train(made, out, resume, "cpu", tiny.datasets())
    params["transformer_config"]["params"]["resid_pdrop"] = 0.0
    return prior.train(made, first_stage, out, resume, "cpu", tiny.datasets())


@pytest.mark.parametrize("stage", ["vqgan", "prior"])
def test_the_way_of_a_gpu_learns_the_same(stage, first_stage, tmp_path, monkeypatch):
    """Fused optimizers, channels last, and health values read rarely, all on a CPU; also after resuming."""
    plain = without_dropout(stage, tmp_path / "plain", first_stage)
    monkeypatch.setattr(acceleration, "_FUSED", ("cpu",))
    monkeypatch.setattr(acceleration, "_CHANNELS_LAST", ("cpu",))
    monkeypatch.setattr(loop, "Monitor", lambda rate, precision, every: health.Monitor(rate, precision, 100))
    groups = []
    train = loop._Run.train
    monkeypatch.setattr(loop._Run, "train", lambda self: (groups.extend(self.groups()), train(self))[1])
    other = without_dropout(stage, tmp_path / "other", first_stage)
    assert groups and all(group["fused"] for group in groups)
    for mine, theirs in zip(*(run_directory.read_metrics(out) for out in (plain, other)), strict=True):
        assert mine.pop("split") == theirs.pop("split")
        assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-5)
    without_dropout(stage, other, first_stage, resume=True, steps=5)
    assert run_directory.progress(other)["step"] == 5


@pytest.mark.parametrize("training", [False, True])
def test_networks_that_are_not_compiled(training, tmp_path, monkeypatch):
    def broken(module: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        if torch.is_grad_enabled() or not training:
            raise OSError("No space left")
        return module

    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(compile, backend=broken))
    torch._dynamo.reset()
    said = r"^training.compile: got true, but .*No space left.*, expected a compiler"
    with torch._functorch.config.patch(donated_buffer=True), pytest.raises(UserError, match=said):  # restores it
        tiny.train("vqgan", tmp_path / "run", compile=True)
    assert (tmp_path / "run").exists() == training


def test_without_a_compiler(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UserError, match=r"^training.compile: got true without a C\+\+ compiler"):
        tiny.train("vqgan", tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()
