"""``tamingfast reproduce orderings`` on its smoke preset."""

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
from tamingfast.checkpoints.config import instantiate_from_config
from tamingfast.reproduce import orderings_report, settings
from tamingfast.training import prior_config


@pytest.fixture(scope="module")
def ordered(everything):
    """The smoke preset's output."""
    return everything / "orderings"


class TestOrderings:
    def test_report_has_every_ordering_and_seed(self, ordered):
        results = json.loads((ordered / "report.json").read_text())
        text = (ordered / "report.md").read_text()
        names = settings.load_preset("orderings", "smoke")["orderings"]["names"]
        assert [row["name"] for row in results["orderings"]] == names and len(names) == 7
        for row in results["orderings"]:
            assert set(row["nll"]) == {"0", "1"} and row["steps"] == [4, 8]
            for curve in row["nll"].values():
                assert len(curve) == 2 and f"| {curve[-1]:.4f} " in text
        for picture in ("nll.png", "samples.png"):
            with Image.open(ordered / picture) as image:
                assert len(np.unique(np.asarray(image))) > 10
            assert f"({picture})" in text

    def test_all_of_a_seed_begin_alike_and_see_the_same_images(self, ordered):
        for seed in (0, 1):
            configs = [tamingfast.load_model(ordered / f"{name}_{seed}").config for name in ("row_major", "z_curve")]
            assert configs[0]["training"] == configs[1]["training"] and configs[0]["training"]["seed"] == seed
            weights = []
            for config in configs:
                torch.manual_seed(seed)
                weights.append(instantiate_from_config(config["model"]).transformer.state_dict())
            assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
            params = [config["model"]["params"] for config in configs]
            assert params[1].pop("permuter_config")["target"].endswith("ZCurve") and params[0] == params[1]

    def test_a_finished_run_is_resumed_without_training_again(self, ordered):
        before = (ordered / "random_1" / "state.pt").stat().st_mtime_ns
        words = ["--preset", "smoke", "--out", ordered, "--resume", *smoke.SMALLER["orderings"]]
        assert run("reproduce", "orderings", *words, "sampling.images=1") == 0
        assert (ordered / "random_1" / "state.pt").stat().st_mtime_ns == before

    def test_summary_sorts_and_pairs_the_seeds(self):
        rows = [
            {"name": "row_major", "steps": [1], "nll": {"0": [1.0], "1": [3.0]}},
            {"name": "random", "steps": [1], "nll": {"0": [0.5], "1": [2.5]}},
        ]
        best, reference = orderings_report.summary(rows)
        assert best == {
            "name": "random", "nll": 1.5, "spread": pytest.approx(2**0.5), "behind": -0.5, "behind_spread": 0.0
        }  # fmt: skip
        assert (reference["nll"], reference["behind"]) == (2.0, 0.0)
        assert "| random | 1.5000 ± 1.4142 | -0.5000 ± 0.0000 | 0.5000 | 2.5000 |" in orderings_report.table(rows)
        alone = [{**row, "nll": {"0": row["nll"]["0"]}} for row in rows]
        assert orderings_report.summary(alone)[0]["spread"] is None and "±" not in orderings_report.table(alone)

    @pytest.mark.parametrize("name", settings.presets("orderings"))
    def test_presets_have_all_orderings(self, name):
        loaded = settings.load_preset("orderings", name)
        assert set(loaded) == {"data", "vqgan", "prior", "orderings", "sampling"}
        assert set(loaded["orderings"]["names"]) == set(prior_config.ORDERINGS)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["ordering"], "did you mean 'orderings'"),
            (["orderings", "--preset", "paper"], "expected one of reproduce orderings: cifar10, cpu, smoke"),
            (["orderings", "--preset", "smoke", "timing.batch=3"], "timing.batch: got an unknown section"),
            (["orderings", "--preset", "smoke", "orderings.names=[zcurve]"], "did you mean 'z_curve'"),
            (["orderings", "--preset", "smoke", "orderings.seeds=[]"], "orderings.seeds: got an empty list"),
            (["orderings", "pixels"], "got 'pixels', expected key=value"),
            (["orderings", "--preset", "smoke", "data.seed=[1"], "data.seed: got"),
        ],
    )
    def test_mistakes_are_one_sentence(self, tmp_path, capsys, words, message):
        assert run("reproduce", *words, "--out", tmp_path / "out") == cli.USAGE_ERROR
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1

    def test_a_grid_without_the_ordering(self, ordered, tmp_path):
        config = {"prior": {"ordering": "subsample"}}
        first = tamingfast.load_model(ordered / "vqgan").config
        made = prior_config.prior_config(first, config, (8, 6))["model"]["params"]["permuter_config"]
        with pytest.raises(
            tamingfast.UserError, match="got 8 x 6, expected a square of side 2\\^k for the subsample ordering"
        ):
            instantiate_from_config(made)
