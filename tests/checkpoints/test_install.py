"""`compat.install`: ours comes first, and all else of ``taming`` from the copy of the original that can be found."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

FILES = {
    "taming/models/vqgan.py": "class VQModel: 'theirs'\nclass Extra:\n    pass\n",
    "taming/models/more.py": "from .vqgan import VQModel\nfrom taming.util import instantiate_from_config, helper\n",
    "taming/modules/util.py": "raise ImportError('theirs needs something that is missing')\n",
    "taming/data/utils.py": "def answer():\n    return 42\n",
    "taming/data/own/__init__.py": "from . import deep\n",
    "taming/data/own/deep.py": "WHERE = __name__\n",
    "taming/callbacks/__init__.py": "from taming.models.vqgan import VQModel\n",
    "taming/util.py": "LOADED = __name__\nfrom taming.util import LOADED as again\nhelper = lambda: 'helped'\n",
}
PACKAGES = ("taming", "taming/models", "taming/modules", "taming/data")
INSTALL = "import tamingfast.compat; tamingfast.compat.install()\n"
OURS = "from taming.models.vqgan import VQModel; assert VQModel.__module__.startswith('tamingfast')\n"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A project in which the original lies as a folder of regular packages."""
    for name, text in (FILES | {f"{package}/__init__.py": "NAMED = __name__\n" for package in PACKAGES}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(folder: Path, code: str) -> str:
    """Runs code in a process of its own in that folder, which is not on its path; what it prints."""
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", textwrap.dedent(code)],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


PATH = "import sys; sys.path.insert(0, '.')\n"
USE = """
from taming.data.utils import answer
assert answer() == 42
import taming.data.own.deep, taming.callbacks
assert taming.data.own.deep.WHERE == "taming.data.own.deep"
assert taming.callbacks.VQModel is VQModel
from taming.models import more
assert more.VQModel is VQModel and more.helper() == "helped"
from taming.models.vqgan import Extra
from taming.data import utils
import pickle
assert type(pickle.loads(pickle.dumps(Extra()))) is Extra
assert pickle.loads(pickle.dumps(VQModel)) is VQModel
assert taming.NAMED == "taming" and taming.data.NAMED == "taming.data"
"""


@pytest.mark.parametrize("order", ["theirs first", "install first", "path later"])
def test_what_is_not_ours_comes_from_theirs(checkout, order):
    before = {"theirs first": PATH + INSTALL, "install first": INSTALL + PATH, "path later": INSTALL + OURS + PATH}
    run(checkout, before[order] + OURS + USE)


def test_theirs_may_be_folders_without_init_or_an_archive(checkout):
    for package in PACKAGES:
        (checkout / package / "__init__.py").unlink()
    used = USE.replace('assert taming.NAMED == "taming" and taming.data.NAMED == "taming.data"', "")
    run(checkout, PATH + INSTALL + OURS + used)
    with zipfile.ZipFile(checkout / "theirs.zip", "w") as archive:
        for name, text in (FILES | dict.fromkeys([f"{package}/__init__.py" for package in PACKAGES], "")).items():
            archive.writestr(name, text)
    run(checkout, INSTALL + "import sys; sys.path.insert(0, 'theirs.zip')\n" + OURS + used)


def test_theirs_may_have_been_imported_before(checkout):
    code = """
        import taming.models.vqgan as old, taming.callbacks, taming.data.utils, taming
        theirs = old.VQModel
        holder = taming
    """
    check = """
        import taming, sys
        assert VQModel is not theirs and holder.models.vqgan.VQModel is VQModel
        assert taming.callbacks is sys.modules["taming.callbacks"] and taming.data.utils.answer() == 42
        from taming.models.vqgan import Extra
        assert Extra is old.Extra
        sys.path.remove(".")
        import taming.data.own.deep
    """
    run(checkout, PATH + textwrap.dedent(code) + INSTALL + OURS + textwrap.dedent(check))


def test_ours_does_not_run_theirs(checkout):
    """Neither on import, nor when programs ask every module for its file, as `inspect` does."""
    for name in ("taming/__init__.py", "taming/models/__init__.py", "taming/models/vqgan.py"):
        (checkout / name).write_text("raise SystemExit('theirs ran')\n")
    code = """
        import inspect, sys
        inspect.getmodule(inspect.currentframe())
        stand_ins = [module for name, module in sys.modules.items() if name.startswith("taming.")]
        assert not any(hasattr(module, "__wrapped__") for module in stand_ins)
        import os, taming.models.vqgan
        assert os.path.samefile(taming.models.vqgan.__file__, "taming/models/vqgan.py")
        assert os.path.samefile(os.path.dirname(taming.__file__), "taming")
        from taming.models.vqgan import *
    """
    run(checkout, PATH + INSTALL + OURS + textwrap.dedent(code))


def test_a_name_that_neither_has_is_an_import_error(checkout):
    code = """
        for name, word in (("vqgan", "Nonsense"), ("nonsense", "it"), ("vqgan.nonsense", "it")):
            try:
                exec(f"from taming.models.{name} import {word}")
            except ImportError:
                continue
            raise AssertionError(name)
        from taming.modules.util import ActNorm
        try:
            from taming.modules.util import TheirsOnly
        except ImportError as error:
            print(error)
    """
    assert "cannot import name 'TheirsOnly'" in run(checkout, INSTALL + OURS + textwrap.dedent(code))
    theirs = run(checkout, PATH + INSTALL + OURS + textwrap.dedent(code))
    assert theirs == "theirs needs something that is missing\n"


def test_installing_again_reloading_and_finding(checkout):
    code = """
        import importlib, importlib.util, sys
        import taming.models.vqgan as module
        finders = len(sys.meta_path)
        tamingfast.compat.install()
        importlib.reload(sys.modules["tamingfast.checkpoints.compat"]).install()
        assert len(sys.meta_path) == finders and sys.modules["taming.models.vqgan"] is module
        assert importlib.reload(module) is module and module.VQModel is VQModel
        assert importlib.util.find_spec("taming.models.vqgan").name == "taming.models.vqgan"
        assert importlib.util.find_spec("taming.data.utils").origin.endswith("utils.py")
        assert importlib.util.find_spec("taming.nothing") is None
        del sys.modules["taming.models.vqgan"]
        from taming.models.vqgan import VQModel as again, Extra
        assert again is VQModel
    """
    run(checkout, PATH + INSTALL + OURS + textwrap.dedent(code))


def test_modules_list_names_and_files_of_both(checkout):
    code = """
        import inspect, taming.models.vqgan as module
        assert "VQModel" in dir(module)
    """
    run(checkout, INSTALL + OURS + textwrap.dedent(code) + "assert not hasattr(module, '__file__')\n")
    code += """
        from taming.models.vqgan import Extra
        assert "Extra" in dir(module) and inspect.getsource(Extra).startswith("class Extra")
    """
    run(checkout, PATH + INSTALL + OURS + textwrap.dedent(code))


SCRIPT = """
import sys
from taming.models.vqgan import VQModel
from ldm.models.autoencoder import VQModel as Latent
from ldm.modules.diffusionmodules.model import Encoder
from ldm.util import instantiate_from_config
from neighbour import here
print(__name__, sys.argv[1:], VQModel.__module__, Latent is VQModel, here)
"""


def compat(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tamingfast.compat", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_an_unchanged_script_runs_on_our_classes(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "run.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "neighbour.py").write_text("here = 'beside'\n")
    done = compat(tmp_path, "scripts/run.py", "--steps", "3")
    assert done.stdout == "__main__ ['--steps', '3'] tamingfast.models.vqgan True beside\n", done.stderr
    done = compat(tmp_path / "scripts", "-m", "run", "x")
    assert done.stdout == "__main__ ['x'] tamingfast.models.vqgan True beside\n", done.stderr


def test_the_script_s_own_end_is_kept(tmp_path):
    (tmp_path / "stop.py").write_text("raise SystemExit(7)\n")
    assert compat(tmp_path, "stop.py").returncode == 7
    missing = compat(tmp_path, "none.py")
    assert missing.returncode == 2 and "none.py: got no such file, expected a script" in missing.stderr
    assert compat(tmp_path).returncode == 2 and compat(tmp_path, "--help").returncode == 0


@pytest.mark.parametrize(
    "line",
    ["from taming.modules.util import Nothing", "import taming.nothing", "from ldm.models.autoencoder import KL"],
)
def test_a_name_that_is_nowhere_says_what_to_do(tmp_path, line):
    (tmp_path / "run.py").write_text(f"try:\n    {line}\nexcept ImportError:\n    raise\n")
    done = compat(tmp_path, "run.py")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "tamingfast has no counterpart" in last and "PYTHONPATH" in last


def test_an_installed_ldm_keeps_its_other_names(tmp_path):
    (tmp_path / "ldm" / "models").mkdir(parents=True)
    (tmp_path / "ldm" / "models" / "autoencoder.py").write_text("class VQModel: pass\nclass KL: theirs = True\n")
    (tmp_path / "run.py").write_text(
        "from ldm.models.autoencoder import KL, VQModel\nprint(KL.theirs, VQModel.__module__)\n"
    )
    assert compat(tmp_path, "run.py").stdout == "True tamingfast.models.vqgan\n"
