"""Squares cut from another dataset's images: what a window of tokens sees of them (the first source, section 4.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from tamingfast.data.base import ArrayDataset, positive, random_bits, random_integers
from tamingfast.errors import UserError


def cut(datasets: tuple[Dataset, Dataset], side: int, seed: int = 0) -> tuple[Crops, Crops]:
    """(train, validation) of squares of ``side`` pixels from (train, validation) images.

    A training image gives one square at random, by (seed, epoch, index); a validation image gives all that fit side by
    side, in an order in which the first few stand for all. Raises UserError when an image is smaller.
    """
    return Crops(datasets[0], side, seed), Crops(datasets[1], side, tiles=True)


class Crops(ArrayDataset):
    """Squares of ``side`` pixels of a dataset's ``image`` (H, W, 3); everything else of an item stays as it is.

    With ``tiles`` the items are all squares that fit side by side, shuffled once and for all; else item k is a square
    at random of image k.
    """

    def __init__(self, images: Dataset, side: int, seed: int = 0, tiles: bool = False) -> None:
        self.images, self.side, self.seed = images, positive("crop", side), seed
        height, width = images[0]["image"].shape[:2]
        if side > min(height, width):
            raise UserError(f"crop is {side}, but the images are {height}x{width} pixels: choose a smaller one")
        self._order: np.ndarray | None = None
        if tiles:
            self._columns = width // side
            squares = np.arange(len(images) * (height // side) * self._columns)
            self._order = np.argsort(random_bits(0, 0, squares), kind="stable")
        self.classes = getattr(images, "classes", None)

    @property
    def description(self) -> str:
        """What the images are, for reports and token files."""
        whole = getattr(self.images, "description", type(self.images).__name__)
        return f"{self.side}x{self.side} cuts of {whole}"

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that later items belong to."""
        super().set_epoch(epoch)
        if hasattr(self.images, "set_epoch"):
            self.images.set_epoch(epoch)

    def warn_broken(self) -> None:
        """Pass on what the images' dataset has to say of its files."""
        getattr(self.images, "warn_broken", lambda: None)()

    def __len__(self) -> int:
        return len(self.images) if self._order is None else len(self._order)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        places, indices = divmod(indices if self._order is None else self._order[indices], len(self.images))
        found = self._whole(indices)
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

    def _whole(self, indices: np.ndarray) -> dict[str, Any]:
        if hasattr(self.images, "batch"):
            return self.images.batch(indices)
        return default_collate([self.images[int(index)] for index in indices])
