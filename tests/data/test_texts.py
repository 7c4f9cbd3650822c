"""Text files as programs on Windows and others write them: lists of images, class names, JSON."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from picture_files import logged, save

from tamingfast import UserError
from tamingfast.data.conditions import Keypoints, scenes
from tamingfast.data.image_lists import ImageList
from tamingfast.files import lines_of, read_text

NAMES = ["a.png", "b c.png", " lead.png", "trail .png", "next\x85line.png", "line\u2028and\u2029paragraph.png",
         "feed\f\v\x1c\x1d\x1e.png", "ünï.png", "\ufeffmark.png"]  # fmt: skip
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be with a mark"]


def encoded(text: str, encoding: str) -> bytes:
    return ("\ufeff" + text).encode("utf-16-be") if encoding == "utf-16-be with a mark" else text.encode(encoding)


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        save(tmp_path / "x.png").rename(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_are_read_as_they_are_meant(images, caplog, encoding, end):
    (images / "list.txt").write_bytes(encoded(end.join([*NAMES, "", ""]), encoding))
    assert ImageList("list.txt", 8).paths == NAMES
    assert not logged(caplog)


def test_a_single_line_without_an_end(images):
    (images / "list.txt").write_bytes("\ufeffa.png".encode())
    assert ImageList("list.txt").paths == ["a.png"]


def test_spaces_around_a_path_are_left_out_only_if_they_are_no_part_of_it(images, caplog):
    (images / "list.txt").write_text("  a.png\t\n lead.png\nb c.png \n nowhere.png\n")
    assert ImageList("list.txt").paths == ["a.png", " lead.png", "b c.png"]
    assert " nowhere.png (No such file" in logged(caplog)[0]


def test_names_that_are_no_utf_8(images):
    name = os.fsdecode(b"caf\xe9.png")
    save(images / "x.png").rename(images / name)
    (images / "list.txt").write_bytes(b"a.png\ncaf\xe9.png\n")
    assert ImageList("list.txt").paths == ["a.png", name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png\n".encode("utf-16-le"), "got a file that is no text in UTF-8, .* save it as UTF-8"),  # without a mark
        (b"\xff\xfea", "cannot be read as UTF-8"),
        (bytes(100), "no text"),
        (b"", "got an empty file"),
        (b" \r\n\t\n", "got an empty file"),
    ],
)
def test_what_is_no_list_is_refused(images, content, message):
    (images / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"list\.txt: .*{message}"):
        ImageList("list.txt")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_files_are_read(tmp_path, make):
    make(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"list\.txt: got a (pipe|directory|device), expected a regular file"):
        ImageList(tmp_path / "list.txt")


def test_large_files_are_refused_before_they_are_read(tmp_path):
    with open(tmp_path / "list.txt", "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(UserError, match="got more than 1 MiB, expected a list"):
        read_text(tmp_path / "list.txt", "a list", largest=1 << 20)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_class_names(tmp_path, encoding):
    (tmp_path / "names.txt").write_bytes(encoded("cat\r\n\r\n dog \r\nhot\x85dog\r\n", encoding))
    assert scenes.class_names(tmp_path / "names.txt") == ("cat", "dog", "hot\x85dog")
    (tmp_path / "names.txt").write_bytes("Bär\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"names\.txt: got a file that cannot be read as UTF-8 .* save it as UTF-8"):
        scenes.class_names(tmp_path / "names.txt")


def test_lines_are_those_between_ends_of_lines():
    assert lines_of("a\n\nb\x0c\r\n \nc") == ["a", "b\x0c", "c"]


# --- JSON -------------------------------------------------------------------------------------------------------------

POSE = {"width": 64, "height": 48, "people": [[[5 + n, 7] for n in range(17)]]}
DEEP = "[" * 100_000
HUGE = "9" * 400


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_read_with_a_mark(tmp_path, encoding):
    (tmp_path / "p.json").write_bytes(encoded(json.dumps(POSE), encoding))
    assert Keypoints().read(tmp_path / "p.json").shape == (48, 64, 3)


def text_of(**changes) -> str:
    return json.dumps(POSE | changes).replace('"HUGE"', HUGE).replace('"DEEP"', DEEP + "]" * len(DEEP))


STRANGE = {
    "nested deeply": DEEP,
    "nested deeply and closed": text_of(people="DEEP"),
    "a person nested deeply": text_of(people=["DEEP"]),
    "not UTF-8": b'{"width": "\xe4"}',
    "numbers of 400 digits": text_of(width="HUGE"),
    "numbers of 5000 digits": text_of(width="HUGE").replace(HUGE, "9" * 5000),
    "a point of 400 digits": text_of(people=[[["HUGE", 1]] * 17]),
    "a width of 1e9": text_of(width=10**9, height=10**9),
    "a width of 1e300": text_of(width=1e300),
    "a width of infinity": text_of(width=float("inf")),
    "a width of NaN": text_of(width=float("nan")),
    "a width true": text_of(width=True),
    "a width in words": text_of(width="64"),
    "a point far away": text_of(people=[[[1e300, 5]] + [[5, 5]] * 16]),
    "a point farther away than ten pictures": text_of(people=[[[6401, 5]] + [[5, 5]] * 16]),
    "a point NaN": text_of(people=[[[float("nan"), 5]] * 17]),
    "a point in words": text_of(people=[[["a", "b"]] * 17]),
    "a person in words": text_of(people=["abc"]),
    "a person null": text_of(people=[None]),
    "a person of an object": text_of(people=[{"keypoints": {"x": 1}}]),
    "a person of none": text_of(people=[[]]),
    "people of an object": text_of(people={"a": 1}),
    "a skeleton of words": text_of(skeleton=["ab", "cd"]),
    "a skeleton of fractions": text_of(skeleton=[[0.5, 1]]),
    "a skeleton of three": text_of(skeleton=[[0, 1, 2]]),
    "a skeleton beyond": text_of(skeleton=[[0, 17]]),
    "a skeleton negative": text_of(skeleton=[[0, -1]]),
    "a skeleton of truths": text_of(skeleton=[[True, False]]),
    "a skeleton of an object": text_of(skeleton={"a": 1}),
    "a skeleton in one number": text_of(skeleton=7),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_json_is_refused_by_its_name(tmp_path, name):
    content = STRANGE[name]
    (tmp_path / "p.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"p\.json: got ") as raised:
        Keypoints().read(tmp_path / "p.json")
    assert len(str(raised.value)) < 1000


def test_strange_scenes_are_refused_by_their_name(tmp_path):
    rule = scenes.Rule(("cat",), 64)
    for changes in ({"class": "cat", "box": [0, 0, "HUGE", 1]}, {"class": ["cat"]}, {"class": "cat", "box": "DEEP"}):
        text = json.dumps({"width": 9, "height": 9, "objects": [changes]})
        text = text.replace('"HUGE"', HUGE).replace('"DEEP"', DEEP)
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(UserError, match=r"s\.json: got "):
            scenes.read(tmp_path / "s.json", rule)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\3\4", b"\x93NUMPY\1\0\x10\0{'descr': 1e9}  ", bytes(64)])
def test_strange_arrays_are_refused_by_their_name(tmp_path, content):
    from tamingfast.data.conditions import Depth

    (tmp_path / "d.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"d\.npy: got "):
        Depth().read(tmp_path / "d.npy")
    np.save(tmp_path / "d.npy", np.array([[None]]), allow_pickle=True)
    with pytest.raises(UserError, match=r"d\.npy: got "):
        Depth().read(tmp_path / "d.npy")
    np.savez(tmp_path / "z.npz", np.ones((2, 2)))
    (tmp_path / "z.npz").rename(tmp_path / "d.npy")
    with pytest.raises(UserError, match=r"d\.npy: got an archive"):
        Depth().read(tmp_path / "d.npy")
