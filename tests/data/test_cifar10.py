"""The CIFAR10 reader, on small archives in the official format that the tests write."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch

from tamingfast.data import build, cifar10, loader
from tamingfast.errors import UserError

COUNT = 6
MEMBERS = [*cifar10.TRAIN_MEMBERS, *cifar10.VALIDATION_MEMBERS]


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: byte strings as str opcodes and numpy's module under its name of that time."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    def save_array(self, value):
        scalar_type = pickle.GLOBAL + b"numpy\ndtype\n" + pickle.MARK + self.text(b"u1")
        dtype = scalar_type + pickle.BININT1 + b"\0" + pickle.BININT1 + b"\1" + pickle.TUPLE + pickle.REDUCE
        start = pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n" + pickle.GLOBAL + b"numpy\nndarray\n"
        start += pickle.BININT1 + b"\0" + pickle.TUPLE1 + self.text(b"b") + pickle.TUPLE3 + pickle.REDUCE
        shape = b"".join(pickle.BININT + struct.pack("<i", side) for side in value.shape)
        state = pickle.MARK + pickle.BININT1 + b"\1" + pickle.MARK + shape + pickle.TUPLE + dtype
        self.write(start + state + pickle.NEWFALSE + self.text(value.tobytes()) + pickle.TUPLE + pickle.BUILD)

    @staticmethod
    def text(value):
        return pickle.BINSTRING + struct.pack("<i", len(value)) + value

    dispatch[bytes] = save_bytes
    dispatch[np.ndarray] = save_array


def pickled(value):
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


def batch_dict(number, count=COUNT):
    data = np.random.default_rng(number).integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [(number + i) % 10 for i in range(count)]
    names = [f"image_{number}_{i}.png".encode() for i in range(count)]
    return {b"batch_label": b"batch", b"labels": labels, b"data": data, b"filenames": names}


def contents(**replaced):
    files = {name: pickled(batch_dict(number)) for number, name in enumerate(MEMBERS)}
    files["batches.meta"] = pickled({b"num_cases_per_batch": COUNT})
    files.update(replaced)
    return {name: content for name, content in files.items() if content is not None}


def archive_bytes(**replaced):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in contents(**replaced).items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(archive_bytes())
    return path


def options(path, **more):
    return {"name": "cifar10", "path": path, "md5": md5(path.read_bytes()), "images_per_batch": COUNT, **more}


def test_the_archive_gives_the_official_splits_pixels_and_labels(archive):
    train, validation = build(options(archive, flip=False))
    assert (len(train), len(validation)) == (5 * COUNT, COUNT)
    for number, dataset, base in ((0, train, 0), (3, train, 3 * COUNT), (5, validation, 0)):
        source = batch_dict(number)
        for i in range(COUNT):
            item = dataset[base + i]
            # The official layout is 1024 red, 1024 green, 1024 blue values, each row by row.
            expected = source[b"data"][i].reshape(3, 32, 32).transpose(1, 2, 0) / 127.5 - 1
            assert item["image"].shape == (32, 32, 3)
            assert item["image"].dtype == torch.float32
            np.testing.assert_array_equal(item["image"].numpy(), expected.astype(np.float32))
            assert item["class_label"] == source[b"labels"][i]
            assert item["file_path_"] == f"{MEMBERS[number]}/image_{number}_{i}.png"
    assert len(train.classes) == 10
    assert train.classes[0] == "airplane"
    assert train.classes[9] == "truck"


def test_batches_equal_items_and_flips_depend_on_the_epoch(archive):
    train, validation = build(options(archive, seed=3))
    (batch,) = loader(train, 30, epoch=2)
    train.set_epoch(2)
    for row in range(30):
        assert torch.equal(batch["image"][row], train[row]["image"])
    assert batch["class_label"].dtype == torch.int64
    plain = torch.from_numpy(train.images.astype(np.float64) / 127.5 - 1).float()
    mirrored = [torch.equal(batch["image"][row], plain[row].flip(1)) for row in range(30)]
    kept = [torch.equal(batch["image"][row], plain[row]) for row in range(30)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert any(mirrored)
    assert any(kept)
    train.set_epoch(3)
    assert any(not torch.equal(batch["image"][row], train[row]["image"]) for row in range(30))
    first = validation[0]["image"]
    validation.set_epoch(5)
    assert torch.equal(validation[0]["image"], first)


def test_extracted_directory_its_parent_and_the_archives_directory_are_accepted(archive, tmp_path):
    folder = tmp_path / "extracted" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums = {}
    for name, content in contents().items():
        (folder / name).write_bytes(content)
        sums[name] = md5(content)
    reference, _ = build(options(archive))
    for path in (folder, folder.parent):
        train, _ = build({"name": "cifar10", "path": path, "member_md5": sums, "images_per_batch": COUNT})
        assert np.array_equal(train.images, reference.images)
    train, _ = build({**options(archive), "path": archive.parent})
    assert np.array_equal(train.images, reference.images)
    with pytest.raises(UserError, match="data_batch_1: got MD5"):
        build({"name": "cifar10", "path": folder, "images_per_batch": COUNT})
    (folder / "test_batch").unlink()
    with pytest.raises(UserError, match="test_batch: got no readable file"):
        build({"name": "cifar10", "path": folder, "member_md5": sums, "images_per_batch": COUNT})


def test_an_archive_without_the_official_checksum_is_refused(archive):
    with pytest.raises(UserError, match=f"{md5(archive.read_bytes())}, expected {cifar10.ARCHIVE_MD5}"):
        build({"name": "cifar10", "path": archive, "images_per_batch": COUNT})
    with pytest.raises(UserError, match="data.md5: got None, expected text"):
        build({**options(archive), "md5": None})


class Evil:
    def __reduce__(self):
        return os.system, ("echo harm > harm.txt",)


def wrong(**fields):
    return pickled({**batch_dict(2), **{key.encode(): value for key, value in fields.items()}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "without cifar-10-batches-py/data_batch_3", id="missing"),
        pytest.param(pickle.dumps({"data": Evil()}, 2), r"refused \((posix|nt)\.system", id="os.system"),
        pytest.param(pickle.dumps({"data": eval}, 2), r"refused \(__builtin__\.eval", id="eval"),
        pytest.param(b"not a pickle", "data_batch_3: got a pickle that is refused", id="garbage"),
        pytest.param(pickled([1, 2]), "without data", id="list"),
        pytest.param(wrong(labels=[0] * (COUNT - 1)), f"{COUNT - 1} labels", id="labels too few"),
        pytest.param(wrong(labels=[10] * COUNT), "labels out of range, expected 0 to 9", id="label out of range"),
        pytest.param(pickled(batch_dict(2, COUNT + 1)), rf"\({COUNT + 1}, 3072\)", id="too many"),
    ],
)
def test_a_wrong_member_is_refused_in_one_sentence(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(archive_bytes(data_batch_3=content))
    with pytest.raises(UserError, match=message):
        build(options(path))
    assert not (tmp_path / "harm.txt").exists()


def test_a_file_that_is_no_archive_and_paths_that_hold_nothing(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(archive_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read as a tar archive"):
        build(options(path))
    with pytest.raises(UserError, match="got a path that does not exist"):
        build({"name": "cifar10", "path": tmp_path / "nowhere"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="got a directory without cifar-10-batches-py and"):
        build({"name": "cifar10", "path": tmp_path / "empty"})
    with pytest.raises(UserError, match="expected 32, the size of CIFAR10's images"):
        build({"name": "cifar10", "size": 64})


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        body = server.content
        if self.path != "/archive":
            self.send_error(404)
            return
        begin = 0
        if server.honours_ranges and self.headers.get("Range"):
            begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if begin >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        self.wfile.write(body[begin : server.stop_at])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as instance:
        instance.content, instance.stop_at, instance.honours_ranges, instance.ranges = archive_bytes(), None, True, []
        thread = threading.Thread(target=instance.serve_forever, daemon=True)
        thread.start()
        instance.url = f"http://127.0.0.1:{instance.server_address[1]}/archive"
        instance.options = {
            "name": "cifar10",
            "url": instance.url,
            "md5": md5(instance.content),
            "images_per_batch": COUNT,
        }
        yield instance
        instance.shutdown()
        thread.join()


def cached():
    folder = cifar10.cache_folder()
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_download_is_kept_and_used_again(server):
    train, _ = build(server.options)
    assert len(train) == 5 * COUNT
    assert cached() == ["cifar-10-python.tar.gz"]
    build(server.options)
    assert server.ranges == [None]


@pytest.mark.parametrize("honours_ranges", [True, False])
def test_a_download_that_stops_early_is_not_taken_for_whole_and_goes_on_later(server, honours_ranges):
    server.stop_at, server.honours_ranges = 5000, honours_ranges
    with pytest.raises(UserError, match=f"got 5000 bytes, expected {len(server.content)} bytes; run again"):
        build(server.options)
    assert cached() == ["cifar-10-python.tar.gz.partial"]
    server.stop_at = None
    train, _ = build(server.options)
    assert len(train) == 5 * COUNT
    assert cached() == ["cifar-10-python.tar.gz"]
    assert server.ranges == [None, "bytes=5000-"]


def test_a_partial_file_of_other_bytes_is_thrown_away(server):
    folder = cifar10.cache_folder()
    folder.mkdir(parents=True)
    partial = folder / "cifar-10-python.tar.gz.partial"
    for stale in (b"x" * 100, b"x" * (len(server.content) + 1)):
        partial.write_bytes(stale)
        with pytest.raises(UserError, match="expected MD5 .* run again to download anew"):
            build(server.options)
        assert cached() == []
    # A process that died between the last byte and the renaming leaves a whole partial file.
    partial.write_bytes(server.content)
    build(server.options)
    assert cached() == ["cifar-10-python.tar.gz"]


def test_wrong_bytes_missing_pages_and_unreachable_servers(server):
    with pytest.raises(UserError, match=f"expected MD5 {cifar10.ARCHIVE_MD5}"):
        build({**server.options, "md5": cifar10.ARCHIVE_MD5})
    assert cached() == []
    with pytest.raises(UserError, match="got HTTP 404"):
        build({**server.options, "url": server.url + "s"})
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=r"got no answer .* connect to the network"):
        build({**server.options, "url": f"http://127.0.0.1:{port}/archive"})
    assert cached() == []
