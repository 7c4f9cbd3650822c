"""``tamingfast reproduce multiscale`` on its smoke preset."""

from __future__ import annotations

import json

import numpy as np
import pytest
import smoke
import torch
from commands import run
from PIL import Image

import tamingfast
from tamingfast import cli
from tamingfast.reproduce import multiscale, multiscale_report, settings

SMALLER = smoke.SMALLER["multiscale"]


@pytest.fixture(scope="module")
def reproduced(everything):
    """The smoke preset's output."""
    return everything / "multiscale"


def test_report_holds_what_was_measured(reproduced):
    results, text = json.loads((reproduced / "report.json").read_text()), (reproduced / "report.md").read_text()
    assert results["scales"] == ["1x1", "2x2", "4x4", "8x8"] and len(results["given"]) == 5
    for row in results["given"]:
        assert f"| {row['to_input']:.4f} ± {row['to_input_error']:.4f} | {row['between']:.4f} |" in text
    assert [row["tokens"] for row in results["nll"]] == [1, 4, 16, 64]
    assert results["given"][-1]["between"] == 0 < results["given"][0]["between"]
    assert "distance in random features" in text and "chelsea, coffee" in text
    for picture in (*multiscale_report.PICTURES, "distance.png"):
        with Image.open(reproduced / picture) as image:
            assert len(np.unique(np.asarray(image))) > 10
        assert f"({picture})" in text


def test_figures_are_those_of_the_models_in_the_run(reproduced):
    loaded = settings.load_preset("multiscale", "smoke", SMALLER)
    model = tamingfast.load_model(reproduced / "prior")
    x = multiscale._held_out(tamingfast.data.build(loaded["data"])[1], loaded["measure"]["images"])
    drawn = multiscale.draw_given(model, x, loaded["measure"]["samples"], loaded["sampling"])
    distance = multiscale.LPIPS("random")
    found = [multiscale.measure(distance, x, samples) for samples in drawn]
    recorded = json.loads((reproduced / "report.json").read_text())["given"]
    for row, again in zip(recorded, found, strict=True):
        assert again == pytest.approx(row, rel=1e-4, abs=1e-7)
    reconstruction = model.decode_grid(model.to_grid(model.encode_to_z(x)[1], 8, 8)).clamp(-1, 1)
    assert torch.equal(drawn[-1][:, 0], reconstruction)


def test_measure_averages_over_pairs():
    class Difference(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    x = torch.zeros(2, 3, 4, 4)
    samples = torch.stack([torch.full((3, 3, 4, 4), value) for value in (0.1, 0.4)])
    samples[:, 1] += 0.3
    found = multiscale.measure(Difference(), x, samples)
    assert found["to_input"] == pytest.approx((0.1 + 0.4) / 2 + 0.1)
    assert found["to_input_error"] == pytest.approx(0.3 / 2)  # of (0.2, 0.5)
    assert found["between"] == pytest.approx(0.2) and found["pixels"] == pytest.approx(0.175)
    assert multiscale.measure(Difference(), x, samples[:, :1])["between"] == 0.0


def test_a_finished_run_is_resumed_without_training_again(reproduced):
    before = (reproduced / "prior" / "state.pt").stat().st_mtime_ns
    words = ["--preset", "smoke", "--out", reproduced, "--resume", *SMALLER, "measure.samples=1"]
    assert run("reproduce", "multiscale", *words) == 0
    assert (reproduced / "prior" / "state.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", settings.presets("multiscale"))
def test_presets_have_all_scales(name):
    loaded = settings.load_preset("multiscale", name)
    assert set(loaded) == {"data", "vqgan", "prior", "scales", "measure", "sampling"} and loaded["scales"] == "all"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "paper"], "expected one of reproduce multiscale"),
        (["scales=null"], "scales: got null"),
        (["measure.images=100000"], "measure.images: got 100000, expected at most"),
        (["measure.perceptual_weights=nowhere.ckpt"], "nowhere.ckpt: got no file, expected a checkpoint"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_trained(tmp_path, capsys, words, message):
    words = words if "--preset" in words else ["--preset", "smoke", *words]
    assert run("reproduce", "multiscale", *words, "--out", tmp_path / "out") == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
