"""Build of the native extension; everything that is plain metadata stands in pyproject.toml."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for ending in ("h", "inl") for path in Path("csrc").rglob(f"*.{ending}"))
# Read by tamingfast/backends.py, so that `tamingfast info` can tell why there is no extension.
FAILURE_NOTE = "_C.failure.txt"


class BuildExtension(build_ext):
    """Builds ``tamingfast._C`` with OpenMP where the compiler has it; a failed build leaves a note, not an error.

    The package works without the extension (on the torch reference), so a machine without a compiler must be
    able to install it. Set ``TAMINGFAST_REQUIRE_NATIVE=1`` to make a failed build fail the installation.
    """

    def run(self) -> None:
        inplace = self.inplace
        package = Path(self.get_finalized_command("build_py").get_package_dir("tamingfast"))
        note = (package if inplace else Path(self.build_lib, "tamingfast")) / FAILURE_NOTE
        note.unlink(missing_ok=True)
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            if os.environ.get("TAMINGFAST_REQUIRE_NATIVE") == "1":
                raise
            self.inplace = inplace
            for extension in self.extensions:  # a binary of an earlier build would pass for this one
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{error}\n", encoding="utf-8")
            self.warn(f"tamingfast._C was not built and the package will run without it: {error}")

    def build_extension(self, extension: Pybind11Extension) -> None:
        version = self.distribution.get_version()
        extension.define_macros = [("TAMINGFAST_VERSION", f'"{version}"')]
        windows = self.compiler.compiler_type == "msvc"
        extension.extra_compile_args += ["/O2"] if windows else ["-O3", "-Wall", "-Wextra"]
        openmp = "/openmp" if windows else "-fopenmp"
        if self._compiles_with(openmp):
            extension.extra_compile_args.append(openmp)
            if not windows:
                extension.extra_link_args.append(openmp)
        elif not windows:
            extension.extra_compile_args.append("-Wno-unknown-pragmas")
        super().build_extension(extension)

    def _compiles_with(self, flag: str) -> bool:
        """Whether a small OpenMP program compiles and links; not having the header or the library says no."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, str(Path(folder, "probe")), extra_postargs=[flag])
            except (BaseError, CCompilerError):
                return False
        return True


setup(
    packages=[*find_packages(include=["tamingfast", "tamingfast.*"]), "tamingfast.kernels"],
    package_dir={"tamingfast": "tamingfast", "tamingfast.kernels": "kernels"},
    ext_modules=[Pybind11Extension("tamingfast._C", SOURCES, depends=HEADERS, cxx_std=17)],
    cmdclass={"build_ext": BuildExtension},
)
