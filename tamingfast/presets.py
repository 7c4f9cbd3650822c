"""What the packaged presets are for, and what they cost: the table of ``tamingfast train --help`` and of the docs.

The settings themselves are in ``configs/*.yaml``. Tests compute the figures here from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: Operations per second at which `Preset.hours` are computed: two CPU cores in float32, and a GPU in bfloat16.
CPU_RATE, GPU_RATE = 1e11, 1e14


@dataclass(frozen=True)
class Preset:
    """One preset.

    Attributes:
        stage: "vqgan" or "prior", as in the command.
        data: what it is trained on.
        side: of its images in pixels; None for a prior, whose first stage decides.
        factor: pixels per token along one side; None for a prior.
        parameters: millions of them; for a first stage without the discriminator, for a prior with 1024 codes and 256
            image tokens.
        operations: floating-point operations of all steps in units of 1e15, forward and backward: of encoder and
            decoder, or of the transformer on 256 tokens. The losses' networks are not counted.
        purpose: what it is for.
    """

    stage: str
    data: str
    side: int | None
    factor: int | None
    parameters: float
    operations: float
    purpose: str

    def hours(self, rate: float) -> float:
        """Hours of all steps at ``rate`` operations per second."""
        return self.operations * 1e15 / rate / 3600


_FOLDER, _PAIRS, _STAGE = "a folder", "images/ + conditions/", "the first stage's"
PRESETS = {
    "photos32_vqgan": Preset(
        "vqgan", "packaged photographs", 32, 2, 0.737, 0.05867, "a first try without data of yours, on a CPU"
    ),
    "folder64_vqgan": Preset("vqgan", _FOLDER, 64, 4, 1.003, 0.03317, "your images, on a CPU"),
    "landscapes_vqgan": Preset("vqgan", _FOLDER, 64, 4, 1.003, 0.1866, "landscapes wider than the crops, on a CPU"),
    "folder_vqgan": Preset("vqgan", _FOLDER, 256, 16, 72.14, 1408.0, "your images, on a GPU: the original's model"),
    "modern_vqgan": Preset("vqgan", _FOLDER, 256, 16, 64.44, 1391.0, "your images, on a GPU: the recipe of today"),
    "photos256_vqgan": Preset(
        "vqgan", "packaged photographs", 256, 16, 72.14, 704.0, "that model without data of yours"
    ),
    "cifar10_vqgan": Preset("vqgan", "CIFAR10", 32, 2, 16.19, 115.2, "the paper's comparison with pixels"),
    "segmentation_vqgan": Preset("vqgan", _PAIRS, 256, 16, 72.48, 784.4, "label maps as a condition"),
    "depth_vqgan": Preset("vqgan", _PAIRS, 256, 16, 72.14, 1406.0, "depth maps as a condition"),
    "keypoints_vqgan": Preset("vqgan", _PAIRS, 256, 16, 72.14, 1408.0, "skeletons as a condition"),
    "edges_vqgan": Preset("vqgan", _FOLDER, 256, 16, 72.14, 1406.0, "edges of images as a condition"),
    "lowres_vqgan": Preset("vqgan", _FOLDER, 256, 16, 72.14, 1408.0, "small images as a condition"),
    "tiny": Preset("prior", _STAGE, None, None, 1.088, 0.01934, "a first try, on a CPU"),
    "landscapes_prior": Preset("prior", _STAGE, None, None, 5.329, 0.06605, "on landscapes_vqgan, on a CPU"),
    "gpt2_small": Preset("prior", _STAGE, None, None, 86.83, 162.4, "on a GPU"),
    "gpt2_medium": Preset("prior", _STAGE, None, None, 304.7, 570.2, "on a GPU: the papers' largest"),
    "boxes": Preset("prior", "images + JSON of objects", None, None, 304.7, 570.2, "scenes from bounding boxes"),
}

NOTE = (
    "Times are rough and computed: the operations of all steps, forward and backward, without those of losses,\n"
    f"at {CPU_RATE / 1e12:g} TFLOP/s (two CPU cores in float32) and {GPU_RATE / 1e12:g} TFLOP/s (a GPU in bfloat16, "
    "on which none was measured).\n"
    "A CPU with AMX needs 0.5 to 0.9 of it; LPIPS, a discriminator and a busy machine add to it. A run says after its\n"
    "first steps what it will take. On a GPU, small models are limited by other things than arithmetic (-)."
)


def rows(stages: Iterable[str] = ("vqgan", "prior")) -> list[tuple[str, ...]]:
    """The table as text, the heading first: of the presets of these stages."""
    found: list[tuple[str, ...]] = [("preset", "data", "pixels", "f", "parameters", "CPU, about", "GPU, about", "for")]
    for name, preset in PRESETS.items():
        if preset.stage in stages:
            found.append((
                name, preset.data, str(preset.side or "-"), str(preset.factor or "-"), f"{preset.parameters:.3g}M",
                duration(preset.hours(CPU_RATE)), _on_a_gpu(preset), preset.purpose,
            ))  # fmt: skip
    return found


def _on_a_gpu(preset: Preset) -> str:
    hours = preset.hours(GPU_RATE)
    return duration(hours) if hours > 1 / 60 else "-"


def duration(hours: float) -> str:
    """A time in two digits, in the unit that suits it."""
    for unit, size in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= 2 * size:
            return f"{_two_digits(hours / size)} {unit}"
    return f"{_two_digits(3600 * hours)} s"


def _two_digits(number: float) -> str:
    return f"{float(f'{number:.2g}'):g}"


def table(*stages: str) -> str:
    """`rows` in columns, with the note on the times: for a terminal."""
    shown = rows(stages) if stages else rows()
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join(["presets:", *(f"  {line}" for line in lines), "", NOTE])


def markdown() -> str:
    """`rows` as a Markdown table."""
    heading, *body = ("| " + " | ".join(row) + " |" for row in rows())
    return "\n".join([heading, "|" + "---|" * len(rows()[0]), *body])
