"""Trains both stages on a folder of pictures, then draws: the commands of the README as a program.

    python examples/train_on_a_folder.py ~/pictures --out runs/mine --minutes 30

Sub-folders are classes, if there are any. Run again with more minutes, it continues where it ended, whether that was
its end, Ctrl-C or a power failure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tamingfast import UserError, images, tasks
from tamingfast.checkpoints import run_directory
from tamingfast.training import load_config, prior, vqgan


def train(pictures: Path, out: Path, minutes: float, settings: list[str]) -> Path:
    """Half of the time for each stage; returns the prior's run."""
    first_stage, second_stage = out / "vqgan", out / "prior"
    # By time alone: a decay of the learning rate would need a number of steps.
    timed = ["training.steps=null", f"training.seconds={30 * minutes}"]
    described = load_config("folder64_vqgan", [*timed, "training.decay_steps=null", f"data.path={pictures}", *settings])
    vqgan.train(described, first_stage, resume=run_directory.exists(first_stage))
    kind = "class" if any(path.is_dir() for path in pictures.iterdir()) else "none"
    described = load_config("tiny", [*timed, f"prior.condition={kind}"])
    return prior.train(described, first_stage, second_stage, resume=run_directory.exists(second_stage))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="the folder; pictures of any size and format")
    parser.add_argument("--out", type=Path, required=True, help="where the runs and the drawings go")
    parser.add_argument("--minutes", type=float, default=30.0, help="for both trainings together")
    parser.add_argument("settings", nargs="*", help="of the first stage, key=value as in docs/training.md")
    options = parser.parse_intermixed_args()
    try:
        trained = train(options.pictures, options.out, options.minutes, options.settings)
        photos = tasks.image_files([options.pictures])[:8]
        again = tasks.reconstruct(trained, photos, size=(64, 64))
        drawing = tasks.sample(trained, 16, options=tasks.DrawingOptions(seed=1))
    except UserError as error:
        sys.exit(f"error: {error}")
    images.save_grid(options.out / "reconstructed.png", torch.stack(again.reconstructed))
    drawing.save(options.out / "drawn.png")
    print(f"{options.out / 'drawn.png'}: 16 drawings; mean error of reconstructions: {again.l1:.3f} of [-1, 1]")


if __name__ == "__main__":
    main()
