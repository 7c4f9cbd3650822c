"""The commands that the pages show, and a desk on which they can be run: small stand-ins for what they are given."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
from pathlib import Path

import archives
import conditioned
import family_files
import numpy as np
import tiny
from PIL import Image

from tamingfast import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Settings of every first stage and prior that is trained here, unless the command has its own.
SMALL = {
    "vqgan": {
        "model.params.embed_dim": "4", "model.params.n_embed": "16", "model.params.ddconfig.z_channels": "4",
        "model.params.ddconfig.ch": "32", "model.params.ddconfig.ch_mult": "[1,1,1,1]",
        "model.params.ddconfig.num_res_blocks": "1", "model.params.ddconfig.attn_resolutions": "[]",
        "model.params.ddconfig.resolution": "64", "data.size": "64",
    },
    "prior": {
        "model.params.transformer_config.params.n_layer": "1", "model.params.transformer_config.params.n_head": "2",
        "model.params.transformer_config.params.n_embd": "16",
    },
}  # fmt: skip
#: Of first stages that have a discriminator.
ADVERSARIAL = {
    "model.params.lossconfig.params.perceptual_weight": "0", "model.params.lossconfig.params.disc_ndf": "4",
    "model.params.lossconfig.params.disc_num_layers": "1",
}  # fmt: skip
BRIEF = {
    "training.steps": "1", "training.batch_size": "2", "training.validation_batches": "1", "training.workers": "0",
    "training.precision": "float32",
}  # fmt: skip
#: Settings of commands that are made smaller, as (pattern, value); numbers of images are 4 at most.
SCALED = [
    (r"(data\.|)size=(?:256|512)", r"\1size=64"), (r"(data\.|)short_side=\d+", r"\1short_side=96"),
    (r"training\.steps=\d{3,}", "training.steps=2"), (r"\d{3,}x\d{3,}", "64x128"),
]  # fmt: skip
COUNTS = ("-n", "--samples", "--limit")
MOST = 4


def code(page: Path, language: str) -> str:
    """All code blocks of a page in a language."""
    return "\n".join(re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S))


def lines(page: Path) -> list[str]:
    """The commands of a page's shell blocks, without the comments behind them."""
    joined = code(page, "bash").replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+# .*", "", line).strip() for line in joined) if line]


def commands(page: Path) -> list[str]:
    """Those that are ours; none with an ellipsis for what is left out."""
    return [line for line in lines(page) if line.startswith("tamingfast ") and "..." not in line]


def smaller(words: list[str]) -> list[str]:
    """The words of a command that does the same in little time."""
    for pattern, value in SCALED:
        words = [re.sub(f"^{pattern}$", value, word) for word in words]
    for place, (word, behind) in enumerate(itertools.pairwise(words)):
        if word in COUNTS:
            words[place + 1] = str(min(MOST, int(behind)))
    if words[0] != "train" or {"--help", "--resume"} & set(words):
        return words
    settings = BRIEF if "--from" in words else SMALL[words[1]] | BRIEF
    if words[1] == "vqgan" and words[2] != "segmentation_vqgan":
        settings = settings | ADVERSARIAL
    given = {word.partition("=")[0] for word in words}
    return [*words, *(f"{key}={value}" for key, value in settings.items() if key not in given)]


def execute(line: str) -> tuple[int, str]:
    """The exit status of a command, made `smaller`, in this process, and what it wrote; files go where it says."""
    line, _, target = line.partition(" > ")
    words = smaller([os.path.expanduser(word) for word in shlex.split(line)[1:]])
    if words[0] == "train" and "--resume" not in words and "--out" in words:
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)  # a stand-in, or that of another block
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        status = cli.main(words)
    if target:
        path = Path(target.strip()).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(printed.getvalue())
    return status, f"{' '.join(words)}\n{printed.getvalue()}{said.getvalue()}"


#: What pages take for granted.
GIVEN = (
    "tamingfast train vqgan folder_vqgan --out runs/vqgan data.path=~/pictures",
    "tamingfast train prior gpt2_small --first-stage runs/vqgan --out runs/prior",
    "tamingfast train prior gpt2_small --first-stage runs/vqgan --out runs/classes prior.condition=class",
    "tamingfast train prior gpt2_small --first-stage runs/vqgan --out runs/multiscale prior.scales=all",
    "tamingfast train vqgan folder_vqgan --out runs/image data.path=conditions/segmentation/images data.size=32",
    "tamingfast train vqgan segmentation_vqgan --out runs/labels data.path=conditions/segmentation data.labels=4 "
    "data.size=32",
    "tamingfast convert runs/classes last.ckpt",
    "tamingfast convert runs/vqgan vqgan_imagenet_f16_16384/ckpts/last.ckpt",
)


def lay_out(desk: Path, home: Path) -> None:
    """Write all that the pages name into ``desk``, the current directory, and ``home``, that of the user."""
    photographs = tiny.photographs(12, 96)
    for name in ("pictures", "held-out", "winter", "imagenet"):
        for number, pixels in enumerate(photographs):
            target = home / name / ("ship", "frog", "dog", "cat")[number % 4] / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
    for name in ("landscapes", "photographs"):
        (desk / name).symlink_to(home / "pictures")
    for name in ("photo.png", "photo.jpg", "other.jpg"):
        Image.fromarray(photographs[0][:64]).save(desk / name)
    mask = np.zeros((64, 96), np.uint8)
    mask[16:40, 40:80] = 255
    Image.fromarray(mask).save(desk / "mask.png")
    archives.shards(desk, 128, 1, size=64)
    conditioned.write_data(desk / "conditions")
    family_files.llamagen_file(desk)
    (desk / "models/first_stage_models/vq-f4").mkdir(parents=True)
    assert family_files.latent_diffusion(desk / "models/first_stage_models/vq-f4").path.name == "model.ckpt"
    (desk / "vqgan_imagenet_f16_16384/ckpts").mkdir(parents=True)
    for line in GIVEN:
        status, said = execute(line)
        assert status == 0, said
    (desk / "RUN").symlink_to(desk / "runs/prior")
