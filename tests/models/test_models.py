"""Behaviour of the models beyond what the reference's recorded outputs show."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tamingfast.models.color_clusters import ColorClusters, KMeans
from tamingfast.models.condition_stages import CoordStage, Labelator
from tamingfast.models.discriminator import ActNorm, NLayerDiscriminator
from tamingfast.models.gpt import GPT, sample, sample_with_past
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.models.quantize import EMAVectorQuantizer, GumbelQuantize, OneHotVectorQuantizer, VectorQuantizer
from tamingfast.models.vqgan import EMAVQ, LambdaWarmUpCosineScheduler, VQModel

DUMMY = {"target": "taming.modules.losses.DummyLoss"}
DDCONFIG = {
    "double_z": False, "z_channels": 4, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def prior(cond="__is_unconditional__", vocab=12, block=17, permuter=None, **options) -> Net2NetTransformer:
    gpt = {"vocab_size": vocab, "block_size": block, "n_layer": 2, "n_head": 2, "n_embd": 16}
    stage = {"ddconfig": DDCONFIG, "lossconfig": DUMMY, "n_embed": 12, "embed_dim": 4}
    return Net2NetTransformer(
        {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        {"target": "taming.models.vqgan.VQModel", "params": stage},
        cond,
        permuter,
        **options,
    )


class TestVectorQuantizer:
    @pytest.mark.parametrize("legacy", [True, False])
    def test_loss_and_gradients_by_formula(self, legacy):
        quantizer = VectorQuantizer(5, 3, beta=0.25, legacy=legacy)
        z = torch.randn(2, 3, 4, 6, requires_grad=True)
        z_q, loss, (_, _, indices) = quantizer(z)
        flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 3)
        codes = quantizer.embedding.weight.detach()
        assert_close(indices, torch.cdist(flat.double(), codes.double()).argmin(1))
        mse = ((flat - codes[indices]) ** 2).mean()
        assert_close(loss.detach(), 1.25 * mse)
        on_z, on_codes = (1.0, 0.25) if legacy else (0.25, 1.0)
        (z_q.sum() * 0 + loss).backward()
        difference = (flat - codes[indices]) * 2 / flat.numel()
        assert_close(z.grad.permute(0, 2, 3, 1).reshape(-1, 3), on_z * difference)
        by_code = torch.zeros_like(codes).index_add_(0, indices, -difference * on_codes)
        assert_close(quantizer.embedding.weight.grad, by_code)

    def test_straight_through(self):
        quantizer = VectorQuantizer(5, 3, beta=0.25)
        z = torch.randn(1, 3, 2, 2, requires_grad=True)
        weights = torch.randn(1, 3, 2, 2)
        (quantizer(z)[0] * weights).sum().backward()
        assert_close(z.grad, weights)

    def test_shapes_of_indices(self):
        z = torch.randn(2, 3, 4, 6)
        assert VectorQuantizer(5, 3, 0.25)(z)[2][2].shape == (48,)
        assert VectorQuantizer(5, 3, 0.25, sane_index_shape=True)(z)[2][2].shape == (2, 4, 6)

    @pytest.mark.parametrize("unknown", ["random", "extra", 1])
    def test_remap(self, tmp_path, unknown):
        used = np.array([7, 2, 9])
        np.save(tmp_path / "used.npy", used)
        quantizer = VectorQuantizer(10, 3, 0.25, remap=tmp_path / "used.npy", unknown_index=unknown)
        assert quantizer.re_embed == (4 if unknown == "extra" else 3)
        new = quantizer.remap_to_used(torch.tensor([[7, 2, 9, 0]]))
        assert new[0, :3].tolist() == [0, 1, 2]
        last = int(new[0, 3])
        assert {"extra": last == 3, "random": 0 <= last < 3, 1: last == 1}[unknown]
        assert quantizer.unmap_to_all(torch.tensor([[0, 1, 2]])).tolist() == [used.tolist()]
        entries = quantizer.get_codebook_entry(torch.tensor([0, 1, 2, 0]), (1, 2, 2, 3))
        assert_close(entries[0, :, 0, 1], quantizer.embedding.weight[2])

    def test_the_original_s_first_version_returns_more(self):
        quantizer = OneHotVectorQuantizer(5, 3, 0.25)
        _, _, (perplexity, encodings, indices) = quantizer(torch.randn(2, 3, 4, 4))
        assert indices.shape == (32, 1) and encodings.shape == (32, 5)
        assert_close(encodings.argmax(1), indices[:, 0])
        share = torch.bincount(indices[:, 0], minlength=5) / 32
        assert_close(perplexity, torch.exp(-torch.special.xlogy(share, share).sum()))

    def test_gumbel_s_arguments_are_refused(self):
        with pytest.raises(ValueError, match="GumbelQuantize"):
            VectorQuantizer(5, 3, 0.25)(torch.randn(1, 3, 2, 2), temp=0.5)


def test_ema_codebook_moves_to_the_means():
    quantizer = EMAVectorQuantizer(2, 3, beta=0.25, decay=0.5)
    before = quantizer.embedding.weight.clone()
    z = torch.randn(2, 3, 4, 4)
    indices = quantizer(z)[2][2]
    flat = z.permute(0, 2, 3, 1).reshape(-1, 3)
    counts = torch.bincount(indices, minlength=2).float()
    sums = torch.zeros(2, 3).index_add_(0, indices, flat)
    size, average = 0.5 * counts, 0.5 * before + 0.5 * sums
    smoothed = (size + 1e-5) / (size.sum() + 2e-5) * size.sum()
    assert_close(quantizer.embedding.weight.detach(), average / smoothed[:, None])
    moved = quantizer.embedding.weight.clone()
    quantizer.eval()(z)
    assert_close(quantizer.embedding.weight, moved)


def test_ema_model_can_be_trained_and_decoded():
    model = EMAVQ(DDCONFIG, DUMMY, n_embed=12, embed_dim=4)
    model.learning_rate = 1e-3
    (optimizer,), _ = model.configure_optimizers()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in model.quantize.parameters()}
    assert model.decode_code(torch.zeros(2, 4, 6, dtype=torch.int64)).shape == (2, 3, 8, 12)


def test_gumbel_kl_and_remap(tmp_path):
    np.save(tmp_path / "used.npy", np.array([4, 1]))
    quantizer = GumbelQuantize(3, 4, 6, kl_weight=0.1, remap=tmp_path / "used.npy")
    z = torch.randn(2, 3, 5, 5)
    z_q, loss, (_, _, indices), logits = quantizer(z, return_logits=True)
    assert logits.shape == (2, 2, 5, 5) and set(indices.unique().tolist()) <= {0, 1}
    q = logits.softmax(1)
    assert_close(loss, 0.1 * (q * (q * 6 + 1e-10).log()).sum(1).mean())
    assert_close(z_q, quantizer.get_codebook_entry(indices.reshape(-1), (2, 5, 5, 4)))


class TestKMeans:
    def test_against_lloyd_s_algorithm(self):
        x = torch.randn(200, 3)
        kmeans = KMeans(ncluster=4, niter=3)
        torch.manual_seed(7)
        kmeans.initialize(x)
        torch.manual_seed(7)
        centres = x[torch.randperm(200)[:4]]
        for _ in range(3):
            assigned = torch.cdist(x.double(), centres.double()).argmin(1)
            centres = torch.stack([x[assigned == k].mean(0) for k in range(4)])
        assert kmeans.is_initialized()
        assert_close(kmeans.C, centres)

    def test_round_trip_and_shapes(self):
        kmeans = KMeans(ncluster=4)
        kmeans.C.copy_(torch.randn(4, 3))
        indices = torch.randint(0, 4, (2, 6))
        images = kmeans(indices, reverse=True, shape=(3, 2, 3))
        assert images.shape == (2, 3, 2, 3)
        assert_close(kmeans(images), indices)

    def test_empty_clusters_are_filled(self):
        x = torch.cat([torch.zeros(50, 3), torch.ones(50, 3)])
        kmeans = KMeans(ncluster=8)
        kmeans.initialize(x)
        assert torch.isfinite(kmeans.C).all()

    def test_too_few_points(self):
        with pytest.raises(ValueError, match="at least 512"):
            KMeans().initialize(torch.randn(5, 3))

    def test_as_a_first_stage(self):
        stage = ColorClusters(ncluster=6)
        stage.kmeans.C.copy_(torch.randn(6, 3))
        x = torch.randn(2, 3, 4, 5)
        quant, loss, (_, _, indices) = stage.encode(x)
        assert indices.shape == (2, 4, 5) and loss == 0
        again = stage.quantize.get_codebook_entry(indices.reshape(-1), (2, 4, 5, 3))
        assert_close(stage.decode(again), quant)


class TestConditions:
    def test_labels(self):
        tokens, _, info = Labelator(10).encode(torch.tensor([3, 7]))
        assert tokens.tolist() == [[3], [7]] and info[2].dtype == torch.int64
        assert Labelator(10).decode(tokens).tolist() == [3, 7]
        with pytest.raises(ValueError, match="0 to 9"):
            Labelator(10).encode(torch.tensor([10]))

    def test_coordinates(self):
        stage = CoordStage(n_embed=8, down_factor=2)
        c = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
        _, _, (_, _, tokens) = stage.encode(c)
        assert_close(tokens, (8 * F.avg_pool2d(c, 2)).round().long())
        assert stage.decode(tokens.float()).shape == c.shape
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            stage.encode(c + 1)


def test_actnorm_starts_by_standardising():
    layer = ActNorm(3)
    x = torch.randn(8, 3, 4, 4) * 5 + 2
    y = layer(x)
    assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(y.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    assert_close(layer(y, reverse=True), x, atol=1e-4, rtol=1e-4)
    patches = NLayerDiscriminator(use_actnorm=True, ndf=8, n_layers=1)(torch.randn(2, 3, 16, 16))
    assert patches.shape == (2, 1, 6, 6)


def test_sides_that_f_does_not_divide_are_cut():
    model = VQModel({**DDCONFIG, "ch_mult": [1, 1, 1]}, DUMMY, n_embed=12, embed_dim=4)
    assert model.encoder(torch.zeros(1, 3, 11, 8)).shape == (1, 4, 2, 2)
    assert model(torch.zeros(1, 3, 11, 8))[0].shape == (1, 3, 8, 8)


def test_attributes_that_other_code_reads():
    model = VQModel({**DDCONFIG, "ch_mult": [1, 1, 1]}, DUMMY, n_embed=12, embed_dim=4)
    assert model.decoder.num_resolutions == model.encoder.num_resolutions == 3
    assert model.decoder.z_shape == (1, 4, 2, 2)
    assert model.encoder.resolution == 8 and model.encoder.in_channels == 3
    mask = GPT(9, 5, n_layer=1, n_head=1, n_embd=4, n_unmasked=2).blocks[0].attn.mask
    assert mask[0, 0].tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1] * 5]


def test_temperature_schedule():
    schedule = LambdaWarmUpCosineScheduler(10, lr_min=0.1, lr_max=1.0, lr_start=0.0, max_decay_steps=110)
    assert schedule(5) == pytest.approx(0.5)
    assert schedule(60) == pytest.approx(0.55)
    assert schedule(110) == schedule(500) == pytest.approx(0.1)


class TestCache:
    @pytest.mark.parametrize("n_unmasked", [0, 4])
    @pytest.mark.parametrize("chunks", [[10], [4, 1, 1, 4], [5, 5]])
    @torch.no_grad()
    def test_pieces_equal_the_whole(self, n_unmasked, chunks):
        model = GPT(9, 12, n_layer=2, n_head=2, n_embd=16, n_unmasked=n_unmasked).eval()
        torch.nn.init.normal_(model.pos_emb)
        tokens = torch.randint(0, 9, (3, 10))
        cache, start, pieces = model.new_cache(3, 10), 0, []
        for length in chunks:
            pieces.append(model.forward_cached(tokens[:, start : start + length], cache, start))
            start += length
        assert_close(torch.cat(pieces, 1), model(tokens)[0])

    def test_errors(self):
        model = GPT(9, 12, n_layer=1, n_head=1, n_embd=4, n_unmasked=4)
        cache = model.new_cache(1, 6)
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match="unmasked prefix of 4"):
            model.forward_cached(tokens, cache, 2)
        with pytest.raises(ValueError, match="cache holds 6"):
            model.forward_cached(tokens, cache, 5)
        with pytest.raises(ValueError, match="at most block_size=12"):
            model.new_cache(1, 13)
        with pytest.raises(ValueError, match="n_head=3"):
            GPT(9, 12, n_head=3, n_embd=16)


class TestPast:
    """The functions that the original's fast sampling script uses."""

    @torch.no_grad()
    def test_pieces_equal_the_whole(self):
        model = GPT(9, 12, n_layer=2, n_head=2, n_embd=16).eval()
        torch.nn.init.normal_(model.pos_emb)
        tokens = torch.randint(0, 9, (3, 7))
        logits, _, present = model.forward_with_past(tokens[:, :4])
        assert present.shape == (2, 2, 3, 2, 4, 8)
        past, pieces = [present], [logits]
        for n in range(4, 7):
            logits, loss, present = model.forward_with_past(tokens[:, n : n + 1], past=past, past_length=n)
            past.append(present)
            pieces.append(logits)
        assert loss is None
        assert_close(torch.cat(pieces, 1), model(tokens)[0])
        with pytest.raises(ValueError, match="past holds 7"):
            model.forward_with_past(tokens[:, :1], past=past, past_length=3)

    def test_embeddings_come_first(self):
        model = GPT(9, 12, n_layer=1, n_head=2, n_embd=16).eval()
        tokens = torch.randint(0, 9, (2, 5))
        logits, loss, _ = model.forward_with_past(
            tokens[:, 2:], embeddings=model.tok_emb(tokens[:, :2]), targets=tokens
        )
        assert_close(logits, model(tokens)[0])
        assert_close(loss, model(tokens, targets=tokens)[1])

    def test_both_samplers_are_greedy_alike(self):
        model = GPT(9, 12, n_layer=2, n_head=2, n_embd=16).eval()
        x = torch.randint(0, 9, (2, 3))
        cached = sample_with_past(x, model, steps=6, sample_logits=False)
        assert_close(torch.cat((x, cached), 1), sample(model, x, steps=6))

    def test_filters_are_the_original_s(self):
        model = GPT(9, 12, n_layer=1, n_head=2, n_embd=16).eval()
        x = torch.zeros(500, 1, dtype=torch.int64)
        drawn = sample_with_past(x, model, steps=1, top_k=2, top_p=0.99)
        best = model(x[:1])[0][0, -1].topk(2).indices
        assert set(drawn.unique().tolist()) <= set(best.tolist())


class TestPrior:
    def test_survives_pickling_and_copying(self):
        model = prior().train()
        x = torch.randn(1, 3, 8, 8)
        for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            again.train()
            assert not again.first_stage_model.training
            assert_close(again(x, x)[0], model(x, x)[0])

    def test_loss_covers_image_tokens_only(self):
        model = prior().eval()
        x = torch.randn(2, 3, 8, 8)
        logits, target = model(x, x)
        assert logits.shape == (2, 16, 12) and target.shape == (2, 16)
        tokens = torch.cat((torch.zeros(2, 1, dtype=torch.int64), target), 1)
        assert_close(logits, model.transformer(tokens[:, :-1])[0])

    def test_dropped_tokens_change_inputs_not_targets(self):
        model = prior(pkeep=0.5).train()
        seen = []
        model.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        x = torch.randn(2, 3, 8, 8)
        _, target = model(x, x)
        kept = (seen[0][:, 1:] == target[:, :-1]).float().mean()
        assert 0.3 < kept < 0.8
        model.eval()(x, x)
        assert_close(seen[1][:, 1:], target[:, :-1])

    def test_frozen_stages_ignore_train(self):
        model = prior().train()
        assert model.transformer.training and not model.first_stage_model.training
        assert not any(p.requires_grad for p in model.first_stage_model.parameters())

    def test_condition_with_flat_indices(self):
        """The original cannot concatenate what its own quantiser returns."""
        model = prior("__is_first_stage__", block=32)
        x = torch.randn(2, 3, 8, 8)
        assert model.encode_to_c(x)[1].shape == (2, 16)
        model.training_step({"image": x.permute(0, 2, 3, 1), "depth": x.permute(0, 2, 3, 1)}, 0).backward()

    def test_ordering_moves_image_tokens_only(self):
        permuter = {"target": "taming.modules.transformer.permuter.SpiralOut", "params": {"H": 4, "W": 4}}
        model = prior(permuter=permuter).eval()
        x = torch.randn(1, 3, 8, 8)
        quant, z = model.encode_to_z(x)
        plain = model.first_stage_model.encode(x)[2][2].view(1, 16)
        assert_close(z, plain[:, model.permuter.forward_shuffle_idx])
        assert_close(model.decode_to_img(z, quant.shape), model.decode_grid(plain.view(1, 4, 4)))

    def test_sampling_continues_a_prefix(self):
        model = prior().eval()
        c = torch.zeros(2, 1, dtype=torch.int64)
        given = torch.randint(0, 12, (2, 5))
        out = model.sample(given, c, 11, sample=True, top_k=3)
        assert_close(out[:, :5], given)
        assert out.shape == (2, 16)

    def test_sampling_follows_the_distribution_and_top_k(self):
        model = prior().eval()
        model.transformer.head.weight.data.mul_(20)
        c = torch.zeros(4000, 1, dtype=torch.int64)
        first = model.sample(c[:, :0], c, 1, sample=True, top_k=3)[:, 0]
        logits = model.transformer(c[:1])[0][0, 0]
        top = logits.topk(3)
        seen = torch.bincount(first, minlength=12) / 4000
        assert set(first.unique().tolist()) == set(top.indices.tolist())
        assert_close(seen[top.indices], top.values.softmax(0), atol=0.04, rtol=0)

    def test_sampling_errors(self):
        model = prior()
        c = torch.zeros(1, 1, dtype=torch.int64)
        with pytest.raises(RuntimeError, match=r"\.eval"):
            model.train().sample(c[:, :0], c, 1)
        with pytest.raises(ValueError, match="at most 17"):
            model.eval().sample(c[:, :0], c, 18)

    def test_noise_model_needs_one_pass(self):
        model = prior("__is_first_stage__", block=32, pkeep=0.0).eval()
        c = torch.randint(0, 12, (2, 16))
        calls = []
        model.transformer.register_forward_hook(lambda *args: calls.append(1))
        assert model.sample(c[:, :0], c, 16).shape == (2, 16)
        assert len(calls) == 1

    @pytest.mark.parametrize("cond", ["__is_unconditional__", "class", "segmentation"])
    def test_log_images(self, cond):
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

    def test_weight_decay_on_linear_weights_only(self):
        model = prior()
        model.learning_rate = 1e-3
        optimizer = model.configure_optimizers()
        names = {id(p): name for name, p in model.transformer.named_parameters()}
        decayed, rest = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
        assert decayed == {n for n in names.values() if n.endswith("weight") and "ln" not in n and "emb" not in n}
        assert decayed | rest == set(names.values())
        assert optimizer.defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 16), (16,)])
def test_decode_code_shapes(shape):
    model = VQModel(DDCONFIG, DUMMY, n_embed=12, embed_dim=4)
    out = model.decode_code(torch.zeros(shape, dtype=torch.int64))
    assert out.shape[2:] == ((8, 12) if len(shape) == 3 else (8, 8))
    with pytest.raises(ValueError, match="not a square grid"):
        model.decode_code(torch.zeros(1, 15, dtype=torch.int64))
