"""Build of the native extension; everything that is plain metadata stands in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, ExecError

CUDA_SOURCES = sorted(str(path) for ending in ("cpp", "cu") for path in Path("csrc", "cuda").glob(f"*.{ending}"))
SOURCES = sorted({str(path) for path in Path("csrc").rglob("*.cpp")} - set(CUDA_SOURCES))
HEADERS = sorted(str(path) for ending in ("h", "inl") for path in Path("csrc").rglob(f"*.{ending}"))
# Machine code for these compute capabilities; later devices compile the PTX of the last one when they load it.
CUDA_TARGETS = ("80", "90")
# Read by tamingfast/backends.py, so that `tamingfast info` can tell why there is no extension.
FAILURE_NOTE = "_C.failure.txt"


class BuildExtension(build_ext):
    """Builds ``tamingfast._C`` with OpenMP where the compiler has it; a failed build leaves a note, not an error.

    The package works without the extension (on the torch reference), so a machine without a compiler must be
    able to install it. Set ``TAMINGFAST_REQUIRE_NATIVE=1`` to make a failed build fail the installation.

    The CUDA engine's kernels are a part of it where nvcc is found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda) and
    works. ``TAMINGFAST_CUDA=0`` leaves them out, ``TAMINGFAST_CUDA=1`` makes their absence fail the installation.
    """

    def run(self) -> None:
        inplace = self.inplace
        package = Path(self.get_finalized_command("build_py").get_package_dir("tamingfast"))
        note = (package if inplace else Path(self.build_lib, "tamingfast")) / FAILURE_NOTE
        note.unlink(missing_ok=True)
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            if "1" in (os.environ.get("TAMINGFAST_REQUIRE_NATIVE"), os.environ.get("TAMINGFAST_CUDA")):
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
        version_macro = ("TAMINGFAST_VERSION", f'"{version}"')
        windows = self.compiler.compiler_type == "msvc"
        extension.extra_compile_args += ["/O2"] if windows else ["-O3", "-Wall", "-Wextra"]
        openmp = "/openmp" if windows else "-fopenmp"
        if self._compiles_with(openmp):
            extension.extra_compile_args.append(openmp)
            if not windows:
                extension.extra_link_args.append(openmp)
        elif not windows:
            extension.extra_compile_args.append("-Wno-unknown-pragmas")
        nvcc, reason = (None, "not built on Windows") if windows else find_nvcc()
        if nvcc is not None:
            plain = extension.sources, extension.extra_link_args
            try:
                extension.define_macros = [version_macro, ("TAMINGFAST_CUDA", f'"{self._add_cuda(extension, nvcc)}"')]
                return super().build_extension(extension)
            except (BaseError, CCompilerError, OSError, subprocess.SubprocessError) as error:
                if os.environ.get("TAMINGFAST_CUDA") == "1":
                    raise
                self.warn(f"tamingfast._C is built without CUDA: {error}")
                reason = "the build with nvcc failed"
                extension.sources, extension.extra_link_args = plain
        elif os.environ.get("TAMINGFAST_CUDA") == "1":
            raise ExecError(f"TAMINGFAST_CUDA=1 asks for the CUDA engine, but {reason}")
        extension.define_macros = [version_macro, ("TAMINGFAST_NO_CUDA", f'"{reason}"')]
        super().build_extension(extension)

    def _add_cuda(self, extension: Pybind11Extension, nvcc: str) -> str:
        """Adds the kernels and the runtime to the extension; what they are built by and for."""
        plan = subprocess.run([nvcc, "--dryrun", "-c", "probe.cu"], capture_output=True, text=True, check=True).stderr
        libraries = next(line for line in plan.splitlines() if line.startswith("#$ LIBRARIES="))
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release ([\d.]+)", version).group(1)
        extension.sources = extension.sources + CUDA_SOURCES
        # torch may have another runtime of its own loaded, for which ours must not be taken, nor the other way round.
        found = [folder for folder in re.findall(r'-L([^"\s]+)', libraries) if not folder.endswith("stubs")]
        extension.extra_link_args = [
            *extension.extra_link_args, *(f"-L{folder}" for folder in found),
            "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL",
        ]  # fmt: skip
        codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in CUDA_TARGETS]
        codes.append(f"-gencode=arch=compute_{CUDA_TARGETS[-1]},code=compute_{CUDA_TARGETS[-1]}")
        compile_other = self.compiler._compile

        def compile_one(target: str, source: str, ending: str, cc_args: list, postargs: list, pp_opts: list) -> None:
            if ending != ".cu":
                return compile_other(target, source, ending, cc_args, postargs, pp_opts)
            flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2", *codes]
            return self.spawn([nvcc, *flags, "-c", source, "-o", target])

        if ".cu" not in self.compiler.src_extensions:
            self.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]
        self.compiler._compile = compile_one
        return f"nvcc {release} for " + ", ".join(f"sm_{target}" for target in CUDA_TARGETS)

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


def find_nvcc() -> tuple[str | None, str]:
    """The path of nvcc, or None and the reason why there is none."""
    if os.environ.get("TAMINGFAST_CUDA") == "0":
        return None, "TAMINGFAST_CUDA=0 was set"
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home, "bin")) for home in (*homes, "/usr/local/cuda") if home]
    own, common = os.pathsep.join(folders[:-1]), folders[-1]
    found = (own and shutil.which("nvcc", path=own)) or shutil.which("nvcc") or shutil.which("nvcc", path=common)
    return found or None, "nvcc was not found"


setup(
    packages=[*find_packages(include=["tamingfast", "tamingfast.*"]), "tamingfast.kernels"],
    package_dir={"tamingfast": "tamingfast", "tamingfast.kernels": "kernels"},
    ext_modules=[Pybind11Extension("tamingfast._C", SOURCES, depends=[*HEADERS, *CUDA_SOURCES], cxx_std=17)],
    cmdclass={"build_ext": BuildExtension},
)
