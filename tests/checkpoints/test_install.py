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
