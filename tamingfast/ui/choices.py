"""The fields that people fill in, as arguments of tasks."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from tamingfast import tasks
from tamingfast.errors import UserError, brief
from tamingfast.tasks import DrawingOptions


@dataclass(frozen=True)
class Choices:
    """How tokens are drawn, as the page's fields hold it.

    Attributes:
        seed: as text, because a browser's numbers end at 2**53.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        cfg: 1 guides nothing.
        rising: whether the guidance rises from 1 to ``cfg``.
    """

    seed: str = "0"
    temperature: float = 1.0
    top_k: float = 100
    top_p: float = 1.0
    cfg: float = 1.0
    rising: bool = False
    schedule: str = "paper"
    stride: float = 8

    def options(self, base: DrawingOptions | None = None) -> DrawingOptions:
        """The task's options; what the page has no field for is taken from ``base``. Raises UserError as those do."""
        cfg = number("cfg", self.cfg)
        guided = None if cfg == 1 else f"{cfg:g}:cosine" if self.rising else cfg
        top_p = number("top_p", self.top_p)
        return replace(
            base or DrawingOptions(),
            seed=whole("seed", self.seed),
            temperature=number("temperature", self.temperature),
            top_k=whole("top_k", self.top_k) or None,
            top_p=None if top_p == 1 else top_p,
            cfg=guided,
            schedule=self.schedule,
            stride=whole("stride", self.stride),
        )

    @classmethod
    def of(cls, options: DrawingOptions) -> Choices:
        """The fields that give these options."""
        scale, _, rule = str(options.cfg if options.cfg is not None else 1).partition(":")
        return cls(
            str(options.seed), options.temperature, options.top_k or 0, 1.0 if options.top_p is None else options.top_p,
            float(scale), rule == "cosine", options.schedule, options.stride,
        )  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn in the tab Sample, as its fields hold it; no labels stand for all in turn."""

    count: float
    height: float
    width: float
    labels: list[str]
    photo: str | None
    scales: float


def labels_of_recipe(recipe: tasks.Recipe, names: tuple[str, ...]) -> list[str]:
    """The names of a recipe's classes; none where it cycles through all."""
    classes = recipe.classes or []
    if classes == list(range(len(names))):
        return []
    return [names[number] for number in classes if number < len(names)]


def whole(name: str, value: object) -> int:
    """The whole number in a field; UserError about ``name`` for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,20}\s*", value):
        return int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    raise UserError(f"{name}: got {brief(value)}, expected a whole number")


def number(name: str, value: object) -> float:
    """The number in a field; UserError about ``name`` where there is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise UserError(f"{name}: got {brief(value)}, expected a number")
