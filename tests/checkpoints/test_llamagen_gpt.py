"""LlamaGen's transformers as files: each layout opens, and what is not known or does not fit is refused."""

from __future__ import annotations

import json

import llamagen
import pytest
import torch

from tamingfast import LlamaGPT, load_model
from tamingfast.checkpoints.formats import llamagen_gpt
from tamingfast.errors import UserError

SIZE_B = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 32, "n_classes": 3}


@pytest.mark.parametrize("wrapped", ["model", "module", "state_dict", None])
def test_layouts(wrapped, tmp_path):
    path = llamagen.copied_to(tmp_path)
    state = torch.load(path, weights_only=True)
    if wrapped:
        torch.save({wrapped: state, "steps": 7}, path)
    model = load_model(path)
    assert isinstance(model, LlamaGPT) and not model.training
    assert (model.config.n_head, model.block_size, model.n_classes) == (4, 25, 10)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.settings["model"]["target"] == llamagen_gpt.TARGET


def test_a_given_config(tmp_path):
    path = llamagen.copied_to(tmp_path, config=False)
    assert load_model(path, llamagen.folder() / "config.json").block_size == 25


@pytest.mark.parametrize(("name", "tokens"), [("c2i_B_256.pt", 256), ("c2i_B_384.pt", 576)])
def test_published_names(name, tokens, tmp_path):
    made = LlamaGPT(**SIZE_B, block_size=16)
    torch.save({"model": made.state_dict()}, tmp_path / name)
    found = load_model(tmp_path / name)
    assert (found.block_size, found.config.n_head, found.config.kind.hidden) == (tokens, 12, 2048)
    assert torch.equal(found.output.weight, made.output.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [("c2i_B_256.pt", "do not show the number of heads"), ("model.pt", "do not show the number of heads")],
)
def test_what_weights_do_not_show(name, message, tmp_path):
    path = llamagen.copied_to(tmp_path, name, config=False)
    with pytest.raises(UserError, match=f"^{path}: got LlamaGen's transformer without a config.* {message}"):
        load_model(path)


def test_a_published_size_under_another_name(tmp_path):
    torch.save(LlamaGPT(**SIZE_B, block_size=16).state_dict(), tmp_path / "b.pt")
    with pytest.raises(UserError, match="do not show the size of the images"):
        load_model(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": 1e-6}, "norm_eps: got 1e-06"), ({"model_type": "t2i"}, "model_type: got 't2i'"),
        ({"cls_token_num": 120}, "cls_token_num: got 120"), ({"n_kv_head": 2}, "n_kv_head: got 2"),
        ({"n_layer": 3}, "n_layer: got 3 .* expected 2"), ({"vocab_size": 65}, "vocab_size: got 65"),
        ({"num_classes": 11}, "num_classes: got 11"), ({"dim": 32}, "dim: got 32"),
        ({"n_head": "4"}, "n_head: got '4'"), ({"n_head": 3}, "n_head: got 3"),
        ({"block_size": 26}, "block_size: got 26"), ({"block_size": None}, "block_size: got None"),
        ({"rope_base": 0}, "rope_base: got 0"), ({"block_size": 10**12}, "expected"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit(change, message, tmp_path):
    path = llamagen.copied_to(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize("missing", ["output.weight", "layers.1.ffn_norm.weight", "tok_embeddings.weight"])
def test_weights_that_are_missing(missing, tmp_path):
    path = llamagen.copied_to(tmp_path)
    state = torch.load(path, weights_only=True)
    del state[missing]
    torch.save(state, path)
    with pytest.raises(UserError, match=missing):
        load_model(path)
