"""Files that are no ordinary images: among images they stop nothing and are named; alone they are refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import picture_files
import pytest
from picture_files import logged, save, truncate
from PIL import Image, PngImagePlugin, features

from tamingfast import UserError, tasks
from tamingfast.data import build
from tamingfast.data.conditions import make
from tamingfast.data.image_files import ImageFiles
from tamingfast.data.rgb import read_rgb


def folder(path: Path, **options) -> list[str]:
    """The files that training and validation use, by their paths in the folder."""
    train, validation = build({"name": "folder", "path": path, "size": 8} | options)
    return sorted(os.path.relpath(each, path) for each in train.paths + validation.paths)


def shown(path: Path) -> list[str]:
    """The names of the files in the folder that are seen, after naming the others."""
    datasets = build({"name": "folder", "path": path, "size": 8})
    found = {os.path.basename(item["file_path_"]) for dataset in datasets for item in dataset}
    for dataset in datasets:
        dataset.warn_broken()
    return sorted(found)


# --- formats ----------------------------------------------------------------------------------------------------------

READ = {
    "a.jfif": "JPEG", "b.jpe": "JPEG", "c.JPG": "JPEG", "d.ppm": "PPM", "e.pgm": "PPM", "f.pnm": "PPM", "g.pbm": "PPM",
    "h.bmp": "BMP", "i.TIFF": "TIFF", "j.webp": "WEBP", "k.gif": "GIF", "l": "PNG", "m.jpg_large": "JPEG",
    "n.png": "JPEG", "o.dib": "BMP", "p.mpo": "JPEG",
}  # fmt: skip
MODES = {"e.pgm": "L", "g.pbm": "1", "k.gif": "P"}


def test_formats_are_read_whatever_the_ending_says(tmp_path, caplog):
    for number, (name, form) in enumerate(READ.items()):
        image = Image.fromarray(np.full((12, 12, 3), 10 * number, np.uint8)).convert(MODES.get(name, "RGB"))
        image.save(tmp_path / name, format=form)
    assert folder(tmp_path) == sorted(READ)
    assert [path.name for path in tasks.image_files([tmp_path])] == sorted(READ)
    assert not logged(caplog)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_can(tmp_path):
    for number in range(2):
        save(tmp_path / f"{number}.avif")
    assert folder(tmp_path) == ["0.avif", "1.avif"]


def test_what_is_left_out_is_counted_and_named_in_one_warning(tmp_path, caplog):
    for number in range(2):
        save(tmp_path / f"cat/{number}.png")
        picture_files.save(tmp_path / f"dog/{number}.png").rename(tmp_path / f"dog/{number}.jfif")
        (tmp_path / "fox").mkdir(exist_ok=True)
        (tmp_path / f"fox/{number}.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
        (tmp_path / f"cat/{number}.svg").write_text("<svg/>")
        (tmp_path / f"cat/{number}.txt").write_text("a cat")  # a caption, which nobody takes for an image
    (tmp_path / "owl").mkdir()
    assert folder(tmp_path) == ["cat/0.png", "cat/1.png", "dog/0.jfif", "dog/1.jfif"]
    (message,) = logged(caplog)
    for word in ("fox (a folder without a readable image)", "owl (", "fox/0.heic", "fox/1.heic", "cat/1.svg", ".jfif"):
        assert word in message
    assert message.startswith("6 image files were skipped: ") and ".txt" not in message and "dog" not in message


def test_many_are_counted_by_their_endings(tmp_path, caplog):
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    for number in range(12):
        (tmp_path / f"{number}.heic").write_bytes(b"x")
    (tmp_path / "none").write_bytes(b"x")
    folder(tmp_path)
    assert "13 image files were skipped: " in (message := logged(caplog)[0])
    assert " and 3 more (12 .heic, 1 without an ending in all)" in message


# --- what else lies in a folder ---------------------------------------------------------------------------------------

CLUTTER = ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png", "__MACOSX/._0.png", "@eaDir/0.png",
           "Icon\r")  # fmt: skip


def test_what_file_managers_leave_is_no_part_of_the_data(tmp_path, caplog):
    for name in CLUTTER:
        save(tmp_path / "x.png").rename(tmp_path / "x")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x").rename(tmp_path / name)
    save(tmp_path / "0.png"), save(tmp_path / "1.png")
    assert folder(tmp_path) == ["0.png", "1.png"]
    assert [path.name for path in tasks.image_files([tmp_path])] == ["0.png", "1.png"]
    assert not logged(caplog)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as each:
        each.bind(path.name)
    os.chdir(here)


STRANGE = {
    "a pipe": fifo,
    "a socket": listening,
    "a link to a pipe": lambda path: (fifo(path.with_name(".pipe")), path.symlink_to(path.with_name(".pipe"))),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "an empty file": lambda path: path.touch(),
    "text": lambda path: path.write_text("no image"),
    "P6 and nothing": lambda path: path.write_bytes(b"P6 "),
    "P6 with a long word": lambda path: path.write_bytes(b"P6 " + b"9" * 100),
    "a PNG's first bytes": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "a cut header": lambda path: truncate(save(path), 0.02),
    "EPS": lambda path: Image.new("RGB", (4, 4)).save(path, "EPS"),
    "a directory of that name": lambda path: path.mkdir(),
    "floating point": lambda path: Image.fromarray(np.ones((4, 4), np.float32)).save(path, "TIFF"),
    "LAB": lambda path: Image.new("LAB", (4, 4)).save(path, "TIFF"),
    "a bomb": lambda path: picture_files.png(path, 1, 0, [b""], 400_000_000),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_image_stops_nothing_and_is_named(tmp_path, caplog, name):
    save(tmp_path / "0.png"), save(tmp_path / "1.png")
    STRANGE[name](tmp_path / "strange.png")
    assert shown(tmp_path) == ["0.png", "1.png"]
    assert "strange.png (" in "".join(logged(caplog))
    assert [path.name for path in tasks.image_files([tmp_path])] == ["0.png", "1.png"]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(tmp_path / each) for each in ("0.png", "strange.png", "1.png")))
    original = {
        "target": "taming.data.custom.CustomTrain",
        "params": {"size": 8, "training_images_list_file": str(listed)},
    }
    assert {Path(item["file_path_"]).name for item in build({"train": original})[0]} == {"0.png", "1.png"}
    with pytest.raises(UserError, match="strange.png: got ") as raised:
        tasks.read_photo(tmp_path / "strange.png")
    assert "\n" not in str(raised.value)


def test_pixels_that_cannot_be_read_do_not_stop_a_command_on_a_folder(tmp_path, caplog):
    save(tmp_path / "0.png")
    truncate(save(tmp_path / "1.png", (64, 64)))
    assert [path.name for path in tasks.image_files([tmp_path])] == ["0.png"]
    assert "1.png (image file is truncated" in logged(caplog)[0]
    with pytest.raises(UserError, match=r"1\.png: got a file that cannot be read"):
        tasks.read_photo(tasks.image_files([tmp_path / "1.png"])[0])


def test_folders_are_read_once_and_named_if_they_are_not_read(tmp_path, caplog):
    for number in range(2):
        save(tmp_path / f"cat/{number}.png")
    (tmp_path / "kitten").symlink_to("cat", target_is_directory=True)
    (tmp_path / "cat" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert folder(tmp_path) == ["cat/0.png", "cat/1.png"]
    assert "kitten (a link to a folder that is read already)" in logged(caplog)[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads what nobody may")
def test_what_may_not_be_read_is_named(tmp_path, caplog):
    for name in ("0.png", "1.png", "mine.png", "ours/2.png"):
        save(tmp_path / name)
    (tmp_path / "mine.png").chmod(0), (tmp_path / "ours").chmod(0)
    try:
        assert folder(tmp_path) == ["0.png", "1.png"]
        assert re.search(r"ours \(Permission denied\).*mine\.png \(Permission denied\)", logged(caplog)[0])
    finally:
        (tmp_path / "ours").chmod(0o700)


NAMES = [b"caf\xe9.png", "café\n.png".encode(), b" lead.png", b"trail .png", "a\x85\u2028\f.png".encode()]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_bytes(tmp_path, caplog, name):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    save(tmp_path / "0.png").rename(path), save(tmp_path / "1.png")
    assert len(folder(tmp_path)) == 2
    assert not logged(caplog)


def test_files_that_vanish_are_replaced_and_named(tmp_path, caplog):
    paths = [str(save(tmp_path / f"{number}.png")) for number in range(3)]
    images = ImageFiles(paths, 8)
    Path(paths[1]).unlink()
    Path(paths[2]).unlink(), os.mkfifo(paths[2])
    assert [item["file_path_"] for item in images] == [paths[0]] * 3
    images.warn_broken()
    assert "1.png" in (message := logged(caplog)[0]) and "2.png" in message


# --- pixels -----------------------------------------------------------------------------------------------------------

OF_TEXT = {
    "plain": lambda info, text: info.add_text("note", text),
    "packed": lambda info, text: info.add_text("note", text, zip=True),
    "international": lambda info, text: info.add_itxt("note", text, "en", "note"),
    "international, packed": lambda info, text: info.add_itxt("note", text, "en", "note", zip=True),
    "many": lambda info, text: [info.add_text(f"note{n}", text[:700_000], zip=True) for n in range(100)],
    "behind the pixels": lambda info, text: info.add(b"zTXt", PACKED, after_idat=True),
}
PACKED = b"note\0\0" + zlib.compress(b"a" * 3_000_000)


@pytest.mark.parametrize("name", OF_TEXT)
def test_long_texts_do_not_lose_the_picture(tmp_path, name):
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "kept")
    OF_TEXT[name](info, "a" * 3_000_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.png", (12, 8), seed=1, pnginfo=info, exif=exif)
    expected = save(tmp_path / "b.png", (12, 8), seed=1, exif=exif)
    assert np.array_equal(np.asarray(read_rgb(path)), np.asarray(read_rgb(expected)))
    assert read_rgb(path).size == (8, 12)  # other notes, such as the camera's orientation, still count
    save(tmp_path / "c.png")
    assert len(folder(tmp_path)) == 3


def test_a_long_profile_does_not_lose_the_picture(tmp_path):
    path = save(tmp_path / "a.png", (12, 8), icc_profile=bytes(3_000_000))
    assert read_rgb(path).size == (12, 8)


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), ".tif", (255, 0, 0)),
        (Image.new("YCbCr", (4, 4), (255, 128, 128)), ".tif", (255, 255, 255)),
        (Image.new("I", (4, 4), 40000), ".tif", (156, 156, 156)),
        (Image.fromarray(np.full((4, 4), 40000, ">u2")), ".tif", (156, 156, 156)),
        (Image.new("P", (4, 4), 1), ".bmp", (1, 1, 1)),
        (Image.new("RGBA", (4, 4), (9, 8, 7, 0)), ".gif", (255, 255, 255)),
    ],
    ids=["CMYK", "YCbCr", "32 bits", "16 bits", "palette", "GIF"],
)
def test_other_modes_become_rgb(tmp_path, image, suffix, expected):
    image.save(tmp_path / f"a{suffix}")
    assert np.abs(np.asarray(read_rgb(tmp_path / f"a{suffix}")).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_of_several_pictures_the_first_is_read(tmp_path, suffix):
    first, second = (Image.new("RGB", (8, 8), color) for color in ("black", "white"))
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second])
    assert np.asarray(read_rgb(tmp_path / f"a{suffix}")).max() <= 1


@pytest.mark.parametrize(("depth", "values"), list(itertools.product([1, 2, 4], [True, False])))
def test_labels_of_few_bits_are_those_of_the_file(tmp_path, depth, values):
    kind = make("segmentation", {"labels": 2**depth})
    chunks = [] if values else [(b"PLTE", bytes(3 * 2**depth))]
    path = picture_files.png(tmp_path / "a.png", depth, 0 if values else 3, [b"\xff", b"\0"], 8 // depth, *chunks)
    assert kind.raw(path).tolist() == [[2**depth - 1] * (8 // depth), [0] * (8 // depth)]


# --- memory -----------------------------------------------------------------------------------------------------------

PEAKS = """
import json, resource, sys
import numpy as np
from tamingfast.data import build
for settings in json.loads(sys.argv[1]):
    for dataset in build({"size": 256} | settings):
        shapes = {value.shape[:2] for item in dataset for value in item.values() if np.ndim(value) == 3}
        assert shapes == {(256, 256)}, shapes
    print(settings["path"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
KINDS = {"edges": {}, "lowres": {}, "coord": {}, "depth": {}, "segmentation": {"labels": 150}, "keypoints": {}}


def test_thin_images_take_no_more_memory_than_others(tmp_path):
    sizes = {"plain": (300, 300), "thin": (1, 3000), "wide": (3000, 1)}
    tried = []
    for shape, kind in itertools.product(sizes, KINDS):
        root, size = tmp_path / shape / kind, sizes[shape]
        (root / "conditions").mkdir(parents=True)
        for number in range(2):
            save(root / f"images/{number}.png", size)
            if kind == "keypoints":
                people = {"width": size[0], "height": size[1], "people": [[[0, 0]] * 17]}
                (root / f"conditions/{number}.json").write_text(json.dumps(people))
            else:
                Image.new("L", size).save(root / f"conditions/{number}.png")
        tried.append({"name": "conditions", "path": str(root), "kind": kind, "short_side": 300} | KINDS[kind])
        if kind == "edges":
            tried += [{"name": "folder", "path": str(root / "images"), "random_crop": crop} for crop in (True, False)]
    done = subprocess.run([sys.executable, "-c", PEAKS, json.dumps(tried)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = [line.split() for line in done.stdout.splitlines()]
    plain = max(int(peak) for path, peak in peaks if "/plain/" in path)
    assert all(int(peak) - plain < 100 for _, peak in peaks), peaks


def test_crops_of_enlarged_images_are_those_of_the_whole(tmp_path):
    path = str(save(tmp_path / "a.png", (40, 24)))
    images = ImageFiles([path], 48, random_crop=True, flip=True, short_side=64)
    whole = np.asarray(read_rgb(path).resize((107, 64), Image.Resampling.BICUBIC)).astype(int)
    found = set()
    for epoch in range(12):
        images.set_epoch(epoch)
        crop = ((images[0]["image"].numpy() + 1) * 127.5).round().astype(int)
        near = {
            (top, left, flipped)
            for top, left, flipped in itertools.product(range(17), range(60), (False, True))
            if np.abs(whole[top : top + 48, left : left + 48][:, :: -1 if flipped else 1] - crop).max() <= 1
        }
        assert len(near) == 1
        found |= near
    assert len(found) > 6


def test_pictures_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    path = picture_files.png(tmp_path / "a.png", 8, 2, [b""], 12_000_000)
    monkeypatch.setattr("tamingfast.data.rgb.available_memory", lambda device: 100_000_000)
    with pytest.raises(UserError, match="a.png: got .*12000000x1, expected at most what fits into this"):
        read_rgb(path)
    with pytest.raises(UserError, match="size: got 1000000000, expected a square that fits"):
        folder(tmp_path, size=10**9)
