"""The first stage of two levels: its tokens, its training, and priors on it."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import tamingfast
from tamingfast import cli, tasks
from tamingfast.models.hierarchical import HierarchicalVQModel
from tamingfast.sampling.canvas import Canvas
from tamingfast.training import prior, vqgan

CONFIG = tiny.config(tiny.VQGAN, steps=6) | {"data": {"name": "photos", "size": tiny.SIZE}}
CONFIG["model"] = CONFIG["model"] | {"target": "tamingfast.models.hierarchical.HierarchicalVQModel"}


def made() -> HierarchicalVQModel:
    return HierarchicalVQModel(**CONFIG["model"]["params"]).eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained first stage and a prior on it, 8 x 8 pixels as 2 x 2 and 4 x 4 tokens."""
    out = tmp_path_factory.mktemp("two_levels")
    vqgan.train(tiny.config(CONFIG, steps=6), out / "vqgan", device="cpu", datasets=tiny.datasets())
    prior.train(tiny.config(tiny.PRIOR, steps=6), out / "vqgan", out / "prior", device="cpu", datasets=tiny.datasets())
    return out


class TestModel:
    def test_a_sequence_holds_the_top_grid_and_then_the_bottom_grid(self):
        model = made()
        x = torch.rand(3, 3, 8, 16) * 2 - 1
        quant, loss, (_, _, tokens) = model.encode(x)
        assert model.factor == 4 and model.grid(8, 16) == (10, 4) and model.n_embed == 32
        assert tokens.shape == (3, 10, 4) and quant.shape == (3, 4, 10, 4) and loss.ndim == 0
        assert int(tokens[:, :2].max()) < 16 <= int(tokens[:, 2:].min())
        table = torch.cat((model.quantize.top.embedding.weight, model.quantize.bottom.embedding.weight))
        assert torch.allclose(quant.permute(0, 2, 3, 1), table[tokens], atol=1e-6)

    def test_raster_order_of_the_bottom_grid_is_kept(self):
        from tamingfast.models.hierarchical import _levels, _sequence

        top, bottom = torch.arange(6).view(1, 1, 2, 3), torch.arange(24).view(1, 1, 4, 6) + 100
        sequence = _sequence(top, bottom)
        assert sequence.shape == (1, 1, 10, 3)
        assert sequence.flatten().tolist() == [*range(6), *range(100, 124)]
        for part, expected in zip(_levels(sequence), (top, bottom), strict=True):
            assert torch.equal(part, expected)

    def test_tokens_decode_to_the_reconstruction(self):
        model = made()
        x = torch.rand(2, 3, 8, 8) * 2 - 1
        _, _, (_, _, tokens) = model.encode(x)
        reconstruction, _ = model(x)
        assert reconstruction.shape == x.shape
        assert torch.allclose(model.decode_code(tokens), reconstruction, atol=1e-5)
        with pytest.raises(ValueError, match="5 \\* h"):
            model.decode_code(tokens.flatten(1))

    @torch.no_grad()
    def test_both_levels_reach_the_image(self):
        model = made()
        tokens = torch.zeros(1, 10, 2, dtype=torch.int64)
        tokens[:, 2:] = 16
        plain = model.decode_code(tokens)
        for row in (0, 9):
            other = tokens.clone()
            other[0, row, 0] += 1
            assert float((model.decode_code(other) - plain).abs().max()) > 1e-6

    def test_footprint_is_of_either_level(self):
        model = made()
        chosen = torch.zeros(1, 10, 2, dtype=torch.bool)  # 8 x 8 pixels: 2 x 2 tokens of 4, 4 x 4 tokens of 2
        chosen[0, 0, 1] = True  # top, right
        chosen[0, 2 + 7, 1] = True  # the bottom grid's last token
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[:4, 4:] = True
        expected[6:, 6:] = True
        assert torch.equal(model.footprint(chosen)[0, 0], expected)

    def test_every_part_is_trained_and_saved(self, tmp_path):
        model = made()
        names = [name for name, _ in model.named_parameters() if not name.startswith("loss.")]
        trained = {id(parameter) for parameter in model.autoencoder_parameters()}
        assert trained == {id(dict(model.named_parameters())[name]) for name in names}
        x = torch.rand(2, 3, 8, 8) * 2 - 1
        reconstruction, loss = model.train()(x)
        (loss + reconstruction.square().mean()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.quantize.parameters())
        tamingfast.checkpoints.save_weights(tmp_path / "m.safetensors", model.state_dict())
        with pytest.raises(tamingfast.UserError, match="without a config, expected one with its config"):
            tamingfast.load_model(tmp_path / "m.safetensors")

    def test_codebooks_start_from_the_latents_of_their_level(self):
        model, batch = made(), {"image": torch.stack([tiny.Noise()[i]["image"] for i in range(8)])}
        vqgan.start_codebook(model, iter([(0, [batch])] * 8), seed=0)
        seen = []
        hook = model.quantize.bottom.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            model.encode(batch["image"].permute(0, 3, 1, 2))
        hook.remove()
        latents = seen[0].movedim(1, -1).flatten(0, -2)
        distance = (model.quantize.bottom.embedding.weight.detach()[:, None] - latents).abs().amax(2).amin(1)
        assert float(distance.max()) < 1e-5


class TestRuns:
    def test_the_first_stage_is_a_run_like_any_other(self, runs, tmp_path, capsys):
        model = tamingfast.load_model(runs / "vqgan")
        assert isinstance(model, tamingfast.HierarchicalVQModel)
        x = torch.rand(2, 3, 8, 8) * 2 - 1
        found = tasks.reconstruct(model, x)
        assert torch.stack(found.reconstructed).shape == x.shape and found.codes <= 32
        photo = tmp_path / "p.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(photo)
        words = ["reconstruct", str(runs / "vqgan"), str(photo), "--size", "16x24", "--out", str(tmp_path / "r.png")]
        assert cli.main(words) == 0
        assert Image.open(tmp_path / "r.png").size == (24 + 4, 2 * 16 + 6)

    def test_a_prior_trains_and_samples_at_the_size_it_was_trained_on(self, runs, tmp_path, capsys):
        model = tamingfast.load_model(runs / "prior")
        assert model.transformer.config.vocab_size == 32 and model.transformer.config.block_size == 1 + 20
        grids = torch.cat(list(tasks.draw(model, tasks.conditions(model, 3), *tasks.grid_size(model, 8, 8))))
        assert grids.shape == (3, 10, 2) and int(grids.max()) < 32
        assert model.decode_grid(grids).shape == (3, 3, 8, 8)
        unfinished = tasks.decoded(model, Canvas.blank(tasks.conditions(model, 1), 10, 2))
        assert unfinished.shape == (1, 3, 8, 8) and not unfinished.any()
        out = tmp_path / "s.png"
        assert cli.main(["sample", str(runs / "prior"), "-n", "2", "--out", str(out), "--size", "8x8"]) == 0
        assert Image.open(out).size == (2 * 10 + 2, 10 + 2)

    def test_a_block_without_a_position_for_the_last_token_will_do(self, runs):
        model = tamingfast.load_model(runs / "prior")
        gpt = model.transformer
        gpt.pos_emb = torch.nn.Parameter(gpt.pos_emb[:, :20])
        gpt.block_size = gpt.config.block_size = 20
        (grid,) = tasks.draw(model, tasks.conditions(model, 1), *tasks.grid_size(model, 8, 8))
        assert grid.shape == (1, 10, 2)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["sample", "--size", "16x16"], "got 80 tokens, expected 20"),
            (["sample", "--size", "6x6"], "multiples of 4"),
            (["complete", "p.png", "--size", "8x8"], "two levels"),
            (["outpaint", "p.png", "--right", "4"], "two levels"),
            (["likelihood", "p.png", "--size", "8x8"], "two levels"),
        ],
    )
    def test_what_needs_one_grid_is_refused(self, runs, tmp_path, capsys, monkeypatch, words, message):
        monkeypatch.chdir(tmp_path)
        Image.new("RGB", (8, 8)).save("p.png")
        command, *rest = words
        assert cli.main([command, str(runs / "prior"), *rest]) == cli.USAGE_ERROR
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1

    def test_conditions_of_one_grid_are_refused(self, runs):
        first = tamingfast.load_model(runs / "vqgan").config
        with pytest.raises(tamingfast.UserError, match="two levels"):
            prior.prior_config(first, {"prior": {"condition": "coord"}}, (10, 2))
        config = prior.prior_config(first, {"prior": {"condition": "class"}}, (10, 2), classes=40)
        assert config["model"]["params"]["transformer_config"]["params"]["vocab_size"] == 40
