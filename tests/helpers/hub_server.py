"""A server that speaks the part of the Hub's API by which repositories are made, filled, listed and read."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Signs by which the client tells one refusal from another.
_REFUSALS = {"RepoNotFound": 404, "GatedRepo": 403, "RevisionNotFound": 404, "EntryNotFound": 404}


class Hub:
    """Repositories by name: files by path, and what was asked of the server."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}  # by their SHA-256
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.commits: list[dict] = []
        self.url = ""

    def add(self, name: str, folder: Path) -> None:
        """Make a repository of the files of a folder."""
        files = (path for path in folder.rglob("*") if path.is_file())
        self.repositories[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def sha(self, name: str) -> str:
        """The commit of the files that a repository has."""
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers at `Hub.url` inside the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._read()

    def do_HEAD(self) -> None:
        self._read()

    def do_PUT(self) -> None:
        self.hub.large[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body, path = self._body(), urlsplit(self.path).path
        self.hub.requests.append(f"POST {path}")
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.hub.gated:
                return self._refuse("GatedRepo")
            self.hub.repositories.setdefault(name, {})
            return self._answer({"url": f"{self.hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if "preupload" in parts:
            files = [
                {"path": each["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            return self._answer({"files": files})
        if "commit" in parts:
            return self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        return self._refuse("EntryNotFound")

    def _commit(self, name: str, lines: list[dict]) -> None:
        files = self.hub.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        self.hub.commits.append(lines[0]["value"])
        sha = self.hub.sha(name)
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _read(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.hub.repositories:
            return self._refuse("RepoNotFound")
        if name in self.hub.gated:
            return self._refuse("GatedRepo")
        sha, files = self.hub.sha(name), self.hub.repositories[name]
        if len(rest) > 1 and rest[1] not in ("main", sha):
            return self._refuse("RevisionNotFound")
        if rest and rest[0] == "resolve":
            content = files.get("/".join(rest[2:]))
            return self._refuse("EntryNotFound") if content is None else self._file(content, sha)
        if rest and rest[0] == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(files.items())
            ]
            return self._answer(listed)
        return self._answer({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in sorted(files)]})

    def _file(self, content: bytes, sha: str) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self._end(content)

    def _answer(self, value: object) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._end(json.dumps(value).encode())

    def _refuse(self, code: str) -> None:
        self.send_response(_REFUSALS[code])
        self.send_header("X-Error-Code", code)
        self._end(b"{}")

    def _end(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))
