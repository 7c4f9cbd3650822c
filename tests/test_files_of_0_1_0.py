"""Runs, canvases and token files that version 0.1.0 wrote (see tests/data/README.md) still open and resume."""

from __future__ import annotations

import json
import math
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tamingfast import cli, load_model
from tamingfast.sampling import Canvas

ARCHIVE = Path(__file__).parent / "data" / "written-by-0.1.0.tar.xz"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["vqgan", "prior", "colors", "multiscale"])
def test_runs_open(written: Path, name: str) -> None:
    model = load_model(written / "runs" / name)
    assert model.config["model"]["target"]
    assert not model.training


def test_a_first_stage_reconstructs_as_it_did(written: Path) -> None:
    model = load_model(written / "runs" / "vqgan")
    expected = load_file(written / "expected" / "reconstruction.safetensors")
    with torch.no_grad():
        quant, _, (_, _, indices) = model.encode(expected["x"])
        reconstruction = model.decode(quant)
    assert torch.equal(indices, expected["indices"])
    assert_close(reconstruction, expected["reconstruction"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stage", "name", "steps"), [("vqgan", "vqgan", 6), ("prior", "multiscale", 4)])
def test_runs_resume(written: Path, tmp_path: Path, stage: str, name: str, steps: int) -> None:
    out = shutil.copytree(written / "runs" / name, tmp_path / name)
    words = ["train", stage, "--resume", "--out", str(out), "--device", "cpu", f"training.steps={steps}"]
    assert cli.main(words) == 0
    found, expected = metrics(out / "metrics.jsonl"), metrics(written / "expected" / f"{name}-metrics.jsonl")
    assert [(line["step"], line["split"]) for line in found] == [(line["step"], line["split"]) for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not isinstance(value, str):
                assert math.isclose(mine[key], value, rel_tol=1e-2, abs_tol=1e-3), (mine["step"], key)


def test_an_unfinished_canvas_is_finished_as_it_would_have_been(written: Path) -> None:
    begun = Canvas.load(written / "unfinished.canvas")
    expected = Canvas.load(written / "expected" / "finished.canvas")
    assert 0 < int(begun.pending.sum()) < begun.pending.numel()
    finished = begun.sample(load_model(written / "runs" / "prior"))
    assert finished.done
    assert torch.equal(finished.tokens, expected.tokens)
    assert finished.settings == expected.settings
    assert finished.model == expected.model


def test_a_token_file_trains_a_prior(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior"
    words = ["train", "prior", str(written / "prior.yaml"), "--first-stage", str(written / "runs" / "vqgan")]
    words += ["--out", str(out), "--device", "cpu", "prior.scales=null", "training.steps=1", "data.name=tokens"]
    assert cli.main([*words, f"data.path={written / 'tokens.safetensors'}"]) == 0
    assert load_model(out).transformer.config.vocab_size == 16
