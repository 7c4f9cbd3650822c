"""The CPU engine and convolutions under GCC's sanitizers: random sizes and histories against plain loops in float64."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SOURCES = [
    *sorted(path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if not path.name.endswith("bindings.cpp")),
    HERE / "openmp_threads.cpp",
]
DRIVERS = ["engine_driver", "convolution_driver"]
HEADERS = [*sorted(path for ending in ("h", "inl") for path in (ROOT / "csrc").rglob(f"*.{ending}")), HERE / "driver.h"]
SANITIZERS = ["address,undefined", "thread"]


@functools.cache
def drivers(sanitizer: str) -> Path:
    """The directory of the programs, which are built again when a source changes.

    Skips the test without a compiler that has the sanitizer.
    """
    sources = [*SOURCES, *(HERE / f"{name}.cpp" for name in DRIVERS)]
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    command = [compiler, "-std=c++17", "-O1", "-g1", "-fopenmp", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all",
               "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]  # fmt: skip
    digest = hashlib.sha256(repr(command).encode())
    for path in (*sources, *HEADERS):
        digest.update(path.read_bytes())
    made = ROOT / "build" / f"sanitized-{digest.hexdigest()[:16]}"
    if made.exists():
        return made
    made.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("int main() {}\n")
        linked = subprocess.run(
            [compiler, f"-fsanitize={sanitizer}", probe, "-o", f"{folder}/probe"], capture_output=True, text=True
        )
        if linked.returncode or subprocess.run([f"{folder}/probe"], capture_output=True).returncode:
            pytest.skip(f"programs with -fsanitize={sanitizer} cannot be built or run here")
        objects = {path.stem: f"{folder}/{path.name}.o" for path in sources}
        for source in sources:
            subprocess.run([*command, "-c", source, "-o", objects[source.stem]], check=True)
        programs = Path(folder, "programs")
        programs.mkdir()
        shared = [target for name, target in objects.items() if name not in DRIVERS]
        for name in DRIVERS:
            # Without -fopenmp, so that openmp_threads.cpp takes the place of GCC's runtime.
            link = [compiler, f"-fsanitize={sanitizer}", objects[name], *shared, "-pthread", "-o", programs / name]
            subprocess.run(link, check=True)
        programs.replace(made)
    return made


def drive(sanitizer: str, name: str, seed: int, rounds: int) -> None:
    quiet = {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [drivers(sanitizer) / name, str(seed), str(rounds)],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0 and done.stdout == f"{rounds} rounds\n", f"from seed {seed}: {done.stderr[-6000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", DRIVERS)
@pytest.mark.parametrize(
    ("sanitizer", "rounds"), [(SANITIZERS[0], 60), pytest.param(SANITIZERS[1], 20, marks=pytest.mark.exhaustive)]
)
def test_random_engines_have_no_fault(sanitizer, name, rounds):
    drive(sanitizer, name, 0, rounds)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", DRIVERS)
@pytest.mark.parametrize(("sanitizer", "rounds"), zip(SANITIZERS, (4000, 500), strict=True))
def test_many_random_engines_have_no_fault(sanitizer, name, rounds):
    drive(sanitizer, name, 1_000_000, rounds)
