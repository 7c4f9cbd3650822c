"""Distances between sets of images and their features: closed forms, other libraries, and the order of degradations."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from scipy import linalg
from sklearn.metrics.pairwise import polynomial_kernel

from tamingfast import UserError, evaluation
from tamingfast.evaluation import Features, frechet_distance, kernel_distance, precision_recall


def _normal(count: int, mean: float, spread: float, seed: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, spread, (count, width))


def _white(count: int, width: int, seed: int) -> np.ndarray:
    """Points whose mean is exactly 0 and whose covariance is exactly the identity."""
    points = _normal(count, 0, 1, seed, width)
    points -= points.mean(0)
    return points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T


@pytest.mark.parametrize(("n", "m"), [(200, 150), (5, 200), (4, 5)])
def test_frechet_is_its_definition(n, m):
    a, b = _normal(n, 0, 1, 0), _normal(m, 0.5, 2, 1)
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-5)


def test_frechet_of_known_gaussians():
    a, b = _white(50, 4, 0), 3 * _white(70, 4, 1) + np.array([1, 2, 0, 0])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 4 * (3 - 1) ** 2)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_its_definition():
    a, b = _normal(20, 0, 1, 0), _normal(30, 0.3, 1, 1)
    aa, bb, ab = (polynomial_kernel(x, y, degree=3) for x, y in ((a, a), (b, b), (a, b)))
    among = [k[~np.eye(len(k), dtype=bool)].mean() for k in (aa, bb)]
    assert kernel_distance(a, b) == pytest.approx(sum(among) - 2 * ab.mean())


def test_kernel_distance_is_unbiased_and_frechet_is_not():
    pairs = [(_normal(10, 0, 1, 2 * i), _normal(10, 0, 1, 2 * i + 1)) for i in range(300)]
    kernel = np.array([kernel_distance(*pair) for pair in pairs])
    assert abs(kernel.mean()) < 3 * kernel.std() / math.sqrt(len(pairs))
    assert np.mean([frechet_distance(*pair) for pair in pairs]) > 1


@pytest.mark.parametrize(("n", "m", "shift"), [(40, 60, 0.0), (60, 40, 1.5), (4, 5, 0.5)])
def test_precision_and_recall_are_their_definition(n, m, shift, monkeypatch):
    monkeypatch.setattr(sys.modules[frechet_distance.__module__], "_CHUNK", 7)
    drawn, real = _normal(n, shift, 1, 0, 3), _normal(m, 0, 1, 1, 3)

    def covered(points: np.ndarray, of: np.ndarray) -> float:
        reach = [sorted(np.linalg.norm(of - one, axis=1))[3] for one in of]
        return np.mean([any(np.linalg.norm(of - one, axis=1) <= reach) for one in points])

    assert precision_recall(drawn, real) == pytest.approx((covered(drawn, real), covered(real, drawn)))


def test_precision_and_recall_tell_apart_what_is_missed():
    real = np.concatenate([_normal(100, 0, 1, 0), _normal(100, 20, 1, 1)])
    assert precision_recall(real, real) == (1, 1)
    few, other = precision_recall(_normal(200, 0, 1, 2), real), precision_recall(_normal(200, -20, 1, 3), real)
    assert few[0] > 0.8 and few[1] < 0.55 and other == (0, 0)
    with pytest.raises(ValueError, match="expected more than 3 each"):
        precision_recall(real[:3], real)


def test_kernel_distance_does_not_depend_on_its_chunks(monkeypatch):
    a, b = _normal(50, 0, 1, 0), _normal(33, 0.2, 1, 1)
    whole = kernel_distance(a, b)
    monkeypatch.setattr(sys.modules[frechet_distance.__module__], "_CHUNK", 7)
    assert kernel_distance(a, b) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("shapes", [((1, 4), (5, 4)), ((5, 4), (5, 3)), ((5,), (5,))])
def test_sets_that_do_not_compare(shapes):
    with pytest.raises(ValueError, match="expected \\(N, D\\) and \\(M, D\\)"):
        frechet_distance(*map(np.zeros, shapes))


def test_names_of_networks_are_kept_apart():
    ours, other = (Features(name, 9) for name in (evaluation.EFFICIENTNET, "other"))
    for features in (ours, other):
        features.add(_normal(9, 0, 1, 0))
    found = evaluation.compare(ours, ours)
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-9) and "fid" not in found
    text = evaluation.distance_table({"samples": found})
    assert "Frechet distance, efficientnet-lite0 features" in text and "FID" not in text
    with pytest.raises(ValueError, match="got features of other, expected those of efficientnet-lite0"):
        evaluation.compare(ours, other)
    with pytest.raises(UserError, match=r"did you mean 'inception'\?"):
        evaluation.load_features("inceptoin")


@pytest.fixture(scope="module")
def efficientnet():
    try:
        return evaluation.load_features(evaluation.EFFICIENTNET)
    except UserError as error:
        pytest.skip(str(error))


def test_efficientnet_sees_a_cat(efficientnet):
    from skimage import data

    photo = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None]
    classes = efficientnet.net(photo).softmax(-1)
    assert int(classes.argmax()) in (281, 282, 285)  # ImageNet's tabby, tiger cat and Egyptian cat


def test_degraded_images_are_farther_in_order(efficientnet):
    x = torch.from_numpy(np.stack(tiny.photographs(48, 32))).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    real, others = (evaluation.extract(efficientnet, part.split(9)) for part in (x[:24], x[24:]))
    made = [x[24:] + 0.1 * noise, F.interpolate(F.avg_pool2d(x[24:], 4), scale_factor=4), noise]
    seen = [others, *(evaluation.extract(efficientnet, [changed]) for changed in made)]
    found = [evaluation.compare(part, real) for part in seen]
    for name in ("frechet_distance", "kernel_distance"):
        assert found[0][name] < found[1][name] < found[3][name] and found[0][name] < found[2][name] < found[3][name]
    assert evaluation.compare(real, real)["frechet_distance"] == pytest.approx(0, abs=1e-6)
