"""``tamingfast reproduce pixels`` on its smoke preset."""

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
from tamingfast.reproduce import budget, pixels, pixels_report, settings


@pytest.fixture(scope="module")
def reproduced(everything):
    """The smoke preset's output."""
    return everything / "pixels"


class TestReproduce:
    def test_report_holds_what_was_measured(self, reproduced):
        results = json.loads((reproduced / "report.json").read_text())
        text = (reproduced / "report.md").read_text()
        for protocol in ("paper", "cached", "fastest"):
            slow, fast = (results["speed"][protocol][name] for name in ("pixels", "latents"))
            assert slow["tokens"] == 1024 and fast["tokens"] == 256
            for row in (slow, fast):
                rate = row["tokens"] / row["seconds_per_image"]
                assert row["tokens_per_second"] == pytest.approx(rate)
            assert f"**{slow['seconds_per_image'] / fast['seconds_per_image']:.2f}**" in text
        assert results["data"] in text and "CIFAR" not in text.partition("## Quality")[0]
        assert results["speed"]["paper"]["pixels"]["integrated"] and "integrated" in text
        for picture in [*results["pictures"], "training.png", "speed.png"]:
            assert f"({picture})" in text or picture == "speed.png"
            with Image.open(reproduced / picture) as image:
                assert len(np.unique(np.asarray(image))) > 10

    def test_quality_is_reported_under_its_name(self, reproduced):
        quality = json.loads((reproduced / "report.json").read_text())["quality"]
        text = (reproduced / "report.md").read_text()
        if "missing" in quality:
            assert f"Not measured: {quality['missing']}" in text
            return
        assert "not FIDs" in text and "Frechet distance, efficientnet-lite0 features" in text
        rows = quality["distances"]
        assert all(row["images"] == 8 and row["real_images"] == 8 for row in rows.values())
        ours, theirs = (rows[f"samples of the prior on {name}"]["frechet_distance"] for name in ("latents", "pixels"))
        assert f"{abs(1 - ours / theirs):.1%} {'lower' if ours < theirs else 'higher'}" in text
        assert rows["validation images in the dictionary's colours"]["frechet_distance"] < min(ours, theirs)

    def test_both_priors_had_the_same_budget(self, reproduced):
        results = json.loads((reproduced / "report.json").read_text())
        geometry, runs = results["prior"], {run["directory"]: run for run in results["runs"]}
        batch = results["settings"]["prior"]["training"]["batch_size"]
        spent = [
            runs[name]["steps"]
            * batch
            * budget.training_flops(geometry, runs[name]["tokens"], runs[name]["vocabulary"])
            for name in (pixels.LATENT_PRIOR, pixels.PIXEL_PRIOR)
        ]
        one_step = spent[1] / runs[pixels.PIXEL_PRIOR]["steps"]
        assert spent[0] == pytest.approx(geometry["budget_flops"])
        assert abs(spent[1] - spent[0]) <= one_step / 2 + 1

    def test_flops_of_a_forward_pass_are_those_that_torch_counts(self):
        from torch.utils.flop_counter import FlopCounterMode

        geometry = {"n_layer": 2, "n_head": 2, "n_embd": 32}
        model = tamingfast.GPT(vocab_size=50, block_size=64, **geometry)
        with FlopCounterMode(display=False) as counter, tamingfast.ops.backends.use("reference"):
            model(torch.zeros(1, 64, dtype=torch.int64))
        assert budget.training_flops(geometry, 64, 50) == 3 * counter.get_total_flops()

    def test_a_finished_run_is_resumed_without_training_again(self, reproduced):
        before = (reproduced / "vqgan" / "state.pt").stat().st_mtime_ns
        again = [*smoke.SMALLER["pixels"], "timing.prefixes=0", "timing.batch=1", "sampling.images=1"]
        assert run("reproduce", "--preset", "smoke", "--out", reproduced, "--resume", *again) == 0
        assert (reproduced / "vqgan" / "state.pt").stat().st_mtime_ns == before
        assert not json.loads((reproduced / "report.json").read_text())["speed"]["paper"]["pixels"]["integrated"]

    def test_an_existing_run_is_not_overwritten(self, reproduced, capsys):
        assert run("reproduce", "--preset", "smoke", "--out", reproduced) == cli.USAGE_ERROR
        assert "--resume" in capsys.readouterr().err

    @pytest.mark.parametrize("name", settings.presets("pixels"))
    def test_presets_are_complete(self, name):
        sections = {"data", "vqgan", "colors", "prior", "sampling", "quality", "timing"}
        assert set(settings.load_preset("pixels", name)) == sections

    def test_table_states_the_ratio(self):
        row = {"seconds_per_image": 2.0, "tokens_per_second": 1.0}
        faster = {"seconds_per_image": 0.5, "tokens_per_second": 1.0}
        speed = {key: {"pixels": row, "latents": faster} for key in ("paper", "cached", "fastest")}
        assert pixels_report.speed_table(speed).count("**4.00**") == 3
        assert "14.08" in pixels_report.speed_table(speed)
