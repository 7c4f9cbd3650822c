"""Runs the kernels of csrc/cuda under ThreadSanitizer on the CPU, as they are or with a mistake planted."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import on_host
import pytest
from on_host import CSRC, SHIM, compiled, linked

# Nothing is optimised away, and half a second is spent on compiling a file.
_DETECT = ["-O0", "-g1", "-fsanitize=thread"]
# ThreadSanitizer's memory has fixed addresses, which those chosen at random may meet.
_FIXED_ADDRESSES = ["setarch", "-R"]


@dataclass(frozen=True)
class Mistake:
    """A change of one place in a file of csrc/cuda, and a case of drive.cpp in which it causes a race."""

    file: str
    right: str
    wrong: str
    case: str
    #: The source that is compiled with a changed header.
    source: str = ""
    dtype: str = "float32"

    def planted(self) -> tuple[Path, Path]:
        """The source to compile, in a copy of csrc with the mistake, and that copy, in build/."""
        text = (CSRC / "cuda" / self.file).read_text()
        if text.count(self.right) != 1:
            raise AssertionError(f"{self.file} has {text.count(self.right)} times, not once:\n{self.right}")
        names = sorted(path.relative_to(CSRC) for path in [*CSRC.glob("*.h"), *(CSRC / "cuda").iterdir()])
        content = {name: (CSRC / name).read_text() for name in names}
        content[Path("cuda", self.file)] = text.replace(self.right, self.wrong)
        digest = hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()[:16]
        copy = on_host.BUILD / f"mistake-{digest}"
        for name, changed in content.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_text(changed)
        return copy / "cuda" / (self.source or self.file), copy


def objects(flags: list[str], mistake: Mistake | None = None) -> list[Path]:
    """drive.cpp and the kernels."""
    planted = [mistake.planted()] if mistake else []
    kept = [(source, CSRC) for source in on_host.kernels() if source.name not in {wrong.name for wrong, _ in planted}]
    sources = [*planted, *kept, (SHIM / "drive.cpp", CSRC)]  # the planted header's functions come first
    return [compiled(source, flags, csrc) for source, csrc in sources]


def program(mistake: Mistake | None = None) -> Path:
    """drive.cpp with the kernels, instrumented."""
    fibers = compiled(SHIM / "fibers.cpp", ["-O0", "-DCUDA_ON_HOST_TSAN"])
    return linked("drive", [*objects(_DETECT, mistake), fibers], _DETECT)


@functools.cache
def why_not() -> str:
    """Why races cannot be detected here, or nothing."""
    if sys.platform != "linux" or shutil.which("setarch") is None:
        return "needs Linux and setarch"
    on_host.BUILD.mkdir(parents=True, exist_ok=True)
    probe = on_host.BUILD / "probe.cpp"
    probe.write_text('extern "C" void* __tsan_create_fiber(unsigned);\nint main() { __tsan_create_fiber(0); }\n')
    try:
        tried = subprocess.run([*_FIXED_ADDRESSES, linked("probe", [probe], _DETECT)], capture_output=True, text=True)
    except subprocess.CalledProcessError:
        return "the compiler has no ThreadSanitizer with fibers"
    return f"ThreadSanitizer does not run here: {tried.stderr.strip()}" if tried.returncode else ""


def races(order: str, *words: str, mistake: Mistake | None = None) -> str:
    """What ThreadSanitizer reports of the given dtypes and cases of drive.cpp, at most one race."""
    if why_not():
        pytest.skip(why_not())
    done = subprocess.run(
        [*_FIXED_ADDRESSES, program(mistake), order, *words],
        env={"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode in (0, 66), done.stderr[-6000:]
    assert (done.returncode == 66) == ("ThreadSanitizer: data race" in done.stderr), done.stderr[-6000:]
    return done.stderr
