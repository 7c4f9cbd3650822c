"""Class dropout: a prior that has seen images without their class, and is drawn from with guidance."""

from __future__ import annotations

import pytest
import tiny
import torch
from commands import run

from tamingfast import load_model
from tamingfast.models.condition_stages import Labelator
from tamingfast.sampling import sample_grid
from tamingfast.training import prior

CLASSES = len(tiny.Noise.classes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropout")
    first_stage = tiny.train("vqgan", folder / "vqgan", steps=2)
    config = tiny.config(tiny.PRIOR, steps=4) | {"prior": {"condition": "class", "class_dropout": 0.5}}
    return prior.train(config, first_stage, folder / "prior", device="cpu", datasets=tiny.datasets())


def test_the_null_class_is_one_more_and_has_an_embedding(trained):
    model = load_model(trained)
    assert isinstance(model.cond_stage_model, Labelator)
    assert model.null == CLASSES and model.class_dropout == 0.5
    assert model.transformer.config.vocab_size >= CLASSES + 1


def test_half_of_the_classes_are_dropped_in_training_only(trained):
    model = load_model(trained).train()
    seen = []
    model.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 0]))
    labels, z = torch.arange(600)[:, None] % CLASSES, torch.zeros(600, 16, dtype=torch.int64)
    torch.manual_seed(0)
    model.token_logits(z, labels)
    dropped = seen[0] == CLASSES
    assert 0.4 < dropped.float().mean() < 0.6
    assert torch.equal(seen[0][~dropped], labels[~dropped, 0])
    model.eval().token_logits(z, labels)
    assert torch.equal(seen[1], labels[:, 0])


def test_without_dropout_nothing_changes(trained):
    config = load_model(trained).config["model"]["params"]
    assert config["cond_stage_config"]["params"] == {"n_classes": CLASSES, "null_class": True}
    stage = Labelator(CLASSES)
    assert stage.null is None and stage.encode(torch.tensor([2]))[0].tolist() == [[2]]


def test_guidance_changes_what_is_drawn(trained, tmp_path):
    model = load_model(trained)
    cond = torch.tensor([[0], [1]])
    with torch.no_grad():
        model.transformer.tok_emb.weight.mul_(50)  # so few steps leave the classes alike
    plain, guided = (sample_grid(model, cond, 4, 4, window=4, cfg=cfg) for cfg in (None, 8.0))
    assert not torch.equal(plain, guided)
    for name, words in (("a", []), ("b", ["--batch", 1, "--lookahead", 3])):
        out = tmp_path / f"{name}.png"
        assert run("sample", trained, "-n", 2, "--cfg", "6:cosine", "--out", out, *words) == 0
    assert run("sample", trained, "-n", 2, "--out", tmp_path / "c.png") == 0


def test_a_guided_drawing_goes_on_with_its_own_scale(trained, tmp_path, capsys):
    out, canvas = tmp_path / "a.png", tmp_path / "a.canvas"
    words = ["sample", trained, "-n", 2, "--out", out, "--canvas", canvas]
    assert run(*words, "--cfg", "3") == 0
    assert run(*words, "--resume") == 0
    capsys.readouterr()
    assert run(*words, "--resume", "--cfg", "4") == 2
    assert "--cfg: got 4.0, expected 3.0" in capsys.readouterr().err
