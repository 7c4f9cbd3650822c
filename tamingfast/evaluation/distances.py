"""Distances between sets of images, in the features of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
from torch import Tensor

from tamingfast.evaluation.features import INCEPTION, Extractor, extract
from tamingfast.evaluation.statistics import Features, Reference

#: Neighbours that say how far a point's surroundings reach (Kynkaanniemi et al. 2019).
_NEIGHBOURS = 3
#: Points that are compared with all others at a time, so that memory does not grow with the square of their number.
_CHUNK = 1024

#: The measures of a set of images; None for what is not known.
Measures: TypeAlias = dict[str, str | float | None]


def distances(network: Extractor, made: Mapping[str, Iterable[Tensor]], real: Iterable[Tensor]) -> dict[str, Measures]:
    """`compare` each set of images in ``made`` with the ``real`` ones, all in batches (b, C, H, W) in [-1, 1]."""
    reference = extract(network, real)
    return {name: compare(extract(network, batches), reference) for name, batches in made.items()}


def compare(drawn: Features, real: Features | Reference) -> Measures:
    """Distances between two sets of images, with the ``network`` and the numbers of ``images`` and ``real_images``.

    In Inception's features they are ``fid``, ``sfid``, ``kid`` and the Inception score of ``drawn``; in others
    ``frechet_distance`` and ``kernel_distance``. The Frechet distance is biased upwards for small sets, so only values
    for equal numbers of images can be compared; the kernel distance is unbiased. With more than 3 images in each set
    there are ``precision`` and ``recall`` as well. Kernel distance, precision and recall take up to 10,000 images of a
    set, and are left out where ``real`` holds moments alone. Raises ValueError for features of two different networks.
    """
    known = real.reference if isinstance(real, Features) else real
    if drawn.network != known.network:
        raise ValueError(f"real: got features of {known.network}, expected those of {drawn.network} as in drawn")
    inception, own = known.network == INCEPTION, drawn.reference
    found: Measures = {"network": known.network, "images": drawn.count, "real_images": known.images}
    distance = moment_distance(own.mean, own.covariance, known.mean, known.covariance)
    found["fid" if inception else "frechet_distance"] = distance
    if own.spatial is not None and known.spatial is not None:
        found["sfid"] = moment_distance(*own.spatial, *known.spatial)
    if known.values is not None:
        found["kid" if inception else "kernel_distance"] = kernel_distance(drawn.values, known.values)
        if min(len(drawn.values), len(known.values)) > _NEIGHBOURS:
            found["precision"], found["recall"] = precision_recall(drawn.values, known.values)
    if drawn.scores is not None:
        found["inception_score_mean"], found["inception_score_std"] = drawn.scores.score()
    return found


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D), N and M at least 2."""
    a, b = _checked(a, b)
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False).reshape(2 * x.shape[1:])) for x in (a, b))
    return moment_distance(mean_a, cov_a, mean_b, cov_b)


def moment_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Frechet distance of two Gaussians from their means (D,) and covariances (D, D).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017). The trace of the root is the sum of the
    singular values of A B^T for S_a = A^T A and S_b = B^T B. This stays exact for singular covariances, where the root
    of their product is unstable.
    """
    root = np.linalg.svd(_root(cov_a) @ _root(cov_b).T, compute_uv=False).sum()
    apart = np.square(mean_a - mean_b).sum()
    # Rounding must not make a distance negative.
    return max(0.0, float(apart + np.trace(cov_a) + np.trace(cov_b) - 2 * root))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of features (N, D) and (M, D) under the kernel (x.y / D + 1)^3.

    The estimate of KID (Binkowski et al. 2018) over all pairs instead of random subsets. It may be negative for similar
    sets. N and M are at least 2.
    """
    a, b = _checked(a, b)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def total(x: np.ndarray, y: np.ndarray) -> float:
        return sum(float(kernel(part, y).sum()) for part in _chunks(x))

    def within(x: np.ndarray) -> float:
        own = (np.square(x).sum(1) / x.shape[1] + 1) ** 3
        return (total(x, x) - float(own.sum())) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))


def precision_recall(drawn: np.ndarray, real: np.ndarray, neighbours: int = _NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall of features ``drawn`` (N, D) against ``real`` (M, D), both in [0, 1].

    Precision is the share of drawn points within the surroundings of a real point, recall that of real points within
    the surroundings of a drawn one; a point's surroundings reach as far as its ``neighbours``-th nearest neighbour in
    its own set (Kynkaanniemi et al. 2019, eq. 1 and 2). Raises ValueError unless N and M are above ``neighbours``.
    """
    drawn, real = _checked(drawn, real)
    if min(len(drawn), len(real)) <= neighbours:
        raise ValueError(f"features: got {len(drawn)} and {len(real)} points, expected more than {neighbours} each")
    return _covered(drawn, real, neighbours), _covered(real, drawn, neighbours)


def _covered(points: np.ndarray, of: np.ndarray, neighbours: int) -> float:
    """The share of ``points`` within the surroundings of a point in ``of``."""
    # The nearest point of its own set is the point itself.
    reach = np.concatenate([np.partition(_squares(part, of), neighbours, 1)[:, neighbours] for part in _chunks(of)])
    inside = [(_squares(part, of) <= reach).any(1) for part in _chunks(points)]
    return float(np.concatenate(inside).mean())


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances (N, M) of points (N, D) and (M, D)."""
    return np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T


def _chunks(x: np.ndarray) -> list[np.ndarray]:
    return [x[first : first + _CHUNK] for first in range(0, len(x), _CHUNK)]


def _root(covariance: np.ndarray) -> np.ndarray:
    """A (r, D) of the covariance's rank r with A^T A = the covariance (D, D)."""
    values, vectors = np.linalg.eigh(covariance)
    # What rounding leaves of eigenvalues that are 0 would add its square root, which is not small.
    real = values > np.finfo(np.float64).eps * len(values) * max(values[-1], 0.0)
    return np.asarray(np.sqrt(values[real])[:, None] * vectors[:, real].T)


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features: got shapes {a.shape} and {b.shape}, expected (N, D) and (M, D), N and M above 1")
    return a, b
