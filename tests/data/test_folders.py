"""Directories and lists of image files: classes, the split, broken files, orientation and colour modes."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tamingfast import tasks
from tamingfast.data import build, folders, loader
from tamingfast.data.folders import CustomTest, CustomTrain, ImageFiles, ImageList, read_rgb
from tamingfast.errors import UserError


def save(path, size=(24, 16), seed=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(path.name.encode()) if seed is None else seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path


def truncate(path, keep=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


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
        assert dataset.report() == ""
    (batch,) = loader(validation, len(validation), 0, 0)
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
    with pytest.raises(UserError, match="class folder 'pear', but the training classes are Zebra, apple, moth"):
        build({"name": "folder", "path": classes_root, "validation_path": held})
    (held / "pear" / "a.png").rename(held / "a.png")
    with pytest.raises(UserError, match=r"a\.png outside any class folder"):
        build({"name": "folder", "path": classes_root, "validation_path": held})


def told(caplog) -> list[str]:
    """What has been logged since the last call."""
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return messages


def test_files_that_do_not_open_are_skipped_counted_and_named_at_once(classes_root, caplog):
    for number in range(13):
        (classes_root / "apple" / f"bad{number:02d}.jpg").write_bytes(b"\xff\xd8 not a jpeg")
    train, validation = build({"name": "folder", "path": classes_root, "size": 8})
    assert len(train) + len(validation) == 12
    (report,) = told(caplog)
    assert report == train.report()
    assert report.startswith("13 image files were skipped: ")
    assert report.endswith(" and 3 more")
    assert "bad09.jpg (it is not an image that can be read)" in report
    assert "bad10.jpg" not in report
    assert validation.report() == ""
    list(loader(train, 2, 0, 0))
    assert not told(caplog)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_truncated_pixels_are_replaced_by_the_next_image_and_reported(tmp_path, workers, suffix, caplog):
    paths = [str(save(tmp_path / f"{number}{suffix}", (64, 64))) for number in range(6)]
    truncate(tmp_path / f"2{suffix}")
    truncate(tmp_path / f"3{suffix}")
    truncate(tmp_path / f"5{suffix}")
    dataset = ImageFiles(paths, 16)
    batches = list(loader(dataset, 1, 0, 0, workers=workers, shuffle=False))
    assert "3 image files were skipped" in "".join(told(caplog))
    read = [batch["file_path_"][0] for batch in batches]
    assert read == [paths[i] for i in (0, 1, 4, 4, 4, 0)]
    assert [path for path, _ in dataset.broken] == [paths[i] for i in (2, 3, 5)]
    list(loader(dataset, 1, 0, 0))
    assert not told(caplog)


def test_unreadable_files_are_told_once_also_when_an_epoch_is_left(tmp_path, caplog):
    paths = [str(save(tmp_path / f"{number}.png", (64, 64))) for number in range(6)]
    for number in (0, 5):
        truncate(tmp_path / f"{number}.png")
    dataset = ImageFiles(paths, 16)
    for number, _ in enumerate(loader(dataset, 1, 0, 0, shuffle=False)):
        if number == 2:
            break
    assert [message.count(".png") for message in told(caplog)] == [1]
    list(loader(dataset, 1, 0, 0, shuffle=False))
    (second,) = told(caplog)
    assert "5.png" in second and "0.png" not in second


def test_one_directory_for_both_sides_is_told_of_once(tmp_path, caplog):
    save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"nothing")
    build({"name": "folder", "path": tmp_path, "validation_path": tmp_path, "size": 8})
    assert len(told(caplog)) == 1


def test_nothing_readable_is_an_error(tmp_path):
    save(tmp_path / "a.jpg", (64, 64))
    truncate(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="None of the 1 image files can be read"):
        ImageFiles([str(tmp_path / "a.jpg")])[0]
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="None of the 1 image files in"):
        build({"name": "folder", "path": tmp_path})


def test_missing_and_empty_directories_say_what_is_there(tmp_path):
    with pytest.raises(UserError, match="does not exist, but a directory of images is expected"):
        build({"name": "folder", "path": tmp_path / "none"})
    with pytest.raises(UserError, match=r"holds no files, but images ending in \.jpg, \.jpeg, \.png, \.webp"):
        build({"name": "folder", "path": tmp_path})
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"holds 1 other file, a\.txt"):
        build({"name": "folder", "path": tmp_path})
    with pytest.raises(UserError, match="is a file"):
        build({"name": "folder", "path": tmp_path / "a.txt"})
    save(tmp_path / "one.png")
    with pytest.raises(UserError, match="at least two are needed"):
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


def test_random_crops_and_flips_are_pure_functions_of_seed_epoch_and_index(tmp_path):
    paths = [str(save(tmp_path / f"{number}.png", (40, 10), seed=number)) for number in range(4)]

    def views(seed, epoch, workers=0):
        dataset = ImageFiles(paths, 10, random_crop=True, flip=True, seed=seed)
        return torch.cat([b["image"] for b in loader(dataset, 2, 0, epoch, workers=workers, shuffle=False)])

    assert torch.equal(views(0, 0), views(0, 0, workers=2))
    assert not torch.equal(views(0, 0), views(0, 1))
    assert not torch.equal(views(0, 0), views(1, 0))
    dataset = ImageFiles(paths, 10, random_crop=True, flip=True)
    found = set()
    source = np.asarray(Image.open(paths[0]))
    for epoch in range(60):
        dataset.set_epoch(epoch)
        pixels = ((dataset[0]["image"].numpy() + 1) * 127.5).round().astype(np.uint8)
        places = [
            (left, flipped)
            for left in range(31)
            for flipped in (False, True)
            if np.array_equal(source[:, left : left + 10][:, :: -1 if flipped else 1], pixels)
        ]
        assert len(places) == 1
        found.add(places[0])
    assert {flipped for _, flipped in found} == {False, True}
    assert max(left for left, _ in found) > 25
    assert min(left for left, _ in found) < 5


def test_centre_crop_after_resizing_the_shorter_side(tmp_path):
    gradient = np.broadcast_to(np.arange(120, dtype=np.uint8)[None, :, None] * 2, (60, 120, 3))
    Image.fromarray(np.ascontiguousarray(gradient)).save(tmp_path / "wide.png")
    image = ImageFiles([str(tmp_path / "wide.png")], 30)[0]["image"]
    assert image.shape == (30, 30, 3)
    columns = ((image[15, :, 0] + 1) * 127.5).numpy()
    assert abs(columns[0] - 61) <= 2
    assert abs(columns[-1] - 177) <= 2
    enlarged = ImageFiles([str(tmp_path / "wide.png")], 100)[0]["image"]
    assert enlarged.shape == (100, 100, 3)
    assert ImageFiles([str(tmp_path / "wide.png")])[0]["image"].shape == (60, 120, 3)


def test_pictures_stay_in_memory_as_far_as_there_is_room(tmp_path, monkeypatch):
    paths = [str(save(tmp_path / f"{number}.png")) for number in range(3)]
    decoded = []

    def read(path, short_side):
        decoded.append(path)
        return read_rgb(path, short_side)

    monkeypatch.setattr(folders, "read_rgb", read)
    monkeypatch.setattr(folders, "KEPT_BYTES", 2 * 3 * 24 * 16 + 100)
    dataset = ImageFiles(paths, 16, random_crop=True)
    before = [dataset[number]["image"] for number in range(3)]
    again = [dataset[number]["image"] for number in range(3)]
    assert decoded == [*paths, paths[2]]
    assert all(map(torch.equal, before, again))


def test_large_jpegs_keep_their_shape_and_colours_when_reduced(tmp_path):
    array = np.zeros((700, 1100, 3), np.uint8)
    array[:, :550] = (200, 40, 40)
    array[:, 550:] = (30, 60, 220)
    Image.fromarray(array).save(tmp_path / "a.jpg", quality=95)
    image = read_rgb(tmp_path / "a.jpg", 35)
    assert image.size == (55, 35)
    assert np.abs(np.asarray(image)[:, :25].astype(int) - (200, 40, 40)).max() < 8
    assert np.abs(np.asarray(image)[:, 30:].astype(int) - (30, 60, 220)).max() < 8
    # Reducing while decoding must not cost sharpness: the border of the colours stays a pixel or two wide.
    sharp = np.asarray(read_rgb(tmp_path / "a.jpg", 350)).astype(int)
    assert np.abs(sharp[:, 271] - (200, 40, 40)).max() < 20
    assert np.abs(sharp[:, 278] - (30, 60, 220)).max() < 20


def test_exif_orientation_is_honoured(tmp_path):
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown upright, the left half is on top
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    image = np.asarray(read_rgb(tmp_path / "turned.png"))
    assert image.shape == (40, 20, 3)
    assert image[:20].min() == 255
    assert image[20:].max() == 0
    assert ImageFiles([str(tmp_path / "turned.png")], 10)[0]["image"].shape == (10, 10, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_agrees_with_pillow(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned{suffix}", (12, 8), exif=exif)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(read_rgb(path)), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".bmp", ".gif"])
def test_directories_give_what_single_files_do(tmp_path, suffix):
    paths = [str(save(tmp_path / f"{number}{suffix}")) for number in range(2)]
    train, validation = build({"name": "folder", "path": tmp_path, "size": 8})
    assert sorted(train.paths + validation.paths) == paths


def test_floating_point_pixels_are_refused(tmp_path, caplog):
    for number in range(2):
        save(tmp_path / f"{number}.png")
    path = tmp_path / "float.tif"
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(path)
    with pytest.raises(UserError, match=r"float\.tif: got a file that cannot be read .*floating-point numbers"):
        tasks.read_photo(path)
    train, validation = build({"name": "folder", "path": tmp_path, "size": 8})
    assert len(train) + len(validation) == 2
    assert "float.tif (its pixels are floating-point numbers" in "".join(told(caplog))


def test_faulty_exif_does_not_lose_the_picture(tmp_path):
    path = save(tmp_path / "a.jpg", (12, 8), exif=b"Exif\0\0no notes about a camera")
    assert read_rgb(path).size == (12, 8)


def _palette_with_transparency():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "expected", "tolerance"),
    [
        pytest.param(lambda: Image.new("L", (4, 4), 77), ".png", (77, 77, 77), 0, id="gray"),
        pytest.param(lambda: Image.new("1", (4, 4), 1), ".png", (255, 255, 255), 0, id="bilevel"),
        pytest.param(lambda: Image.new("LA", (4, 4), (9, 0)), ".png", (255, 255, 255), 0, id="gray, transparent"),
        pytest.param(lambda: Image.new("RGBA", (4, 4), (9, 8, 7, 255)), ".png", (9, 8, 7), 0, id="opaque"),
        pytest.param(lambda: Image.new("RGBA", (4, 4), (9, 8, 7, 0)), ".png", (255, 255, 255), 0, id="transparent"),
        pytest.param(lambda: Image.new("RGBA", (4, 4), (0, 0, 200, 51)), ".png", (204, 204, 244), 1, id="veil"),
        pytest.param(_palette_with_transparency, ".png", (255, 255, 255), 0, id="palette, transparent"),
        pytest.param(lambda: Image.new("CMYK", (4, 4), (0, 255, 255, 0)), ".jpg", (255, 0, 0), 6, id="CMYK"),
        pytest.param(lambda: Image.fromarray(np.full((4, 4), 40000, np.uint16)), ".png", (156,) * 3, 0, id="16 bits"),
        pytest.param(
            lambda: Image.fromarray(np.full((4, 4), 65535, np.uint16)), ".png", (255,) * 3, 0, id="16 bits, white"
        ),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path, image, suffix, expected, tolerance):
    path = tmp_path / f"image{suffix}"
    image().save(path)
    converted = read_rgb(path)
    assert converted.mode == "RGB"
    assert np.abs(np.asarray(converted).astype(int) - expected).max() <= tolerance


def test_decoders_that_start_programs_are_not_used(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    (tmp_path / "c.png").write_bytes(buffer.getvalue())
    train, _ = build({"name": "folder", "path": tmp_path, "size": 4})
    assert "c.png (it is not an image that can be read)" in train.report()


def test_lists_of_paths_serve_the_originals_data_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "pictures" / "a.png", (30, 20), seed=1)
    absolute = save(tmp_path / "b.jpg", (20, 30))
    (tmp_path / "list.txt").write_text(f"pictures/a.png\n\n{absolute}\nmissing.png\n")
    for dataset in (CustomTrain(16, "list.txt"), CustomTest(16, "list.txt"), ImageList("list.txt", 16)):
        assert [item["file_path_"] for item in dataset] == ["pictures/a.png", str(absolute)]
        assert dataset[0]["image"].shape == (16, 16, 3)
        assert "missing.png (No such file or directory)" in dataset.report()
    reference = ImageFiles(["pictures/a.png"], 16)[0]["image"]
    assert torch.equal(CustomTrain(size=16, training_images_list_file="list.txt")[0]["image"], reference)
    assert torch.equal(CustomTest(size=16, test_images_list_file="list.txt")[0]["image"], reference)
    (tmp_path / "none.txt").write_text("x.png\ny.png\n")
    with pytest.raises(UserError, match=r"None of the 2 images that none\.txt lists can be opened, x\.png"):
        ImageList("none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        ImageList("empty.txt")
    with pytest.raises(UserError, match="cannot be read as a list"):
        ImageList("nowhere.txt")
