"""The kinds of condition, read from files or computed from images.

The paper conditions on segmentation, depth, edges, keypoints, low resolution and coordinates (section 4.2); the
original repository adds objects. Each kind is one class: those in `maps` and `keypoints` cover the image,
those in `objects` are tokens.
"""

from tamingfast.data.conditions.keypoints import Keypoints
from tamingfast.data.conditions.kind import Computed, FromFile, Kind, Map
from tamingfast.data.conditions.maps import Coordinates, Depth, Edges, LowResolution, Segmentation, Superpixels
from tamingfast.data.conditions.objects import Boxes, Centers, Objects
from tamingfast.data.conditions.palette import label_colors
from tamingfast.data.conditions.registry import (
    IMAGE_KEYS,
    KINDS,
    SETTINGS,
    SPATIAL_KEYS,
    TOKEN_KEYS,
    make,
    settings_of,
)
from tamingfast.data.conditions.scenes import Scene

__all__ = [
    "IMAGE_KEYS",
    "KINDS",
    "SETTINGS",
    "SPATIAL_KEYS",
    "TOKEN_KEYS",
    "Boxes",
    "Centers",
    "Computed",
    "Coordinates",
    "Depth",
    "Edges",
    "FromFile",
    "Keypoints",
    "Kind",
    "LowResolution",
    "Map",
    "Objects",
    "Scene",
    "Segmentation",
    "Superpixels",
    "label_colors",
    "make",
    "settings_of",
]
