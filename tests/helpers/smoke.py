"""The run of all experiments that tests share: ``tamingfast reproduce all --preset smoke``, made smaller still."""

from __future__ import annotations

#: Settings of each experiment; they must be given again to resume it.
SMALLER = {
    "pixels": ("timing.repeats=1", "timing.prefixes=3", "vqgan.training.steps=8"),
    "orderings": ("data.length=48",),
    "compression": (),
    "multiscale": ("data.length=48", "sampling.images=3"),
}
