"""Builds the native extension with ninja; all plain metadata is in pyproject.toml."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError, ExecError

CUDA_SOURCES = sorted(str(path) for ending in ("cpp", "cu") for path in Path("csrc", "cuda").glob(f"*.{ending}"))
SOURCES = sorted({str(path) for path in Path("csrc").rglob("*.cpp")} - set(CUDA_SOURCES))
HEADERS = sorted(str(path) for ending in ("h", "inl") for path in Path("csrc").rglob(f"*.{ending}"))
# Machine code is compiled for these compute capabilities; later devices compile the PTX of the last one on first use.
CUDA_TARGETS = ("80", "90")
# tamingfast/ops/machine.py reads it, so that `tamingfast info` can say why there is no extension.
FAILURE_NOTE = "_C.failure.txt"
PATIENCE = 120  # seconds for a compiler's answer to a small question
# Objects persist here even across editable installations, each of which gets a new build directory of its own.
FOLDER = Path("build", "native" + sysconfig.get_config_var("EXT_SUFFIX").rpartition(".")[0])


class NoCuda(ExecError):
    """The extension cannot have the CUDA engine; the message says why."""


class BuildExtension(build_ext):
    """Builds ``tamingfast._C``, with OpenMP if the compiler supports it. A failed build leaves a note, not an error.

    The package works without the extension (on the torch reference), so that it can be installed on a machine without
    a compiler, or with one that does anything at all. ``TAMINGFAST_REQUIRE_NATIVE=1`` makes a failed build fail the
    installation.

    The CUDA engine's kernels are included if nvcc is found (in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda) and
    compiles them. ``TAMINGFAST_CUDA=0`` leaves them out, ``TAMINGFAST_CUDA=1`` makes their absence an error.
    """

    def run(self) -> None:
        required = [flag("TAMINGFAST_REQUIRE_NATIVE"), flag("TAMINGFAST_CUDA")]
        inplace = self.inplace
        package = Path(self.get_finalized_command("build_py").get_package_dir("tamingfast"))
        note = (package if inplace else Path(self.build_lib, "tamingfast")) / FAILURE_NOTE
        note.unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:  # whatever a compiler did or answered: the package works without the extension
            if "1" in required:
                raise
            self.inplace = inplace
            for extension in self.extensions:  # the binary of an earlier build would be taken for this one
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []
            note.parent.mkdir(parents=True, exist_ok=True)
            foreseen = isinstance(error, (BaseError, CCompilerError, OSError))
            reason = printable(str(error) if foreseen else f"{type(error).__name__}: {error}")
            note.write_text(f"{reason}\n", encoding="utf-8")
            self.warn(f"tamingfast._C was not built and the package will run without it: {reason}")

    def build_extension(self, extension: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise ExecError(f"{self.compiler.compiler_type} is not supported; the extension needs GCC or Clang")
        compiler = self.compiler.compiler_so_cxx[0]
        if shutil.which(compiler) is None:
            raise ExecError(f"the C++ compiler {compiler!r} was not found")
        openmp = ["-fopenmp"] if self._compiles_with("-fopenmp") else []
        try:
            library = self._run_ninja(openmp, find_cuda())
        except (NoCuda, CompileError) as error:
            if flag("TAMINGFAST_CUDA") == "1":
                raise ExecError(f"TAMINGFAST_CUDA=1 asks for the CUDA engine, but {error}") from error
            reason = printable(str(error)) if isinstance(error, NoCuda) else "the build with nvcc failed"
            self.warn(f"tamingfast._C is built without CUDA: {reason}")
            library = self._run_ninja(openmp, reason)
        target = Path(self.get_ext_fullpath(extension.name))
        self.mkpath(str(target.parent))
        self.copy_file(str(library), str(target))

    def _run_ninja(self, openmp: list[str], cuda: Cuda | str) -> Path:
        """Compiles what has changed; returns the library. ``cuda`` is the toolkit, or why there is none."""
        plan = Plan(FOLDER)
        plan.rule("cxx", [
            *self.compiler.compiler_so_cxx, "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra",
            *(openmp or ["-Wno-unknown-pragmas"]),
        ], "$flags -MMD -MF $out.d -c $in -o $out")  # fmt: skip
        libraries = list(openmp)
        macros = {"TAMINGFAST_VERSION": self.distribution.get_version()}
        if isinstance(cuda, Cuda):
            macros["TAMINGFAST_CUDA"] = cuda.description
            libraries += cuda.libraries
            plan.rule("nvcc", cuda.command, "-MD -MF $out.d -c $in -o $out")
        else:
            macros["TAMINGFAST_NO_CUDA"] = cuda
        # Only bindings get the flags that may change from one build to the next: under build isolation, pybind11 has a
        # new path every time.
        includes = [f"-I{path}" for path in (*self.include_dirs, find_pybind11())]
        defines = [f"-D{name}={json.dumps(value)}" for name, value in macros.items()]
        sources = [*CUDA_SOURCES, *SOURCES] if isinstance(cuda, Cuda) else SOURCES
        objects = [
            plan.compile("nvcc", source)
            if source.endswith(".cu")
            else plan.compile("cxx", source, [*includes, *defines] if source.endswith("bindings.cpp") else [])
            for source in sorted(sources, key=lambda source: not source.endswith(".cu"))  # the slowest first
        ]
        # CXX in the environment changes the compile command but not the link command; only the latter's flags are kept.
        linker = self.compiler.linker_so_cxx
        first = next((index for index, word in enumerate(linker) if word.startswith("-")), len(linker))
        plan.rule("link", [*self.compiler.compiler_cxx, *linker[first:]], f"$in -o $out {shell(libraries)}")
        library = plan.build("link", objects, "_C.so")
        plan.run(find_ninja(), self.parallel)
        return library

    def _compiles_with(self, flag: str) -> bool:
        """Whether a small OpenMP program compiles and links, which needs the header and the library too."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n")
            command = [*self.compiler.compiler_cxx, flag, str(source), "-o", str(Path(folder, "probe"))]
            return subprocess.run(command, capture_output=True, timeout=PATIENCE).returncode == 0


# A module of editable installations, which a .pth file imports when Python starts.
EDITABLE = '''"""Finds an editable tamingfast even from beside a clone of that name."""

import sys
from importlib.machinery import PathFinder


class BeforeNamespaces:
    """Prefers an editable package to a directory of its name without an ``__init__.py``, and nothing else to anything.

    Python makes an empty namespace package of such a directory, in sys.path because the running script is beside it,
    before it asks the finder of an editable installation.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "tamingfast":
            return None
        found = PathFinder.find_spec(name, path, target)
        if found is None or found.origin is not None:
            return found
        later = sys.meta_path[sys.meta_path.index(PathFinder) + 1 :]
        return next(filter(None, (finder.find_spec(name, path, target) for finder in later)), found)


sys.meta_path.insert(0, BeforeNamespaces)
'''


class BuildEditable(Command):
    """A part of ``build`` that adds `EDITABLE` to an editable wheel, and does nothing otherwise."""

    editable_mode = False  # setuptools sets it

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        if self.editable_mode:
            wheel = Path(self.get_finalized_command("install").install_lib)  # whatever is here gets into the wheel
            (wheel / "_editable_tamingfast.py").write_text(EDITABLE, encoding="utf-8")
            (wheel / "_editable_tamingfast.pth").write_text("import _editable_tamingfast\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


@dataclass(frozen=True)
class Cuda:
    """How the CUDA engine is compiled and linked."""

    nvcc: str
    release: str
    folders: tuple[str, ...]  # of the toolkit's libraries

    @property
    def description(self) -> str:
        return f"nvcc {self.release} for " + ", ".join(f"sm_{target}" for target in CUDA_TARGETS)

    @property
    def command(self) -> list[str]:
        codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in CUDA_TARGETS]
        codes.append(f"-gencode=arch=compute_{CUDA_TARGETS[-1]},code=compute_{CUDA_TARGETS[-1]}")
        return [self.nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2", *codes]

    @property
    def libraries(self) -> list[str]:
        # The symbols are hidden, because torch may have loaded another runtime and each must keep to its own.
        runtime = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        return [*(f"-L{folder}" for folder in self.folders), *runtime]


def find_cuda() -> Cuda:
    """The CUDA toolkit, as its nvcc describes itself. Raises NoCuda if there is none that can be used."""
    if flag("TAMINGFAST_CUDA") == "0":
        raise NoCuda("TAMINGFAST_CUDA=0 was set")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    named = os.pathsep.join(str(Path(home, "bin")) for home in homes if home)
    nvcc = (named and shutil.which("nvcc", path=named)) or shutil.which("nvcc")
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        raise NoCuda("nvcc was not found")
    release = re.search(r"release ([\d.]+)", answer(nvcc, "--version"))
    if release is None:
        raise NoCuda("nvcc --version names no release")
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", answer(nvcc, "--dryrun", "-c", "probe.cu"), re.MULTILINE)
    if libraries is None:
        raise NoCuda("nvcc --dryrun names no libraries")
    try:
        words = shlex.split(libraries.group(1))  # folders may contain spaces
    except ValueError as error:
        raise NoCuda(f"nvcc --dryrun names libraries that cannot be read: {error}") from error
    folders = [word[2:] for word in words if word.startswith("-L") and not word.endswith("stubs")]
    return Cuda(nvcc, release.group(1), tuple(folders))


def answer(nvcc: str, *arguments: str) -> str:
    """The output of nvcc. Raises NoCuda if it fails."""
    try:
        done = subprocess.run(
            [nvcc, *arguments], capture_output=True, text=True, errors="replace", timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as error:
        raise NoCuda(f"nvcc cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise NoCuda(f"nvcc {' '.join(arguments)} gave no answer in {PATIENCE} seconds") from error
    if done.returncode != 0:
        raise NoCuda(f"nvcc {' '.join(arguments)} failed with exit status {done.returncode}")
    return done.stdout + done.stderr


def flag(name: str) -> str:
    """The value of an environment variable, "0", "1" or empty. Ends the installation if it has another."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: got {value!r}, expected 0 or 1, or leave it unset")
    return value


def printable(text: str) -> str:
    """The first lines of a message, short, in characters that every file and C++ string can hold."""
    return " ".join(text.split())[:500].encode("ascii", "replace").decode()


def find_ninja() -> str:
    """The path of ninja. An environment's scripts need not be on PATH when its Python runs."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    found = shutil.which("ninja", path=os.pathsep.join(folders))
    if found is None:
        raise ExecError("ninja was not found; install it with `pip install ninja`")
    return found


def find_pybind11() -> str:
    """The folder of pybind11's headers."""
    try:
        import pybind11
    except ImportError as error:
        raise ExecError("pybind11 was not found; install it with `pip install pybind11`") from error
    return pybind11.get_include()


class Plan:
    """A ninja file under construction, for objects and a library in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [f"builddir = {escape(str(folder))}"]

    def rule(self, name: str, command: Sequence[str], arguments: str) -> None:
        """A rule that runs ``command`` with ``arguments``, in which ninja's variables are expanded."""
        self.lines += [f"rule {name}", f"  command = {shell(command)} {arguments}", f"  description = {name} $out"]
        if "$out.d" in arguments:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: str, flags: Sequence[str] = ()) -> Path:
        """Adds an object; returns its path."""
        made = self.build(rule, [Path(source)], f"{source}.o")
        if flags:
            self.lines.append(f"  flags = {shell(flags)}")
        return made

    def build(self, rule: str, inputs: Sequence[Path], output: str) -> Path:
        """Adds a file that ``rule`` makes from ``inputs``; returns its path."""
        made = self.folder / output
        self.lines.append(f"build {escape(str(made))}: {rule} {' '.join(escape(str(path)) for path in inputs)}")
        return made

    def run(self, ninja: str, jobs: int | None) -> None:
        """Builds what is out of date. Raises CompileError with the first error."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "build.ninja"
        file.write_text("\n".join([*self.lines, ""]), encoding="utf-8", errors="surrogateescape")
        command = [ninja, "-f", str(file), *(["-j", str(jobs)] if jobs else [])]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        )
        print(done.stdout, end="", file=sys.stderr)
        if done.returncode != 0:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            errors = [line for line in lines if re.search(r"\berror\b|not found", line, re.IGNORECASE)]
            raise CompileError((errors or lines[-1:] or ["ninja failed"])[0])


def shell(words: Sequence[str]) -> str:
    """A command line, quoted for the shell and escaped for a ninja file."""
    return shlex.join(words).replace("$", "$$")


def escape(path: str) -> str:
    """A path, escaped for a ninja file."""
    return re.sub(r"([$ :])", r"$\1", path)


build.sub_commands = [*build.sub_commands, ("build_editable", None)]
setup(
    packages=[*find_packages(include=["tamingfast", "tamingfast.*"]), "tamingfast.kernels"],
    package_dir={"tamingfast": "tamingfast", "tamingfast.kernels": "kernels"},
    ext_modules=[Extension("tamingfast._C", SOURCES, depends=[*HEADERS, *CUDA_SOURCES], language="c++")],
    cmdclass={"build_ext": BuildExtension, "build_editable": BuildEditable},
)
