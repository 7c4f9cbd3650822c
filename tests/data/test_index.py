"""The index of a run's files: what it spares, what it notices, and what of it is trusted."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tiny
from picture_files import save, truncate
from runs import same_run
from safetensors.numpy import save_file

from tamingfast import UserError
from tamingfast.checkpoints import run_directory
from tamingfast.data import Index, build, index, listing
from tamingfast.training import vqgan


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for number in range(12):
        save(root / f"{'ab'[number % 2]}/{number:02d}.png", (16, 16))
    (root / "a/no image").write_bytes(b"x")
    (root / "a/note.txt").write_text("x")
    return root


def settings(root):
    return {"name": "folder", "path": str(root), "size": 16, "validation_fraction": 0.2}


def listed(root, path, monkeypatch):
    """(paths of both sets with the index, whether a folder was listed)"""
    walks = []
    monkeypatch.setattr(listing, "_walk", lambda each: (walks.append(each), walk(each))[1])
    found = Index(path)
    sets = build(settings(root), found)
    monkeypatch.setattr(listing, "_walk", walk)
    found.save(path)
    return [each.paths for each in sets], sets[0].broken, bool(walks)


walk = listing._walk


def test_files_are_listed_once_and_again_after_a_change(folder, tmp_path, monkeypatch):
    path = tmp_path / "data.index"
    paths, broken, walked = listed(folder, path, monkeypatch)
    assert walked and any("no image" in each for each, _ in broken)
    before = path.stat()
    assert listed(folder, path, monkeypatch) == (paths, broken, False)
    assert path.stat().st_ino == before.st_ino  # not written again
    save(folder / "b/99.png", (16, 16))
    more, _, walked = listed(folder, path, monkeypatch)
    assert walked and sum(map(len, more)) == 13
    assert listed(folder, path, monkeypatch)[2] is False
    (folder / "b/99.png").rename(folder / "b/98.png")
    assert listed(folder, path, monkeypatch)[2]


@pytest.mark.parametrize("content", [b"", b"no index", None, {"names": ["/etc/passwd"]}, {"names": ["a/../../x.png"]}])
def test_an_index_that_cannot_be_followed_is_written_again(folder, tmp_path, monkeypatch, content):
    path = tmp_path / "data.index"
    paths, _, _ = listed(folder, path, monkeypatch)
    if content is None:
        path.unlink()
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to(path.with_name("pipe"))
        assert Index(path).find(f"images in {folder}") is None
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        arrays = {"0/names": index.packed(content["names"]), "0/skipped": index.packed([]),
                  "0/folders": index.packed([]), "0/times": np.array([], np.int64)}  # fmt: skip
        save_file(arrays, path, {"format": index.FORMAT, "places": f'["images in {folder}"]'})
    assert listed(folder, path, monkeypatch)[::2] == (paths, True)
    assert listed(folder, path, monkeypatch)[::2] == (paths, False)


def test_names_of_any_bytes_come_back():
    names = ["", "a\n/b.png", os.fsdecode(b"caf\xe9.png"), "\u2028"]
    assert index.unpacked(index.packed(names)) == names and index.unpacked(index.packed([])) == []


class TestRuns:
    def train(self, root, out, steps, resume=False, **training):
        config = tiny.config(tiny.VQGAN, steps=steps, batch_size=2, **training) | {"data": settings(root)}
        return vqgan.train(config, out, resume, "cpu")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_broken_files_in_the_middle_change_nothing_for_workers_and_resumed_runs(
        self, folder, tmp_path, workers, monkeypatch, caplog
    ):
        truncate(folder / "a/04.png", 0.5)
        (folder / "b/07.png").write_bytes(b"")
        whole = self.train(folder, tmp_path / "whole", 7)
        assert "04.png" in caplog.text and "07.png" in caplog.text
        out = self.train(folder, tmp_path / "parts", 3, workers=workers)
        monkeypatch.setattr(listing, "_walk", lambda root: pytest.fail("listed again"))
        monkeypatch.setattr(listing, "judged", lambda *_: pytest.fail("judged again"))
        self.train(folder, out, 7, True, workers=workers)
        same_run(out, whole)

    def test_other_files_than_the_run_began_with_are_refused(self, folder, tmp_path):
        out = self.train(folder, tmp_path / "run", 1)
        assert (out / run_directory.INDEX).exists()
        (folder / "a/00.png").rename(folder / "a/0x.png")
        with pytest.raises(UserError, match=r"images in .*: got files without a/00.png, expected those that the run"):
            self.train(folder, out, 2, True)
        (folder / "a/0x.png").rename(folder / "a/00.png")
        self.train(folder, out, 2, True)
