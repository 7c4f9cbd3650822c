"""What a trained model is used for: drawing images, reconstructing and completing them, encoding data sets."""

from __future__ import annotations

from tamingfast.tasks.conditions import (
    computed_condition,
    condition_picture,
    condition_tokens,
    conditions,
    decoded_condition,
    kind_of,
    own_condition,
    read_condition,
)
from tamingfast.tasks.drawing import TOP_K, begun, complete, decoded, draw, painted, photo_canvas, photo_tokens
from tamingfast.tasks.encode import check_encodable, encode
from tamingfast.tasks.models import check_prior, check_windowed, first_stage_of, is_multiscale, is_spatial
from tamingfast.tasks.pictures import image_files, load_images, read_mask, read_photo
from tamingfast.tasks.reconstruct import likelihood, reconstruct
from tamingfast.tasks.sizes import grid_size, trained_size, window_of

__all__ = [
    "TOP_K",
    "begun",
    "check_encodable",
    "check_prior",
    "check_windowed",
    "complete",
    "computed_condition",
    "condition_picture",
    "condition_tokens",
    "conditions",
    "decoded",
    "decoded_condition",
    "draw",
    "encode",
    "first_stage_of",
    "grid_size",
    "image_files",
    "is_multiscale",
    "is_spatial",
    "kind_of",
    "likelihood",
    "load_images",
    "own_condition",
    "painted",
    "photo_canvas",
    "photo_tokens",
    "read_condition",
    "read_mask",
    "read_photo",
    "reconstruct",
    "trained_size",
    "window_of",
]
