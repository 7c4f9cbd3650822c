"""Sampling with rejection by a classifier, and samples in one archive for other programs."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from commands import run
from refusals import refused, unchanged

from tamingfast import UserError, images, load_model, tasks
from tamingfast.tasks import canvases, selection
from tamingfast.tasks.options import DrawingOptions
from tamingfast.training import prior, vqgan

OPTIONS = DrawingOptions(seed=3, batch=5)


@pytest.fixture(scope="module")
def run_of_classes(tmp_path_factory):
    """A prior of 3 classes on images of 8x8."""
    folder = tmp_path_factory.mktemp("classes")
    first = vqgan.train(tiny.config(tiny.VQGAN, steps=2), folder / "vqgan", device="cpu", datasets=tiny.datasets())
    config = tiny.config(tiny.PRIOR, steps=2)
    return prior.train(config, first, folder / "prior", device="cpu", datasets=tiny.datasets())


@pytest.fixture(scope="module")
def model(run_of_classes):
    return load_model(run_of_classes)


def brightness(x: torch.Tensor) -> torch.Tensor:
    """Logits (b, 8) that rise with the brightness of one channel for the later classes and fall for the others."""
    levels = x.mean((2, 3))[:, torch.arange(8) % 3]
    return 9 * levels * torch.linspace(-1, 1, 8)


def candidates(model, labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens, and the certainty of each one's class, drawn without the code under test."""
    cond = tasks.conditions(model, len(labels), labels)
    grids = torch.cat(list(tasks.draw(model, cond, 4, 4, **OPTIONS.deciding())))
    found = brightness(model.decode_grid(grids).clamp(-1, 1)).log_softmax(1)
    return grids, found[torch.arange(len(labels)), labels]


def test_the_most_certain_of_each_class_are_kept(model):
    drawn = tasks.sample(model, 6, label=[2, 1], options=OPTIONS, accept=0.25, classifier=brightness)
    grids, certain = candidates(model, [1] * 12 + [2] * 12)
    best = [sorted((first + certain[first : first + 12].topk(3).indices).tolist()) for first in (0, 12)]
    expected = torch.stack([grids[number] for pair in zip(best[1], best[0], strict=True) for number in pair])
    assert torch.equal(drawn.canvas.tokens, expected) and drawn.canvas.done
    assert drawn.accepted == 0.25 and drawn.recipe is None
    torch.testing.assert_close(drawn.images, model.decode_grid(expected).clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("rate", "drawn"), [(1, 2), (0.7, 3), (0.5, 4), (0.05, 40), (0.005, 400)])
def test_rates(rate, drawn, model):
    seen = []

    def watched(x):
        seen.append(len(x))
        return brightness(x)

    options = DrawingOptions(batch=200, top_k=5)
    found = tasks.sample(model, 2, label=1, options=options, accept=rate, classifier=watched)
    assert sum(seen) == drawn and found.accepted == pytest.approx(2 / drawn)


def test_the_batch_makes_no_difference(model):
    found = [
        tasks.sample(model, 4, options=DrawingOptions(batch=batch), accept=0.2, classifier=brightness).canvas.tokens
        for batch in (1, 7, 100)
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_of_equals_the_first_is_kept(model):
    found = tasks.sample(model, 3, label=2, options=OPTIONS, accept=0.3, classifier=lambda x: torch.zeros(len(x), 8))
    first = tasks.sample(model, 3, label=2, options=OPTIONS)
    assert torch.equal(found.canvas.tokens, first.canvas.tokens)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"accept": 0}, "accept: got 0, expected a rate above 0 and at most 1"),
        ({"accept": True}, "accept: got True, expected a rate"),
        (
            {"classifier": None},
            "classifier: got none for a prior of 3 classes, expected one of its classes; the packaged",
        ),
        (
            {"classifier": lambda x: x},
            r"classifier: got \(5, 3, 8, 8\) from it, expected logits of shape \(5, classes\)",
        ),
        ({"classifier": lambda x: torch.zeros(len(x), 2)}, "for classes up to"),
        ({"classifier": lambda x: None}, "classifier: got None from it"),
        ({"classifier": lambda x: torch.full((len(x), 8), torch.nan)}, "classifier: got logits that are not finite"),
        ({"resume": True}, "accept: got a rate together with resume"),
        ({"canvas": "a.canvas"}, "accept: got a rate together with canvas"),
    ],
)
def test_what_is_refused(changed, said, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"accept": 0.5, "classifier": brightness, "label": [0, 2]} | changed
    with unchanged(tmp_path), pytest.raises(UserError, match=said):
        tasks.sample(model, 4, options=OPTIONS, **given)


def test_a_prior_without_classes_is_refused(runs):
    with pytest.raises(UserError, match="accept: got a rate for a prior without classes"):
        tasks.sample(runs / "prior", 2, accept=0.5, classifier=brightness)


def test_the_packaged_classifier_knows_imagenet(monkeypatch, model):
    monkeypatch.setattr(selection, "classes_of", lambda model: 1000)
    try:
        classifier = selection.packaged(model)
    except UserError as error:
        pytest.skip(str(error))
    from skimage import data

    photo = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None] / 127.5 - 1
    assert int(classifier(photo).argmax()) in (281, 282, 285)


def test_the_command(run_of_classes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tamingfast.tasks.sampling.packaged", lambda model: brightness)
    words = ["sample", run_of_classes, "-n", 4, "--accept", 0.5, "--seed", 3]
    assert run(*words, "--npz", "a.npz") == 0
    assert "written: a.npz, kept 0.5 of the candidates" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    expected = tasks.sample(run_of_classes, 4, options=DrawingOptions(seed=3), accept=0.5, classifier=brightness)
    with np.load("a.npz") as found:
        assert (found["arr_0"] == images.to_uint8(expected.images)).all() and found["arr_0"].shape == (4, 8, 8, 3)
    with unchanged(tmp_path):
        refused(*words, "--canvas", "a.canvas", names="--accept: got a rate together with --canvas")


def test_an_archive_holds_what_is_drawn(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = []
    decode = canvases.decoded_batches

    def watched(*arguments):
        for batch in decode(*arguments):
            batches.append(len(batch))
            yield batch

    monkeypatch.setattr(canvases, "decoded_batches", watched)
    assert run("sample", runs / "prior", "-n", 7, "--batch", 3, "--npz", "a.npz") == 0
    assert batches == [3, 3, 1]
    drawn = tasks.sample(runs / "prior", 7, options=DrawingOptions(batch=3), npz=tmp_path / "b.npz")
    assert drawn.images.shape[0] == 0 and drawn.canvas.tokens.shape[0] == 7
    whole = images.to_uint8(tasks.sample(runs / "prior", 7, options=DrawingOptions(batch=3)).images)
    for name in ("a.npz", "b.npz"):
        with np.load(name) as found:
            assert found.files == ["arr_0"] and (found["arr_0"] == whole).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    with unchanged(tmp_path):
        refused("sample", runs / "prior", "--npz", "a.png", names="a.png: got the suffix")
        refused("sample", runs / "prior", "--npz", "a.npz", "--separate", names="--npz: got an archive and --separate")


def test_an_interrupted_archive_keeps_its_tokens(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decode = canvases.decoded_batches

    def stopped(*arguments):
        yield next(decode(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(canvases, "decoded_batches", stopped)
        assert run("sample", runs / "prior", "-n", 4, "--batch", 2, "--npz", "a.npz") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a.canvas"]
    assert run("sample", runs / "prior", "--resume", "--npz", "a.npz") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
