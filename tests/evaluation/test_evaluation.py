"""Measures of models on real images: equal to other libraries' and hand-made values, and in the expected order."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from skimage import metrics

from tamingfast import UserError, cli, evaluation, images, load_model, tasks
from tamingfast.data import build
from tamingfast.evaluation import generated
from tamingfast.evaluation.batches import batches
from tamingfast.evaluation.likelihood import cell_bits
from tamingfast.models.base import FirstStage
from tamingfast.models.color_clusters import ColorClusters
from tamingfast.models.lpips import LPIPS
from tamingfast.ops import backends
from tamingfast.training import prior, vqgan
from tamingfast.training.colors import fit_color_clusters
from tamingfast.training.tokens import tokens_of


class Photographs(torch.utils.data.Dataset):
    """Real crops, 32x32."""

    def __init__(self, count: int = 24):
        self.pixels = tiny.photographs(count, 32)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.from_numpy(self.pixels[index]).float() / 127.5 - 1, "class_label": index % 3}


class Blur(FirstStage):
    """A first stage that averages squares of 2x2 pixels; its tokens are their brightness in 8 steps."""

    factor, n_embed, image_key = 2, 8, "image"

    def encode(self, x):
        small = F.avg_pool2d(x, 2)
        return small, None, (None, None, ((small.mean(1) + 1) * 3.999).long())

    def decode(self, small):
        return F.interpolate(small, scale_factor=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories of a first stage and a prior on it, both on real crops of 8x8."""
    folder = tmp_path_factory.mktemp("evaluated")
    data = {"name": "photos", "size": 8, "length": 64}
    first = vqgan.train(tiny.config(tiny.VQGAN, steps=20) | {"data": data}, folder / "vqgan", device="cpu")
    config = tiny.config(tiny.PRIOR, steps=60) | {"data": data}
    return first, prior.train(config, first, folder / "prior", device="cpu")


def test_reconstruction_equals_the_librarys_figures():
    crops = Photographs()
    found = evaluation.reconstruction(Blur(), crops, batch_size=7, perceptual=LPIPS("random"))
    x = torch.stack([crops[i]["image"] for i in range(len(crops))]).permute(0, 3, 1, 2)
    out = Blur().decode(Blur().encode(x)[0])
    real, made = images.to_uint8(x), images.to_uint8(out)
    psnr = [metrics.peak_signal_noise_ratio(a, b) for a, b in zip(real, made, strict=True)]
    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1)
    ssim = [metrics.structural_similarity(a, b, **window) for a, b in zip(real, made, strict=True)]
    assert found["psnr"] == pytest.approx(np.mean(psnr)) and found["ssim"] == pytest.approx(np.mean(ssim))
    assert found["lpips"] == pytest.approx(float(LPIPS("random")(out, x).mean()), rel=1e-5)
    assert found["l1"] == pytest.approx(float((out - x).abs().mean()), rel=1e-5) and found["images"] == len(crops)
    shares = np.bincount(Blur().encode(x)[2][2].numpy().ravel(), minlength=8) / (len(crops) * 256)
    assert found["codebook_usage"] == np.mean(shares > 0)
    entropy = -sum(share * math.log(share) for share in shares if share)
    assert found["codebook_perplexity"] == pytest.approx(math.exp(entropy))


def test_reconstruction_says_what_is_not_defined():
    class Exact(Blur):
        def encode(self, x):
            return x, None, (None, None, torch.zeros(len(x), 4, 4, dtype=torch.int64))

        def decode(self, x):
            return x

    found = evaluation.reconstruction(Exact(), tiny.Noise(5), perceptual=LPIPS("random"))
    assert found["psnr"] is None and found["ssim"] is None and found["lpips"] is None and found["l1"] == 0
    assert json.loads(json.dumps(found, allow_nan=False))["codebook_perplexity"] == 1
    Exact.image_key = "segmentation"
    with pytest.raises(UserError, match="got items with image, class_label, file_path_, expected 'segmentation'"):
        evaluation.reconstruction(Exact(), tiny.Noise(5))


def test_a_limit_draws_from_the_whole_set():
    crops = Photographs()
    whole = torch.cat(list(evaluation.images_of(crops, 5)))
    some = torch.cat(list(evaluation.images_of(crops, 5, limit=7, seed=1)))
    assert len(whole) == 24 and len(some) == 7
    at = [int((whole == image).flatten(1).all(1).nonzero()[0]) for image in some]
    assert at != sorted(at) and len(set(at)) == 7
    assert torch.equal(some, torch.cat(list(evaluation.images_of(crops, 3, limit=7, seed=1))))
    assert torch.equal(whole, torch.cat(list(evaluation.images_of(crops, 5, limit=100))))


def test_likelihood_is_the_cross_entropy_of_each_token(runs):
    model, data = load_model(runs[1]), tiny.datasets()[1]
    found = evaluation.likelihood(model, data, batch_size=2)
    z, c = tokens_of(model.requires_grad_(False), torch.utils.data.default_collate([data[i] for i in range(len(data))]))
    log = torch.stack([model.transformer(torch.cat((c, z[:, :i]), 1))[0][:, -1].log_softmax(-1) for i in range(16)], 1)
    nats = float(-log.gather(2, z[..., None]).mean())
    assert found["nats_per_token"] == pytest.approx(nats, rel=1e-5) and found["tokens"] == 16
    assert found["bits_per_token"] == pytest.approx(nats / math.log(2), rel=1e-5)
    assert found["token_bits_per_image_dimension"] == pytest.approx(16 * nats / math.log(2) / (8 * 8 * 3), rel=1e-5)
    assert "pixel_bits_per_dimension" not in found


def test_probabilities_of_all_8_bit_colors_sum_to_one():
    clusters = ColorClusters(16)
    torch.manual_seed(0)
    clusters.kmeans.initialize(torch.rand(500, 3) * 2 - 1)
    assert float(cell_bits(clusters).exp2().sum()) == pytest.approx(2.0**24, rel=1e-12)


def test_a_prior_on_colors_has_a_likelihood_of_pixels(tmp_path):
    data = {"name": "photos", "size": 8, "length": 64}
    train = build(data)[0]
    fit_color_clusters(train, 8, 0, tmp_path / "colors", data)
    config = tiny.config(tiny.PRIOR, steps=2) | {"data": data}
    model = load_model(prior.train(config, tmp_path / "colors", tmp_path / "prior", device="cpu"))
    torch.nn.init.zeros_(model.transformer.head.weight)  # every one of the 8 colours is as likely
    found = evaluation.likelihood(model, train, limit=32)
    z = torch.cat([tokens_of(model, batch)[0] for batch in batches(train, 16, 32)])
    expected = (math.log2(8) + float(cell_bits(model.first_stage_model)[z].mean())) / 3
    assert model.transformer.config.vocab_size == 8
    assert found["pixel_bits_per_dimension"] == pytest.approx(expected, rel=1e-5) and expected < 8.5


def test_a_prior_on_tokens_of_colors_knows_its_size(tmp_path):
    train = build(tiny.CROPS)[0]
    colors = fit_color_clusters(train, 8, 0, tmp_path / "colors", tiny.CROPS)
    tasks.encode(colors, train, tmp_path / "tokens.safetensors")
    data = {"name": "tokens", "path": str(tmp_path / "tokens.safetensors")}
    config = tiny.config(tiny.PRIOR, steps=1) | {"data": data, "prior": {"condition": "none"}}
    out = prior.train(config, colors, tmp_path / "prior", device="cpu")
    assert tasks.trained_size(load_model(out)) == (8, 8)
    assert tasks.sample(out, 1).images.shape == (1, 3, 8, 8)


def test_images_beyond_the_block_are_refused(runs):
    with pytest.raises(UserError, match="got images of 256 tokens, expected at most 17"):
        evaluation.likelihood(load_model(runs[1]), Photographs(2))


def test_samples_follow_the_conditions_and_the_seed(runs, monkeypatch):
    model, data = load_model(runs[1]), tiny.datasets()[1]
    seen = []
    draw = generated.tasks.draw

    def noted(model, cond, *arguments, **options):
        seen.append(cond)
        return draw(model, cond, *arguments, **options)

    monkeypatch.setattr(generated.tasks, "draw", noted)
    drawn = torch.cat(list(evaluation.samples(model, data, 12, batch_size=5)))
    assert drawn.shape == (12, 3, 8, 8) and len(seen[0]) == 12
    labels = [data[i]["class_label"] for i in range(5)]
    assert seen[0].flatten().tolist() == [*labels, *labels, *labels[:2]]
    assert torch.equal(drawn, torch.cat(list(evaluation.samples(model, data, 12, batch_size=12))))
    assert not torch.equal(drawn, torch.cat(list(evaluation.samples(model, data, 12, seed=1))))


@pytest.mark.skipif(not backends.native()[0], reason="needs the extension")
def test_tokens_per_pass_are_counted_where_the_images_are_the_same(runs, monkeypatch):
    model = load_model(runs[1])
    rates = evaluation.tokens_per_pass(model, (1, 2, 16), images=3, temperature=0.2)
    assert rates[1] == 1
    assert 1 <= rates[2] <= 2
    assert rates[2] <= rates[16] <= 16 / 2, "nothing is guessed before the first logits"
    assert rates == evaluation.tokens_per_pass(model, (1, 2, 16), images=3, temperature=0.2)
    grids = iter([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    monkeypatch.setattr(tasks, "draw", lambda *a, **options: iter([next(grids)]))
    with pytest.raises(RuntimeError, match="lookahead 8 draws other images"):
        evaluation.tokens_per_pass(model, (8,), images=1)


def test_the_command_reports_a_prior(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tamingfast.evaluation.run.load_features", _refuse)
    words = ["evaluate", str(runs[1]), "--out", str(tmp_path / "r.json")]
    assert cli.main([*words, "--limit", "8", "--samples", "4"]) == 0
    text, report = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert "NLL, nats per token" in text and "Not computed: distances of features, as it is not here" in text
    assert report["likelihood"]["images"] == report["reconstruction"]["images"] == 8
    assert "distances" not in report and report["missing"]["distances of features"] == "it is not here"
    monkeypatch.setattr("tamingfast.evaluation.run.load_features", lambda *arguments: torch.nn.Identity())
    assert cli.main([*words, "--limit", "1", "--samples", "2"]) == 0
    assert "distances of features, as they need at least 2 images" in capsys.readouterr().out
    monkeypatch.setattr("tamingfast.evaluation.run.load_features", _refuse)
    for wrong, said in (
        (["--samples", "0"], "samples: got 0, expected at least 1"),
        (["--features", "efficientnet-lite0"], "it is not here"),
        (["--perceptual-weights", "random"], "whose distance is not LPIPS"),
        (["--features", "efficientnet-lite0", "--inception-weights", "x"], "leave one out"),
        (["--data", str(tmp_path), "name=photos"], "got a directory and 'name=photos'"),
    ):
        assert cli.main(["evaluate", str(runs[1]), *wrong]) == cli.USAGE_ERROR
        assert said in capsys.readouterr().err


def test_data_without_the_condition_are_refused(runs, tmp_path, capsys):
    for number, pixels in enumerate(tiny.photographs(3, 8)):
        images.save_png(tmp_path / f"{number}.png", pixels)
    assert cli.main(["evaluate", str(runs[1]), "--data", str(tmp_path)]) == cli.USAGE_ERROR
    assert "got 0 class folders, expected 8" in capsys.readouterr().err
    model = load_model(runs[1])
    model.cond_stage_key = "depth"
    with pytest.raises(UserError, match="data: got image, class_label, file_path_, expected 'depth' too, on which"):
        evaluation.likelihood(model, tiny.datasets()[1])


def test_the_command_reads_a_folder(runs, tmp_path, capsys):
    for number, pixels in enumerate(tiny.photographs(5, 16)):
        images.save_png(tmp_path / "photos" / f"{number}.png", pixels)
    words = ["evaluate", str(runs[0]), "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "r.json")]
    assert cli.main(words) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["reconstruction"]["images"] == 5 and "likelihood" not in report
    assert "5 image files as 8x8" in capsys.readouterr().out


def _refuse(*arguments):
    raise UserError("it is not here")
