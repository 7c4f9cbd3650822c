"""Directories of images: classes, the split, files that do not open."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from picture_files import logged, save, truncate
from PIL import Image

from tamingfast import tasks
from tamingfast.data import build, listing, loader
from tamingfast.data.image_files import ImageFiles
from tamingfast.data.rgb import check_headers
from tamingfast.errors import UserError


def names(dataset, root):
    return [str(path).removeprefix(f"{root}/") for path in dataset.paths]


@pytest.fixture
def classes_root(tmp_path):
    root = tmp_path / "images"
    for number in range(12):
        folder = ("Zebra", "apple", "moth/deep/er")[number % 3]
        suffix = (".jpg", ".PNG", ".webp", ".JpEg")[number % 4]
        save(root / folder / f"{number:02d}{suffix}")
    return root


def test_sub_folders_are_classes_in_the_order_of_their_names(classes_root):
    (classes_root / "apple" / "notes.txt").write_text("no image")
    (classes_root / "empty").mkdir()
    save(classes_root / ".hidden" / "x.png")
    save(classes_root / "apple" / "._x.png")
    train, validation = build({"name": "folder", "path": classes_root, "size": 16, "validation_fraction": 0.3})
    assert train.classes == validation.classes == ["Zebra", "apple", "moth"]
    assert len(train) + len(validation) == 12
    for dataset in (train, validation):
        for item in dataset:
            folder = item["file_path_"].removeprefix(f"{classes_root}/").split("/")[0]
            assert dataset.classes[item["class_label"]] == folder
            assert item["image"].shape == (16, 16, 3)
            assert item["image"].dtype == torch.float32
    assert train.report() == f"1 image file was skipped: {classes_root}/empty (a folder without a readable image)"
    assert validation.report() == ""
    (batch,) = loader(validation, len(validation))
    assert batch["class_label"].dtype == torch.int64
    assert isinstance(batch["file_path_"][0], str)


def test_without_sub_folders_the_class_is_zero(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png")
    train, validation = build({"name": "folder", "path": tmp_path, "size": 8})
    assert train.classes is None
    assert {item["class_label"] for dataset in (train, validation) for item in dataset} == {0}


def test_images_beside_class_folders_are_left_out_and_named(classes_root):
    save(classes_root / "stray.png")
    train, validation = build({"name": "folder", "path": classes_root, "size": 8})
    assert not any("stray" in path for path in train.paths + validation.paths)
    assert "1 image file was skipped" in train.report()
    assert "stray.png (lies beside the class folders)" in train.report()


def test_the_split_stays_when_files_are_added(tmp_path):
    for number in range(60):
        save(tmp_path / f"{number}.png", size=(2, 2))
    options = {"name": "folder", "path": tmp_path, "size": 2, "validation_fraction": 0.3}
    train, validation = build(options)
    assert not set(train.paths) & set(validation.paths)
    assert len(train) + len(validation) == 60
    assert 8 <= len(validation) <= 28
    for number in range(60, 120):
        save(tmp_path / f"{number}.png", size=(2, 2))
    more_train, more_validation = build(options)
    assert set(train.paths) < set(more_train.paths)
    assert set(validation.paths) < set(more_validation.paths)
    again, _ = build({**options, "path": str(tmp_path) + "/"})
    assert names(again, tmp_path) == names(more_train, tmp_path)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_the_split_is_empty(tmp_path, fraction):
    for number in range(3):
        save(tmp_path / f"{number}.png")
    train, validation = build({"name": "folder", "path": tmp_path, "validation_fraction": fraction})
    assert {len(train), len(validation)} == {1, 2}


def test_a_validation_directory_takes_the_training_classes(classes_root, tmp_path):
    held = tmp_path / "held"
    save(held / "apple" / "a.png")
    train, validation = build({"name": "folder", "path": classes_root, "validation_path": held, "size": 8})
    assert len(train) == 12
    assert [item["class_label"] for item in validation] == [1]
    save(held / "pear" / "a.png")
    with pytest.raises(UserError, match="class folder 'pear', expected the training classes Zebra, apple, moth"):
        build({"name": "folder", "path": classes_root, "validation_path": held})
    (held / "pear" / "a.png").rename(held / "a.png")
    with pytest.raises(UserError, match=r"a\.png outside any class folder"):
        build({"name": "folder", "path": classes_root, "validation_path": held})


def test_files_with_odd_endings_that_do_not_open_are_skipped_counted_and_named_at_once(classes_root, caplog):
    for number in range(13):
        (classes_root / "apple" / f"bad{number:02d}.jpeg_").write_bytes(b"\xff\xd8 not a jpeg")
    train, validation = build({"name": "folder", "path": classes_root, "size": 8})
    assert len(train) + len(validation) == 12
    (report,) = logged(caplog)
    assert report == train.report()
    assert report.startswith("13 image files were skipped: ")
    assert " and 3 more (13 .jpeg_ in all); files that can be read are .apng, " in report
    assert "bad09.jpeg_ (not an image in a known format)" in report
    assert "bad10.jpeg_" not in report
    assert validation.report() == ""
    list(loader(train, 2))
    assert not logged(caplog)


def test_files_with_the_endings_of_images_are_opened_when_they_are_read(classes_root, caplog, monkeypatch):
    (classes_root / "apple" / "01.PNG").write_bytes(b"\xff\xd8 not a jpeg")
    opened = []
    monkeypatch.setattr(listing, "check_headers", lambda paths: (opened.extend(paths), check_headers(paths))[1])
    options = {"name": "folder", "path": classes_root, "size": 8, "validation_fraction": 0.3}
    train, validation = build(options)
    assert len(train) + len(validation) == 12 and len(opened) < 4 and not logged(caplog)
    read = [item["file_path_"] for dataset in (train, validation) for item in dataset]
    for dataset in (train, validation):
        dataset.warn_broken()
    assert len(read) == 12 and not any("01.PNG" in path for path in read)
    (message,) = logged(caplog)
    assert message.startswith("1 image file was skipped: ") and "01.PNG (not an image in a known format)" in message


def test_the_validation_set_has_an_image_that_opens(tmp_path):
    for number in range(12):
        save(tmp_path / f"{number}.png")
    for broken in range(10):
        (tmp_path / f"{broken}.png").write_bytes(b"nothing")
        train, validation = build({"name": "folder", "path": tmp_path, "size": 8, "validation_fraction": 0.01})
        assert train[0]["image"].shape == validation[0]["image"].shape == (8, 8, 3)
    (tmp_path / "10.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="got one readable image, expected at least two"):
        build({"name": "folder", "path": tmp_path, "validation_fraction": 0.01})


def test_one_directory_for_both_sides_is_logged_once(tmp_path, caplog):
    save(tmp_path / "0.png")
    (tmp_path / "1").write_bytes(b"nothing")
    build({"name": "folder", "path": tmp_path, "validation_path": tmp_path, "size": 8})
    assert len(logged(caplog)) == 1


def test_nothing_readable_is_an_error(tmp_path):
    save(tmp_path / "a.jpg", (64, 64))
    truncate(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="got pixels that cannot be read, as in all 1 image files"):
        ImageFiles([str(tmp_path / "a.jpg")])[0]
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="got 1 files, none of which opens as an image, the first being .*a.jpg"):
        build({"name": "folder", "path": tmp_path})


def test_missing_and_empty_directories_say_what_is_there(tmp_path):
    with pytest.raises(UserError, match="got a path that does not exist, expected a directory of images"):
        build({"name": "folder", "path": tmp_path / "none"})
    with pytest.raises(UserError, match=r"got no files, expected images \(\.apng, .*\.jpe, \.jpeg"):
        build({"name": "folder", "path": tmp_path})
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"got 1 files, none of which opens as an image, the first being .*a\.txt"):
        build({"name": "folder", "path": tmp_path})
    with pytest.raises(UserError, match="got a file, expected"):
        build({"name": "folder", "path": tmp_path / "a.txt"})
    save(tmp_path / "one.png")
    with pytest.raises(UserError, match="expected at least two"):
        build({"name": "folder", "path": tmp_path})
    for fraction in (0, 1, "half"):
        with pytest.raises(UserError, match="validation_fraction"):
            build({"name": "folder", "path": tmp_path, "validation_fraction": fraction})


def test_a_link_to_a_parent_ends(tmp_path):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "a" / "2.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    train, validation = build({"name": "folder", "path": tmp_path, "size": 8})
    assert len(train) + len(validation) == 2


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".bmp", ".gif"])
def test_directories_give_what_single_files_do(tmp_path, suffix):
    paths = [str(save(tmp_path / f"{number}{suffix}")) for number in range(2)]
    train, validation = build({"name": "folder", "path": tmp_path, "size": 8})
    assert sorted(train.paths + validation.paths) == paths


def test_floating_point_pixels_are_refused(tmp_path, caplog):
    for number in range(2):
        save(tmp_path / f"{number}.png")
    path = tmp_path / "float"
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(path, "TIFF")
    with pytest.raises(UserError, match="float: .*pixels: got floating-point"):
        tasks.read_photo(path)
    train, validation = build({"name": "folder", "path": tmp_path, "size": 8})
    assert len(train) + len(validation) == 2
    assert "float (pixels: got floating-point" in "".join(logged(caplog))


def test_decoders_that_start_programs_are_not_used(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    (tmp_path / "c.eps").write_bytes(buffer.getvalue())
    train, _ = build({"name": "folder", "path": tmp_path, "size": 4})
    assert "c.eps (not an image in a known format)" in train.report()
    (tmp_path / "c.eps").rename(tmp_path / "c.png")
    for dataset in build({"name": "folder", "path": tmp_path, "size": 4}):
        assert not any("c.png" in item["file_path_"] for item in dataset)


def test_one_name_in_two_forms_of_unicode_is_one_class(tmp_path):
    """As macOS and Linux write it."""
    for folder, name in (("train", "caf\u00e9"), ("held", "cafe\u0301"), ("train", "the"), ("held", "the")):
        save(tmp_path / folder / name / "0.png", (8, 8))
    train, validation = build(
        {"name": "folder", "path": tmp_path / "train", "validation_path": tmp_path / "held", "size": 8}
    )
    assert train.classes == ["caf\u00e9", "the"]
    assert sorted(item["class_label"] for item in validation) == [0, 1]
