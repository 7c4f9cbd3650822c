"""Measures of a model: its reconstructions, its likelihoods, and the distance of its samples from real images.

`reconstruction` and `likelihood` take a model and a data set. `samples` and `reconstructions` make images, which
`distances` compares with real ones in the features of a network from `load_features`; `read_reference` reads
statistics of real images that others have published. `evaluate` takes every measure that applies to a model;
`evaluate_model` does the same from paths and settings, and `evaluate_samples` judges the images of any model.
"""

from __future__ import annotations

from tamingfast.evaluation.batches import images_of
from tamingfast.evaluation.distances import compare, distances, frechet_distance, kernel_distance, precision_recall
from tamingfast.evaluation.features import EFFICIENTNET, INCEPTION, extract, load_features
from tamingfast.evaluation.generated import reconstructions, samples
from tamingfast.evaluation.likelihood import likelihood
from tamingfast.evaluation.lookahead import tokens_per_pass
from tamingfast.evaluation.plots import plot_lookahead, plot_schedules
from tamingfast.evaluation.reconstruction import reconstruction
from tamingfast.evaluation.references import features_of, read_reference, save_reference
from tamingfast.evaluation.run import evaluate_model, evaluate_samples
from tamingfast.evaluation.statistics import Features, Reference
from tamingfast.evaluation.summary import evaluate
from tamingfast.figures import distance_table, table

__all__ = [
    "EFFICIENTNET",
    "INCEPTION",
    "Features",
    "Reference",
    "compare",
    "distance_table",
    "distances",
    "evaluate",
    "evaluate_model",
    "evaluate_samples",
    "extract",
    "features_of",
    "frechet_distance",
    "images_of",
    "kernel_distance",
    "likelihood",
    "load_features",
    "plot_lookahead",
    "plot_schedules",
    "precision_recall",
    "read_reference",
    "reconstruction",
    "reconstructions",
    "samples",
    "save_reference",
    "table",
    "tokens_per_pass",
]
