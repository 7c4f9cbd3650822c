"""Distances between sets of feature vectors."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D), N and M at least 2.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) with the unbiased covariances S (Heusel et al. 2017). With
    S_a = A^T A and S_b = B^T B the trace of the root is the sum of the singular values of A B^T, which also holds where
    fewer images than features make the covariances singular and the root of their product unstable.
    """
    a, b = _checked(a, b)
    factors = [_factor(x) for x in (a, b)]
    root = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    spread = sum(np.square(factor).sum() for factor in factors)
    # Rounding must not make a distance negative.
    return max(0.0, float(np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * root))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of features (N, D) and (M, D) under the kernel (x.y / D + 1)^3.

    The estimate of KID (Binkowski et al. 2018) over all pairs instead of random subsets. Its values may be below 0 for
    sets that are alike. N and M are at least 2.
    """
    a, b = _checked(a, b)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def among(x: np.ndarray) -> float:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(among(a) + among(b) - 2 * kernel(a, b).mean())


def _factor(x: np.ndarray) -> np.ndarray:
    """A (min(N, D), D) with A^T A = the covariance of x (N, D)."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.linalg.qr(centred, mode="r") if len(x) > x.shape[1] else centred


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features: got shapes {a.shape} and {b.shape}; expected (N, D) and (M, D), N and M at least 2"
        )
    return a, b
