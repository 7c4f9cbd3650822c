"""The packaged photographs, and what all datasets share: keyed randomness, loaders, settings."""

from __future__ import annotations

import hashlib
import importlib.util

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from tamingfast.data import build, loader, photos, shuffled
from tamingfast.data.randomness import _mix, random_bits, random_integers, random_units
from tamingfast.errors import UserError


@pytest.fixture(scope="module")
def pair():
    return build({"name": "photos", "size": 32, "length": 300, "seed": 1})


def fingerprint(batches):
    state = hashlib.sha256()
    for batch in batches:
        state.update(batch["image"].numpy().tobytes() + batch["class_label"].numpy().tobytes())
        state.update("\n".join(batch["file_path_"]).encode())
    return state.hexdigest()


def test_random_bits_are_splitmix64():
    # The published sequence of SplitMix64 for seed 0.
    steps = (np.arange(1, 4, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert _mix(steps).tolist() == published
    assert _mix(0x9E3779B97F4A7C15) == published[0]
    # A change here changes every training run: the streams are part of what makes runs repeatable.
    assert random_bits(0, 0, [0, 1]).tolist() == [2391539541053276776, 920862675595841680]


def test_random_bits_are_uniform_and_keyed_by_every_argument():
    index = np.arange(20000)
    base = random_bits(3, 4, index, 1)
    for other in (random_bits(4, 4, index, 1), random_bits(3, 5, index, 1), random_bits(3, 4, index, 2)):
        agree = np.mean(random_integers(base, 10) == random_integers(other, 10))
        assert abs(agree - 0.1) < 0.015
    counts = np.bincount(random_integers(base, 7), minlength=7)
    assert len(counts) == 7
    assert np.all(np.abs(counts / 20000 - 1 / 7) < 0.015)
    units = random_units(base)
    assert 0 <= units.min() <= units.max() < 1
    assert abs(units.mean() - 0.5) < 0.01
    assert np.array_equal(random_bits(3, 4, index[::-1], 1)[::-1], base)


def test_items_have_the_contract_of_a_batch(pair):
    train, _ = pair
    assert len(train) == 300
    for dataset in pair:
        item = dataset[len(dataset) - 1]
        assert item["image"].shape == (32, 32, 3)
        assert item["image"].dtype == torch.float32
        assert -1 <= item["image"].min() < item["image"].max() <= 1
        assert isinstance(item["class_label"], int)
        assert item["file_path_"].startswith(dataset.classes[item["class_label"]] + "/")
        assert torch.equal(dataset[-1]["image"], item["image"])
        with pytest.raises(IndexError):
            dataset[len(dataset)]


def test_an_item_is_a_pure_function_of_seed_epoch_and_index(pair):
    train, validation = pair
    again, _ = build({"name": "photos", "size": 32, "length": 300, "seed": 1})
    other, _ = build({"name": "photos", "size": 32, "length": 300, "seed": 2})
    train.set_epoch(0)
    first = [train[i] for i in range(20)]
    batch = train.batch(np.arange(20))
    train.set_epoch(1)
    changed = sum(train[i]["file_path_"] != first[i]["file_path_"] for i in range(20))
    assert changed >= 18
    assert sum(other[i]["file_path_"] != first[i]["file_path_"] for i in range(20)) >= 18
    train.set_epoch(0)
    for i in reversed(range(20)):
        for item in (train[i], again[i]):
            assert torch.equal(item["image"], first[i]["image"])
            assert item["file_path_"] == first[i]["file_path_"]
        assert torch.equal(batch["image"][i], first[i]["image"])
    fixed = validation[7]["image"]
    validation.set_epoch(9)
    assert torch.equal(validation[7]["image"], fixed)


def test_an_image_is_the_crop_that_its_name_says(pair):
    train, _ = pair
    for i in range(40):
        item = train[i]
        name, shape, place, *flipped = item["file_path_"].split("/")
        width, height = map(int, shape.split("x"))
        left, top = map(int, place.split(","))
        (plane,) = [p for p in train.planes if train.classes[p.label] == name and p.pixels.shape == (height, width, 3)]
        crop = plane.pixels[top : top + 32, left : left + 32]
        crop = crop[:, ::-1] if flipped else crop
        np.testing.assert_array_equal(item["image"].numpy(), (crop / 127.5 - 1).astype(np.float32))
    flips = sum(train[i]["file_path_"].endswith("flipped") for i in range(300))
    assert 110 < flips < 190


@pytest.mark.parametrize("size", [32, 256, photos.SMALLEST_SIDE])
def test_the_split_is_by_photograph(size):
    train, validation = build({"name": "photos", "size": size, "length": 64})
    assert validation.photographs == ["chelsea", "coffee"]
    assert not set(train.photographs) & set(validation.photographs)
    assert set(train.photographs) | set(validation.photographs) == set(photos.CLASSES)
    batch = train.batch(np.arange(len(train)))
    assert batch["image"].shape[1:] == (size, size, 3)
    assert {train.classes[label] for label in batch["class_label"].tolist()} <= set(train.photographs)
    assert {validation[i]["file_path_"].split("/")[0] for i in range(len(validation))} == {"chelsea", "coffee"}


def test_validation_crops_cover_every_plane_once(pair):
    _, validation = pair
    names = [validation[i]["file_path_"] for i in range(len(validation))]
    assert len(set(names)) == len(names)
    covered = [np.zeros(plane.pixels.shape[:2], bool) for plane in validation.planes]
    for number, top, left in validation._places:
        covered[number][top : top + 32, left : left + 32] = True
    assert all(part.all() for part in covered)


def test_no_photograph_is_enlarged_and_no_output_says_cifar(pair):
    for size in (32, 256):
        for dataset in build({"name": "photos", "size": size}):
            for plane in dataset.planes:
                native = photos._read(photos.PHOTOGRAPHS[plane.label]).shape
                assert size <= min(plane.pixels.shape[:2]) <= min(native[:2])
                assert plane.pixels.dtype == np.uint8
            assert "cifar" not in (dataset.description + str(dataset.classes)).lower()
            assert f"{size}x{size}" in dataset.description


def test_photographs_are_chosen_by_weight():
    train, _ = build({"name": "photos", "size": 32, "length": 6000})
    counts = np.bincount(train.batch(np.arange(6000))["class_label"].numpy(), minlength=len(photos.PHOTOGRAPHS))
    weights = np.array([0 if p.validation else p.weight for p in photos.PHOTOGRAPHS])
    assert np.all(np.abs(counts / 6000 - weights / weights.sum()) < 0.02)


def test_crops_begin_at_every_place():
    train, _ = build({"name": "photos", "size": 32, "length": 6000, "flip": False})
    starts = [name.split("/") for name in train.batch(np.arange(6000))["file_path_"]]
    found = {place for name, shape, place in starts if (name, shape) == ("astronaut", "36x36")}
    assert found == {f"{left},{top}" for left in range(5) for top in range(5)}


def test_area_resize_is_the_mean_over_what_a_pixel_covers():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)
    whole = pixels.reshape(3, 2, 2, 5, 3).mean((1, 3))
    assert np.array_equal(photos.area_resize(pixels, 3, 2), np.rint(whole).astype(np.uint8))
    # Three cells into two: the middle one counts half for each.
    row = np.array([0, 90, 240], np.uint8).reshape(1, 3, 1)
    assert photos.area_resize(row, 1, 2).ravel().tolist() == [30, 190]
    assert np.array_equal(photos.area_resize(pixels, 6, 10), pixels)


def test_an_absent_package_or_file_is_a_sentence_that_says_what_to_install(monkeypatch, tmp_path):
    photos._planes.cache_clear()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    with pytest.raises(UserError, match="sklearn: got no such package, .* run 'pip install scikit-image scikit-learn'"):
        build({"name": "photos"})
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(photos, "PHOTOGRAPHS", (photos.Photograph("lost", "skimage", "data/lost.png"),))
    with pytest.raises(UserError, match="cannot be read .* expected the photograph lost"):
        build({"name": "photos"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "photo"}, "data.name: got 'photo', expected one of cifar10, .*; did you mean 'photos'"),
        ({}, "data.name: got none, expected one of cifar10, conditions"),
        (
            {"name": "photos", "sise": 32},
            "data.sise: got a key that .* does not have, expected .*; did you mean 'data.size'",
        ),
        ({"name": "folder"}, "data.path: got none"),
        ({"name": "tokens", "path": "x", "crop": 4}, "data.crop: got 4 for data.name=tokens, expected images without"),
        ({"train": {"target": "taming.data.imagenet.ImageNetTrain"}}, "ImageNet.*give data.name=folder"),
        ({"name": "photos", "size": 301}, "at most 300"),
        ({"name": "photos", "size": 0}, "size: got 0"),
        ({"name": "photos", "size": "32"}, "size: got '32'"),
        ({"name": "photos", "length": -1}, "length: got -1"),
    ],
)
def test_wrong_settings_are_named(config, message):
    with pytest.raises(UserError, match=message):
        build(config)


def test_an_omegaconf_mapping_is_accepted():
    omegaconf = pytest.importorskip("omegaconf")
    train, _ = build(omegaconf.OmegaConf.create({"name": "photos", "size": 64, "length": 5}))
    assert len(train) == 5


@pytest.mark.parametrize("shuffle", [True, False])
def test_workers_do_not_change_batches_nor_the_global_random_state(pair, shuffle):
    train, _ = pair
    torch.manual_seed(0)
    state = torch.get_rng_state()
    order = shuffled(len(train), 5, 3) if shuffle else None
    alone = fingerprint(loader(train, 32, order=order, epoch=3))
    assert fingerprint(loader(train, 32, order=order, epoch=3, workers=2)) == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_starting_in_the_middle_equals_skipping(pair):
    train, _ = pair
    order = shuffled(len(train), 5, 3)
    whole = list(loader(train, 32, order=order, epoch=3))
    assert len(whole) == 9
    for start, workers in ((4, 0), (4, 1), (9, 0), (9, 1)):
        rest = loader(train, 32, order=order, epoch=3, start_batch=start, workers=workers)
        assert len(rest) == 9 - start
        assert fingerprint(rest) == fingerprint(whole[start:])


def test_skipped_items_are_not_read():
    class Recorder(torch.utils.data.Dataset):
        def __init__(self):
            self.seen = []

        def __len__(self):
            return 10

        def __getitem__(self, index):
            self.seen.append(index)
            return {"index": index}

    dataset = Recorder()
    batches = list(loader(dataset, 2, order=shuffled(10, 0), start_batch=3))
    assert [i for batch in batches for i in batch["index"].tolist()] == dataset.seen
    assert len(dataset.seen) == 4


def test_order_covers_every_item_once_and_differs_by_seed_and_epoch():
    class Index(torch.utils.data.Dataset):
        def __len__(self):
            return 103

        def __getitem__(self, index):
            return {"index": index}

    def read(order=None, **options):
        return [i for batch in loader(Index(), 10, order=order, **options) for i in batch["index"].tolist()]

    assert sorted(shuffled(103, 0)) == list(range(103))
    assert read(shuffled(103, 0), drop_last=False) == shuffled(103, 0).tolist()
    assert read(shuffled(103, 0)) == shuffled(103, 0).tolist()[:100]
    assert len({tuple(shuffled(103, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))}) == 3
    assert read(drop_last=False) == list(range(103))


def test_two_loaders_of_different_epochs_may_take_turns(pair):
    train, _ = pair
    for epoch in (0, 1):
        (batch,) = loader(train, 300, epoch=epoch)
        train.set_epoch(epoch)
        assert batch["file_path_"] == [train[i]["file_path_"] for i in range(300)]
        train.set_epoch(7)
    expected = tuple(fingerprint(loader(train, 50, epoch=epoch)) for epoch in (0, 1))
    turns = list(zip(loader(train, 50, epoch=0), loader(train, 50, epoch=1), strict=True))
    assert (fingerprint(a for a, _ in turns), fingerprint(b for _, b in turns)) == expected


def test_loader_refuses_what_cannot_be_served(pair):
    train, _ = pair
    with pytest.raises(UserError, match="batch_size: got 301, expected at most 300, the number of items; lower it"):
        loader(train, 301)
    assert len(list(loader(train, 301, drop_last=False))) == 1
    for options in ({"batch_size": 0}, {"start_batch": 10}, {"start_batch": -1}, {"workers": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            loader(train, **{"batch_size": 32, **options})
