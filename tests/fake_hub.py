"""A fake Hub on 127.0.0.1, enough for the real huggingface_hub and datasets clients: it serves folders and logs
every request.

As the real one does, it answers requests for large files by a redirect to another host (here `localhost`), and for
weights that host ignores ranges where the client would accept a compressed answer.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

# What a repository can be made to answer: (request it hits, status, X-Error-Code).
FAILURES = {
    "gated": ("resolve", 403, "GatedRepo"),
    "busy": ("api", 429, ""),
    "broken": ("api", 500, ""),
    "html": ("api", 200, ""),  # a proxy's login page
    "silent": ("api", 0, ""),  # never answers
    "foreign": ("resolve", 0, ""),  # answers without X-Repo-Commit
    "rangeless": ("cdn", 0, ""),  # ignores ranges
    "flaky": ("cdn", 503, ""),  # at the first request for each whole file
    "stalled": ("cdn", 0, ""),  # stops halfway through a whole file
}
_LARGE = (".safetensors", ".gguf", ".parquet", ".gz")  # what Git LFS holds
_REPO = r"(?P<repo>(?:datasets/)?[^/]+/[^/]+)"
_API = re.compile(rf"/api/(?:models/|(?=datasets/)){_REPO}(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(rf"/api/(?:models/|(?=datasets/)){_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
_RESOLVE = re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_CDN = re.compile(rf"/cdn/{_REPO}/(?P<file>.+)")


@dataclass
class Request:
    """One line of the log, there before its answer is; `sent` counts the bytes of the body so far."""

    method: str
    path: str
    range: str | None
    authorized: bool
    status: int
    sent: int


class FakeHub(ThreadingHTTPServer):
    """`repos` names the folder of each repository, `failures` (keys of FAILURES) what some do instead.

    The name of a dataset's repository starts with `datasets/`.
    """

    daemon_threads = True
    request_queue_size = 128  # connections may come faster than a busy machine takes them

    def __init__(self, handler: "type[Handler] | None" = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.repos: dict[str, Path] = {}
        self.failures: dict[str, str] = {}
        self.log: list[Request] = []
        self.stopped = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def requests(self, repo: str) -> list[Request]:
        """The requests that concern `repo`."""
        return [request for request in self.log if f"/{repo}" in request.path]


Hub = TypeVar("Hub", bound=FakeHub)


def commit_of(repo: str) -> str:
    """The only commit of a repository."""
    return hashlib.sha1(repo.encode()).hexdigest()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running FakeHub."""
    with serve(FakeHub()) as hub:
        yield hub


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """`hub`, answering until the end of the context."""
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


@cache
def _etag(path: Path) -> str:
    return f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"'


class Handler(BaseHTTPRequestHandler):
    """Reads the whole request before anything is answered, so that a connection is never closed with bytes unread.

    A connection that will be closed after its answer says so (Connection: close); else the client would send its next
    request into it.
    """

    server: FakeHub
    protocol_version = "HTTP/1.1"
    body = b""  # of the request

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        self.body = self._read_body()
        return True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, answer in ((_API, self._api), (_TREE, self._tree), (_RESOLVE, self._resolve), (_CDN, self._cdn)):
            if match := pattern.fullmatch(path):
                return answer(**match.groupdict())
        self._error(404, "")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr; see `FakeHub.log`."""

    def _api(self, repo: str, revision: str | None) -> None:
        if self._refused(repo, revision, "api"):
            return
        folder = self.server.repos[repo]
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        siblings = [{"rfilename": file, "size": (folder / file).stat().st_size} for file in files]
        name = repo.removeprefix("datasets/")
        info = {"id": name, "sha": commit_of(repo), "siblings": siblings, "tags": [], "private": False}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _tree(self, repo: str, revision: str, folder: str | None) -> None:
        if self._refused(repo, revision, "api"):
            return
        top = self.server.repos[repo]
        start = top / (folder or "")
        if not start.is_dir():
            return self._error(404, "EntryNotFound")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        entries = []
        for path in sorted(start.rglob("*") if recursive else start.iterdir()):
            name = str(path.relative_to(top))
            oid = hashlib.sha1(name.encode()).hexdigest()
            kind, size = ("file", path.stat().st_size) if path.is_file() else ("directory", 0)
            entries.append({"type": kind, "oid": oid, "size": size, "path": name})
        self._send(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        if self._refused(repo, revision, "resolve"):
            return
        path = self.server.repos[repo] / file
        headers = {} if self.server.failures.get(repo) == "foreign" else {"X-Repo-Commit": commit_of(repo)}
        if not path.is_file():
            self._error(404, "EntryNotFound")
        elif path.suffix in _LARGE:
            headers |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": _etag(path)}
            location = f"http://localhost:{self.server.server_port}/cdn/{repo}/{file}"
            self._send(302, headers | {"Location": location}, b"")
        else:
            self._send_file(path, headers | {"ETag": _etag(path)})

    def _cdn(self, repo: str, file: str) -> None:
        path = self.server.repos[repo] / file
        whole = [r for r in self.server.log if r.path == self.path and r.range is None]
        if self.server.failures.get(repo) == "flaky" and self.headers.get("Range") is None and not whole:
            return self._error(503, "")
        compressed = path.suffix == ".safetensors" and self.headers.get("Accept-Encoding") != "identity"
        self._send_file(path, {}, ranges=not compressed and self.server.failures.get(repo) != "rangeless")

    def _send_file(self, path: Path, headers: dict[str, str], ranges: bool = True) -> None:
        data = path.read_bytes()
        wanted = self.headers.get("Range") if ranges else None
        if wanted is None:
            stalled = any(f"/{repo}/" in self.path for repo, what in self.server.failures.items() if what == "stalled")
            return self._send(200, headers, data, stalled=stalled)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        start, end = (int(match[1]), min(int(match[2] or len(data)), len(data) - 1)) if match else (0, -1)
        if start > end:
            return self._send(416, headers | {"Content-Range": f"bytes */{len(data)}"}, b"")
        self._send(206, headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1])

    def _refused(self, repo: str, revision: str | None, kind: str) -> bool:
        if repo not in self.server.repos:
            self._error(404, "RepoNotFound")
            return True
        if revision not in (None, "main", commit_of(repo)):
            self._error(404, "RevisionNotFound")
            return True
        failure = self.server.failures.get(repo, "")
        hits, status, code = FAILURES.get(failure, ("", 0, ""))
        if hits != kind or failure == "foreign":
            return False
        if failure == "silent":
            self.server.stopped.wait()
            self.close_connection = True
        elif status == 200:
            self._send(200, {"Content-Type": "text/html"}, b"<html>please log in</html>")
        else:
            self._error(status, code)
        return True

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code} if code else {}, b"")

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, stalled: bool = False) -> None:
        self.send_response(status)
        closing = {"Connection": "close"} if self.close_connection else {}
        for name, value in (headers | closing | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        authorized = "Authorization" in self.headers
        request = Request(self.command, self.path, self.headers.get("Range"), authorized, status, sent=0)
        self.server.log.append(request)  # a client that has the answer may look at once
        self.end_headers()
        try:
            while self.command != "HEAD" and request.sent < len(body):
                if stalled and request.sent > len(body) // 2:
                    self.server.stopped.wait()
                request.sent += self.connection.send(body[request.sent : request.sent + 65536])
        except OSError:  # the client has read enough
            self.close_connection = True
