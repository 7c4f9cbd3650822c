"""Photographs with conditions of every kind, small recipes to train on them, and the paths of their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny
from commands import pixels_of
from PIL import Image

SIZE, HEIGHT, WIDTH, FACTOR, LABELS = 32, 40, 48, 8, 4
ROWS_COLUMNS = (HEIGHT // FACTOR, WIDTH // FACTOR)
SMALL = [
    "model.params.embed_dim=8",
    "model.params.n_embed=32",
    "model.params.ddconfig.ch=32",
    "model.params.ddconfig.ch_mult=[1,1,1,1]",
    "model.params.ddconfig.num_res_blocks=1",
    "model.params.ddconfig.attn_resolutions=[]",
    "model.params.ddconfig.z_channels=8",
    "model.params.ddconfig.resolution=32",
    f"data.size={SIZE}",
    "training.batch_size=4",
    "training.precision=float32",
    "training.learning_rate=1e-3",
    "training.codebook_from_data=true",
    "training.log_every=1",
    "training.validation_batches=1",
    "training.workers=0",
]
ADVERSARIAL = [f"model.params.lossconfig.params.{key}" for key in ("disc_num_layers=1", "disc_ndf=8")]
#: kind -> (recipe of its first stage, None without one; settings; key of the batch)
KINDS = {
    "segmentation": ("segmentation_vqgan", [f"data.labels={LABELS}"], "segmentation"),
    "superpixels": ("segmentation_vqgan", [f"data.labels={LABELS}"], "segmentation"),
    "depth": ("depth_vqgan", ADVERSARIAL, "depth"),
    "keypoints": ("keypoints_vqgan", ADVERSARIAL, "keypoints"),
    "edges": ("edges_vqgan", ADVERSARIAL, "edges"),
    "lowres": ("lowres_vqgan", [*ADVERSARIAL, "model.params.lossconfig.params.perceptual_weight=0"], "lowres"),
    "coord": (None, [], "coord"),
    "boxes": (None, ["data.classes=[cat,dog,tree]", "data.objects=3"], "objects_bbox"),
    "centers": (None, ["data.classes=[cat,dog,tree]", "data.objects=3"], "objects_center_points"),
    "class": (None, [], "class_label"),
}
FROM_FILE = {"segmentation": ".png", "depth": ".png", "keypoints": ".json", "boxes": ".json", "centers": ".json"}
#: Number of condition tokens, where it differs from the image's; for objects: three of them and the crop.
TOKENS = {"class": 1, "boxes": 11, "centers": 8}


def write_data(root: Path) -> Path:
    """Write a folder of ten photographs and their conditions for each kind that is read from files.

    "coord" has the photographs alone, "class" has each of them in a folder of its own.
    """
    random = np.random.default_rng(0)
    for number, pixels in enumerate(tiny.photographs(10, WIDTH)):
        pixels = pixels[:HEIGHT]
        labels = pixels[..., 1] // (256 // LABELS)
        made = {"images": pixels, "segmentation": labels, "depth": pixels[..., 1]}
        made = {name: Image.fromarray(array) for name, array in made.items()}
        (root / f"class/{number}").mkdir(parents=True)
        made["images"].save(root / f"class/{number}/photo.png")
        for kind in ("coord", *FROM_FILE):
            (root / kind / "images").mkdir(parents=True, exist_ok=True)
            made["images"].save(root / kind / f"images/{number}.png")
            if kind in FROM_FILE:
                target = root / kind / f"conditions/{number}{FROM_FILE[kind]}"
                target.parent.mkdir(exist_ok=True)
                if kind == "keypoints":
                    people = [(random.random((18, 2)) * [WIDTH, HEIGHT]).tolist()]
                    target.write_text(json.dumps({"width": WIDTH, "height": HEIGHT, "people": people}))
                elif kind in TOKENS:
                    target.write_text(json.dumps(scene(random)))
                else:
                    made[kind].save(target)
    return root


def scene(random):
    """Two objects somewhere in a photograph."""
    corners = (random.random((2, 2)) * [WIDTH / 2, HEIGHT / 2]).tolist()
    names = random.permutation(["cat", "dog", "tree"])
    objects = [{"class": str(name), "box": [*corner, 20, 16]} for name, corner in zip(names, corners, strict=False)]
    return {"width": WIDTH, "height": HEIGHT, "objects": objects}


def folder_of(data, kind):
    return data / (kind if kind in (*FROM_FILE, "class") else "coord")


def photo_of(data, kind):
    return folder_of(data, kind) / ("3/photo.png" if kind == "class" else "images/3.png")


def condition_of(data, kind):
    """Options that name the condition of `photo_of`, for kinds that need them."""
    if kind in FROM_FILE:
        return ["--condition", folder_of(data, kind) / f"conditions/3{FROM_FILE[kind]}"]
    return ["--class", 3] if kind == "class" else []


def enlarged(source, target):
    """Write a condition's file or a photo to ``target``, with 8 more columns at the left and 16 at the right."""
    if target.suffix == ".json":
        content = json.loads(source.read_text())
        content["people"] = [[[x + 8, y] for x, y in person] for person in content.get("people", [])]
        for thing in content.get("objects", []):
            thing["box"][0] += 8
        target.write_text(json.dumps(content | {"width": WIDTH + 24}))
    else:
        pixels = pixels_of(source).astype(np.uint8)
        Image.fromarray(np.pad(pixels, ((0, 0), (8, 16), (0, 0))[: pixels.ndim], mode="edge")).save(target)
