"""Text files that list paths of images."""

from __future__ import annotations

import pytest
import torch
from picture_files import save

from tamingfast.data.image_files import ImageFiles
from tamingfast.data.image_lists import CustomTest, CustomTrain, ImageList
from tamingfast.errors import UserError


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
    with pytest.raises(
        UserError, match=r"none\.txt: got 2 paths, none of which opens as an image, the first being x\.png"
    ):
        ImageList("none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="got an empty file"):
        ImageList("empty.txt")
    with pytest.raises(UserError, match="expected a text file with one image path per line"):
        ImageList("nowhere.txt")


@pytest.mark.parametrize(
    "written",
    [
        '"{}"', '"{}" ', "{}\u00a0", "\ufeff{}", "{}\u200b", "\u3000{}\t", "{}\x1a",
    ],
    ids=ascii,
)  # fmt: skip
def test_what_windows_writes_around_a_path_is_no_part_of_it(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b c.png"):
        save(tmp_path / "pictures" / name, (30, 20))
    lines = [written.format(path) for path in ("pictures/a.png", "pictures\\b c.png")]
    (tmp_path / "list.txt").write_text("\n".join([*lines, "\x1a"]), encoding="utf-8")
    listed = ImageList("list.txt", 16)
    assert listed.paths == ["pictures/a.png", "pictures/b c.png"]
    assert not listed.report()


def test_a_file_of_the_very_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ['"a.png"', "a.png", "b\\c.png", "b/c.png", "\ufeffd.png", "d.png"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / "new.png", (30, 20), seed=number).rename(tmp_path / name)
    (tmp_path / "list.txt").write_text("\n".join(names), encoding="utf-8")
    assert ImageList("list.txt").paths == names
