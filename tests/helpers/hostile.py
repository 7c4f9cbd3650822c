"""Files of ``torch.save`` around pickles of the caller's, and a process that reads them while it is watched."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def zipped(path: Path, pickled: bytes, records: Mapping[str, bytes] = {}) -> Path:
    """A zip checkpoint with this ``data.pkl`` and more records."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **records}.items():
            archive.writestr(f"x/{name}", content)
    return path


def legacy(path: Path, pickled: bytes, keys: tuple[str, ...] = (), storages: bytes = b"") -> Path:
    """A checkpoint in the format before torch 1.6 with this pickle as its value."""
    start = [pickle.dumps(part, 2) for part in (_MAGIC, _PROTOCOL, {"little_endian": True})]
    path.write_bytes(b"".join([*start, pickled, pickle.dumps(list(keys), 2), storages]))
    return path


def tensor(shape: tuple, stride: tuple, offset: int = 0, numel: int = 4, key: str = "0") -> bytes:
    """A pickle of ``{"state_dict": {"w": tensor}}``, a float32 tensor as this describes it."""
    body = b"\x80\x02}X\x0a\0\0\0state_dict}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(("
    body += _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu") + _value(numel) + b"tQ"
    body += _value(offset) + _value(shape) + _value(stride) + b"\x89ccollections\nOrderedDict\n)RtRss."
    return body


def four_floats() -> bytes:
    """The memory of four float32 values, 0 to 3."""
    return struct.pack("<4f", 0, 1, 2, 3)


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _value(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


# Prints what reading each file ends in, and what the interpreter was asked to do meanwhile.
_WATCHED = """
import encodings.cp437, encodings.raw_unicode_escape  # codecs of names in archives and of old text
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
from tamingfast.checkpoints.weights import read_checkpoint
from tamingfast.errors import UserError
import safetensors.torch
seen, watching = [], False
def watch(event, arguments):
    if not watching:
        return
    if event in ("pickle.find_class", "import", "os.system", "subprocess.Popen", "os.exec", "compile", "exec"):
        seen.append(f"{event} {arguments[0]}"[:100])
    if event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith(str(folder)):
        seen.append(f"open {arguments[0]}")
try:
    read_checkpoint(folder / "warm-up")
except UserError:
    pass
sys.addaudithook(watch)
ends = {}
for path in sorted(folder.iterdir()):
    watching = True
    try:
        checkpoint = read_checkpoint(path)
        end = "read"
    except UserError as error:
        end = "refused" if path.name in str(error) and len(str(error).splitlines()) == 1 else f"bad message: {error}"
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    watching = False
    ends[path.name] = end
    print(path.name, file=sys.stderr, flush=True)
print(json.dumps([ends, seen]))
"""


def read_watched(folder: Path) -> tuple[dict[str, str], list[str]]:
    """(end by file name, forbidden events) of reading all files of a folder in a process of its own.

    An end is "read", "refused" (by a UserError of one line that names the file) or the error.
    """
    torch.save({"a": torch.ones(3)}, folder / "warm-up")
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, str(folder)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1:]
    assert done.returncode == 0, f"the process ended with {done.returncode} after {last}"
    ends, seen = json.loads(done.stdout.splitlines()[-1])
    del ends["warm-up"]
    return ends, seen
