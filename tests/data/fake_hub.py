"""A server on this machine that speaks the part of the Hugging Face Hub's protocol that a download of a dataset needs."""

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".bin", ".model", ".jsonl")
"""Files in large-file storage; the others are in git."""


@dataclass
class FakeHub:
    """One dataset repository, its last commit only.

    Attributes:
        files: content by path; `change` changes it.
        repo: owner and name.
        branch: the name of the one branch.
        missing: files that are listed, yet not there.
        damaged: files that are sent with their last byte changed.
        cut_after: bytes after which the next transfers of a file break off, by path; each is used once.
        stall_after: bytes after which every transfer of a file stops, by path, and leaves its reader waiting.
        stated: what is said in place of the truth: ``sha``, ``oid``, ``lfs.oid``, ``path``, ``size`` or the name of a header, by name.
        ignores_ranges: every transfer starts at the beginning.
        requests: what was asked for: method, path, and where the range starts (0 without one).
    """

    files: dict[str, bytes]
    repo: str = "owner/data"
    branch: str = "main"
    missing: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    stall_after: dict[str, int] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    ignores_ranges: bool = False
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    commit: str = field(init=False)
    digests: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.change({})

    def change(self, files: dict[str, bytes]) -> None:
        """Make a commit with some files changed or added."""
        self.files |= files
        self.digests = {name: sha256(content) if name.endswith(LFS_SUFFIXES) else git_sha1(content) for name, content in self.files.items()}
        self.commit = hashlib.sha1(json.dumps(self.digests).encode()).hexdigest()
        self.requests.clear()

    def transfers(self, name: str) -> list[int]:
        """Where each transfer of a file started."""
        return [start for method, path, start in self.requests if method == "GET" and path.endswith(f"/{name}")]

    @contextmanager
    def serve(self) -> Iterator[str]:
        """The address of the running server."""
        server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the other side was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        self.hub.requests.append((self.command, path, start))
        api, repo = re.escape(f"/api/datasets/{self.hub.repo}"), re.escape(f"/datasets/{self.hub.repo}")
        if match := re.fullmatch(rf"{api}/revision/(.+)", path):
            if self._knows(match[1]):
                sha = self.hub.stated.get("sha", self.hub.commit)
                self._send_json({"id": self.hub.repo, "sha": sha, "private": False, "tags": [], "downloads": 0, "likes": 0})
        elif match := re.fullmatch(rf"{api}/tree/([^/]+)", path):
            if self._knows(match[1]):
                self._send_json([self._entry(name) for name in self.hub.files] + [{"type": "directory", "path": "data", "oid": "0" * 40}])
        elif match := re.fullmatch(rf"{repo}/resolve/([^/]+)/(.+)", path):
            if self._knows(match[1]):
                self._send_file(match[2], start)
        else:
            self._send_error("RepoNotFound")

    def _knows(self, revision: str) -> bool:
        known = revision in (self.hub.branch, self.hub.commit)
        if not known:
            self._send_error("RevisionNotFound")
        return known

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.hub.files[name]
        entry: dict[str, Any] = {"type": "file", "path": self.hub.stated.get("path", name), "size": len(content),
                                 "oid": self.hub.stated.get("oid", git_sha1(content))}
        if name.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": self.hub.stated.get("lfs.oid", self.hub.digests[name]), "size": len(content), "pointerSize": 130}
        return entry

    def _send_file(self, name: str, start: int) -> None:
        if name not in self.hub.files or name in self.hub.missing:
            self._send_error("EntryNotFound")
            return
        content = self.hub.files[name]
        digest = self.hub.digests[name]
        if self.hub.ignores_ranges:
            start = 0
        if name in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        for header, value in (("ETag", f'"{digest}"'), ("X-Repo-Commit", self.hub.commit), ("X-Linked-Etag", f'"{digest}"'),
                              ("X-Linked-Size", str(len(content)))):
            self.send_header(header, self.hub.stated.get(header, value))
        self.end_headers()
        if self.command == "GET":
            body = content[start:]
            if self.hub.cut_after.get(name):
                body = body[:self.hub.cut_after[name].pop(0)]
                self.close_connection = True
            self.wfile.write(body[:self.hub.stall_after.get(name, len(body))])
            while name in self.hub.stall_after:
                time.sleep(0.05)

    def _send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_error(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
