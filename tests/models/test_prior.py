"""Priors beyond the recorded outputs of the reference."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import DDCONFIG, DUMMY, prior
from torch import nn
from torch.testing import assert_close

from tamingfast.models.gpt import sample, sample_with_past
from tamingfast.sampling import sample_grid
from tamingfast.sampling.likelihood import negative_log_likelihood
from tamingfast.tasks import window_of


def test_survives_pickling_and_copying():
    model = prior().train()
    x = torch.randn(1, 3, 8, 8)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        again.train()
        assert not again.first_stage_model.training
        assert_close(again(x, x)[0], model(x, x)[0])


def test_loss_covers_image_tokens_only():
    model = prior().eval()
    x = torch.randn(2, 3, 8, 8)
    logits, target = model(x, x)
    assert logits.shape == (2, 16, 12) and target.shape == (2, 16)
    tokens = torch.cat((torch.zeros(2, 1, dtype=torch.int64), target), 1)
    assert_close(logits, model.transformer(tokens[:, :-1])[0])


def test_dropped_tokens_change_inputs_not_targets():
    model = prior(pkeep=0.5).train()
    seen = []
    model.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, 3, 8, 8)
    _, target = model(x, x)
    kept = (seen[0][:, 1:] == target[:, :-1]).float().mean()
    assert 0.3 < kept < 0.8
    model.eval()(x, x)
    assert_close(seen[1][:, 1:], target[:, :-1])


def test_frozen_stages_ignore_train():
    model = prior().train()
    assert model.transformer.training and not model.first_stage_model.training
    assert not any(p.requires_grad for p in model.first_stage_model.parameters())


def test_condition_with_flat_indices():
    """The original cannot concatenate what its own quantiser returns."""
    model = prior("__is_first_stage__", block=32)
    x = torch.randn(2, 3, 8, 8)
    assert model.encode_to_c(x)[1].shape == (2, 16)
    model.training_step({"image": x.permute(0, 2, 3, 1), "depth": x.permute(0, 2, 3, 1)}, 0).backward()


def test_ordering_moves_image_tokens_only():
    permuter = {"target": "taming.modules.transformer.permuter.SpiralOut", "params": {"H": 4, "W": 4}}
    model = prior(permuter=permuter).eval()
    x = torch.randn(1, 3, 8, 8)
    quant, z = model.encode_to_z(x)
    plain = model.first_stage_model.encode(x)[2][2].view(1, 16)
    assert_close(z, plain[:, model.permuter.forward_shuffle_idx])
    assert_close(model.decode_to_img(z, quant.shape), model.decode_grid(plain.view(1, 4, 4)))


def test_sampling_continues_a_prefix():
    model = prior().eval()
    c = torch.zeros(2, 1, dtype=torch.int64)
    given = torch.randint(0, 12, (2, 5))
    out = model.sample(given, c, 11, sample=True, top_k=3)
    assert_close(out[:, :5], given)
    assert out.shape == (2, 16)


def conditions(name: str) -> dict:
    """A prior's condition and its number of tokens."""
    if name == "class":
        return dict(cond={"target": "taming.modules.util.Labelator", "params": {"n_classes": 5}},
                    cond_stage_key="class_label"), 1  # fmt: skip
    return {"unconditional": ({}, 1), "first stage": (dict(cond="__is_first_stage__"), 16)}[name]


@pytest.mark.parametrize("name", ["unconditional", "class", "first stage"])
def test_every_way_to_draw_needs_a_position_for_all_tokens_but_the_last(name):
    """Whatever the condition, and however many tokens are given already."""
    options, count = conditions(name)
    model = prior(block=count + 15, **options).eval()
    c = torch.randint(0, 5, (2, count))
    whole = torch.randint(0, 12, (2, 16))
    for given in (0, 1, 7, 15, 16):
        for sampled in (False, True):
            drawn = model.sample(whole[:, :given], c, 16 - given, sample=sampled, top_k=3)
            assert drawn.shape == (2, 16) and torch.equal(drawn[:, :given], whole[:, :given])
            from_all = torch.cat((c, whole[:, :given]), 1)
            drawn = sample_with_past(from_all, model.transformer, 16 - given, sample_logits=sampled, top_k=3)
            assert drawn.shape == (2, 16 - given)
        if given:
            with pytest.raises(
                ValueError, match=f"^steps: got {17 - given} after {count + given} tokens, expected at most"
            ):
                model.sample(whole[:, :given], c, 17 - given)
            with pytest.raises(
                ValueError, match=f"^steps: got {17 - given} after {count + given} tokens, expected at most"
            ):
                sample_with_past(from_all, model.transformer, 17 - given)
    assert sample_grid(model, c, 4, 4).shape == (2, 4, 4)
    assert negative_log_likelihood(model, c, whole.view(2, 4, 4)).shape == (2, 4, 4)
    assert model.token_logits(whole, c).shape == (2, 16, 12)
    assert sample(model.transformer, torch.cat((c, whole), 1), 3).shape == (2, count + 19)  # sees the last tokens only
    x = torch.randn(2, 8, 8, 3).clamp(-1, 1)
    batch = {"image": x, "depth": x, "class_label": torch.tensor([1, 4])}
    assert model.log_images(batch)["samples_nopix"].shape == (2, 3, 8, 8)
    assert window_of(model, 4, 4, count) == 4


def test_sampling_no_tokens_returns_what_is_given():
    """Even if it would not fit."""
    model = prior(block=8).eval()
    given, c = torch.randint(0, 12, (2, 20)), torch.zeros(2, 1, dtype=torch.int64)
    assert torch.equal(model.sample(given, c, 0), given)
    assert sample_with_past(given, model.transformer, 0).shape == (2, 0)


def test_sampling_follows_the_distribution_and_top_k():
    model = prior().eval()
    model.transformer.head.weight.data.mul_(20)
    c = torch.zeros(4000, 1, dtype=torch.int64)
    first = model.sample(c[:, :0], c, 1, sample=True, top_k=3)[:, 0]
    logits = model.transformer(c[:1])[0][0, 0]
    top = logits.topk(3)
    seen = torch.bincount(first, minlength=12) / 4000
    assert set(first.unique().tolist()) == set(top.indices.tolist())
    assert_close(seen[top.indices], top.values.softmax(0), atol=0.04, rtol=0)


def test_sampling_errors():
    model = prior()
    c = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"\.eval"):
        model.train().sample(c[:, :0], c, 1)
    with pytest.raises(ValueError, match="expected at most 17 with block_size=17"):
        model.eval().sample(c[:, :0], c, 18)


def test_noise_model_needs_one_pass():
    model = prior("__is_first_stage__", block=32, pkeep=0.0).eval()
    c = torch.randint(0, 12, (2, 16))
    calls = []
    model.transformer.register_forward_hook(lambda *args: calls.append(1))
    assert model.sample(c[:, :0], c, 16).shape == (2, 16)
    assert len(calls) == 1


@pytest.mark.parametrize("cond", ["__is_unconditional__", "class", "segmentation"])
def test_log_images(cond):
    x = torch.randn(2, 8, 8, 3).clamp(-1, 1)
    batch = {"image": x}
    if cond == "class":
        model = prior({"target": "taming.modules.util.Labelator", "params": {"n_classes": 5}},
                      cond_stage_key="class_label").eval()  # fmt: skip
        batch["class_label"] = torch.tensor([1, 4])
    elif cond == "segmentation":
        maps = {**DDCONFIG, "in_channels": 4, "out_ch": 4}
        params = {"ddconfig": maps, "lossconfig": DUMMY, "n_embed": 12, "embed_dim": 4, "n_labels": 4,
                  "image_key": "segmentation"}  # fmt: skip
        stage = {"target": "taming.models.vqgan.VQSegmentationModel", "params": params}
        model = prior(stage, block=32, cond_stage_key="segmentation").eval()
        batch["segmentation"] = F.one_hot(torch.randint(0, 4, (2, 8, 8)), 4).float()
    else:
        model = prior().eval()
    images = model.log_images(batch)
    expected = {"inputs", "reconstructions", "samples_half", "samples_nopix", "samples_det"}
    if cond != "__is_unconditional__":
        expected |= {"conditioning", "conditioning_rec"}
    assert set(images) == expected
    assert images["samples_nopix"].shape == (2, 3, 8, 8)


def test_weight_decay_on_linear_weights_only():
    model = prior()
    model.learning_rate = 1e-3
    optimizer = model.configure_optimizers()
    names = {id(p): name for name, p in model.transformer.named_parameters()}
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert decayed == {n for n in names.values() if n.endswith("weight") and "ln" not in n and "emb" not in n}
    assert decayed | rest == set(names.values())
    assert optimizer.defaults["betas"] == (0.9, 0.95)


class Halves(nn.Module):
    """A first stage without our base class: 2x2 pixels become one of two codes, the sign of their mean."""

    embed_dim = 1

    @property
    def quantize(self):
        return self

    def encode(self, x):
        codes = F.avg_pool2d(x.mean(1, keepdim=True), 2).sign()
        return codes, None, (None, None, (codes > 0).long().flatten())

    def get_codebook_entry(self, indices, shape):
        batch, rows, columns, _ = shape
        return (indices * 2.0 - 1).view(batch, 1, rows, columns)

    def decode(self, codes):
        return F.interpolate(codes, scale_factor=2).expand(-1, 3, -1, -1)


@pytest.mark.parametrize("as_condition", [False, True], ids=["image", "condition"])
def test_a_foreign_module_as_first_stage(as_condition):
    model, x = prior("__is_first_stage__", block=32).eval(), torch.randn(2, 3, 6, 8)
    stage = Halves()
    model.first_stage_model = model.cond_stage_model = stage
    encode, decode = (
        (model.encode_condition, model.decode_condition) if as_condition else (model.encode_grid, model.decode_grid)
    )
    tokens = encode(x)
    assert tokens.tolist() == (F.avg_pool2d(x.mean(1), 2) > 0).long().tolist()
    assert_close(decode(tokens), stage.decode(stage.encode(x)[0]))
