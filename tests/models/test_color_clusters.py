"""Colours learned by k-means, and the first stage made of them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tamingfast.models.color_clusters import ColorClusters, KMeans


def test_against_lloyd_s_algorithm():
    x = torch.randn(200, 3)
    kmeans = KMeans(ncluster=4, niter=3)
    torch.manual_seed(7)
    kmeans.initialize(x)
    torch.manual_seed(7)
    centres = x[torch.randperm(200)[:4]]
    for _ in range(3):
        assigned = torch.cdist(x.double(), centres.double()).argmin(1)
        centres = torch.stack([x[assigned == k].mean(0) for k in range(4)])
    assert kmeans.is_initialized()
    assert_close(kmeans.C, centres)


def test_round_trip_and_shapes():
    kmeans = KMeans(ncluster=4)
    kmeans.C.copy_(torch.randn(4, 3))
    indices = torch.randint(0, 4, (2, 6))
    images = kmeans(indices, reverse=True, shape=(3, 2, 3))
    assert images.shape == (2, 3, 2, 3)
    assert_close(kmeans(images), indices)


def test_empty_clusters_are_filled():
    x = torch.cat([torch.zeros(50, 3), torch.ones(50, 3)])
    kmeans = KMeans(ncluster=8)
    kmeans.initialize(x)
    assert torch.isfinite(kmeans.C).all()


def test_too_few_points():
    with pytest.raises(ValueError, match="at least 512"):
        KMeans().initialize(torch.randn(5, 3))


def test_as_a_first_stage():
    stage = ColorClusters(ncluster=6)
    stage.kmeans.C.copy_(torch.randn(6, 3))
    x = torch.randn(2, 3, 4, 5)
    quant, loss, (_, _, indices) = stage.encode(x)
    assert indices.shape == (2, 4, 5) and loss == 0
    again = stage.quantize.get_codebook_entry(indices.reshape(-1), (2, 4, 5, 3))
    assert_close(stage.decode(again), quant)
