"""Workflows on trained models, as functions that take paths, pictures or arrays and return results.

`sample`, `edit`, `outpaint`, `complete`, `reconstruct`, `encode`, `likelihood`, `inspect` and `export` are the
workflows; the other names are building blocks for programs that need finer control. The functions print nothing and
write only the files that the caller names. Names are imported on first use, so that the command line can read
`DrawingOptions` for its ``--help`` without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tamingfast.tasks.abilities import Abilities as Abilities
    from tamingfast.tasks.abilities import Form as Form
    from tamingfast.tasks.abilities import abilities_of as abilities_of
    from tamingfast.tasks.canvases import begun_with as begun_with
    from tamingfast.tasks.canvases import check_unused as check_unused
    from tamingfast.tasks.canvases import forget as forget
    from tamingfast.tasks.completion import Completion as Completion
    from tamingfast.tasks.completion import complete as complete
    from tamingfast.tasks.conditioning import computed_condition as computed_condition
    from tamingfast.tasks.conditioning import condition_picture as condition_picture
    from tamingfast.tasks.conditioning import condition_tokens as condition_tokens
    from tamingfast.tasks.conditioning import conditions as conditions
    from tamingfast.tasks.conditioning import decoded_condition as decoded_condition
    from tamingfast.tasks.conditioning import kind_of as kind_of
    from tamingfast.tasks.conditioning import own_condition as own_condition
    from tamingfast.tasks.conditioning import read_condition as read_condition
    from tamingfast.tasks.costs import ScheduleCost as ScheduleCost
    from tamingfast.tasks.costs import likelihood as likelihood
    from tamingfast.tasks.drawing import TOP_K as TOP_K
    from tamingfast.tasks.drawing import Drawing as Drawing
    from tamingfast.tasks.drawing import begun as begun
    from tamingfast.tasks.drawing import completed as completed
    from tamingfast.tasks.drawing import decoded as decoded
    from tamingfast.tasks.drawing import draw as draw
    from tamingfast.tasks.drawing import painted as painted
    from tamingfast.tasks.drawing import photo_canvas as photo_canvas
    from tamingfast.tasks.drawing import photo_tokens as photo_tokens
    from tamingfast.tasks.editing import edit as edit
    from tamingfast.tasks.editing import outpaint as outpaint
    from tamingfast.tasks.encoding import check_encodable as check_encodable
    from tamingfast.tasks.encoding import encode as encode
    from tamingfast.tasks.exporting import Exported as Exported
    from tamingfast.tasks.exporting import export as export
    from tamingfast.tasks.inspection import inspect as inspect
    from tamingfast.tasks.labels import class_names_of as class_names_of
    from tamingfast.tasks.labels import labels_of as labels_of
    from tamingfast.tasks.models import Unread as Unread
    from tamingfast.tasks.models import check_prior as check_prior
    from tamingfast.tasks.models import check_windowed as check_windowed
    from tamingfast.tasks.models import classes_of as classes_of
    from tamingfast.tasks.models import config_of as config_of
    from tamingfast.tasks.models import data_of as data_of
    from tamingfast.tasks.models import first_stage_of as first_stage_of
    from tamingfast.tasks.models import is_multiscale as is_multiscale
    from tamingfast.tasks.models import is_spatial as is_spatial
    from tamingfast.tasks.models import opened as opened
    from tamingfast.tasks.models import paired as paired
    from tamingfast.tasks.models import unread as unread
    from tamingfast.tasks.options import DrawingOptions as DrawingOptions
    from tamingfast.tasks.options import drawing_options as drawing_options
    from tamingfast.tasks.pictures import image_files as image_files
    from tamingfast.tasks.pictures import load_images as load_images
    from tamingfast.tasks.pictures import read_mask as read_mask
    from tamingfast.tasks.pictures import read_photo as read_photo
    from tamingfast.tasks.pictures import read_strokes as read_strokes
    from tamingfast.tasks.pictures import scaled_size as scaled_size
    from tamingfast.tasks.recipes import Recipe as Recipe
    from tamingfast.tasks.recipes import check_same_model as check_same_model
    from tamingfast.tasks.recipes import model_named as model_named
    from tamingfast.tasks.recipes import recipe_of as recipe_of
    from tamingfast.tasks.reconstruction import Reconstruction as Reconstruction
    from tamingfast.tasks.reconstruction import reconstruct as reconstruct
    from tamingfast.tasks.reconstruction import reconstructed as reconstructed
    from tamingfast.tasks.reconstruction import token_pictures as token_pictures
    from tamingfast.tasks.sampling import sample as sample
    from tamingfast.tasks.sheets import Sheet as Sheet
    from tamingfast.tasks.sizes import grid_size as grid_size
    from tamingfast.tasks.sizes import image_size as image_size
    from tamingfast.tasks.sizes import trained_size as trained_size
    from tamingfast.tasks.sizes import window_of as window_of

#: module -> names. No module may have the name of a function: importing the module would hide the function.
_HOMES = {
    "abilities": ("Abilities", "Form", "abilities_of"),
    "canvases": ("begun_with", "check_unused", "forget"),
    "completion": ("Completion", "complete"),
    "conditioning": (
        "computed_condition", "condition_picture", "condition_tokens", "conditions", "decoded_condition", "kind_of",
        "own_condition", "read_condition",
    ),
    "costs": ("ScheduleCost", "likelihood"),
    "drawing": (
        "TOP_K", "Drawing", "begun", "completed", "decoded", "draw", "painted", "photo_canvas", "photo_tokens",
    ),
    "editing": ("edit", "outpaint"),
    "encoding": ("check_encodable", "encode"),
    "exporting": ("Exported", "export"),
    "inspection": ("inspect",),
    "labels": ("class_names_of", "labels_of"),
    "models": (
        "Unread", "check_prior", "check_windowed", "classes_of", "config_of", "data_of", "first_stage_of",
        "is_multiscale", "is_spatial", "opened", "paired", "unread",
    ),
    "options": ("DrawingOptions", "drawing_options"),
    "pictures": ("image_files", "load_images", "read_mask", "read_photo", "read_strokes", "scaled_size"),
    "recipes": ("Recipe", "check_same_model", "model_named", "recipe_of"),
    "reconstruction": ("Reconstruction", "reconstruct", "reconstructed", "token_pictures"),
    "sampling": ("sample",),
    "sheets": ("Sheet",),
    "sizes": ("grid_size", "image_size", "trained_size", "window_of"),
}  # fmt: skip

__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
