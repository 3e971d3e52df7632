"""A server on 127.0.0.1 that speaks the Hugging Face Hub's protocol, and misbehaves when asked to.

Requests without a fault are answered as the Hub does: metadata, trees, files with ranges. A
process uses it through the environment that `Hub.environment` gives.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_a_user_of_the_tests"

_FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)"
)
_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info)"
    r"/(?P<rev>[^/]+)(/(?P<path>.*))?)?"
)


@dataclass
class Answer:
    """What the server answers instead of the truth. cut: bytes of the true body that are sent."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    cut: int | None = None


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted."}
PROXY_PAGE = Answer(
    200, {"Content-Type": "text/html"}, b"<html><body>Please log in to the guest network.</body>"
)


@dataclass
class Hub:
    """Repositories by id ("datasets/" before a data set's), each with revision -> file -> content.

    fault: gets method and path, gives an Answer or None for the truth. seen: (method, path, whether
    a token came along).
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    fault: Callable[[str, str], Answer | None] = lambda method, path: None
    seen: list[tuple[str, str, bool]] = field(default_factory=list)
    address: str = ""

    def add(self, repo: str, files: Mapping[str, bytes] | Path, revision: str = "main") -> None:
        """Put a repository on the hub: a directory, or files by name."""
        if isinstance(files, Path):
            inside = [path for path in files.rglob("*") if path.is_file()]
            files = {str(path.relative_to(files)): path.read_bytes() for path in inside}
        self.repos.setdefault(repo, {})[revision] = dict(files)

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        held = self.repos.get(repo, {})
        by_commit = {commit(repo, name): name for name in held}
        return held.get(by_commit.get(revision, revision))

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that knows this hub alone, with a cache of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SDRPN_"))}
        kept = {k: v for k, v in kept.items() if "proxy" not in k.lower()}
        path = os.pathsep.join(p for p in sys.path if p)
        return kept | {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": path,
            **more,
        }

    def fetched(self, ending: str) -> list[str]:
        """Paths of the files whose content was asked for, with this ending."""
        return [path for method, path, _ in self.seen if method == "GET" and path.endswith(ending)]


def commit(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub, empty, for as long as the block runs."""
    hub = Hub()

    class Handler(_Handler):
        held = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    held: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(size)
        path = unquote(urlsplit(self.path).path)
        self.held.seen.append((self.command, path, "Authorization" in self.headers))
        fault = self.held.fault(self.command, path)
        if fault is not None and fault.cut is None:
            self._send(fault.status, fault.body, fault.headers)
            return
        cut = fault.cut if fault else None
        if path == "/api/whoami-v2":
            self._json({"name": "tester", "type": "user", "auth": {}})
        elif file := _FILE.fullmatch(path):
            self._file((file["kind"] or "") + file["repo"], file["rev"], file["file"], cut)
        elif api := _API.fullmatch(path):
            kind = "datasets/" if api["kind"] == "datasets" else ""
            self._api(kind + api["repo"], api["rev"] or "main", api["what"], api["path"], sent)
        else:
            self._send(404, b"{}", {})

    def _file(self, repo: str, revision: str, name: str, cut: int | None) -> None:
        files = self._found(repo, revision)
        if files is None:
            return
        if name not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"} | self._head(repo, revision))
            return
        body = files[name]
        etag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"'} | self._head(repo, revision)
        if self.command == "GET" and cut is not None:
            self._send(200, body[:cut], etag)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, end = int(wanted[1]), int(wanted[2] or len(body) - 1)
            span = {"Content-Range": f"bytes {start}-{min(end, len(body) - 1)}/{len(body)}"}
            self._send(206, body[start : end + 1], etag | span)
            return
        self._send(200, body, etag | {"Accept-Ranges": "bytes"})

    def _api(
        self, repo: str, revision: str, what: str | None, path: str | None, sent: bytes
    ) -> None:
        files = self._found(repo, revision)
        if files is None:
            return
        if what in (None, "revision"):
            self._json(
                {
                    "id": repo.removeprefix("datasets/"),
                    "sha": self._head(repo, revision)["X-Repo-Commit"],
                    "private": False,
                    "gated": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": name} for name in files],
                }
            )
        elif what == "tree":
            self._json(list(_tree(files, path or "", "recursive=true" in self.path.lower())))
        else:
            paths = json.loads(sent)["paths"] if sent.startswith(b"{") else _form(sent)
            every = [entry for name in paths for entry in _tree(files, _above(name), False)]
            self._json([entry for entry in every if entry["path"] in paths])

    def _found(self, repo: str, revision: str) -> dict[str, bytes] | None:
        if repo not in self.held.repos:
            # As the Hub does: who is not logged in is not told whether there is such a repository.
            known = "Authorization" in self.headers
            self._send(404 if known else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        files = self.held.files(repo, revision)
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return files

    def _head(self, repo: str, revision: str) -> dict[str, str]:
        known = revision in self.held.repos[repo]
        return {"X-Repo-Commit": commit(repo, revision) if known else revision}

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _above(name: str) -> str:
    return name.rpartition("/")[0]


def _form(sent: bytes) -> list[str]:
    pairs = [part.partition("=") for part in unquote(sent.decode().replace("+", " ")).split("&")]
    return [value for name, _, value in pairs if name == "paths"]


def _tree(files: Mapping[str, bytes], below: str, recursive: bool) -> Iterator[dict[str, Any]]:
    seen = set()
    for name, body in files.items():
        if below and not name.startswith(f"{below}/"):
            continue
        inside = name[len(below) + 1 :] if below else name
        oid = hashlib.sha1(body).hexdigest()
        if recursive or "/" not in inside:
            yield {"type": "file", "path": name, "size": len(body), "oid": oid}
        folders = inside.split("/")[:-1]
        for depth in range(1, (len(folders) if recursive else min(len(folders), 1)) + 1):
            folder = "/".join([*([below] if below else []), *folders[:depth]])
            if folder not in seen:
                seen.add(folder)
                yield {"type": "directory", "path": folder, "size": 0, "oid": oid}
