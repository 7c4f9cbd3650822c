"""Repositories of the Hugging Face Hub: the local copies of their files, and uploads.

``huggingface_hub`` is imported when a repository is first needed. Its cache, its token and its variables (``HF_HOME``,
``HF_ENDPOINT``, ``HF_HUB_OFFLINE``) count; ``TAMINGFAST_OFFLINE=1`` forbids the network as well.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tamingfast import __version__
from tamingfast.errors import UserError, first_line

#: Set to 1, it forbids downloads, this package's own as well.
OFFLINE = "TAMINGFAST_OFFLINE"
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?(?:/(?P<inside>[^\0]+))?"
)
_CONFIGS = ("*.json", "*.yaml", "*.yml")
#: Kinds of weights, the safer first: of a repository that has both, only those are fetched.
_WEIGHTS = (("*.safetensors",), ("*.ckpt", "*.pt", "*.pth", "*.bin"))
_LIBRARY = {"library_name": "tamingfast", "library_version": __version__}


@dataclass(frozen=True)
class Access:
    """How a repository is reached: arguments of ``huggingface_hub.snapshot_download``, None for its defaults."""

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    force_download: bool = False
    local_files_only: bool = False


USUAL = Access()


def names_repository(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a repository: ``owner/name[@revision][/file or folder]``.

    It does not if there is such a file, or a directory of the owner's name, in which a run was misspelt.
    """
    text = os.fspath(path)
    return bool(_NAME.fullmatch(text)) and not os.path.lexists(text) and not os.path.isdir(text.partition("/")[0])


def fetched(name: str | os.PathLike[str], access: Access = USUAL) -> Path:
    """The local copy of a repository, or of a folder or file in it, as `names_repository` describes it.

    Configs and weights are fetched, the latter as safetensors where there are any, unless the cache has them. Raises
    UserError if there is no such repository or file, and if it is not in the cache and cannot be fetched.
    """
    text = os.fspath(name)
    found = _NAME.fullmatch(text)
    if found is None:
        raise UserError(f"repository: got {text!r}, expected owner/name, as on the Hub")
    hub = _library(text)
    inside = found["inside"] or ""
    options = {
        "revision": found["revision"] or access.revision, "cache_dir": access.cache_dir, "token": access.token,
        "force_download": access.force_download, "endpoint": os.environ.get("HF_ENDPOINT") or None,
        "local_files_only": access.local_files_only or os.environ.get(OFFLINE) == "1", **_LIBRARY,
    }  # fmt: skip
    with _in_words(hub, text):
        if inside.endswith(tuple(pattern[1:] for patterns in _WEIGHTS for pattern in patterns)):
            return Path(hub.hf_hub_download(found["repo"], inside, **options))
        folder = f"{inside}/" if inside else ""
        for weights in _WEIGHTS:
            patterns = [folder + pattern for pattern in (*_CONFIGS, *weights)]
            root = Path(hub.snapshot_download(found["repo"], allow_patterns=patterns, **options), inside)
            if any(file for pattern in weights for file in root.rglob(pattern)):
                return root
    raise UserError(f"{text}: got a repository without weights, expected one with a model; correct the name")


def check_repository(name: str) -> None:
    """Raise UserError unless ``name`` is one of a whole repository: ``owner/name``."""
    if _NAME.fullmatch(name) is None or name.count("/") != 1 or "@" in name:
        raise UserError(f"repository: got {name!r}, expected owner/name, as on the Hub")


def upload(folder: Path, repo_id: str, *, private: bool | None, token: str | bool | None, **commit: Any) -> str:
    """Upload the files of ``folder`` as one commit to a repository, made if it is missing; returns the commit's URL.

    ``commit`` are further arguments of ``huggingface_hub.HfApi.upload_folder``. Raises UserError if it cannot be done.
    """
    check_repository(repo_id)
    hub = _library(repo_id)
    if os.environ.get(OFFLINE) == "1":
        raise _unanswered(repo_id, f"{OFFLINE} is 1")
    with _upload_in_words(hub, repo_id):
        api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, **_LIBRARY)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit).commit_url)


def _library(name: str) -> ModuleType:
    try:
        import huggingface_hub.errors  # takes time, and few commands need it
    except ImportError:
        raise UserError(
            f"{name}: got no such file, and no package huggingface_hub to look for a repository of this name, expected "
            "one of them; correct the path, or run 'pip install huggingface_hub'"
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _in_words(hub: ModuleType, name: str) -> Iterator[None]:
    """The library's errors as sentences."""
    errors = hub.errors
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name}: got a repository whose terms nobody has accepted with this token, expected one that it may read; "
            "accept them on its page, and run 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: got neither a file here nor a repository of the Hub that this token may read, expected one of "
            "them; correct the name, or run 'hf auth login' if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{name}: got a revision that the repository lacks, expected one of its branches, tags or "
            "commits; correct it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = next((each for each in (OFFLINE, "HF_HUB_OFFLINE") if os.environ.get(each) == "1"), None)
        raise _unreachable(name, f"{offline} is 1" if offline else _reason(error)) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{name}: got a file that the repository lacks, expected one of its files; correct it"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise _unreachable(name, "HF_HUB_OFFLINE is 1") from error
    except errors.HFValidationError as error:
        raise UserError(
            f"{name}: got no valid name ({first_line(error)}), expected owner/name, as on the Hub"
        ) from error
    except Exception as error:
        if _of_network(error):
            raise _unreachable(name, first_line(error)) from error
        raise


@contextlib.contextmanager
def _upload_in_words(hub: ModuleType, name: str) -> Iterator[None]:
    """The library's errors of an upload as sentences."""
    errors = hub.errors
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise _unanswered(name, "HF_HUB_OFFLINE is 1") from error
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404) or isinstance(error, errors.LocalTokenNotFoundError):
            raise UserError(
                f"{name}: got no permission to write there, expected the token of somebody who may; run 'hf auth "
                "login', or set HF_TOKEN"
            ) from error
        if _of_network(error):
            raise _unanswered(name, first_line(error)) from error
        raise


def _of_network(error: Exception) -> bool:
    """Whether an error is of the connection or of the server, not of this system, whose errors are told elsewhere."""
    if isinstance(error, OSError):
        return error.errno is None
    # The HTTP library's errors share no class over its versions.
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")


def _reason(error: BaseException) -> str:
    """Why a repository could not be asked: the innermost error's words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _unreachable(name: str, reason: str) -> UserError:
    return UserError(
        f"{name}: got neither a file here nor an answer of the Hub ({reason}), expected one of them or a copy in the "
        "cache; correct the path, or try again with a network"
    )


def _unanswered(name: str, reason: str) -> UserError:
    return UserError(f"{name}: got nothing ({reason}), expected an answer of the Hub; try again with a network")
