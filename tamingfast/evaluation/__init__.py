"""How good a model is: reconstructions, likelihoods, and samples against real images.

`reconstruction` and `likelihood` take a model and a dataset; `samples` draws what `compare` sets against real images in
the features of a network that `load_features` gives. `evaluate` does all that a model allows.
"""

from __future__ import annotations

from tamingfast.evaluation.batches import images_of
from tamingfast.evaluation.distances import frechet_distance, kernel_distance
from tamingfast.evaluation.features import EFFICIENTNET, INCEPTION, Features, extract, load_features
from tamingfast.evaluation.likelihood import likelihood
from tamingfast.evaluation.generated import compare, distances, reconstructions, samples
from tamingfast.evaluation.reconstruction import reconstruction
from tamingfast.evaluation.summary import distance_table, evaluate, table

__all__ = [
    "EFFICIENTNET",
    "INCEPTION",
    "Features",
    "compare",
    "distance_table",
    "distances",
    "evaluate",
    "extract",
    "frechet_distance",
    "images_of",
    "kernel_distance",
    "likelihood",
    "load_features",
    "reconstruction",
    "reconstructions",
    "samples",
    "table",
]
