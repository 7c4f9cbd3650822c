"""WebDataset's archives as a data set: samples, classes, conditions, the order, and what is refused."""

from __future__ import annotations

import pickle

import archives
import numpy as np
import pytest
import torch
from picture_files import logged
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tamingfast import UserError
from tamingfast.data import Index, build, loader
from tamingfast.data import shards as module


def settings(root, **options):
    return {"name": "shards", "path": str(root), "size": 16, "random_crop": False, "flip": False} | options


def every_item(described):
    return [item for dataset in build(described) for item in dataset]


def number_of(item) -> int:
    return round((float(item["image"][0, 0, 0]) + 1) * 127.5)


@pytest.fixture
def root(tmp_path):
    return archives.shards(tmp_path / "shards", 4, 10)


def test_every_sample_is_seen_once_with_its_class(root):
    train, validation = build(settings(f"{root}/train-{{000..003}}.tar", validation_fraction=0.2))
    items = [item for dataset in (train, validation) for item in dataset]
    assert sorted(map(number_of, items)) == list(range(40)) and len(validation) >= 1
    assert all(item["class_label"] == number_of(item) % 3 for item in items)
    assert train.classes == validation.classes == ["0", "1", "2"]
    whole = np.stack([((item["image"].numpy() + 1) * 127.5).round() for item in items])
    assert all(np.array_equal(image, archives.noise(number_of(item))) for image, item in zip(whole, items, strict=True))
    name = items[0]["file_path_"]
    assert name == f"{root}/train-{number_of(items[0]) // 10:03d}.tar/{number_of(items[0]):05d}.png"
    held = {item["file_path_"] for item in validation}
    archives.shards(root, 6, 10)
    more = build(settings(root, validation_fraction=0.2))[1]
    assert held <= {item["file_path_"] for item in more}  # adding archives moves none of the others


def test_files_of_the_library_itself(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(f"{tmp_path}/x-%03d.tar", maxcount=5, verbose=0) as sink:
        for number in range(12):
            pixels = archives.noise(number)
            sink.write({"__key__": f"sub.folder/{number:04d}", "png": pixels, "cls": number % 4,
                        "json": {"a": 1}, "label.txt": "b"})  # fmt: skip
    path = f"{tmp_path}/x-{{000..002}}.tar"
    ours = every_item(settings(path))
    theirs = wds.WebDataset(path, shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("png", "cls")
    expected = sorted((int(image[0, 0, 0]), label) for image, label in theirs)
    assert sorted((number_of(item), item["class_label"]) for item in ours) == expected and len(expected) == 12


def test_an_epoch_takes_one_group_of_archives_after_the_other(root, monkeypatch):
    monkeypatch.setattr(module, "MIXED", 15)
    train, _ = build(settings(root, validation_fraction=0.01))
    orders = [train.order(seed) for seed in range(6)]
    shard = np.array([part.path[-5] for part in train.paths])
    for order in orders:
        assert sorted(order) == list(range(len(train)))
        first = shard[order[: len(train) // 2]]
        assert len(set(first[:-2])) == 2 and (first[:-1] != first[1:]).sum() > 3  # two archives, mixed
    assert len({tuple(order) for order in orders}) == 6 and len({tuple(sorted(shard[o[:9]])) for o in orders}) > 1
    assert np.array_equal(train.order(3), orders[3])
    monkeypatch.setattr(module, "MIXED", 1)
    train, _ = build(settings(root, validation_fraction=0.4))
    seen = np.array([part.path[-5] for part in train.paths])[train.order(0)]
    assert (seen[1:] != seen[:-1]).sum() == 3 and not (train.order(0)[1:] > train.order(0)[:-1]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_alike_everywhere(root, workers, caplog):
    files = {f"{n:05d}.png": archives.encoded(archives.noise(n)) for n in range(40, 50)}
    files |= {"00044.png": b"no image", "00045.png": files["00045.png"][:200], "00046.txt": b"no sample"}
    files.pop("00046.png")
    archives.write(root / "train-004.tar", files)
    archives.write(root / "held.tar", {"0.png": archives.encoded(archives.noise(0))})
    train, _ = build(settings(root / "train-004.tar", validation_path=str(root / "held.tar")))
    assert "00046 (a sample without an image)" in "".join(logged(caplog))
    read = [path for batch in loader(train, 2, workers=workers, drop_last=False) for path in batch["file_path_"]]
    assert read == [item["file_path_"] for item in train] and len(read) == 9
    assert not any("00044" in path or "00045" in path for path in read)
    told = "".join(logged(caplog))
    assert "train-004.tar/00044.png (not an image in a known format)" in told and "00045.png" in told


def test_conditions_lie_beside_their_images(tmp_path):
    files = {}
    for number in range(6):
        pixels = archives.noise(number)
        files[f"{number}.png"] = archives.encoded(pixels)
        files[f"{number}.segmentation.png"] = archives.encoded(pixels[..., 0] // 64)
        files[f"{number}.depth.npy"] = npy(pixels[..., 1].astype(np.float32))
    path = archives.write(tmp_path / "x.tar", files)
    train, _ = build(settings(path, kind="segmentation", labels=4, random_crop=True, flip=True, size=8, short_side=16))
    for index in range(len(train)):
        item = train[index]
        assert torch.equal(item["segmentation"].argmax(-1), ((item["image"][..., 0] + 1) * 127.5).round().long() // 64)
    train, _ = build(settings(path, kind="depth", depth_range=[0, 255]))
    item = train[0]
    torch.testing.assert_close(item["depth"][..., 0], item["image"][..., 1], atol=1e-5, rtol=0)
    train, _ = build(settings(path, kind="edges"))
    assert train[0]["edges"].shape == (16, 16, 1)
    del files["3.depth.npy"]
    archives.write(path, files)
    with pytest.raises(UserError, match=r"3.png: got a sample with png, .*, expected its condition, depth.npy or"):
        build(settings(path, kind="depth"))


def npy(array) -> bytes:
    import io

    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_nothing_in_an_archive_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it ran",))

    bomb = pickle.dumps(Bomb())
    files = {f"{n}.png": archives.encoded(archives.noise(n)) for n in range(4)}
    for ending in ("pyd", "pkl", "pth", "npy", "py"):
        files[f"0.{ending}"] = bomb
    files = dict(sorted(files.items()))
    path = archives.write(tmp_path / "x.tar", files)
    assert len(every_item(settings(path))) == 4
    files["0.depth.npy"] = bomb
    for number in range(1, 4):
        files[f"{number}.depth.npy"] = npy(np.ones((16, 16), np.float32))
    archives.write(path, dict(sorted(files.items())))
    with pytest.raises(UserError, match=r"0.depth.npy: got a file that cannot be read"):
        every_item(settings(path, kind="depth"))
    for address in ("pipe:touch /tmp/x", "http://localhost/x.tar", "pipe:cat {0..1}.tar"):
        with pytest.raises(UserError, match="got no such file, expected tar archives"):
            build(settings(address))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"2.cls": b"cat"}, r"2.cls: got 'cat', expected the number of a class"),
        ({"2.cls": b"-1"}, r"2.cls: got '-1', expected the number"),
        ({"2.cls": b"9" * 3000}, r"2.cls: got .*, expected the number"),
        ({"2.cls": None}, r"2.png: got a sample without .cls, expected one as in others"),
        ({f"{n}.png": None for n in range(4)}, r"got 1 archives without images, expected some"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    files = {f"{n}.{end}": archives.encoded(archives.noise(n)) if end == "png" else b"1\n"
             for n in range(4) for end in ("png", "cls")}  # fmt: skip
    files = {name: content for name, content in (files | change).items() if content is not None}
    path = archives.write(tmp_path / "x.tar", files)
    with pytest.raises(UserError, match=message) as caught:
        build(settings(path))
    assert "\n" not in str(caught.value)


def test_settings_are_checked(root):
    for options, message in (
        ({"labels": 3}, "labels: got a setting of conditions, expected it with a kind"),
        ({"kind": "segmentaton"}, "did you mean 'segmentation'"),
        ({"short_side": 8}, "short_side: got 8, expected at least size=16"),
        ({"crop": 8}, "data.crop: got 8 for data.name=shards"),
    ):
        with pytest.raises(UserError, match=message):
            build(settings(root, **options))


def test_the_index_spares_the_headers_until_an_archive_changes(root, tmp_path, monkeypatch):
    path = tmp_path / "data.index"
    listed = []
    parts_of = module.parts_of
    monkeypatch.setattr(module, "parts_of", lambda path, each: (listed.append(path[-5]), parts_of(path, each))[1])

    def built():
        listed.clear()
        found = Index(path)
        sets = build(settings(root), found)
        found.save(path)
        return [list(each.paths) for each in sets], [each.labels for each in sets]

    first = built()
    assert sorted(listed) == ["0", "1", "2", "3"]
    assert built() == first and not listed
    archives.write(root / "train-002.tar", {"x.png": archives.encoded(archives.noise(7)), "x.cls": b"2"})
    assert sum(map(len, built()[0])) == 31 and listed == ["2"]


def test_an_index_that_does_not_fit_is_not_followed(root, tmp_path):
    path = tmp_path / "data.index"
    found = Index(path)
    expected = [list(each.paths) for each in build(settings(root), found)]
    found.save(path)
    whole = load_file(path)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    for name in [each for each in whole if each.startswith("0/") and "conditions" not in each]:
        for value in (np.zeros(3, np.float32), whole[name][:1] * 0 + 77):
            save_file(whole | {name: value}, path, metadata)
            assert [list(each.paths) for each in build(settings(root), Index(path))] == expected
