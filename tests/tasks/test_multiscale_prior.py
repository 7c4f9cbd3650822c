"""The multiscale prior is trained, saved and sampled like any other prior."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from commands import run
from PIL import Image
from torch import nn

from tamingfast import UserError, cli, evaluation, load_model, tasks
from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import instantiate_from_config
from tamingfast.data.tokens import write_tokens
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.ops import backends
from tamingfast.sampling import Canvas, gumbel_noise, sample_grid
from tamingfast.training import load_config, prior, prior_config

ENGINES = ("torch", "naive", *(["native"] if backends.native()[0] else []))
GRID, TOKENS = (4, 4), 1 + 4 + 16


def config(condition: str = "class", **training) -> dict:
    made = tiny.config(tiny.PRIOR, {"pkeep": 1.0}, **training)
    return made | {"prior": {"condition": condition, "scales": "all"}}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    return tiny.train("vqgan", tmp_path_factory.mktemp("first") / "run", steps=2)


@pytest.fixture(scope="module")
def trained(first_stage, tmp_path_factory):
    """An unconditional prior, as the command trains it."""
    out = tmp_path_factory.mktemp("prior") / "run"
    settings = config("none", steps=6, image_every=6, validation_batches=3)
    return prior.train(settings, first_stage, out, device="cpu", datasets=tiny.datasets())


@pytest.fixture(scope="module")
def model(trained) -> MultiscaleTransformer:
    """With weights so large that every token depends on all before it."""
    model = load_model(trained)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.transformer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.stack([tiny.Noise()[i]["image"] for i in range(3)]).permute(0, 3, 1, 2)


# --- training -------------------------------------------------------------------------------------------------------


def test_a_run_is_a_multiscale_prior(trained):
    model = load_model(trained)
    assert isinstance(model, MultiscaleTransformer) and model.pyramid.names == ["1x1", "2x2", "4x4"]
    assert model.transformer.config.block_size == 1 + TOKENS
    assert (trained / "images" / "00000006.png").is_file()
    assert tasks.trained_size(model) == (8, 8)


def test_a_run_s_own_config_trains_again(trained, first_stage, tmp_path):
    again = load_config(trained / "config.yaml")
    out = prior.train(again, first_stage, tmp_path / "run", device="cpu", datasets=tiny.datasets())
    losses = [[line["loss"] for line in run_directory.read_metrics(run, "train")] for run in (trained, out)]
    assert losses[0] == losses[1] and isinstance(load_model(out), MultiscaleTransformer)


def test_validation_reports_each_scale_and_they_sum_up(trained):
    model, line = load_model(trained), run_directory.read_metrics(trained, "validation")[-1]
    scales = [line[f"nll_{name}"] for name in model.pyramid.names]
    assert line["nll"] * TOKENS == pytest.approx(np.dot(scales, [1, 4, 16]))
    x = torch.stack([tiny.datasets()[1][i]["image"] for i in range(5)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits, tokens = model(x, x)
    nats = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    expected = [float(nats[:, part].mean()) for part in (slice(0, 1), slice(1, 5), slice(5, 21))]
    assert scales == pytest.approx(expected, rel=1e-5)


def test_token_files_train_as_their_images_do(first_stage, tmp_path):
    stage = load_model(first_stage)
    data = tiny.Noise(9)
    data.set_epoch = lambda epoch: None
    with torch.no_grad():
        x = torch.stack([data[i]["image"] for i in range(9)]).permute(0, 3, 1, 2)
        write_tokens(tmp_path / "codes.safetensors", stage.encode(x)[2][2].view(9, *GRID), stage.n_embed)
    prior.train(config("none", steps=3), first_stage, tmp_path / "images", device="cpu", datasets=(data, None))
    settings = config("none", steps=3) | {"data": {"name": "tokens", "path": str(tmp_path / "codes.safetensors")}}
    prior.train(settings, first_stage, tmp_path / "tokens", device="cpu")
    losses = [
        [line["loss"] for line in run_directory.read_metrics(tmp_path / kind, "train")] for kind in ("images", "tokens")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_resumed_run_equals_an_unbroken_one(first_stage, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    prior.train(config(steps=4), first_stage, whole, device="cpu", datasets=tiny.datasets())
    prior.train(config(steps=2), first_stage, broken, device="cpu", datasets=tiny.datasets())
    prior.train(config(steps=4), first_stage, broken, True, "cpu", tiny.datasets())
    expected = load_model(whole).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_model(broken).state_dict().items())


def test_learning_lowers_the_nll_of_every_scale(first_stage, tmp_path):
    data = tiny.Noise(4)
    data.set_epoch = lambda epoch: None
    settings = config("none", steps=60, learning_rate=1e-2, batch_size=4, validate_every=1)
    out = prior.train(settings, first_stage, tmp_path / "run", device="cpu", datasets=(data, data))
    first, *_, last = run_directory.read_metrics(out, "validation")
    for scale in ("1x1", "2x2", "4x4"):
        assert last[f"nll_{scale}"] < 0.6 * first[f"nll_{scale}"]


def test_the_setting_is_a_key_of_every_preset(first_stage):
    settings = load_config("gpt2_small", ["prior.scales=[16,4,1]"])
    made = prior.prior_config(load_model(first_stage).config, settings, (16, 16))["model"]
    assert made["target"] == prior_config.MULTISCALE and made["params"]["scales"] == [16, 4, 1]
    assert made["params"]["transformer_config"]["params"]["block_size"] == 1 + 1 + 16 + 256
    settings = load_config("gpt2_small", ["prior.scales=all"])
    made = prior.prior_config(load_model(first_stage).config, settings, (16, 16))["model"]
    with torch.device("meta"):
        model = instantiate_from_config({key: made[key] for key in ("target", "params")})
    assert model.pyramid.tokens == 341


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"scales": [16, 1]}, "scales: got 16, expected divisors of a grid of 4 x 4 tokens"),
        ({"scales": [1, 2]}, "expected strictly decreasing factors"),
        ({"scales": "all", "ordering": "z_curve"}, "prior.ordering: got z_curve with prior.scales"),
        ({"scales": "all", "condition": "coord"}, "prior.condition: got coord with prior.scales"),
    ],
)
def test_settings_that_do_not_go_together(first_stage, section, said):
    with pytest.raises(UserError, match=said):
        prior.prior_config(load_model(first_stage).config, {"prior": section}, GRID)


# --- sampling -------------------------------------------------------------------------------------------------------


def test_sequence_and_back(model, images):
    with torch.no_grad():
        _, _, (_, _, indices) = model.first_stage_model.encode(images)
    quant, sequence = model.encode_to_z(images)
    assert torch.equal(model.to_grid(sequence, *GRID), indices.view(3, *GRID))
    decoded = model.decode_grid(indices.view(3, *GRID))
    assert torch.equal(model.decode_to_img(sequence, quant.shape), decoded)
    logged = model.log_images({"image": images.permute(0, 2, 3, 1)})
    assert torch.equal(logged["reconstructions"], decoded) and logged["samples_nopix"].shape == images.shape


@pytest.mark.parametrize("given", [0, 1, 5])
def test_engines_agree_and_keep_what_is_given(model, images, given):
    start = model.encode_to_z(images)[1][:, :given]
    cond = tasks.conditions(model, 3)
    drawn = [sample_grid(model, cond, 1, TOKENS, start=start, seed=3, engine=engine) for engine in ENGINES]
    for tokens in drawn:
        assert torch.equal(tokens, drawn[0]) and tokens.shape == (3, 1, TOKENS)
        assert torch.equal(tokens[:, 0, :given], start)
    other = sample_grid(model, cond, 1, TOKENS, start=start, seed=4)
    assert not torch.equal(other, drawn[0])
    pixels = model.sample_images(cond, *GRID, start=start, seed=3)
    assert torch.equal(pixels, model.decode_grid(drawn[0][:, 0, -16:].view(3, *GRID)).clamp(-1, 1))


def test_the_original_s_sampler_agrees(model):
    cond = tasks.conditions(model, 2)
    greedy = sample_grid(model, cond, 1, TOKENS, greedy=True)
    assert torch.equal(model.sample(cond[:, :0], cond, TOKENS), greedy[:, 0])


@pytest.mark.parametrize("engine", ENGINES)
def test_all_scales_given_are_the_image(model, images, engine):
    sequence = model.encode_to_z(images)[1]
    tokens = sample_grid(model, tasks.conditions(model, 3), 1, TOKENS, start=sequence, engine=engine)
    assert torch.equal(tokens[:, 0], sequence)
    canvas = tasks.painted(model, tasks.begun(model, images, 3, tasks.conditions(model, 3)))
    assert canvas.done
    assert torch.equal(tasks.decoded(model, canvas.sample(model)), model.decode_grid(model.image_tokens(tokens)))


@pytest.mark.parametrize("engine", ENGINES)
def test_noise_is_keyed_by_the_place_in_the_sequence(trained, engine):
    """Where all logits are alike the noise decides alone: row 0, and a column of its own for every token."""
    model = load_model(trained)
    nn.init.zeros_(model.transformer.head.weight)
    tokens = sample_grid(model, tasks.conditions(model, 2), 1, TOKENS, seed=5, first_image=7, engine=engine)
    image, column = torch.arange(7, 9)[:, None], torch.arange(TOKENS)[None]
    expected = gumbel_noise(5, image, torch.zeros_like(column), column, 16).argmax(-1)
    assert torch.equal(tokens[:, 0], expected)


def test_batches_do_not_change_samples(model):
    cond = tasks.conditions(model, 5)
    at_once, apart = (torch.cat(list(tasks.draw(model, cond, 1, TOKENS, batch=batch, seed=1))) for batch in (5, 2))
    assert torch.equal(at_once, apart)


def test_an_interrupted_canvas_goes_on(model, tmp_path):
    cond = tasks.conditions(model, 2)
    blank = tasks.painted(model, Canvas.blank(cond, *model.canvas_size(*GRID)), seed=2)
    whole = blank.sample(model)

    def stop(now: Canvas) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blank.sample(model, path=tmp_path / "kept.canvas", preview=stop, every=0)
    kept = Canvas.load(tmp_path / "kept.canvas")
    assert 0 < int(kept.pending.sum()) < 2 * TOKENS
    assert torch.equal(kept.sample(model).tokens, whole.tokens)


def test_other_sizes_and_windows_are_refused(model):
    cond = tasks.conditions(model, 1)
    with pytest.raises(UserError, match="expected 4 x 4, the only size"):
        model.sample_images(cond, 4, 8)
    with pytest.raises(UserError, match="got a grid of 4 x 4, expected 1 x 21"):
        sample_grid(model, cond, 4, 4)
    assert model.sample_images(cond, 4, 4).shape == (1, 3, 8, 8)


def test_evaluation_takes_all_scales(trained, model):
    found = evaluation.likelihood(load_model(trained), tiny.datasets()[1])
    assert found["tokens"] == TOKENS
    assert found["nats_per_token"] == pytest.approx(
        run_directory.read_metrics(trained, "validation")[-1]["nll"], rel=1e-5
    )
    drawn = torch.cat(list(evaluation.samples(model, tiny.datasets()[1], 3, batch_size=2, top_k=None)))
    expected = tasks.decoded(model, Canvas.blank(tasks.conditions(model, 3), 1, TOKENS).sample(model))
    torch.testing.assert_close(drawn.cpu(), expected, atol=1e-5, rtol=1e-5)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(tiny.photographs(1, 24)[0]).save(path)
    return path


def pixels_of(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def test_sample_from_scratch_and_from_a_photo(trained, photo, tmp_path):
    assert run("sample", trained, "-n", 3, "--out", tmp_path / "a.png") == 0
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (22, 22)  # three images in two rows
    for scales, name in ((0, "none"), (2, "two"), (3, "all")):
        words = ("--from", photo, "--scales", scales, "--separate", "--out", tmp_path / f"{name}.png")
        assert run("sample", trained, "-n", 2, *words) == 0
        with Image.open(tmp_path / f"{name}-condition.png") as shown:
            assert shown.size == (8, 8)
    names = ("none", "two", "all")
    drawn = {name: [pixels_of(tmp_path / f"{name}-000{i}.png") for i in (0, 1)] for name in names}
    assert drawn["none"][0] != drawn["none"][1] and drawn["all"][0] == drawn["all"][1]
    assert run("sample", trained, "-n", 2, "--separate", "--out", tmp_path / "scratch.png") == 0
    assert pixels_of(tmp_path / "scratch-0001.png") == drawn["none"][1]
    assert run("reconstruct", trained, photo, "--out", tmp_path / "rec.png") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "--from", "PHOTO", "--scales", 4], "got 4"),
        (["sample", "--from", "PHOTO", "--scales", -1], "got -1"),
        (
            ["sample", "--from", "PHOTO"],
            "expected photo and scales together; scales is the number taken from the photo",
        ),
        (["sample", "--scales", 1], "got scales alone"),
        (["sample", "--from", "nowhere.png", "--scales", 1], "nowhere.png: got no such file"),
        (["sample", "--size", "16x16"], "4 x 4"),
        (["complete", "PHOTO"], "got a multiscale prior"),
        (["likelihood", "PHOTO"], "got a multiscale prior"),
        (["outpaint", "PHOTO", "--right", 8], "got a multiscale prior"),
        (["edit", "PHOTO", "--mask", "PHOTO"], "got a multiscale prior"),
    ],
)
def test_mistakes_are_one_sentence(trained, photo, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    command, *rest = (photo if word == "PHOTO" else word for word in words)
    rest += ["--out", "x.png"] if command == "sample" else []
    assert run(command, trained, *rest) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_scales_are_for_multiscale_priors(first_stage, photo, tmp_path, capsys):
    plain = tiny.train("prior", tmp_path / "run", first_stage, steps=1)
    assert run("sample", plain, "--from", photo, "--scales", 1, "--out", tmp_path / "x.png") == cli.USAGE_ERROR
    assert "expected a multiscale prior; train one with prior.scales=all" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
def test_lookahead_does_not_change_a_token_of_any_scale(model, engine):
    cond, size = tasks.conditions(model, 2), model.canvas_size(*GRID)
    for given in (dict(), dict(start=torch.zeros(2, 1 + 4, dtype=torch.int64))):
        options = dict(seed=3, engine=engine) | given
        expected = sample_grid(model, cond, *size, lookahead=1, **options)
        for lookahead in (3, 50):
            assert torch.equal(sample_grid(model, cond, *size, lookahead=lookahead, **options), expected)
