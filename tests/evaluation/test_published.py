"""Inception's network and the measures in its features: the same as torch-fidelity 0.4.0 gave for the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from tamingfast import UserError, evaluation
from tamingfast.evaluation import Features, statistics
from tamingfast.evaluation.distances import moment_distance
from tamingfast.evaluation.inception import FILE, Inception, resized
from tamingfast.evaluation.statistics import Moments

#: Of the features below: `fid_statistics_to_metric`, `kid_features_to_metric` with one subset of 150,
#: `isc_features_to_metric` of three times the first, and `prc_features_to_metric` with 3 neighbours.
FID, KID = 0.9753082486706504, 0.32069939660386515
SCORE = (3.175237654679732, 0.34948533125618264)
PRECISION, RECALL = 0.8522167205810547, 0.846666693687439


def features(seed: int, count: int, mean: float) -> np.ndarray:
    return np.random.RandomState(seed).normal(mean, 1, (count, 8))


def test_the_recorded_distances():
    drawn, real = features(0, 203, 0.0), features(1, 150, 0.25)
    assert evaluation.frechet_distance(drawn, real) == pytest.approx(FID, rel=1e-9)
    assert evaluation.kernel_distance(drawn[:150], real) == pytest.approx(KID, rel=1e-9)
    assert evaluation.precision_recall(drawn, real) == pytest.approx((PRECISION, RECALL), rel=1e-6)


@pytest.mark.parametrize("batch", [203, 1, 37])
def test_batches_make_no_difference(batch):
    drawn, real = Features(evaluation.INCEPTION, 203), Features(evaluation.INCEPTION, 150)
    for found, values in ((drawn, features(0, 203, 0.0)), (real, features(1, 150, 0.25))):
        for part in np.array_split(values, range(batch, len(values), batch)):
            found.add(part, 3 * part, 2 * part + 100)
    found = evaluation.compare(drawn, real)
    assert found["fid"] == pytest.approx(FID, rel=1e-9)
    assert found["sfid"] == pytest.approx(4 * FID, rel=1e-9)
    assert (found["inception_score_mean"], found["inception_score_std"]) == pytest.approx(SCORE, rel=1e-9)
    assert (found["precision"], found["recall"]) == pytest.approx((PRECISION, RECALL), rel=1e-6)
    assert (found["images"], found["real_images"]) == (203, 150)


def test_moments_are_numpys_where_the_mean_is_large():
    values = features(0, 500, 1e6)
    found = Moments()
    for part in np.array_split(values, 9):
        found.add(part)
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(values, rowvar=False), rtol=1e-6, atol=1e-6)


def test_the_distance_of_moments_is_scipys():
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.mean(0), np.cov(x, rowvar=False)) for x in (features(0, 99, 0), features(1, 99, 1))
    )
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    found = moment_distance(mean_a, cov_a, mean_b, cov_b)
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_part_of_the_features_is_kept_from_all_of_the_set(monkeypatch):
    monkeypatch.setattr(statistics, "KEPT", 50)
    kept = []
    for batch in (7, 1000):
        found = Features("any", 1000)
        for part in np.array_split(np.arange(1000.0)[:, None], range(batch, 1000, batch)):
            found.add(part)
        kept.append(found.values[:, 0])
    assert len(kept[0]) == 50 and (kept[0] == kept[1]).all() and found.pooled.count == 1000
    assert 5 < (kept[0] < 500).sum() < 45 and len(set(kept[0] % 10)) > 5  # neither a beginning nor a period
    with pytest.raises(ValueError, match="got 1001 images, expected 1000"):
        found.add(np.zeros((1, 1)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """Weights that anyone can make again, as there are none of the real ones here."""
    network, draw = Inception(), np.random.RandomState(0)
    state = network.state_dict()
    for name, value in sorted(state.items()):
        if name.endswith("num_batches_tracked"):
            del state[name]
            continue
        if name.endswith("var"):
            made = draw.uniform(0.5, 1.5, value.shape)
        elif value.ndim > 1:
            made = draw.standard_normal(value.shape) * np.sqrt(2 / value[0].numel())
        else:
            made = draw.standard_normal(value.shape) * 0.1 + name.endswith("bn.weight")
        value.copy_(torch.from_numpy(made))
    path = tmp_path_factory.mktemp("inception") / FILE
    torch.save(state, path)
    return str(path)


def test_the_recorded_features(weights):
    network = evaluation.load_features(evaluation.INCEPTION, weights)
    pixels = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 32, 40)).astype(np.uint8))
    pooled, logits, spatial = network(pixels)
    first = [
        [0.05938979238, 0.03960363939, 0.43980684876, 2.21199512482],
        [0.07792198658, 0.04074685648, 0.57891225815, 2.35202646255],
    ]
    torch.testing.assert_close(pooled[:, :4], torch.tensor(first), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled.mean(1), torch.tensor([1.7775872946, 1.8086609840]), rtol=1e-5, atol=0)
    classes = [[10.1973304749, 4.7562303543, -1.4776823521], [10.3089694977, 4.6760835648, -1.4764330387]]
    torch.testing.assert_close(logits[:, :3], torch.tensor(classes), rtol=1e-4, atol=1e-4)
    assert spatial.shape == (2, 2023) and logits.shape == (2, 1008) and pooled.shape == (2, 2048)
    place = [
        [0.0, 2.2810957432, 0.0, 3.7804923058, 1.7372397184, 5.5910549164, 5.6444821358],
        [0.0, 2.1083085537, 0.0, 2.9805550575, 1.5846449137, 5.4826459885, 5.0897130966],
    ]
    torch.testing.assert_close(spatial.view(2, 17, 17, 7)[:, 5, 5], torch.tensor(place), rtol=1e-4, atol=1e-4)


def test_images_are_scaled_as_tensorflow_1_did():
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resized(x, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert torch.equal(resized(x, 4), x)


def test_weights_come_from_a_file(weights, tmp_path):
    with pytest.raises(UserError, match=f"inception_weights: got none, expected torch-fidelity's {FILE}; download"):
        evaluation.load_features(evaluation.INCEPTION)
    with pytest.raises(UserError, match="got no file .*absent.pth, expected"):
        evaluation.load_features(evaluation.INCEPTION, tmp_path / "absent.pth")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: got shape"):
        evaluation.load_features(evaluation.INCEPTION, tmp_path / "other.pth")
