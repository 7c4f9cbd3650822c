"""``tamingfast reproduce compression`` on its smoke preset."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from commands import run
from PIL import Image

import tamingfast
from tamingfast import cli
from tamingfast.reproduce import budget, compression, compression_report, settings


@pytest.fixture(scope="module")
def compressed(everything):
    return everything / "compression"


@pytest.fixture(scope="module")
def results(compressed):
    return json.loads((compressed / "report.json").read_text())


class TestStudy:
    def test_every_first_stage_has_its_row(self, compressed, results):
        text = (compressed / "report.md").read_text()
        rows = {row["name"]: row for row in results["rows"]}
        assert list(rows) == ["f1", "f2", "f16", "f16_f8"]
        assert [row["tokens"] for row in rows.values()] == [64 * 64, 32 * 32, 4 * 4, 4 * 4 + 8 * 8]
        assert [row["crop"] for row in rows.values()] == [4, 8, 64, 16]
        assert [row["tokens_trained"] for row in rows.values()] == [16, 16, 16, 5]
        for row in rows.values():
            kept, nll = row["reconstruction"], row["likelihood"]
            assert kept["psnr"] > 5 and 0 < kept["codebook_usage"] <= 1
            assert 0 < nll["nats_per_token"] < 2 * math.log(row["vocabulary"])
            # All bits of the tokens of an image of the whole size, over its 3 * 64 * 64 values.
            bits = nll["nats_per_token"] / math.log(2) * row["tokens"] / (3 * 64 * 64)
            assert nll["token_bits_per_image_dimension"] == pytest.approx(bits)
            for speed in row["speed"].values():
                assert speed["tokens"] == row["tokens"]
                assert speed["tokens_per_second"] * speed["seconds_per_image"] == pytest.approx(row["tokens"])
            assert f"| {row['label']} | {row['tokens']:,} |" in text
            assert f"{row['speed']['engine']['seconds_per_image']:.4g}" in text
        assert "random features" in text and "LPIPS" not in text
        for picture in [*results["pictures"], "reconstruction.png", "speed.png"]:
            with Image.open(compressed / picture) as image:
                assert len(np.unique(np.asarray(image))) > 10
            assert f"({picture})" in text

    def test_first_stages_differ_in_f_alone(self, compressed):
        configs = [tamingfast.load_model(compressed / name).config for name in ("f2", "f16", "f16_f8")]
        assert [len(config["model"]["params"]["ddconfig"].pop("ch_mult")) for config in configs] == [2, 5, 4]
        assert configs[2]["model"].pop("target").endswith("HierarchicalVQModel")
        assert configs[0]["model"].pop("target") == configs[1]["model"].pop("target")
        assert configs[0] == configs[1] == configs[2] and configs[0]["data"]["crop"] == 32

    def test_priors_have_one_transformer_and_one_budget(self, compressed, results):
        training = results["settings"]["prior"]["training"]
        for row in results["rows"]:
            model = tamingfast.load_model(compressed / f"{row['name']}_prior")
            geometry = model.transformer.config
            assert (geometry.n_layer, geometry.n_head, geometry.n_embd) == (1, 2, 32)
            assert model.config["data"]["crop"] == row["crop"]
            cost = training["batch_size"] * budget.training_flops(
                {"n_layer": 1, "n_embd": 32}, row["tokens_trained"], row["vocabulary"]
            )
            assert abs(row["steps"] * cost - results["budget_flops"]) <= cost / 2 + 1

    def test_samples_are_of_the_whole_size(self, compressed):
        with Image.open(compressed / "samples_f1.png") as image:
            assert image.height == 66 + 2 and image.width > 2 * 66 + 2  # a margin with the row's name

    def test_a_prior_draws_on_at_the_size_that_its_window_saw(self, compressed, tmp_path):
        assert run("sample", compressed / "f16_f8_prior", "-n", 1, "--out", tmp_path / "s.png") == 0
        assert Image.open(tmp_path / "s.png").size == (16, 16)

    def test_a_resumed_run_measures_again_and_trains_nothing(self, compressed):
        names = [f"{name}/weights.safetensors" for name in ("f1", "f2", "f16_f8", "f16_prior")]
        before = [(compressed / name).stat().st_mtime_ns for name in names]
        words = ["--preset", "smoke", "--out", compressed, "--resume", "evaluation.images=1", "sampling.images=1"]
        assert run("reproduce", "compression", *words) == 0
        assert [(compressed / name).stat().st_mtime_ns for name in names] == before
        again = json.loads((compressed / "report.json").read_text())
        assert {row["reconstruction"]["images"] for row in again["rows"]} == {1}

    @pytest.mark.parametrize("name", settings.presets("compression"))
    def test_presets_compare_all_that_the_paper_does(self, name):
        loaded = settings.load_preset("compression", name)
        assert set(loaded) == {
            "data", "stages", "colors", "vqgan", "prior", "evaluation", "sampling", "timing"
        }  # fmt: skip
        rows = compression.variants_of(loaded)
        assert max(row.crop for row in rows) == loaded["data"]["size"]
        assert rows[-1].levels == (1 if loaded["stages"]["two_levels"] is None else 2)
        if name == "cpu":
            assert [row.factor for row in rows] == [1, 2, 4, 8, 16, 8]
            # VQ-VAE-2's grids for images of 256 pixels, 32 x 32 and 64 x 64, and as much of them as the window holds.
            assert (rows[-1].label, rows[-1].crop) == ("f = 8 over 4", 56)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("stages.factors=[3,16]", "stages.factors: got 3, expected one of 1, 2, 4, 8, 16"),
            ("stages.factors=[32]", "expected one of 1, 2, 4, 8, 16"),
            ("stages.two_levels=2", "stages.two_levels: got 2, expected one of 4, 8, 16"),
            ("stages.window=8", "crops of 128 pixels"),
            ("stages.window=2", "stages.window: got 2, expected at least 3"),
            ("data.size=72", "data.size: got 72, expected a multiple of 16"),
            ("stages.crop=24", "stages.crop: got 24, expected a multiple of 16"),
            ("data.size=null", "data.size: got null"),
            ("stages.factors=[]", "expected at least two"),
            ("stage.window=2", "did you mean 'stages'"),
        ],
    )
    def test_mistakes_are_one_sentence(self, tmp_path, capsys, override, message):
        words = ["--preset", "smoke", "--out", tmp_path / "out", override]
        assert run("reproduce", "compression", *words) == cli.USAGE_ERROR
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()

    def test_table_states_how_many_times_faster(self):
        def row(label, seconds):
            return {
                "label": label,
                "speed": {key: {"seconds_per_image": seconds} for key in compression_report.SPEEDS},
            }

        table = compression_report.speed_table([row("f = 1", 6.0), row("f = 2", 1.5)])
        assert "| f = 2 | 1.5 | 1.5 | 1.5 | 4x, 4x, 4x |" in table
