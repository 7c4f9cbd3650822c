"""What an installation provides, what the archives contain, and how the extension is built."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import tamingfast

ROOT = Path(__file__).parents[1]
IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.so", "*.egg-info", "__pycache__", "tests")
TOOLS = ("ninja", "pybind11", "setuptools")


def modules() -> set[str]:
    """Every source file of the package, by its path in an installation."""
    own = {str(path.relative_to(ROOT)) for path in ROOT.glob("tamingfast/**/*.py")}
    return own | {f"tamingfast/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/*.py")}


def data_files() -> set[str]:
    kept = [*ROOT.glob("tamingfast/configs/**/*.yaml"), *ROOT.glob("tamingfast/pretrained/demo/*")]
    return {str(path.relative_to(ROOT)) for path in kept} | {"tamingfast/py.typed"}


def native_files() -> set[str]:
    endings = ("cpp", "cu", "h", "inl")
    return {str(path.relative_to(ROOT)) for ending in endings for path in ROOT.glob(f"csrc/**/*.{ending}")}


def setup(source: Path, *command: str, **environment: str) -> str:
    """Runs setup.py with the build tools of this environment; what it prints."""
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=source,
        env=os.environ | {"TAMINGFAST_REQUIRE_NATIVE": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources as in a checkout."""
    for tool in TOOLS:
        pytest.importorskip(tool, reason=f"{tool} is needed for a build without isolation")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tamingfast", symlinks=True, ignore=IGNORED))


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_kernels_are_a_part_of_the_package():
    assert importlib.import_module("tamingfast.kernels").__name__ == "tamingfast.kernels"


def test_the_command_can_be_called():
    (command,) = metadata.entry_points(group="console_scripts", name="tamingfast")
    assert callable(command.load())


# --- archives ---------------------------------------------------------------------------------------------------------


def test_source_archive_has_everything_that_a_build_needs(source):
    setup(source, "sdist")
    (archive,) = (source / "dist").glob("*.tar.gz")
    assert archive.name == f"tamingfast-{tamingfast.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    kernels = {str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/*.py")}
    package = {name for name in modules() if not name.startswith("tamingfast/kernels/")}
    assert not (native_files() | kernels | package | data_files() | {"setup.py", "pyproject.toml", "LICENSE"}) - names


def test_wheel_without_a_compiler_has_the_package_and_the_reason(source):
    setup(source, "bdist_wheel", CC="no-such-compiler", CXX="no-such-compiler")
    (archive,) = (source / "dist").glob("*.whl")
    assert archive.name.split("-")[1] == tamingfast.__version__
    with zipfile.ZipFile(archive) as wheel:
        names = set(wheel.namelist())
        assert not (modules() | data_files()) - names
        assert not [name for name in names if name.startswith(("kernels", "tests", "benchmarks", "csrc"))]
        assert not [name for name in names if name.startswith("tamingfast/_C.") and not name.endswith(".txt")]
        assert "'no-such-compiler' was not found" in wheel.read("tamingfast/_C.failure.txt").decode()


def test_a_wheel_from_the_source_archive_is_that_of_the_checkout(source, tmp_path):
    def wheel(folder: Path) -> dict[str, int]:
        setup(folder, "bdist_wheel", "--dist-dir", str(tmp_path), CC="no-such-compiler", CXX="no-such-compiler")
        (archive,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(archive) as opened:
            files = {one.filename: one.CRC for one in opened.infolist() if not one.filename.endswith("RECORD")}
        archive.unlink()
        return files

    setup(source, "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    assert wheel(unpacked) == wheel(source)


# --- editable installations -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory) -> Path:
    """A directory of packages with an editable installation of ``source``, which is a clone named tamingfast."""
    build = "import setuptools.build_meta as backend; print(backend.build_editable('dist'))"
    environment = os.environ | {"TAMINGFAST_REQUIRE_NATIVE": "0", "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(source / "dist" / done.stdout.splitlines()[-1]) as wheel:
        record = wheel.read(f"tamingfast-{tamingfast.__version__}.dist-info/RECORD").decode()
        assert {line.split(",")[0] for line in record.splitlines()} == set(wheel.namelist())
        wheel.extractall(site)
    return site


def imported_by(script: Path, editable: Path, **environment: str) -> list[Path]:
    """The files of tamingfast and of its kernels, as a script imports them in a fresh interpreter."""
    script.write_text(
        f"import site; site.addsitedir({str(editable)!r}); from importlib.util import find_spec; "
        "print(find_spec('tamingfast').origin, find_spec('tamingfast.kernels').origin, sep='\\n')"
    )
    found = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([sys.executable, "-S", str(script)], env=found, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [Path(line).resolve() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("folder", ["beside the clone", "in the clone", "elsewhere"])
def test_an_editable_installation_is_found_from_everywhere(source, editable, tmp_path, folder):
    script = {"beside the clone": source.parent, "in the clone": source, "elsewhere": tmp_path}[folder] / "script.py"
    own = [source / "tamingfast" / "__init__.py", source / "kernels" / "__init__.py"]
    assert imported_by(script, editable) == own


def test_a_package_on_the_path_precedes_an_editable_installation(source, editable, tmp_path):
    for package in ("tamingfast", "tamingfast/kernels"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    own = [tmp_path / package / "__init__.py" for package in ("tamingfast", "tamingfast/kernels")]
    assert imported_by(source.parent / "script.py", editable, PYTHONPATH=str(tmp_path)) == own


# --- the extension ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(tmp_path) -> Path:
    """A compiler that makes empty files with their true dependencies, and writes its arguments to `log` beside it."""
    real = shutil.which("g++")
    if real is None:
        pytest.skip("g++ finds the dependencies")
    text = f"""echo "$*" >> "{tmp_path}/log"
case " $* " in *" -MF "*) exec "{real}" "$@" -MM;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done
"""
    return program(tmp_path / "c++", text)


def build(source: Path, compiler: Path, target: str = "build/lib", **environment: str) -> str:
    """Builds the extension; the arguments of every call of the compiler, one a line."""
    log = compiler.with_name("log")
    log.unlink(missing_ok=True)
    setup(source, "build_ext", "--build-lib", target, CC=str(compiler), CXX=str(compiler), **environment)
    assert not (source / target / "tamingfast" / "_C.failure.txt").exists()
    assert list((source / target / "tamingfast").glob("_C.*"))
    return log.read_text()


def compiled(calls: str) -> set[str]:
    return set(re.findall(r" -c (\S+) ", calls))


def test_only_what_has_changed_is_compiled_again(source, compiler):
    def again() -> set[str]:
        return compiled(build(source, compiler, TAMINGFAST_CUDA="0"))

    assert again() == {name for name in native_files() if name.endswith(".cpp") and "/cuda/" not in name}
    assert again() == set()
    os.utime(source / "csrc" / "cpu" / "limits.cpp")
    assert again() == {"csrc/cpu/limits.cpp"}
    os.utime(source / "csrc" / "philox.h")
    assert again() == {"csrc/bindings.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("bindings", "decode", "engine"))}


RELEASE, PLAN = 'echo "release 12.4, V12.4.99"', "echo '#$ LIBRARIES= -L/opt/cuda'"
# What `nvcc` does, and the reason that is kept; a None is nothing that can be found.
UNUSUAL = {
    "fails": ("echo this nvcc fails; exit 3", "nvcc --version failed with exit status 3"),
    "says nothing": ("", "nvcc --version names no release"),
    "another release": ('echo "nvcc wrapper"', "nvcc --version names no release"),
    "not in UTF-8": (r"printf '\377\376 r\351lease 12\n'", "nvcc --version names no release"),
    "another plan": (RELEASE, "nvcc --dryrun names no libraries"),
    "an open quote": (
        f"{RELEASE}; echo '#$ LIBRARIES= \"-L/opt'",
        "nvcc --dryrun names libraries that cannot be read: ",
    ),
    "killed": ("kill -9 $$", "nvcc --version failed with exit status -9"),
    "compiles nothing": (f'case "$*" in *-MF*) exit 1;; esac; {RELEASE}; {PLAN}', "the build with nvcc failed"),
    "complains in bytes": (
        rf'case "$*" in *-MF*) printf "\377\200 error" >&2; exit 1;; esac; {RELEASE}; {PLAN}',
        "the build with nvcc failed",
    ),
    "not a program": (None, "nvcc cannot be run: "),
}


@pytest.mark.parametrize(("text", "reason"), UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_nvcc_means_no_cuda_and_says_why(source, compiler, tmp_path, text, reason):
    nvcc = program(tmp_path / "bin" / "nvcc", text or "")
    if text is None:
        nvcc.write_bytes(b"\x7fELF\x00\xff")
    calls = build(source, compiler, CUDA_HOME=str(tmp_path), TAMINGFAST_CUDA="")
    assert f'-DTAMINGFAST_NO_CUDA="{reason}' in calls
    with pytest.raises(AssertionError, match="TAMINGFAST_CUDA=1 asks for the CUDA engine, but "):
        build(source, compiler, CUDA_HOME=str(tmp_path), TAMINGFAST_CUDA="1")


@pytest.mark.parametrize("nvcc", ["a folder", "no program", "nothing"])
def test_what_is_no_nvcc_is_not_taken_for_one(monkeypatch, tmp_path, nvcc):
    if nvcc == "a folder":
        (tmp_path / "bin" / "nvcc").mkdir(parents=True)
    elif nvcc == "no program":
        program(tmp_path / "bin" / "nvcc", "").chmod(0o644)
    script = build_script(monkeypatch)
    for name, value in (("CUDA_HOME", str(tmp_path)), ("CUDA_PATH", ""), ("PATH", ""), ("TAMINGFAST_CUDA", "")):
        monkeypatch.setenv(name, value)
    try:
        found = script["find_cuda"]().nvcc  # perhaps that of the system
    except script["NoCuda"] as error:
        found = str(error)
    assert str(tmp_path) not in found


def test_a_folder_of_cuda_may_have_any_name(source, compiler, tmp_path):
    home = tmp_path / "cuda $HOME 12 'new' \udcff"
    text = f"""case "$*" in *--version*) {RELEASE};; *--dryrun*) echo '#$ LIBRARIES= "-L/opt/my cuda/lib"';; esac
{MAKES}"""
    program(home / "bin" / "nvcc", text)
    calls = build(source, compiler, CUDA_HOME=str(home), TAMINGFAST_CUDA="1")
    assert '-DTAMINGFAST_CUDA="nvcc 12.4' in calls and "-L/opt/my cuda/lib -l" in calls


MAKES = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done\n'
# What the C++ compiler does, or its command, and the reason that is kept.
COMPILERS = {
    "makes nothing": ("exit 0", "."),
    "says nothing": ("exit 1", "."),
    "complains in bytes": (r"printf '\377\200 error: \376\n' >&2; exit 1", r"\?\? error: \?"),
    "is killed": ("kill -9 $$", "."),
    "not a program": (None, "."),
    "an open quote": ("CXX=c++ '", "ValueError: "),
    "a folder": ("CXX=/", "the C\\+\\+ compiler '/' was not found"),
    "nothing": ("CXX= ", "."),
    "not in UTF-8": ("CXX=c\udcff++", "the C\\+\\+ compiler 'c.+' was not found"),
}


@pytest.mark.parametrize(("text", "reason"), COMPILERS.values(), ids=COMPILERS)
def test_an_unusual_compiler_means_no_extension_and_says_why(source, tmp_path, text, reason):
    shutil.rmtree(source / "build", ignore_errors=True)  # objects of another compiler
    named = (text or "").removeprefix("CXX=")
    if named == text or text is None:
        named = str(program(tmp_path / "c++", named))
    if text is None:
        Path(named).write_bytes(b"\x7fELF\x00\xff")
    chosen = {"CC": named, "CXX": named, "TAMINGFAST_CUDA": "0"}
    target = f"build/unusual-{tmp_path.name}"
    setup(source, "build_ext", "--build-lib", target, **chosen)
    (note,) = (source / target / "tamingfast").iterdir()
    assert note.name == "_C.failure.txt"
    assert re.match(reason, note.read_text(encoding="ascii"))
    with pytest.raises(AssertionError):
        setup(source, "build_ext", "--build-lib", target, **chosen, TAMINGFAST_REQUIRE_NATIVE="1")


@pytest.mark.parametrize("name", ["TAMINGFAST_CUDA", "TAMINGFAST_REQUIRE_NATIVE"])
@pytest.mark.parametrize("value", ["yes", " ", "2", "True"])
def test_other_values_of_the_build_s_variables_are_refused_by_name(source, name, value):
    with pytest.raises(AssertionError, match=f"{name}: got '{value}', expected 0 or 1, or leave it unset"):
        setup(source, "build_ext", "--build-lib", "build/refused", **{name: value})


def test_compilers_that_never_answer_are_given_up(monkeypatch, tmp_path):
    script = build_script(monkeypatch)
    monkeypatch.setitem(script["answer"].__globals__, "PATIENCE", 0.2)
    with pytest.raises(script["NoCuda"], match="nvcc --version gave no answer in 0.2 seconds"):
        script["answer"](str(program(tmp_path / "nvcc", "exec sleep 60")), "--version")
    sleeping = str(program(tmp_path / "c++", "exec sleep 60"))
    builder = type("Builder", (), {"compiler": type("Compiler", (), {"compiler_cxx": [sleeping]})})
    with pytest.raises(subprocess.TimeoutExpired):  # which `run` turns into the note
        script["BuildExtension"]._compiles_with(builder, "-fopenmp")


def test_cuda_sources_are_compiled_by_nvcc_and_linked(source, compiler, tmp_path):
    text = f"""case "$*" in
*--version*) {RELEASE};;
*--dryrun*) echo '#$ LIBRARIES= "-L/opt/cuda/lib/stubs" "-L/opt/cuda/lib"' >&2;;
esac
{MAKES}"""
    program(tmp_path / "bin" / "nvcc", text)
    calls = build(source, compiler, CUDA_HOME=str(tmp_path), TAMINGFAST_CUDA="1")
    assert '-DTAMINGFAST_CUDA="nvcc 12.4 for sm_80, sm_90"' in calls
    link = calls.splitlines()[-1]
    assert "-L/opt/cuda/lib " in link and "stubs" not in link and "-lcudart_static" in link
    assert all(f"{name}.o" in link for name in native_files() if name.endswith((".cpp", ".cu")))


def test_a_failed_build_leaves_its_first_error_or_fails_where_the_extension_is_required(source, tmp_path):
    text = f"""case "$*" in *" -c "*engine.cpp*) echo "engine.cpp:7:1: error: refused" >&2; exit 1;; esac
{MAKES}"""
    compiler = str(program(tmp_path / "c++", text))
    command = ("build_ext", "--build-lib", "build/failing")
    chosen = {"CC": compiler, "CXX": compiler, "TAMINGFAST_CUDA": "0"}
    setup(source, *command, **chosen)
    (note,) = (source / "build" / "failing" / "tamingfast").iterdir()
    assert note.name == "_C.failure.txt"
    assert note.read_text() == "engine.cpp:7:1: error: refused\n"
    with pytest.raises(AssertionError, match="error: refused"):
        setup(source, *command, **chosen, TAMINGFAST_REQUIRE_NATIVE="1")


def build_script(monkeypatch) -> dict[str, object]:
    """The names of setup.py, which does nothing here."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path("setup.py")


def test_without_ninja_the_error_says_what_to_install(monkeypatch):
    """An error that `run` turns into the note, as every other failure."""
    script = build_script(monkeypatch)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(script["ExecError"], match="ninja was not found; install it with `pip install ninja`"):
        script["find_ninja"]()
