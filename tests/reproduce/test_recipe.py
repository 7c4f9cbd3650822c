"""``tamingfast reproduce recipe``: rows that differ in one part, written as they finish, and resumed."""

from __future__ import annotations

import json

import pytest
from commands import run
from omegaconf import OmegaConf

from tamingfast import UserError, cli, load_model, reproduce
from tamingfast.reproduce import recipe, recipe_report, settings
from tamingfast.training.configs import check_config

ROWS = ["base", "ema", "restart", "cosine", "fsq", "lfq", "together"]


def rows_of(out):
    return {row["name"]: row for row in json.loads((out / "report.json").read_text())["rows"]}


def test_every_row_is_measured(tmp_path):
    out = reproduce.run("recipe", "smoke", tmp_path / "recipe").parent
    rows, text = rows_of(out), (out / "report.md").read_text()
    assert list(rows) == ROWS
    for name, row in rows.items():
        assert row == json.loads((out / "rows" / f"{name}.json").read_text())
        assert row["steps"] == 4 and row["reconstruction"]["images"] == 8 and row["codes"] == 16
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{row['reconstruction']['psnr']:.2f}" in line and recipe_report.CHANGES[name] in line
        assert f"{row['seconds_per_step']:.3g}" in line
        assert type(load_model(out / name).quantize).__name__ == {
            "restart": "TableQuantizer", "cosine": "CosineQuantizer", "fsq": "FSQ", "lfq": "LFQ",
            "together": "CosineQuantizer",
        }.get(name, "VectorQuantizer")  # fmt: skip
    assert "not measured (evaluation.features=null)" in text and "Not run yet" not in text


def test_a_study_continues_with_the_rows_that_are_missing(monkeypatch, tmp_path):
    out = tmp_path / "recipe"
    trained = []

    def stop(self, name, *rest, train=recipe.Study.train_first_stage):
        if name == "cosine":
            raise KeyboardInterrupt
        trained.append(name)
        return train(self, name, *rest)

    words = ["recipe.rows=[ema,cosine]", "vqgan.training.steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(recipe.Study, "train_first_stage", stop)
        with pytest.raises(KeyboardInterrupt):
            reproduce.run("recipe", "smoke", out, words)
        assert list(rows_of(out)) == ["base", "ema"] == trained
        assert "Not run yet: cosine." in (out / "report.md").read_text()
    before = rows_of(out)
    page = reproduce.run("recipe", "smoke", out, words, resume=True)
    after = rows_of(out)
    assert list(after) == ["base", "ema", "cosine"] and "Not run yet" not in page.read_text()
    assert {name: after[name] for name in before} == before
    with pytest.raises(UserError, match=r"rows/base.json: got a row with other settings"):
        reproduce.run("recipe", "smoke", out, [*words, "evaluation.images=4"], resume=True)
    (out / "rows" / "ema.json").write_text("{")
    with pytest.raises(UserError, match=r"rows/ema.json: got a damaged file"):
        reproduce.run("recipe", "smoke", out, words, resume=True)


@pytest.mark.parametrize("preset", ["smoke", "cpu", "cifar10"])
def test_rows_differ_from_the_first_in_their_part_alone(preset):
    base = settings.load_preset("recipe", preset)["vqgan"]
    known = recipe.variants(base)
    assert list(known) == list(recipe_report.CHANGES) and len(known) >= 12
    for name, change in known.items():
        config = recipe._merged(base, change)
        check_config({**config, "data": {"name": "photos"}})
        assert (config == base) == (name == recipe.BASE)
        assert config["training"]["steps"] == base["training"]["steps"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("recipe.rows=[cosin]", "recipe.rows: got 'cosin', expected some of .*did you mean 'cosine'"),
        ("vqgan.model.params.n_embed=20", "n_embed: got 20, expected a power of two"),
    ],
)
def test_mistakes_are_one_sentence(word, message, tmp_path, capsys):
    assert run("reproduce", "recipe", "--preset", "smoke", "--out", tmp_path / "out", word) == cli.USAGE_ERROR
    import re

    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_preset_of_today_is_a_model_without_attention():
    from tamingfast.training import load_config

    config = OmegaConf.to_container(load_config("modern_vqgan"))
    assert config["model"]["params"]["ddconfig"]["attn_type"] == "none"
    quantizer = config["model"]["params"]["quantizer_config"]
    assert quantizer["target"].endswith("CosineQuantizer") and quantizer["params"] == {"restart_below": 0.05}
    assert config["training"]["codebook_from_data"]
