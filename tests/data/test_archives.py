"""Tar archives: every form of header, damage, hostile contents, and patterns of names."""

from __future__ import annotations

import contextlib
import io
import tarfile

import archives
import pytest

from tamingfast import UserError
from tamingfast.data.archives import opened, parts_of
from tamingfast.data.patterns import files_of
from tamingfast.files import Part, open_regular

LONG = "a/" * 60 + "b" * 120 + ".jpg"
FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def listed(path):
    with opened(str(path)) as stream:
        return list(parts_of(str(path), stream))


@pytest.mark.parametrize("form", FORMS)
def test_every_format_lists_what_tarfile_does(tmp_path, form):
    files = {"a.jpg": b"1" * 700, "sub/caf\u00e9.png": b"", "c" * 90 + "/d.png": b"3" * 512}
    files |= {} if form == "ustar" else {LONG: b"2" * 3}
    path = archives.write(tmp_path / "x.tar", files, FORMS[form])
    with tarfile.open(path, "a", format=FORMS[form]) as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE),
                           ("pipe.png", tarfile.FIFOTYPE)):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        last = tarfile.TarInfo("last.png")
        last.size = 4
        archive.addfile(last, io.BytesIO(b"last"))
    found = {part.name: open_regular(part).read() for part in listed(path)}
    assert found == files | {"last.png": b"last"}


def test_large_sizes_are_binary_numbers():
    from tamingfast.data.archives import _number

    assert _number(tarfile.itn(1 << 40, 12, tarfile.GNU_FORMAT)) == 1 << 40
    assert _number(tarfile.itn(511, 12, tarfile.USTAR_FORMAT)) == 511


@pytest.mark.parametrize("keep", [1, 100, 511, 513, 900, 1600, 2000])
def test_an_archive_that_ends_early_is_refused(tmp_path, keep):
    path = archives.write(tmp_path / "x.tar", {"a.jpg": b"1" * 700, "b.jpg": b"2" * 700})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="x.tar: got a file that cannot be read .*, expected an uncompressed tar"):
        listed(path)


def test_damage_anywhere_is_refused_or_changes_nothing_else(tmp_path):
    path = archives.write(tmp_path / "x.tar", {"a.jpg": b"1" * 10, LONG: b"2"}, tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    for place in range(0, 4096, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        found = []
        with contextlib.suppress(UserError):
            found += listed(path)
        assert all(part.offset > 0 and part.offset + part.size <= len(whole) for part in found)


def test_what_is_no_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    for path in (tmp_path / "x.tar.gz", tmp_path / "none.tar", tmp_path):
        with pytest.raises(UserError, match="expected"):
            listed(path)


def test_parts_are_limited_and_checked(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"0123456789")
    assert open_regular(Part(str(path), "a", 3, 4)).read() == b"3456"
    with pytest.raises(UserError, match=r"x.tar: got a file that ends before a, expected"):
        open_regular(Part(str(path), "a", 8, 4))
    with pytest.raises(UserError, match=r"x.tar/a: got 1099511627776 bytes, expected at most"):
        open_regular(Part(str(path), "a", 0, 1 << 40))


def test_patterns(tmp_path):
    names = [f"t-{n:03d}.tar" for n in range(8, 12)] + ["v-a.tar", "v-b.tar", "odd{1..2}.tar", ".hidden.tar", "no.txt"]
    for name in names:
        (tmp_path / name).touch()

    def found(pattern):
        return [each.removeprefix(f"{tmp_path}/") for each in files_of(f"{tmp_path}/{pattern}", ".tar", "archives")]

    assert found("t-{008..011}.tar") == names[:4]
    assert found("v-{b,a}.tar") == ["v-b.tar", "v-a.tar"]
    assert found("t-{010..011}.tar") == ["t-010.tar", "t-011.tar"]
    assert found("odd{1..2}.tar") == ["odd{1..2}.tar"]
    assert found("t-*.tar") == names[:4]
    assert found("") == sorted(names[:7])
    for pattern, missing in (
        ("t-{008..012}.tar", "t-012.tar"),
        ("x*.tar", r"x\*.tar"),
        ("t-{0..999999999}.tar", "t-0"),
    ):
        with pytest.raises(UserError, match=rf"{missing}.*: got no such file, expected archives"):
            found(pattern)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="got a directory without files that end in .tar"):
        found("empty")
