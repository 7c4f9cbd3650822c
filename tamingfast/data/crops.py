"""Squares cut from another dataset's images, each as large as what a window of tokens sees (paper section 4.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tamingfast.data.base import ArrayDataset, as_epoch_dataset
from tamingfast.data.checks import positive
from tamingfast.data.randomness import random_bits, random_integers
from tamingfast.errors import UserError


def cut(datasets: tuple[Dataset, Dataset], side: int, seed: int = 0) -> tuple[Crops, Crops]:
    """(train, validation): squares of ``side`` pixels from (train, validation) images.

    Each training image gives one random square, a function of (seed, epoch, index). Each validation image gives every
    square of its tiling; the squares of all images are shuffled, so that the first ones represent the whole set. Raises
    UserError when the first image is smaller than a square.
    """
    return Crops(datasets[0], side, seed), Crops(datasets[1], side, tiles=True)


class Crops(ArrayDataset):
    """Squares of ``side`` pixels of a dataset's ``image`` (H, W, 3); the rest of an item stays as it is.

    With ``tiles``, the items are the squares of every image's tiling, in one fixed random order; otherwise item k is a
    random square of image k.
    """

    def __init__(self, images: Dataset, side: int, seed: int = 0, tiles: bool = False) -> None:
        self.images, self.side, self.seed = as_epoch_dataset(images), positive("crop", side), seed
        height, width = self.images[0]["image"].shape[:2]
        if side > min(height, width):
            raise UserError(
                f"crop: got {side}, expected at most the images' shorter side of {min(height, width)} pixels"
            )
        self._order: np.ndarray | None = None
        if tiles:
            self._columns = width // side
            squares = np.arange(len(self.images) * (height // side) * self._columns)
            self._order = np.argsort(random_bits(0, 0, squares), kind="stable")
        self.classes, self.decodes = self.images.classes, self.images.decodes

    @property
    def description(self) -> str:
        """One phrase about the images, for reports and token files."""
        return f"{self.side}x{self.side} cuts of {self.images.description}"

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next items belong to."""
        super().set_epoch(epoch)
        self.images.set_epoch(epoch)

    def warn_broken(self) -> None:
        """Log the image files found unreadable since the last call."""
        self.images.warn_broken()

    def __len__(self) -> int:
        return len(self.images) if self._order is None else len(self._order)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        places, indices = divmod(indices if self._order is None else self._order[indices], len(self.images))
        found = self.images.batch(indices)
        height, width = found["image"].shape[1:3]
        if self._order is None:
            tops, lefts = (
                random_integers(random_bits(self.seed, self.epoch, indices, draw), side - self.side + 1)
                for draw, side in ((0, height), (1, width))
            )
        else:
            tops, lefts = (place * self.side for place in divmod(places, self._columns))
        squares = [
            image[top : top + self.side, left : left + self.side]
            for image, top, left in zip(found["image"], tops.tolist(), lefts.tolist(), strict=True)
        ]
        return found | {"image": torch.stack(squares)}
