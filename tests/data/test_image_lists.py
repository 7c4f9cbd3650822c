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
