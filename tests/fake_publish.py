"""The part of the fake Hub that takes models: accounts, repositories with commits, LFS storage, tags, pull requests.

Commits are kept in memory and can be read back at any revision. `attacks` makes it fail, by a pattern of
"METHOD path": a status with a message, "drop" (the connection ends without an answer) or a function to call.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fake_hub import FakeHub, Handler, serve

Attack = tuple[int, str] | str | Callable[[], None]
Files = dict[str, bytes]
_LARGE = (".safetensors", ".gguf")  # what the Hub's own .gitattributes puts into LFS
_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """One model: files of every commit, branches and pull requests by their ref, tags."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request or commit names."""
        known = self.refs | self.tags | {commit: commit for commit in self.commits}
        return known.get(revision)

    def commit(self, ref: str, files: Files) -> str:
        oid = hashlib.sha1(repr((sorted(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        return oid

    @property
    def main(self) -> Files:
        return self.commits[self.refs["main"]]


class PublishingHub(FakeHub):
    """`accounts`: what whoami says by token, or an attack. `lfs`: all large files ever received, by SHA-256."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.accounts: dict[str, dict[str, Any] | Attack] = {}
        self.models: dict[str, Repo] = {}
        self.lfs: Files = {}
        self.attacks: dict[str, Attack] = {}
        self.calls: list[tuple[str, str]] = []  # method and path of every request that was let through, with its query
        self.said: list[bytes] = []  # bodies of all requests

    def add(self, repo: str, *, private: bool = True, files: Files | None = None) -> Repo:
        self.models[repo] = Repo(private)
        self.models[repo].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return self.models[repo]

    def calls_of(self, pattern: str) -> list[str]:
        return [f"{method} {path}" for method, path in self.calls if re.search(pattern, f"{method} {path}")]


@contextmanager
def publishing_hub() -> Iterator[PublishingHub]:
    """A running PublishingHub."""
    with serve(PublishingHub()) as hub:
        yield hub


def is_large(path: str) -> bool:
    return path.endswith(_LARGE)


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(Handler):
    server: PublishingHub  # type: ignore[assignment]
    _lock = threading.Lock()

    def do_GET(self) -> None:  # noqa: N802
        self._route()

    do_HEAD = do_PUT = do_POST = do_GET

    def _route(self) -> None:
        split = urlsplit(self.path)
        path = unquote(split.path)
        with self._lock:
            self.server.said.append(self.body)
            if self._attacked(f"{self.command} {path}"):
                return
            self.server.calls.append((self.command, self.path))
            for method, pattern, answer in _ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                    return answer(self, body=self.body, query=parse_qs(split.query), **match.groupdict())
        self._error(404, "")

    def _attacked(self, request: str) -> bool:
        attack = next((a for pattern, a in self.server.attacks.items() if re.search(pattern, request)), None)
        return attack is not None and self._strike(attack)

    def _strike(self, attack: Attack) -> bool:
        if callable(attack):
            attack()
            return False
        if attack == "drop":
            self.close_connection = True
        elif not isinstance(attack, str):
            status, message = attack
            token = self.headers.get("Authorization", "")
            headers = {"X-Error-Message": message.replace("TOKEN", token), "Content-Type": "text/html"}
            self._send(status, headers, b"<html>")
        return True

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _me(self) -> dict[str, Any] | None:
        account = self.server.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        return account if isinstance(account, dict) else None

    def _repo(self, name: str, write: bool = False) -> Repo | None:
        """None, and an answer is sent, where the repository is not there or not theirs."""
        repo, me = self.server.models.get(name), self._me()
        owner = name.partition("/")[0]
        mine = me is not None and owner in (me["name"], *(org["name"] for org in me["orgs"]))
        if repo is None or (repo.private and not mine):
            self._error(404 if me else 401, "RepoNotFound")
            return None
        if write and not mine:
            self._send(403, {"X-Error-Message": "You have read access but not the required permissions"}, b"{}")
            return None
        return repo

    # -- accounts and repositories ---------------------------------------------------------------------
    def _whoami(self, body: bytes, query: Any) -> None:
        me, token = self._me(), self.headers.get("Authorization", "").removeprefix("Bearer ")
        if me is None and token in self.server.accounts:
            self._strike(self.server.accounts[token])  # type: ignore[arg-type]
            return
        self._json(me) if me else self._send(
            401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        )

    def _create(self, body: bytes, query: Any) -> None:
        wanted, me = json.loads(body), self._me()
        name = f"{wanted['organization'] or (me or {}).get('name')}/{wanted['name']}"
        if me is None or wanted["organization"] not in (me["name"], *(org["name"] for org in me["orgs"])):
            return self._send(403, {"X-Error-Message": "You don't have the rights to create a model there"}, b"{}")
        if name in self.server.models:
            return self._json({"error": "You already created this model repo"}, 409)
        self.server.add(name, private=wanted.get("visibility") == "private")
        self._json({"url": f"{self.server.endpoint}/{name}", "name": name, "id": "1"})

    def _settings(self, repo: str, body: bytes, query: Any) -> None:
        if found := self._repo(repo, write=True):
            found.private = json.loads(body)["visibility"] == "private"
            self._json({})

    def _may_write(self, repo: str, body: bytes, query: Any) -> None:
        if self._repo(repo, write=True):
            self._json({})

    def _validate(self, body: bytes, query: Any) -> None:
        head = json.loads(body)["content"].split("---")[1]
        bad = "license: nonsense" in head
        errors = [{"message": "license must be one of a list"}] if bad else []
        self._json({"errors": errors, "warnings": []}, 400 if bad else 200)

    # -- reading ---------------------------------------------------------------------------------------
    def _info(self, repo: str, body: bytes, query: Any, revision: str | None = None) -> None:
        if (found := self._repo(repo)) is None:
            return
        if (commit := found.at(revision or "main")) is None:
            return self._error(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in sorted(found.commits[commit])]
        self._json({"id": repo, "sha": commit, "siblings": siblings, "tags": [], "private": found.private})

    def _tree(self, repo: str, revision: str, body: bytes, query: Any) -> None:
        if (found := self._repo(repo)) is None:
            return
        if (commit := found.at(revision)) is None:
            return self._error(404, "RevisionNotFound")
        entries: list[dict[str, Any]] = []
        for name, data in sorted(found.commits[commit].items()):
            entry = {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
            if is_large(name):
                pointer = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                entry |= {"lfs": pointer, "oid": git_id(json.dumps(pointer).encode())}
            entries.append(entry)
        self._json(entries)

    def _refs(self, repo: str, body: bytes, query: Any) -> None:
        if found := self._repo(repo):
            named = {"branches": found.refs, "tags": found.tags}
            ref = {k: [{"name": n, "ref": n, "targetCommit": c} for n, c in v.items()] for k, v in named.items()}
            self._json({**ref, "converts": []})

    def _resolve(self, repo: str, revision: str, file: str, body: bytes, query: Any) -> None:
        if (found := self._repo(repo)) is None:
            return
        if (commit := found.at(revision)) is None:
            return self._error(404, "RevisionNotFound")
        if (data := found.commits[commit].get(file)) is None:
            return self._error(404, "EntryNotFound")
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Content-Type": "application/octet-stream"}
        if is_large(file):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if match is None:
            return self._send(200, headers, data)
        part = data[int(match[1]) : int(match[2]) + 1]
        self._send(206, headers | {"Content-Range": f"bytes {match[1]}-{match[2]}/{len(data)}"}, part)

    # -- writing ---------------------------------------------------------------------------------------
    def _preupload(self, repo: str, revision: str, body: bytes, query: Any) -> None:
        if (found := self._repo(repo, write="create_pr" not in query)) is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            data, large = found.main.get(file["path"]), is_large(file["path"])
            oid = None if data is None else hashlib.sha256(data).hexdigest() if large else git_id(data)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, repo: str, body: bytes, query: Any) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.lfs:
                answer["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{asked['oid']}", "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str, body: bytes, query: Any) -> None:
        self.server.lfs[oid] = body
        self._send(200, {}, b"")

    def _commit(self, repo: str, revision: str, body: bytes, query: Any) -> None:
        create_pr = "create_pr" in query
        if (found := self._repo(repo, write=not create_pr)) is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines.pop(0)["value"]
        if header.get("parentCommit", found.refs["main"]) != found.refs["main"]:
            return self._send(412, {"X-Error-Message": "A commit has happened since"}, b"{}")
        files = dict(found.main)
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                if hashlib.sha256(self.server.lfs.get(value["oid"], b"")).hexdigest() != value["oid"]:
                    return self._send(400, {"X-Error-Message": "LFS pointer to an object that is not there"}, b"{}")
                files[value["path"]] = self.server.lfs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs)
        oid = found.commit(f"refs/pr/{number}" if create_pr else "main", files)
        url = f"{self.server.endpoint}/{repo}"
        pr = f"{url}/discussions/{number}" if create_pr else None
        self._json({"success": True, "commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": pr})

    def _tag(self, repo: str, revision: str, body: bytes, query: Any) -> None:
        if (found := self._repo(repo, write=True)) is None:
            return
        name, commit = json.loads(body)["tag"], found.at(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        if name in found.tags:
            return self._send(409, {"X-Error-Message": "Tag reference exists already"}, b"{}")
        found.tags[name] = commit
        self._json({})


_REVISION = r"(?P<revision>[^/]+|refs/pr/\d+)"
_ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("GET", _MODEL, _Handler._info),
    ("GET", rf"{_MODEL}/revision/{_REVISION}", _Handler._info),
    ("GET", rf"{_MODEL}/auth-check/write", _Handler._may_write),
    ("GET", rf"{_MODEL}/refs", _Handler._refs),
    ("GET", rf"{_MODEL}/tree/{_REVISION}", _Handler._tree),
    ("PUT", rf"{_MODEL}/settings", _Handler._settings),
    ("POST", rf"{_MODEL}/preupload/{_REVISION}", _Handler._preupload),
    ("POST", rf"{_MODEL}/commit/{_REVISION}", _Handler._commit),
    ("POST", rf"{_MODEL}/tag/{_REVISION}", _Handler._tag),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler._put),
    ("GET", rf"/(?P<repo>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<file>.+)", _Handler._resolve),
)
