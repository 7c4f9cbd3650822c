"""The scales of a token grid: their tokens, their order in the sequence, and which scales are allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamingfast import UserError
from tamingfast.models.pyramid import FACTORS, Pyramid


def test_the_source_s_scales_of_its_grid():
    pyramid = Pyramid.of("all", 16, 16)
    assert pyramid.factors == FACTORS == (16, 8, 4, 2, 1)
    assert pyramid.names == ["1x1", "2x2", "4x4", "8x8", "16x16"]
    assert pyramid.tokens == 1 + 4 + 16 + 64 + 256
    assert [pyramid.first(scales) for scales in range(6)] == [0, 1, 5, 21, 85, 341]


@pytest.mark.parametrize(
    ("side", "names"),
    [((6, 4), ["3x2", "6x4"]), ((32, 48), ["2x3", "4x6", "8x12", "16x24", "32x48"]), ((5, 5), ["5x5"])],
)
def test_all_means_what_the_grid_allows(side, names):
    assert Pyramid.of("all", *side).names == names


@pytest.mark.parametrize(("height", "width", "factors"), [(8, 8, (8, 4, 2, 1)), (6, 12, (3, 2, 1)), (4, 4, (1,))])
def test_scales_are_means_of_codes_and_their_nearest_codes(rng, height, width, factors):
    codebook = torch.randn(20, 3, generator=rng)
    tokens = torch.randint(20, (2, height, width), generator=rng)
    grids = Pyramid(factors, height, width).split(Pyramid(factors, height, width).build(tokens, codebook))
    codes = codebook.double().numpy()
    for factor, grid in zip(factors, grids, strict=True):
        assert grid.dtype == torch.int64 and grid.shape == (2, height // factor, width // factor)
        for image in range(2):
            for row in range(height // factor):
                for column in range(width // factor):
                    below = tokens[image, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
                    mean = codes[below.flatten().numpy()].mean(0)
                    assert int(grid[image, row, column]) == np.argmin(((codes - mean) ** 2).sum(1))
    assert torch.equal(grids[-1], tokens)  # the image's own tokens are kept even if codes are equal


def test_equal_codes_do_not_change_the_image():
    codebook = torch.ones(3, 2)
    sequence = Pyramid((2, 1), 2, 2).build(torch.tensor([[[2, 1], [0, 2]]]), codebook)
    assert sequence.tolist() == [[0, 2, 1, 0, 2]]


def test_half_precision_gives_the_same_scales(rng):
    codebook = torch.randn(50, 8, generator=rng).bfloat16()
    tokens = torch.randint(50, (4, 8, 8), generator=rng)
    pyramid = Pyramid((8, 4, 2, 1), 8, 8)
    assert torch.equal(pyramid.build(tokens, codebook), pyramid.build(tokens, codebook.float()))


def test_sequence_and_back(rng):
    pyramid = Pyramid((4, 2, 1), 4, 8)
    sequence = torch.randint(9, (3, pyramid.tokens), generator=rng)
    grids = pyramid.split(sequence)
    assert [tuple(grid.shape) for grid in grids] == [(3, 1, 2), (3, 2, 4), (3, 4, 8)]
    assert torch.equal(pyramid.join(grids), sequence)
    assert sequence[1, 2:10].tolist() == grids[1][1].flatten().tolist()  # coarse to fine, row by row


@pytest.mark.parametrize(
    ("factors", "grid", "message"),
    [
        ([1, 2, 4], (4, 4), "expected strictly decreasing"),
        ([4, 4, 1], (4, 4), "expected strictly decreasing"),
        ([4, 2], (4, 4), "expected 1, the image's own tokens, as the last"),
        ([], (4, 4), "expected positive integers"),
        ([4, 0.5], (4, 4), "expected positive integers"),
        ([2, True], (4, 4), "expected positive integers"),
        ([16, 8, 4, 2, 1], (8, 8), "got 16, expected divisors of a grid of 8 x 8 tokens"),
        ([4, 1], (4, 6), "got 4, expected divisors of a grid of 4 x 6 tokens"),
        ("every", (4, 4), "expected 'all' or a list"),
        (4, (4, 4), "expected 'all' or a list"),
    ],
)
def test_wrong_scales(factors, grid, message):
    with pytest.raises(UserError, match=f"^scales: .*{message}"):
        Pyramid.of(factors, *grid)


@pytest.mark.parametrize("scales", [-1, 4])
def test_more_scales_than_exist(scales):
    with pytest.raises(UserError, match=rf"got {scales}, expected 0 to 3, .* \(1x1, 2x2, 4x4\)"):
        Pyramid.of("all", 4, 4).first(scales)


def test_misuse_names_the_argument():
    pyramid = Pyramid((2, 1), 4, 4)
    with pytest.raises(ValueError, match="tokens: got .2, 4, 2., expected"):
        pyramid.build(torch.zeros(2, 4, 2, dtype=torch.int64), torch.ones(3, 2))
    with pytest.raises(ValueError, match="sequence: got 16 tokens, expected 20"):
        pyramid.split(torch.zeros(1, 16))
    with pytest.raises(ValueError, match="grids: got"):
        pyramid.join([torch.zeros(1, 4, 4)])
