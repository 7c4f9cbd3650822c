"""Statistics and images in files: of others, of ours, and invalid ones; and a long evaluation that is interrupted."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import run
from refusals import refused, unchanged

from tamingfast import UserError, cli, evaluation, load_model
from tamingfast.evaluation import states, summary
from tamingfast.evaluation.features import Extractor
from tamingfast.files import locked
from tamingfast.training import prior, vqgan


class StandIn(Extractor):
    """Features, logits and spatial features that tell images apart, without weights of hundreds of megabytes."""

    name = evaluation.INCEPTION

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(12, 17, bias=False)
        draw = np.random.RandomState(0).standard_normal((17, 12))
        self.mix.weight.data.copy_(torch.from_numpy(draw))
        self.requires_grad_(False)

    def forward(self, pixels):
        small = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 64, 2).flatten(1)
        pooled, logits, spatial = self.mix(small).split([6, 7, 4], 1)
        return pooled, logits, spatial


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr("tamingfast.evaluation.run.load_features", lambda *arguments: StandIn())
    return StandIn()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    data = {"name": "photos", "size": 8, "length": 24}
    first = vqgan.train(tiny.config(tiny.VQGAN, steps=3) | {"data": data}, folder / "vqgan", device="cpu")
    config = tiny.config(tiny.PRIOR, steps=3) | {"data": data}
    return first, prior.train(config, first, folder / "prior", device="cpu")


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def features(network: Extractor, pixels: np.ndarray) -> evaluation.Features:
    return evaluation.extract(network, [torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1])


def test_a_file_of_guided_diffusion(stand_in, tmp_path):
    real, drawn = features(stand_in, pictures(40)), features(stand_in, pictures(30, 1))
    known = real.reference
    moments = {"mu": known.mean.astype(np.float32), "sigma": known.covariance}
    moments |= dict(zip(("mu_s", "sigma_s"), known.spatial, strict=True))
    np.savez(tmp_path / "moments.npz", **moments)
    np.savez_compressed(tmp_path / "both.npz", pictures(40)[:25], **moments)
    np.savez(tmp_path / "images.npz", pictures(40))
    expected = evaluation.compare(drawn, real)
    for name, missing in (("moments", {"kid", "precision", "recall"}), ("both", set()), ("images", set())):
        found = evaluation.compare(drawn, evaluation.read_reference(tmp_path / f"{name}.npz", stand_in, 7))
        assert found.keys() == expected.keys() - missing
        assert found["fid"] == pytest.approx(expected["fid"], rel=1e-4)
        assert found["sfid"] == pytest.approx(expected["sfid"], rel=1e-6)
        assert found["real_images"] == (40 if name == "images" else None)
    some = evaluation.compare(drawn, features(stand_in, pictures(40)[:25]))
    both = evaluation.compare(drawn, evaluation.read_reference(tmp_path / "both.npz", stand_in))
    assert both["kid"] == pytest.approx(some["kid"]) and both["recall"] == some["recall"] and both["fid"] != some["fid"]
    assert "| FID | sFID |" in evaluation.distance_table({"samples": both})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mu": np.zeros(5)}, r"got sigma of float64 and shape \(6, 6\), expected real numbers of shape \(5, 5\)"),
        ({"sigma": np.zeros((6, 6, 1))}, "got sigma of float64"),
        ({"sigma": np.triu(np.ones((6, 6)))}, "got a sigma that is not symmetric"),
        ({"mu": np.full(6, np.inf)}, "got values in mu that are not finite"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "got 0 numbers in mu"),
        ({"network": np.array("efficientnet-lite0")}, "got statistics in the features of efficientnet-lite0"),
        ({"arr_0": pictures(1)}, "got 1 images, expected at least 2"),
        ({"arr_0": pictures(4), "mu": np.zeros(3), "sigma": np.eye(3)}, "got moments of 3 features, expected 6"),
        ({"mu": None}, "got sigma, expected statistics of images"),
    ],
)
def test_files_that_are_refused(changed, said, stand_in, tmp_path):
    arrays = {"mu": np.zeros(6), "sigma": np.eye(6)} | changed
    np.savez(tmp_path / "a.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(UserError, match=said) as caught:
        evaluation.read_reference(tmp_path / "a.npz", stand_in)
    assert str(caught.value).startswith(str(tmp_path / "a.npz"))


def test_the_command_writes_and_reads_a_reference(runs, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", runs[1], "--samples", 12, "--limit", 10, "--batch", 5]
    assert run(*words, "--save-reference", "real.npz", "--out", "a.json") == 0
    assert run(*words, "--reference", "real.npz", "--out", "b.json") == 0
    assert "written: real.npz" in capsys.readouterr().out
    one, two = (json.loads(Path(name).read_text())["distances"] for name in ("a.json", "b.json"))
    for name in ("samples", "reconstructions", "training images"):
        assert two[name].pop("network") == one[name].pop("network") == "inception"
        assert two[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6)
        assert {"fid", "sfid", "kid", "inception_score_mean", "precision"} <= one[name].keys()
    with np.load("real.npz") as found:
        assert found["arr_0"].shape == (10, 8, 8, 3) and found["arr_0"].dtype == np.uint8
        seen = features(stand_in, found["arr_0"])
        np.testing.assert_allclose(found["mu"], seen.pooled.mean)
        np.testing.assert_allclose(found["sigma_s"], seen.spatial.covariance)
    np.savez("drawn.npz", pictures(9))
    assert run("evaluate", "drawn.npz", "--reference", "real.npz", "--out", "c.json") == 0
    found = json.loads(Path("c.json").read_text())
    expected = evaluation.compare(features(stand_in, pictures(9)), seen)
    assert found["distances"]["samples"].pop("network") == expected.pop("network")
    assert found["distances"]["samples"] == pytest.approx(expected, rel=1e-6)
    assert found["reference"] == "real.npz" and "| 9 | 10 |" in capsys.readouterr().out


def test_options_that_do_not_fit(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", pictures(3))
    np.savez("mu.npz", mu=np.zeros(6), sigma=np.eye(6))
    with unchanged(tmp_path):
        refused("evaluate", "a.npz", names="--reference: got none, expected the statistics")
        refused("evaluate", "a.npz", "--reference", "mu.npz", "--limit", 3, names="--limit: got 3, expected none")
        refused("evaluate", runs[0], "--reference", "none.npz", names="none.npz: got no such file")
        refused("evaluate", runs[0], "--save-reference", "real.png", names="real.png: got the suffix")
        refused(
            "evaluate", runs[0], "--reference", "a.npz", "--save-reference", "b.npz", names="--reference: got a file"
        )
        refused("evaluate", "a.npz", "--reference", "mu.npz", names="--inception-weights: got none, expected torch-")
        refused(
            "evaluate", runs[0], "--save-reference", "b.npz", "--features", "inception", names="--inception-weights"
        )


class Interrupted(Exception):
    pass


def judged(runs, state: Path | None, seed: int = 0, stop: int | None = None) -> dict:
    """The distances of 20 samples in batches of 4; `Interrupted` after ``stop`` batches."""
    model, data = load_model(runs[1]), tiny.datasets()[1]
    draw, drawn = summary.samples, []

    def watched(*arguments, **options):
        for batch in draw(*arguments, **options):
            if len(drawn) == stop:
                raise Interrupted
            drawn.append(len(batch))
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "samples", watched)
        found = evaluation.evaluate(
            model, data, network=StandIn(), count=20, batch_size=4, seed=seed, state=state, top_k=8
        )
    return found["distances"]["samples"] | {"drawn": sum(drawn)}


def test_an_interrupted_evaluation_goes_on(runs, tmp_path):
    state = tmp_path / "a.state"
    whole = judged(runs, None)
    with pytest.raises(Interrupted):
        judged(runs, state, stop=3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]
    resumed = judged(runs, state)
    assert (whole.pop("drawn"), resumed.pop("drawn")) == (20, 8)
    assert resumed == whole
    again = judged(runs, state)
    assert again.pop("drawn") == 0 and again == whole


def test_the_state_is_written_regularly(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(states, "EVERY", 0.0)
    saved = []
    save = states.State.save
    monkeypatch.setattr(states.State, "save", lambda self: (saved.append(self.found.count), save(self)))
    judged(runs, tmp_path / "a.state")
    assert saved == [4, 8, 12, 16, 20, 20]


def test_another_evaluation_or_a_damaged_state_is_refused(runs, tmp_path):
    state = tmp_path / "a.state"
    with pytest.raises(Interrupted):
        judged(runs, state, stop=2)
    whole = state.read_bytes()
    with pytest.raises(UserError, match="a.state: got samples with seed 0, expected 1, as in this evaluation"):
        judged(runs, state, seed=1)
    for damaged, said in (
        (whole[:-8], "a.state: got"),
        (whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:], "got bytes of checksum"),
        (b"nothing", "got a damaged file or none of ours"),
    ):
        state.write_bytes(damaged)
        with pytest.raises(UserError, match=said):
            judged(runs, state)
        assert state.read_bytes() == damaged
    state.write_bytes(whole)
    with locked(tmp_path / ".a.state.lock", "x", "y"), pytest.raises(UserError, match="another process is writing"):
        judged(runs, state)


def test_arrays_of_other_shapes_are_no_state():
    found = evaluation.Features("any", 9)
    found.add(np.ones((5, 3)), np.ones((5, 4)), np.ones((5, 2)))
    good = found.state()
    evaluation.Features("any", 9).restore(good)
    for name in good:
        for wrong in (None, good[name][..., None], np.full_like(good[name], np.nan, dtype=float)):
            state = {key: value for key, value in (good | {name: wrong}).items() if value is not None}
            if name == "count" and wrong is not None and wrong.shape == (1,):
                state["count"] = np.array([10])
            with pytest.raises(ValueError, match="state: got"):
                evaluation.Features("any", 9).restore(state)


def test_a_disk_without_room(runs, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("real.npz").write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for option, name in (("--save-reference", "real.npz"), ("--state", "a.state")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
        try:
            with unchanged(tmp_path):
                words = ("evaluate", runs[1], "--samples", 6, "--limit", 4, option, name)
                assert "File too large" in refused(*words, names=name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_the_command_keeps_a_state(runs, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", str(runs[1]), "--samples", "6", "--limit", "4", "--state", "a.state", "--out", "r.json"]
    assert cli.main(words) == 0
    first = Path("r.json").read_text()
    assert cli.main(words) == 0 and Path("r.json").read_text() == first
    assert "got samples with count 6, expected 7" in refused(*words[:3], "7", *words[4:])
