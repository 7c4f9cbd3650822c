"""The workflows called from Python, with paths, arrays, PIL images and tensors."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tamingfast import UserError, evaluation, load_model, progress, tasks
from tamingfast.data.tokens import TokenDataset
from tamingfast.sampling import Canvas
from tamingfast.tasks import DrawingOptions, costs
from tamingfast.training import prior as training_prior


@pytest.fixture(scope="module")
def prior(runs):
    return load_model(runs / "prior")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """A photograph, uint8 (16, 12, 3)."""
    return tiny.photographs(1, 16)[0][:, :12]


def test_sample_from_a_path_and_from_a_model(runs, prior):
    options = DrawingOptions(seed=3, batch=2)
    drawing = tasks.sample(runs / "prior", 3, options=options)
    assert drawing.images.shape == (3, 3, 8, 8) and drawing.images.device.type == "cpu"
    assert drawing.canvas.done and drawing.canvas.tokens.shape == (3, 4, 4) and drawing.conditions == ()
    assert torch.equal(drawing.images, tasks.sample(prior, 3, options=options).images)
    assert not torch.equal(drawing.images, tasks.sample(prior, 3).images)
    assert tasks.sample(prior, 1, size=(4, 12)).images.shape == (1, 3, 4, 12)


def test_edit_takes_arrays_pil_images_tensors_and_paths(prior, pixels, tmp_path):
    mask = np.zeros((16, 12), bool)
    mask[6:10, 4:8] = True
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    tensor = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).float()
    photos = (pixels, Image.fromarray(pixels), tensor, tmp_path / "photo.png")
    masks = (mask, Image.fromarray(mask), torch.from_numpy(mask), str(tmp_path / "mask.png"))
    drawings = [tasks.edit(prior, *given) for given in zip(photos, masks, strict=True)]
    first = drawings[0].images
    assert first.shape == (1, 3, 16, 12)
    assert all(torch.equal(drawing.canvas.tokens, drawings[0].canvas.tokens) for drawing in drawings)
    assert all(torch.allclose(drawing.images, first, atol=1e-5) for drawing in drawings)
    assert torch.allclose(first[0, :, :4], tensor[:, :4]) and not torch.allclose(first[0, :, 6:10], tensor[:, 6:10])
    own = tasks.edit(prior, pixels, mask, own_pixels=False).images
    assert torch.allclose(own[..., 6:10, 4:8], first[..., 6:10, 4:8], atol=1e-5)
    assert not torch.allclose(own[0, :, :4], tensor[:, :4])
    with pytest.raises(UserError, match=r"mask: got 4x4 pixels, expected 16x12, the photo's size"):
        tasks.edit(prior, pixels, np.ones((4, 4), bool))


def test_outpaint_goes_on_with_its_canvas(prior, pixels):
    wider = tasks.outpaint(prior, pixels, right=4, count=2)
    assert wider.images.shape == (2, 3, 16, 16)
    assert torch.equal(wider.images[0, :, :, :8], wider.images[1, :, :, :8])
    higher = tasks.outpaint(prior, wider.canvas, top=2, options=DrawingOptions(seed=1))
    assert higher.images.shape == (2, 3, 18, 16)
    assert torch.equal(higher.canvas.tokens[:, 1:], wider.canvas.tokens)
    with pytest.raises(UserError, match="right: got 3 pixels, expected 0 or a multiple of 2"):
        tasks.outpaint(prior, pixels, right=3)


def test_a_label_map_is_a_condition_from_memory():
    model = load_model(golden.checkpoint("net2net_seg"))
    labels = tasks.kind_of(model).labels
    factor = tasks.first_stage_of(model).factor
    size = (2 * factor, 4 * factor)
    values = np.random.default_rng(0).integers(0, labels, size).astype(np.uint8)
    one_hot = (values[..., None] == np.arange(labels)).astype(np.float32)
    drawings = [tasks.sample(model, 1, condition=given) for given in (values, Image.fromarray(values), one_hot)]
    assert drawings[0].images.shape == (1, 3, *size)
    assert all(torch.equal(drawing.images, drawings[0].images) for drawing in drawings)
    assert drawings[0].conditions[0].shape == (1, 3, *size)
    photo = np.random.default_rng(1).integers(0, 255, (*size, 3)).astype(np.uint8)
    wide = np.pad(values, ((0, 0), (0, factor)), mode="edge")
    outpainted = tasks.outpaint(model, photo, right=factor, condition=wide)
    assert outpainted.images.shape == (1, 3, size[0], size[1] + factor)
    assert outpainted.canvas.cond.shape == outpainted.canvas.tokens.shape
    with pytest.raises(UserError, match="condition: got a condition of .* the size of the canvas"):
        tasks.outpaint(model, photo, right=factor, condition=values)
    completion = tasks.complete(model, [photo], 1, size=size, conditions=[values])
    assert completion.completed[0].shape == (1, 3, *size) and completion.conditions[0].shape == (3, *size)


def test_an_interrupted_drawing_is_resumed(prior, tmp_path):
    kept, seen = tmp_path / "kept.canvas", []
    expected = tasks.sample(prior, 1, size=(16, 16), options=DrawingOptions(seed=2))

    class Interrupting(progress.Bar):
        def moved(self, done: int, total: int) -> None:
            if done:
                raise KeyboardInterrupt

    options = DrawingOptions(seed=2, engine="naive")
    with pytest.raises(KeyboardInterrupt):
        tasks.sample(
            prior, 1, size=(16, 16), options=options, canvas=kept, bars=lambda unit, total: Interrupting(disable=True)
        )
    content = kept.read_bytes()
    assert not Canvas.load(kept).done and tasks.begun_with(kept).seed == 2
    with pytest.raises(UserError, match="a file that already contains a drawing"):
        tasks.sample(prior, 1, canvas=kept)
    for given, said in (
        ({"options": DrawingOptions(seed=9)}, "seed: got 9, expected 2"),
        ({"options": DrawingOptions(seed=2, top_k=3)}, "top_k: got 3, expected 16"),
        ({"count": 2}, "count: got 2, expected 1"),
    ):
        with pytest.raises(UserError, match=said):
            tasks.sample(prior, canvas=kept, resume=True, **given)
    assert kept.read_bytes() == content
    resumed = tasks.sample(prior, canvas=kept, resume=True, preview=seen.append)
    assert torch.equal(resumed.images, expected.images) and Canvas.load(kept).done
    with pytest.raises(UserError, match="canvas: got none"):
        tasks.sample(prior, resume=True)


def test_complete(prior, pixels):
    batch = torch.from_numpy(np.stack(tiny.photographs(2, 8)) / 127.5 - 1).permute(0, 3, 1, 2).float()
    completion = tasks.complete(prior, batch, 2)
    assert [image.shape for image in completion.completed] == [(2, 3, 8, 8)] * 2
    assert torch.equal(torch.stack(completion.images), batch) and completion.conditions is None
    assert not torch.equal(completion.completed[0][0], completion.completed[0][1])
    sized = tasks.complete(prior, [pixels, Image.fromarray(pixels)], 1, size=(8, 8))
    assert [image.shape for image in sized.completed] == [(1, 3, 8, 8)] * 2


def test_pictures_of_different_sizes_stay_whole(prior, pixels, caplog):
    """Each is completed as it would be alone, but for the number that keys its noise."""
    several = [pixels, pixels[:7, :11], pixels[1:8, :11], pixels[:2]]
    options = DrawingOptions(seed=1, greedy=True)
    found = tasks.complete(prior, several, 1, options=options)
    assert [tuple(image.shape) for image in found.images] == [(3, 16, 12), (3, 6, 10), (3, 6, 10), (3, 2, 12)]
    assert "cut to multiples of f = 2 pixels: a picture from 7x11 to 6x10 and 1 more" in caplog.text
    for picture, completed, image in zip(several, found.completed, found.images, strict=True):
        alone = tasks.complete(prior, [picture], 1, options=options)
        assert torch.allclose(alone.completed[0], completed, atol=1e-5) and torch.equal(alone.images[0], image)
    whole = found.completed[0][0]
    assert torch.allclose(whole[:, :6], found.images[0][:, :6]) and not torch.equal(
        whole[:, 9:], found.images[0][:, 9:]
    )
    plain = tasks.complete(prior, several[:1], 1, options=options, own_pixels=False).completed[0][0]
    assert not torch.allclose(plain[:, :6], found.images[0][:, :6])
    assert torch.allclose(plain[:, 8:], whole[:, 8:], atol=1e-5)
    again = tasks.reconstruct(prior, several)
    assert [image.shape for image in again.reconstructed] == [image.shape for image in found.images]
    with pytest.raises(UserError, match="picture: got 1x12 pixels, expected at least 2x2, one token"):
        tasks.reconstruct(prior, [pixels[:1]])


def test_pictures_beyond_the_memory_are_refused_before_they_are_read(prior, pixels, monkeypatch):
    monkeypatch.setattr("tamingfast.tasks.pictures.available_memory", lambda device: 1000)
    with pytest.raises(UserError, match="memory: got .* GiB for 1 pictures"):
        tasks.reconstruct(prior, [pixels])


def test_a_prior_of_one_size_completes_that_size_and_says_so(runs, pixels, tmp_path, caplog):
    settings = tiny.config(tiny.PRIOR, steps=1) | {"data": tiny.CROPS}
    settings |= {"prior": {"condition": "none", "ordering": "z_curve"}}
    run = training_prior.train(settings, runs / "vqgan", tmp_path / "run", device="cpu")
    found = tasks.complete(run, [pixels], 1)
    assert found.completed[0].shape == (1, 3, 8, 8)
    assert "scaled and cut to 8x8 pixels, the only size that this prior draws" in caplog.text


def test_reconstruct_and_its_figures(runs, pixels):
    found = tasks.reconstruct(runs / "vqgan", [pixels], size=(16, 12))
    assert found.reconstructed[0].shape == (3, 16, 12) and found.figures.keys() == {"l1", "psnr", "codes"}
    made = ((found.reconstructed[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / np.mean((made - pixels) ** 2)))


def test_likelihood(prior, pixels):
    found = tasks.likelihood(prior, pixels, size=(16, 12), strides=(2,))
    assert [cost.name for cost in found] == ["paper", "scene", "strided 2", "block 2"]
    assert all(cost.nats > 0 and cost.tokens_per_token >= 1 for cost in found)


def test_processes_share_the_photographs_of_a_likelihood(prior, monkeypatch):
    """Of two processes, here the first with what the second would send."""
    photographs, encoded, alone = tiny.photographs(5, 16), [], []

    def noted(model, x, progress, encode=costs.photo_tokens):
        encoded.append(len(x))
        return encode(model, x, progress)

    def all_items(work, items):
        alone.append([work(item) for item in items])
        return iter(alone[-1])

    monkeypatch.setattr(costs, "photo_tokens", noted)
    monkeypatch.setattr(costs, "in_turns", all_items)
    expected = tasks.likelihood(prior, photographs, strides=(2,), batch=2)
    assert encoded == [2, 2, 1]
    encoded.clear()
    sent = iter(alone)

    def every_second(work, items):
        others = next(sent)
        return iter([others[number] if number % 2 else work(item) for number, item in enumerate(items)])

    monkeypatch.setattr(costs, "in_turns", every_second)
    assert tasks.likelihood(prior, photographs, strides=(2,), batch=2) == expected
    assert encoded == [2, 1]


def test_encode(runs, tmp_path):
    out = tmp_path / "tokens.safetensors"
    assert tasks.encode(runs / "vqgan", None, out) == 16  # on what it was trained on
    given = tmp_path / "given.safetensors"
    assert tasks.encode(runs / "vqgan", tiny.Noise(5), given, batch=2) == 5
    assert TokenDataset(out).grid == TokenDataset(given).grid == (4, 4)
    assert tasks.inspect(given)["images"] == 5
    with pytest.raises(UserError, match="split: got 'test', expected train or validation"):
        tasks.encode(runs / "vqgan", None, out, split="test")


def test_evaluate(runs, monkeypatch):
    def refuse(*arguments):
        raise UserError("it is not here")

    monkeypatch.setattr("tamingfast.evaluation.run.load_features", refuse)
    found = evaluation.evaluate_model(runs / "prior", limit=4, samples=2)
    assert found["likelihood"]["images"] == found["reconstruction"]["images"] == 4
    assert found["missing"].keys() == {"distances of features", "LPIPS"}
    assert evaluation.evaluate_model(load_model(runs / "vqgan"), tiny.Noise(3))["reconstruction"]["images"] == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [({"temperature": 0}, "temperature"), ({"top_k": 0}, "top_k"), ({"seed": -1}, "seed"), ({"batch": 0}, "batch")],
)
def test_options_out_of_range(options, said):
    with pytest.raises(UserError, match=said):
        DrawingOptions(**options)


@pytest.mark.parametrize("size", [32, "32x64", (3, 8, 8), (8.0, 8), (8,)])
def test_a_size_is_two_integers(prior, size):
    with pytest.raises(UserError, match=r"size: got .*, expected \(height, width\) in pixels"):
        tasks.sample(prior, 1, size=size)


def test_sides_are_integers(prior, pixels):
    with pytest.raises(UserError, match="right: got '8' pixels, expected 0 or a multiple of 2"):
        tasks.outpaint(prior, pixels, right="8")


def test_drawn_images_stay_in_range(prior):
    assert float(tasks.sample(prior, 4).images.abs().max()) <= 1


def test_every_public_name_is_there():
    assert all(getattr(tasks, name) is not None for name in tasks.__all__)
