"""What is kept of the features of a set of images, however large it is: moments, a part of them, and class scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from tamingfast.data import shuffled

#: Features that are kept for the measures that compare points with points, as in guided-diffusion's evaluator.
KEPT = 10_000
#: Largest number of parts that the Inception score is averaged over (Salimans et al. 2016).
SPLITS = 10
#: Seed of torch-fidelity's order of images, by which they are divided into parts.
_SHUFFLE = 2020


@dataclass
class Moments:
    """Number, mean (D,) and centred second moment (D, D) of points, float64, gathered in batches.

    Batches are merged by their means (Chan et al. 1979), so that large means do not drown small variances.
    """

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scatter: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, points: np.ndarray) -> None:
        """Take in more points (n, D), n at least 1."""
        new = np.asarray(points, np.float64)
        if not self.count:
            self.mean, self.scatter = np.zeros(new.shape[1]), np.zeros(2 * new.shape[1:])
        mean, total = new.mean(0), self.count + len(new)
        # The distance between the means of the old points and the new is one more row of the product.
        apart = (mean - self.mean) * np.sqrt(self.count * len(new) / total)
        rows = torch.from_numpy(np.vstack([new - mean, apart]))
        torch.from_numpy(self.scatter).addmm_(rows.T, rows)
        self.mean = self.mean + (mean - self.mean) * (len(new) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (D, D) of at least 2 points."""
        return self.scatter / (self.count - 1)


@dataclass
class Scores:
    """Sums for the Inception score of each part of a set: images, sum of p log p, and sum of p (parts, classes)."""

    count: np.ndarray
    entropy: np.ndarray
    classes: np.ndarray

    @classmethod
    def none(cls, parts: int, classes: int) -> Scores:
        """The sums of no image."""
        return cls(np.zeros(parts), np.zeros(parts), np.zeros((parts, classes)))

    def add(self, logits: np.ndarray, parts: np.ndarray) -> None:
        """Take in logits (n, classes) of images that belong to ``parts`` (n,)."""
        wide = np.asarray(logits, np.float64)
        log = wide - wide.max(1, keepdims=True)
        log -= np.log(np.exp(log).sum(1, keepdims=True))
        np.add.at(self.count, parts, 1)
        np.add.at(self.entropy, parts, (np.exp(log) * log).sum(1))
        np.add.at(self.classes, parts, np.exp(log))

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts of exp(mean KL divergence of p from the part's mean p)."""
        mean = self.classes / self.count[:, None]
        marginal = (mean * np.log(np.maximum(mean, np.finfo(np.float64).tiny))).sum(1)
        each = np.exp(self.entropy / self.count - marginal)
        return float(each.mean()), float(each.std())


@dataclass(frozen=True, eq=False)
class Reference:
    """What is known of the images that others are compared with.

    Attributes:
        network: name of the network of the features.
        images: their number, None if it is not known.
        mean, covariance: of the features, float64 (D,) and (D, D); ``spatial``: both of the spatial features, or None.
        values: features (n, D) of some of the images, or None.
    """

    network: str
    images: int | None
    mean: np.ndarray
    covariance: np.ndarray
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    values: np.ndarray | None = None


class Features:
    """The features of a set of ``total`` images, taken in batch by batch in memory that does not grow with ``total``.

    Attributes:
        network: name of the network.
        total: number of images in the set.
        count: number of images taken in so far.
        pooled: moments of the features; spatial: of the spatial features, without points if the network has none.
        values: float32 (n, D), the features of up to 10,000 of the images, drawn from all of them, in their order.
        scores: sums for the Inception score, None if the network has no classes for it.
    """

    def __init__(self, network: str, total: int) -> None:
        self.network, self.total, self.count = network, total, 0
        self.pooled, self.spatial = Moments(), Moments()
        self.scores: Scores | None = None
        self._values: list[np.ndarray] = []
        self._kept = np.zeros(total, bool)
        self._kept[shuffled(total, 0)[:KEPT]] = True
        parts = min(SPLITS, total)
        # Image order[j] belongs to the part that holds place j; part i ends before place (i + 1) * total // parts.
        ends = np.arange(1, parts + 1) * total // parts
        self._part = np.empty(total, np.int64)
        self._part[np.random.RandomState(_SHUFFLE).permutation(total)] = np.searchsorted(
            ends, np.arange(total), "right"
        )
        self._parts = parts

    @property
    def values(self) -> np.ndarray:
        """The kept features."""
        self._values = [np.concatenate(self._values)]
        return self._values[0]

    @property
    def reference(self) -> Reference:
        """What other sets are compared with."""
        spatial = (self.spatial.mean, self.spatial.covariance) if self.spatial.count else None
        return Reference(self.network, self.count, self.pooled.mean, self.pooled.covariance, spatial, self.values)

    def add(self, values: np.ndarray, logits: np.ndarray | None = None, spatial: np.ndarray | None = None) -> None:
        """Take in the features (n, D) of the next images, their logits (n, classes) and spatial features (n, E).

        Raises ValueError for more images than ``total``.
        """
        place = slice(self.count, self.count + len(values))
        if place.stop > self.total:
            raise ValueError(f"values: got {place.stop} images, expected {self.total}")
        self.pooled.add(values)
        self._values.append(values[self._kept[place]].astype(np.float32))
        if spatial is not None:
            self.spatial.add(spatial)
        if logits is not None:
            self.scores = self.scores or Scores.none(self._parts, logits.shape[1])
            self.scores.add(logits, self._part[place])
        self.count = place.stop

    def state(self) -> dict[str, np.ndarray]:
        """All that `restore` needs to go on from here, as arrays by name."""
        found = {"count": np.array([self.count]), "values": self.values}
        for name, moments in (("pooled", self.pooled), ("spatial", self.spatial)):
            if moments.count:
                found |= {f"{name}.mean": moments.mean, f"{name}.scatter": moments.scatter}
        if self.scores is not None:
            names = ("count", "entropy", "classes")
            found |= {f"scores.{name}": getattr(self.scores, name) for name in names}
        return found

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state` gave for a set of the same size; ValueError for anything else."""
        shapes = {name: array.shape for name, array in state.items()}
        count = int(state["count"][0]) if shapes.get("count") == (1,) else 0
        width, wide = (shapes.get(f"{name}.mean", (0,))[0] for name in ("pooled", "spatial"))
        classes = shapes.get("scores.classes", (0,))[-1]
        wanted = {"count": (1,), "values": (int(self._kept[:count].sum()), width)}
        for name, length in (("pooled", width), ("spatial", wide)):
            wanted |= {f"{name}.mean": (length,), f"{name}.scatter": (length, length)} if length else {}
        if classes:
            parts = (self._parts,)
            wanted |= {"scores.count": parts, "scores.entropy": parts, "scores.classes": (self._parts, classes)}
        if not 1 <= count <= self.total or shapes != wanted:
            raise ValueError(f"state: got {count} images and {shapes}, expected at most {self.total} and {wanted}")
        if not all(np.isfinite(array).all() for array in state.values()):
            raise ValueError("state: got values that are not finite, expected numbers")
        self.count, self._values = count, [state["values"].astype(np.float32)]
        for moments, name in ((self.pooled, "pooled"), (self.spatial, "spatial")):
            if f"{name}.mean" in state:
                moments.count = count
                moments.mean, moments.scatter = (
                    np.array(state[f"{name}.{part}"], np.float64) for part in ("mean", "scatter")
                )
        if classes:
            self.scores = Scores(*(state[f"scores.{name}"] for name in ("count", "entropy", "classes")))
