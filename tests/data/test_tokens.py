"""Token files: what is written from any iterable is read back, and damaged files are refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tamingfast.data import loader, shuffled
from tamingfast.data.tokens import FORMAT, TokenDataset, write_tokens
from tamingfast.errors import UserError


def grids(count, vocab_size, seed=0, shape=(4, 6)):
    return np.random.default_rng(seed).integers(0, vocab_size, (count, *shape))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (256, torch.uint8),
        (257, torch.int16),
        (1024, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
        (70000, torch.int32),
    ],
)
def test_tokens_come_back_from_the_smallest_type_that_fits(tmp_path, vocab_size, dtype):
    path = tmp_path / "tokens.safetensors"
    source = grids(9, vocab_size)
    source[0, 0, 0] = vocab_size - 1
    assert write_tokens(path, source, vocab_size) == 9
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.safetensors"]
    # Any reader of the format can read the file.
    stored = load_file(path)
    assert set(stored) == {"indices"}
    assert stored["indices"].dtype == dtype
    assert np.array_equal(stored["indices"].numpy(), source)
    dataset = TokenDataset(path, vocab_size=vocab_size)
    assert (len(dataset), dataset.vocab_size, dataset.grid, dataset.classes) == (9, vocab_size, (4, 6), None)
    item = dataset[8]
    assert set(item) == {"indices"}
    assert item["indices"].dtype == torch.int64
    assert np.array_equal(item["indices"].numpy(), source[8].reshape(-1))


def test_a_generator_is_written_as_it_comes_and_may_fill_the_labels(tmp_path):
    path = tmp_path / "tokens.safetensors"
    labels = []

    def encode():
        for number in range(5):
            labels.append(torch.full((3 + number,), number))
            yield torch.from_numpy(grids(3 + number, 50, seed=number))

    metadata = {"first_stage": "a" * 64, "source": "ünïcode crops", "flips": "yes"}
    classes = ["ant", "bee", "cat", "dog", "emu"]
    count = write_tokens(path, encode(), 50, class_label=labels, metadata=metadata, classes=classes)
    assert count == 25
    dataset = TokenDataset(path)
    assert dataset.classes == classes
    assert metadata.items() <= dataset.metadata.items()
    expected = np.concatenate([grids(3 + number, 50, seed=number) for number in range(5)])
    (batch,) = loader(dataset, 25)
    assert np.array_equal(batch["indices"].numpy(), expected.reshape(25, -1))
    assert batch["class_label"].dtype == torch.int64
    assert batch["class_label"].tolist() == torch.cat(labels).tolist()
    assert dataset[24]["class_label"] == 4


def test_conditions_stand_beside_their_images(tmp_path):
    path, said = tmp_path / "tokens.safetensors", {"key": "edges", "vocab_size": 300, "data": {"kind": "edges"}}
    conditions = []

    def encode():
        for number in range(3):
            conditions.append(grids(4, 300, seed=9 + number))
            yield grids(4, 50, seed=number)

    assert write_tokens(path, encode(), 50, conditions=conditions, condition=said) == 12
    assert load_file(path)["conditions"].dtype == torch.int16
    dataset = TokenDataset(path)
    assert dataset.condition == said
    batch = dataset.batch(np.array([11, 0]))
    assert np.array_equal(batch["edges_indices"].numpy(), np.concatenate(conditions)[[11, 0]].reshape(2, -1))
    with pytest.raises(ValueError, match="conditions: got 8 grids, expected 12"):
        write_tokens(path, grids(12, 50), 50, conditions=conditions[:2], condition=said)
    with pytest.raises(ValueError, match="conditions: got tokens from . to 29., expected 0 to 289"):
        write_tokens(path, grids(12, 50), 50, conditions=conditions, condition={**said, "vocab_size": 290})
    marks = {"format": FORMAT, "vocab_size": "8"}
    tensors = {name: torch.zeros(2, 3, 3, dtype=torch.int16) for name in ("indices", "conditions")}
    save_file(tensors, path, metadata=marks)
    with pytest.raises(UserError, match="got conditions without a record of what they are"):
        TokenDataset(path)
    tensors["conditions"][1, 0, 0] = 5
    save_file(tensors, path, metadata={**marks, "condition": json.dumps({**said, "vocab_size": 5})})
    with pytest.raises(UserError, match="got the token 5 .* expected 0 to 4"):
        TokenDataset(path)


def test_labels_without_names_are_named_by_their_numbers(tmp_path):
    path = tmp_path / "tokens.safetensors"
    write_tokens(path, torch.zeros(3, 2, 2, dtype=torch.int64), 8, class_label=[0, 2, 1])
    assert TokenDataset(path).classes == ["0", "1", "2"]


def test_workers_and_copies_map_the_file_again(tmp_path):
    path = tmp_path / "tokens.safetensors"
    write_tokens(path, grids(400, 1000), 1000)
    dataset = TokenDataset(path)
    assert len(pickle.dumps(dataset)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7]["indices"], dataset[7]["indices"])
    order = shuffled(len(dataset), 1, 2)
    alone = [batch["indices"] for batch in loader(dataset, 16, order=order, epoch=2)]
    others = [batch["indices"] for batch in loader(dataset, 16, order=order, epoch=2, workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, others, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"indices": np.full((1, 2, 2), 8)}, "got tokens from 8 to 8, expected 0 to 7", id="too large"),
        pytest.param({"indices": np.full((1, 2, 2), -1)}, "got tokens from -1", id="negative"),
        pytest.param({"indices": np.zeros((1, 2, 2))}, "dtype float64", id="float"),
        pytest.param({"indices": np.zeros((2, 2), int)}, r"shape \(2, 2\)", id="not grids"),
        pytest.param({"indices": []}, "got no grids", id="empty"),
        pytest.param(
            {"indices": [np.zeros((1, 2, 2), int), np.zeros((1, 2, 3), int)]},
            "expected equal shapes",
            id="shapes differ",
        ),
        pytest.param({"class_label": [1, 2]}, "2 values .* expected 3 integers", id="labels too few"),
        pytest.param({"class_label": [0.5, 1, 2]}, "expected 3 integers", id="labels float"),
        pytest.param(
            {"class_label": [0, 1, 2], "classes": ["a", "b"]}, "got 0 to 2, expected 0 to 1", id="label unnamed"
        ),
        pytest.param({"class_label": [0, -1, 2]}, "got -1 to 2", id="label negative"),
        pytest.param({"metadata": {"flips": True}}, "got 'flips': True, expected strings", id="metadata type"),
        pytest.param(
            {"metadata": {"format": "x"}}, "expected strings under keys other than format", id="metadata reserved"
        ),
        pytest.param({"vocab_size": 0}, "vocab_size: got 0", id="vocabulary"),
    ],
)
def test_wrong_arguments_leave_no_file(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_tokens(
            tmp_path / "tokens.safetensors",
            **{"indices": np.zeros((3, 2, 2), int), "vocab_size": 8, **arguments},
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "tokens.safetensors"
    write_tokens(path, grids(3, 8), 8)

    def encode():
        yield grids(3, 8, seed=1)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_tokens(path, encode(), 8)
    assert len(list(tmp_path.iterdir())) == 1
    assert np.array_equal(TokenDataset(path)[0]["indices"].numpy(), grids(3, 8)[0].reshape(-1))


def test_truncated_files_are_refused_wherever_they_end(tmp_path):
    path = tmp_path / "tokens.safetensors"
    write_tokens(path, grids(20, 300), 300)
    content = path.read_bytes()
    for keep in (0, 4, 8, 300, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(UserError, match="got a truncated file or one of another format"):
            TokenDataset(path)


def test_files_that_are_not_token_files_are_refused(tmp_path):
    path = tmp_path / "tokens.safetensors"
    with pytest.raises(UserError, match="got no such file"):
        TokenDataset(path)
    with pytest.raises(
        UserError, match="got a directory without files that end in .safetensors, expected a token file"
    ):
        TokenDataset(tmp_path)
    path.write_bytes(b"no tokens at all")
    with pytest.raises(UserError, match="one of another format"):
        TokenDataset(path)
    good = {"indices": torch.zeros(2, 3, 3, dtype=torch.int16)}
    marks = {"format": FORMAT, "vocab_size": "8"}
    save_file(good, path)
    with pytest.raises(UserError, match="without the metadata format="):
        TokenDataset(path)
    for tensors in (
        {"weight": torch.zeros(2)},
        {"indices": torch.zeros(2, 3, 3)},
        {"indices": torch.zeros(2, 3, dtype=torch.int16)},
        {"indices": torch.zeros(0, 3, 3, dtype=torch.int16)},
        {**good, "class_label": torch.zeros(3, dtype=torch.int64)},
    ):
        save_file(tensors, path, metadata=marks)
        with pytest.raises(UserError, match=r"integer tensors: indices \(N, h, w\)"):
            TokenDataset(path)


def test_values_out_of_range_and_another_vocabulary_are_refused(tmp_path):
    path = tmp_path / "tokens.safetensors"
    marks = {"format": FORMAT, "vocab_size": "8"}
    for token in (8, -3):
        save_file({"indices": torch.tensor([[[1, token]]], dtype=torch.int16)}, path, metadata=marks)
        with pytest.raises(UserError, match=f"got the token {token} in grids 0 to 0, expected 0 to 7"):
            TokenDataset(path)
    tensors = {"indices": torch.zeros(1, 2, 2, dtype=torch.int16), "class_label": torch.tensor([2])}
    save_file(tensors, path, metadata={**marks, "classes": json.dumps(["a", "b"])})
    with pytest.raises(UserError, match="class labels from 2 to 2, expected 0 to 1"):
        TokenDataset(path)
    write_tokens(path, grids(2, 8), 8)
    with pytest.raises(UserError, match="a vocabulary of 8 tokens, expected 16"):
        TokenDataset(path, vocab_size=16)
