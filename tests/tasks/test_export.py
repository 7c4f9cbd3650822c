"""The networks of a model as programs: of torch, and of ONNX where its packages are installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from commands import run
from refusals import refused
from torch.testing import assert_close

from tamingfast import UserError, load_model, tasks
from tamingfast.tasks import exporting

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
INSTALLED = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
ONNX = pytest.param("onnx", marks=[INSTALLED, pytest.mark.exhaustive])
PARTS = {"encoder", "decoder", "condition_encoder", "transformer"}


def result(path: Path, x: torch.Tensor) -> torch.Tensor:
    """What a program makes of an input."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    import onnxruntime  # optional package

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(found)


@pytest.fixture(scope="module", params=["torch", ONNX])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes of a prior with a condition, in both formats."""
    out = tmp_path_factory.mktemp("exported") / "new"
    assert run("export", golden.checkpoint("net2net_seg"), "--out", out, "--format", request.param) == 0
    return out


def test_programs_give_the_model_s_results_at_any_size(exported):
    facts = json.loads((exported / "networks.json").read_text())
    assert facts["networks"].keys() == PARTS
    files = {name: exported / network["file"] for name, network in facts["networks"].items()}
    assert {path.name for path in exported.iterdir()} == {"networks.json", *(path.name for path in files.values())}
    model = load_model(golden.checkpoint("net2net_seg"))
    for name, stage in (("", model.first_stage_model), ("condition_", model.cond_stage_model)):
        for batch, rows, columns in ((1, 8, 8), (3, 4, 7)):
            channels = stage.encoder.conv_in.in_channels
            images = torch.rand(batch, channels, rows * stage.factor, columns * stage.factor) * 2 - 1
            tokens = result(files[f"{name}encoder"], images)
            assert torch.equal(tokens, stage.encode_grid(images))
            if not name:
                assert_close(result(files["decoder"], tokens), stage.decode_grid(tokens), atol=1e-4, rtol=1e-4)
    for shape in ((1, 3), (2, model.transformer.config.block_size)):
        sequence = torch.randint(0, model.transformer.config.vocab_size, shape)
        found = result(files["transformer"], sequence)
        assert_close(found, model.transformer(sequence)[0], atol=1e-4, rtol=1e-4)


def test_a_program_of_torch_runs_without_this_package(exported):
    if not (exported / "encoder.pt2").exists():
        pytest.skip("programs of torch are meant")
    code = f"""
import sys, torch
program = torch.export.load({str(exported / "encoder.pt2")!r})
print(tuple(program.module()(torch.zeros(1, 3, 16, 24)).shape))
print(any(name.startswith("tamingfast") for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=exported)
    assert done.returncode == 0 and done.stdout == "(1, 8, 12)\nFalse\n", done.stderr


def test_the_likeliest_code_of_a_gumbel_model(tmp_path):
    model = load_model(golden.checkpoint("gumbelvq_f2"))
    written = tasks.export(model, tmp_path)
    images = torch.rand(2, 3, 16, 16)
    logits = model.quantize.proj(model.encode_to_prequant(images))
    assert torch.equal(result(tmp_path / written["encoder"].file, images), logits.argmax(1))


def test_a_file_whose_results_differ_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_run_torch", lambda path, x: exporting._Encoder(stage)(x) + 1)
    stage = load_model(golden.checkpoint("vqmodel_f2"))
    with pytest.raises(UserError, match="encoder: got results that differ from the model's by 1, expected at most"):
        tasks.export(stage, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    checkpoint = golden.checkpoint("vqmodel_f2")
    refused("export", checkpoint, "--out", tmp_path / "new", "--format", "onx", names="did you mean 'onnx'")
    refused("export", tmp_path / "none", "--out", tmp_path / "new", names="none")
    monkeypatch.setattr(exporting, "_ONNX_PACKAGES", ("no_such_package",))
    said = refused("export", checkpoint, "--out", tmp_path / "new", "--format", "onnx", names="no_such_package")
    assert "'pip install no_such_package'" in said
    monkeypatch.setattr(exporting, "_LARGEST_ONNX", 1000)
    monkeypatch.setattr(exporting, "_ONNX_PACKAGES", ())
    refused(
        "export", checkpoint, "--out", tmp_path / "new", "--format", "onnx", names="the most that one file can hold"
    )


def test_two_levels_are_refused(tmp_path, monkeypatch):
    stage = load_model(golden.checkpoint("vqmodel_f2"))
    monkeypatch.setattr(type(stage), "levels", 2)
    with pytest.raises(UserError, match="whose tokens are of two levels"):
        tasks.export(stage, tmp_path)
