"""Makes the model that comes with the package: weights in bfloat16, their figures, and a card that says what they are.

``python docs/make_demo.py RUN FIRST_STAGE IMAGES [COUNT]`` takes the runs of a class-conditional prior and of the first
stage that it was trained on, both on CIFAR10, and the directory of the test images, in folders named after the classes.
COUNT images are measured, and as many samples are drawn; 10,000 by default. The old model is replaced as a whole.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tamingfast import evaluation, load_model, report, tasks
from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import load_yaml, plain
from tamingfast.checkpoints.locate import PACKAGED
from tamingfast.checkpoints.model_card import CARD, model_card
from tamingfast.checkpoints.pretrained import save_pretrained
from tamingfast.files import write_json, write_text
from tamingfast.tasks import DrawingOptions
from tamingfast.tasks.drawing import PAPER

NAME, FIGURES = "demo", "figures.json"
#: How samples of a prior with a null class are drawn for the figures.
GUIDED = DrawingOptions(cfg=3.0, top_k=None)
#: Bytes that the model may take in an installation.
LARGEST = 16_000_000
DATA = """\
The 50,000 training images of CIFAR10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009),
32x32 pixels in ten classes, in a copy that was re-encoded as JPEG of quality 75. Figures are of the test images of that
copy, so they compare models on this copy, and not with figures published for CIFAR10."""
LIMITS = """\
The model is there to try the package with, and for its tests and benchmarks: small, and trained for hours on two CPU
cores (the first stage) and for minutes on one GPU (the prior), where published models take days on many. It knows ten
classes in 32x32 pixels. Samples are drawn with guidance of 3 from all codes, which the model's config recommends and
the figures above are measured with: they show objects of their classes, seldom in detail. With the paper's top-k of 100
(`--cfg 1 --top-k 100`) they are flat. Larger images, by the sliding window, are rows of such objects.
The images and their classes were collected from the web by others; whatever bias they have, the model has. Distances
are measured in the features of the network that is named, and are no FID unless that is Inception."""
LICENCE = """\
The weights are under the MIT licence of this package. CIFAR10's authors state no licence of the images; none of them is
part of the package."""


def make(run: Path, first_stage: Path, images: Path, count: int = 10_000, out: Path = PACKAGED / NAME) -> Path:
    """Write the model into the folder ``out``, which is replaced when everything is measured; returns ``out``."""
    model = load_model(run, device="cpu")
    model.config["data"] = {"name": "folder", "size": tasks.image_size(model)[0]}
    with tempfile.TemporaryDirectory() as folder:
        made = save_pretrained(model, Path(folder, NAME), dtype="bfloat16")
        (made / CARD).unlink()
        packaged = load_model(made, device="cpu")
        options = GUIDED if packaged.null is not None else PAPER
        figures = evaluation.evaluate_model(packaged, images, limit=count, samples=count, options=options)
        measured = figures.get("reconstruction", {}).get("images", count)
        figures |= {"model": NAME, "data": f"{measured:,} test images of CIFAR10, JPEG of quality 75"}
        del figures["machine"]["platform"]
        write_json(made / FIGURES, figures)
        write_text(made / CARD, card(packaged, figures, first_stage, run))
        size = sum(path.stat().st_size for path in made.iterdir())
        if size > LARGEST:
            raise SystemExit(f"{run}: got a model of {size:,} bytes in bfloat16, expected at most {LARGEST:,}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    return out


def card(model: Any, figures: Mapping[str, Any], first_stage: Path, run: Path) -> str:
    """The card of a model of the package, with how it came about."""
    recipe = "\n\n".join([trained("First stage", first_stage), trained("Prior", run)])
    parts = {"Data": DATA, "Recipe": recipe, "Limits": LIMITS, "Licence": LICENCE}
    text = model_card(model, model.config, NAME, figures).replace(f"path/to/{NAME}", NAME)
    text = text.replace("---\n", "---\nlicense: mit\n", 1)
    return text + "".join(f"\n## {heading}\n\n{part}\n" for heading, part in parts.items())


def trained(what: str, run: Path) -> str:
    """How a run was trained: its steps and hours, and the settings that are not the defaults."""
    config, progress = plain(load_yaml(run / run_directory.CONFIG)), run_directory.progress(run)
    settings = {key: value for key, value in config["training"].items() if value not in (None, False)}
    shown = {"model": config["model"], "training": settings}
    return (
        f"{what}: {report.counted(progress['step'], 'step')} in {report.duration(progress['seconds'])}.\n\n"
        f"```yaml\n{yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=110)}```"
    )


if __name__ == "__main__":
    sources, amount = [Path(word) for word in sys.argv[1:4]], sys.argv[4:5]
    print(make(*sources, *map(int, amount)))
