"""What an installation gives, and what the distributed archives carry."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.so", "*.egg-info", "__pycache__", "tests")


def modules() -> set[str]:
    """Every source file of the package, by its path in an installation."""
    own = {str(path.relative_to(ROOT)) for path in ROOT.glob("tamingfast/**/*.py")}
    return own | {f"tamingfast/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/*.py")}


def data_files() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in ROOT.glob("tamingfast/configs/**/*.yaml")} | {"tamingfast/py.typed"}


def setup(source: Path, *command: str, **environment: str) -> None:
    """Run setup.py with the build tools of this environment, quietly unless it fails."""
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=source,
        env=os.environ | {"TAMINGFAST_REQUIRE_NATIVE": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources as a checkout has them."""
    for tool in ("setuptools", "pybind11"):
        pytest.importorskip(tool, reason=f"{tool} builds the archives; pip fetches its own for an installation")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tamingfast", ignore=IGNORED))


def test_kernels_are_a_part_of_the_package():
    assert importlib.import_module("tamingfast.kernels").__name__ == "tamingfast.kernels"
    assert metadata.version("tamingfast") == "0.1.0"


def test_metadata_keeps_open_ranges_and_the_extras():
    facts = metadata.metadata("tamingfast")
    assert set(facts.get_all("Provides-Extra")) == {"train", "eval", "demo", "peers", "test"}
    assert facts["Requires-Python"] == ">=3.10"
    required = metadata.requires("tamingfast")
    assert "torch>=2.6" in required
    assert not [line for line in required if "==" in line.split(";")[0]]
    (command,) = metadata.entry_points(group="console_scripts", name="tamingfast")
    assert command.value == "tamingfast.cli:main"


def test_constraints_pin_every_direct_requirement():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = {re.match(r"[\w-]+", line).group() for line in metadata.requires("tamingfast")}
    not_installed_by_make = {
        "torch-fidelity",
        "flash-kmeans",
        "transformers",
        "vector-quantize-pytorch",
        "x-transformers",
    }
    assert wanted - pinned == not_installed_by_make


def test_source_archive_carries_everything_that_a_build_needs(source):
    setup(source, "sdist")
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    native = {
        str(path.relative_to(ROOT)) for suffix in ("cpp", "cu", "h", "inl") for path in ROOT.glob(f"csrc/**/*.{suffix}")
    }
    kernels = {str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/*.py")}
    package = {name for name in modules() if not name.startswith("tamingfast/kernels/")}
    assert not (native | kernels | package | data_files() | {"setup.py", "pyproject.toml", "LICENSE"}) - names


def test_wheel_without_a_compiler_carries_the_package_and_the_reason(source):
    setup(source, "bdist_wheel", CC="no-such-compiler", CXX="no-such-compiler")
    (archive,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        names = set(wheel.namelist())
        assert not (modules() | data_files()) - names
        assert not [name for name in names if name.startswith(("kernels", "tests", "benchmarks", "csrc"))]
        assert not [name for name in names if name.startswith("tamingfast/_C.") and not name.endswith(".txt")]
        assert "no-such-compiler" in wheel.read("tamingfast/_C.failure.txt").decode()


def test_a_failed_build_is_an_error_where_the_extension_is_required(source):
    required = {"CC": "no-such-compiler", "CXX": "no-such-compiler", "TAMINGFAST_REQUIRE_NATIVE": "1"}
    with pytest.raises(AssertionError, match="no-such-compiler"):
        setup(source, "build_ext", "--build-lib", "build/required", **required)
