"""Distances between sets of images, in the features of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from tamingfast.evaluation.features import INCEPTION, Extractor, Features, extract

#: Neighbours that say how far a point's surroundings reach (Kynkaanniemi et al. 2019).
_NEIGHBOURS = 3
#: Points that are compared with all others at a time, so that memory does not grow with the square of their number.
_CHUNK = 1024
#: Largest number of parts that the Inception score is averaged over (Salimans et al. 2016).
_SPLITS = 10


def distances(
    network: Extractor, made: Mapping[str, Iterable[Tensor]], real: Iterable[Tensor]
) -> dict[str, dict[str, str | float]]:
    """`compare` each set of images in ``made`` with the ``real`` ones, all in batches (b, C, H, W) in [-1, 1]."""
    reference = extract(network, real)
    return {name: compare(extract(network, batches), reference) for name, batches in made.items()}


def compare(drawn: Features, real: Features) -> dict[str, str | float]:
    """Distances between two sets of images, with the ``network`` and the numbers of ``images`` and ``real_images``.

    In Inception's features they are ``fid``, ``kid`` and the Inception score of ``drawn``; in others
    ``frechet_distance`` and ``kernel_distance``. The Frechet distance is biased upwards for small sets, so only values
    for equal numbers of images can be compared; the kernel distance is unbiased. With more than 3 images in each set
    there are ``precision`` and ``recall`` as well. Raises ValueError for features of two different networks.
    """
    if drawn.network != real.network:
        raise ValueError(f"real: got features of {real.network}, expected those of {drawn.network} as in drawn")
    found: dict[str, str | float] = {
        "network": real.network, "images": len(drawn.values), "real_images": len(real.values)
    }  # fmt: skip
    frechet, kernel = (distance(drawn.values, real.values) for distance in (frechet_distance, kernel_distance))
    if min(len(drawn.values), len(real.values)) > _NEIGHBOURS:
        found["precision"], found["recall"] = precision_recall(drawn.values, real.values)
    if real.network != INCEPTION:
        return found | {"frechet_distance": frechet, "kernel_distance": kernel}
    from torch_fidelity.metric_isc import isc_features_to_metric  # optional package

    score = isc_features_to_metric(drawn.logits, splits=min(_SPLITS, len(drawn.values)))
    return found | {"fid": frechet, "kid": kernel} | score


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D), N and M at least 2.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) with the unbiased covariances S (Heusel et al. 2017). With
    S_a = A^T A and S_b = B^T B the trace of the root is the sum of the singular values of A B^T. This stays exact where
    there are fewer images than features, so that the covariances are singular and the root of their product unstable.
    """
    a, b = _checked(a, b)
    factors = [_factor(x) for x in (a, b)]
    root = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    spread = sum(np.square(factor).sum() for factor in factors)
    # Rounding must not make a distance negative.
    return max(0.0, float(np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * root))


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


def _factor(x: np.ndarray) -> np.ndarray:
    """A (min(N, D), D) with A^T A = the covariance of x (N, D)."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(x) > x.shape[1] else centred


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features: got shapes {a.shape} and {b.shape}, expected (N, D) and (M, D), N and M above 1")
    return a, b
