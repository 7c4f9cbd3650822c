"""Runs with each of the quantisers of today: exported, converted, resumed, and under a prior."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import run
from runs import same_run
from safetensors.torch import load_file

from tamingfast import UserError, load_model, tasks
from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.convert import convert
from tamingfast.training import prior, vqgan

KINDS: dict[str, dict[str, Any]] = {
    "TableQuantizer": {"gradient": "rotation", "restart_below": 0.5, "restart_decay": 0.5},
    "CosineQuantizer": {},
    "SimVQ": {"gradient": "rotation"},
    "FSQ": {"levels": [2, 2, 2, 2]},
    "LFQ": {"entropy_weight": 0.1},
}


def trained(kind: str, out: Path, resume: bool = False, **training: Any) -> Path:
    described = {"target": f"tamingfast.models.codebooks.{kind}", "params": KINDS[kind]}
    settings = tiny.config(tiny.VQGAN, {"quantizer_config": described}, ema_decay=0.5, **training)
    return vqgan.train(settings | {"data": tiny.CROPS}, out, resume, "cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """finished(kind): a run of six steps."""
    return functools.cache(lambda kind: trained(kind, tmp_path_factory.mktemp(kind) / "run"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_exports_a_codebook_and_resumes(kind, finished, tmp_path):
    out = finished(kind)
    exported = load_file(out / run_directory.WEIGHTS)
    assert [name for name in exported if name.startswith("quantize.")] == ["quantize.embedding.weight"]
    parts = trained(kind, tmp_path / "parts", steps=3)
    trained(kind, parts, resume=True, steps=6)
    same_run(out, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_converted_is_an_ordinary_model(kind, finished, tmp_path):
    model = load_model(finished(kind))
    other = load_model(convert(finished(kind), tmp_path / "model.safetensors"))
    plain = type(other.quantize).__name__ == "VectorQuantizer"
    assert plain == (kind != "FSQ") and plain == ("quantizer_config" not in other.config["model"]["params"])
    x = torch.rand(4, 3, tiny.SIZE, tiny.SIZE) * 2 - 1
    grid = model.encode_grid(x)
    assert torch.equal(other.encode_grid(x), grid)
    assert torch.allclose(other.decode_grid(grid), model.decode_grid(grid), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_on_it_draws_and_is_converted(kind, finished, tmp_path):
    settings = tiny.config(tiny.PRIOR, steps=1, checkpoint_every=1) | {"prior": {"condition": "none"}}
    out = prior.train(settings, finished(kind), tmp_path / "prior", device="cpu")
    model = load_model(out)
    again = load_model(convert(out, tmp_path / "prior.safetensors"))
    grids = [torch.cat(list(tasks.draw(each, tasks.conditions(each, 2), 4, 4, seed=1))) for each in (model, again)]
    assert torch.equal(*grids)
    assert run("sample", out, "-n", 1, "--out", tmp_path / "out.png") == 0


def test_restarts_differ_from_step_to_step_but_not_from_run_to_run(finished, tmp_path):
    state = torch.load(finished("TableQuantizer") / run_directory.STATE, weights_only=True)
    usage = state["model"]["quantize.usage"]
    assert len(usage.unique()) > 1  # it counts
    same_run(finished("TableQuantizer"), trained("TableQuantizer", tmp_path / "again"))


def test_a_codebook_from_data_is_one_of_latents(tmp_path):
    for kind in ("TableQuantizer", "CosineQuantizer", "SimVQ"):
        out = trained(kind, tmp_path / kind, steps=1, checkpoint_every=1, learning_rate=1e-9, codebook_from_data=True)
        model = load_model(out)
        used = {int(token) for i in range(13) for token in model.encode_grid(crop(i)).flatten()}
        assert len(used) >= 8, kind  # of 16: an untrained encoder's latents differ little
    with pytest.raises(UserError, match=r"^training.codebook_from_data: got true"):
        trained("FSQ", tmp_path / "fsq", codebook_from_data=True)


def crop(index: int) -> torch.Tensor:
    from tamingfast.data import build

    return build(tiny.CROPS)[0][index]["image"].permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        ("SimVQ", ["gradient=up"], "gradient: got 'up'"),
        ("SimVQ", ["levels=[2]"], "a key that nothing reads"),
        ("SimVQ", ["gradient=1"], "expected text"),
        ("TableQuantizer", ["restart_below=2"], "restart_below: got 2"),
        ("FSQ", ["levels=[2,3]"], "levels: got [2, 3]"),
        ("LFQ", [], "n_embed: got 1024, expected 2^embed_dim"),
        ("Best", [], "expected the name of a class"),
    ],
)
def test_mistakes_are_one_sentence(target, params, message, tmp_path, capsys):
    words = [f"target=tamingfast.models.codebooks.{target}", *(f"params.{param}" for param in params)]
    settings = [f"model.params.quantizer_config.{word}" for word in words]
    assert run("train", "vqgan", "photos32_vqgan", "--out", tmp_path / "run", *settings) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert not (tmp_path / "run").exists()
