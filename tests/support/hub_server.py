"""A small Hub on the loopback interface, for tests: repositories from folders, served as huggingface.co serves them.

Every request is logged with the bytes that were really sent, so that a test can prove what was never fetched. `faults` make it misbehave.
A new endpoint is one function with @route. Weights are redirected to another host, as the real Hub does, to prove that tokens stay here.

A test module takes the fixture with `hub = hub_server.hub`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".model")
CHUNK = 64 * 1024


@dataclass
class Blob:
    """A file's content: in a file of the test's, or in memory."""

    content: Path | bytes
    lfs: bool

    @cached_property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        stop = self.size if stop is None else stop
        if isinstance(self.content, bytes):
            yield self.content[start:stop]
            return
        with self.content.open("rb") as handle:
            handle.seek(start)
            while start < stop and (chunk := handle.read(min(CHUNK, stop - start))):
                start += len(chunk)
                yield chunk

    def _hash(self, digest: Any) -> str:
        for chunk in self.chunks():
            digest.update(chunk)
        return str(digest.hexdigest())

    @cached_property
    def sha256(self) -> str:
        return self._hash(hashlib.sha256())

    @cached_property
    def oid(self) -> str:
        """Git's name of the blob."""
        return self._hash(hashlib.sha1(b"blob %d\0" % self.size))


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    """Tokens that may read it, where it is private or gated."""
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, add: dict[str, Blob], *, branch: str = "main", delete: tuple[str, ...] = ()) -> str:
        files = {**self.commits.get(self.refs.get(branch, ""), {}), **add}
        files = {name: blob for name, blob in files.items() if name not in delete}
        listing = [branch, len(self.commits), *((n, b.oid) for n, b in sorted(files.items()))]
        sha = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong for requests of `method` whose path matches, `times` times over."""

    path: str
    method: str = "GET"
    status: int = 0
    """Answer with this status."""
    cut_after: int = -1
    """Break the connection after so many bytes of the body."""
    ignore_range: bool = False
    whole: bool = False
    """Only where no range is asked for."""
    delay: float = 0.0
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    """Instead of the true ones of a file, or of where it is."""
    times: int = 1_000_000


@dataclass
class Logged:
    method: str
    path: str
    range: str
    authorization: str
    host: str
    status: int = 0
    sent: int = 0
    received: int = 0


class HubServer:
    """Starts on a free port as a context manager. `tokens` are the valid ones."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self.faults: list[Fault] = []
        self.log: list[Logged] = []
        self.writers: dict[str, set[str]] = {}
        """Owner -> tokens that may write for it."""
        self.objects: dict[str, bytes] = {}
        """What was uploaded by LFS, by SHA-256."""
        self.xet: Path | None = None
        """Store of hf_xet's own offline kind; weights then go there instead of LFS."""
        self.quota = 1 << 60
        """Bytes of LFS that the Hub takes in all."""

    def add(self, repo_id: str, folder: Path, *, branch: str = "main", **options: Any) -> str:
        """Commits a folder as it stands; its files are read when they are asked for. Gives the commit."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id, **options))
        paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        return repo.commit({p.relative_to(folder).as_posix(): Blob(p, p.name.endswith(LFS_SUFFIXES)) for p in paths}, branch=branch)

    def __enter__(self) -> HubServer:
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sent(self, suffix: str) -> int:
        """Bytes of body sent for LFS or plain files whose name ends so."""
        shas = {b.sha256 for r in self.repos.values() for c in r.commits.values() for n, b in c.items() if b.lfs and n.endswith(suffix)}
        return sum(r.sent for r in self.log if r.status < 300 and (r.path.endswith(suffix) or r.path.rpartition("/")[2] in shas))


Route = Callable[..., None]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
REPO_PATTERN = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Adds an endpoint; named groups of the pattern become arguments. The first route that matches is taken. HEAD goes where GET goes."""

    def add(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.unread = int(self.headers.get("Content-Length") or 0)
        authorization, host = self.headers.get("Authorization", ""), self.headers.get("Host", "")
        path = unquote(url.path)
        self.entry = Logged(self.command, path, self.headers.get("Range", ""), authorization, host)
        self.hub.log.append(self.entry)
        self.token = authorization.removeprefix("Bearer ")
        method = "GET" if self.command == "HEAD" else self.command
        self.fault = next(filter(self._applies, self.hub.faults), Fault(""))
        self.fault.times -= 1
        time.sleep(self.fault.delay)
        if self.fault.status:
            return self.refuse(self.fault.status, "", self.fault.body)
        if self.token and self.token not in self.hub.tokens:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        for wanted, pattern, function in ROUTES:
            # Matched as it came, so that a branch may hold an escaped slash.
            if wanted == method and (match := pattern.fullmatch(url.path)):
                return function(self, **{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
        return self.refuse(404, "", "no such endpoint")

    def _applies(self, fault: Fault) -> bool:
        return bool(
            fault.times
            and fault.method == self.command
            and re.search(fault.path, self.entry.path)
            and not (fault.whole and self.entry.range)
        )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, headers: dict[str, str], blob: Blob, start: int = 0, stop: int | None = None) -> None:
        stop = blob.size if stop is None else stop
        self.entry.status = status
        self.send_response(status)
        for name, value in {**headers, **self.fault.headers, "Content-Length": str(stop - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = self.fault.cut_after if self.fault.cut_after >= 0 else stop - start
        try:
            for chunk in blob.chunks(start, stop):
                self.wfile.write(chunk[:left])
                self.entry.sent += len(chunk[:left])
                left -= len(chunk[:left])
                if not left:
                    break
        except OSError:  # the client had enough
            self.close_connection = True
        if self.fault.cut_after >= 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(status, {"Content-Type": "application/json", **(headers or {})}, Blob(json.dumps(data).encode(), False))

    def refuse(self, status: int, code: str, message: str = "") -> None:
        while self.unread and (piece := self.rfile.read(min(CHUNK, self.unread))):  # else the next request would begin with it
            self.unread -= len(piece)
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message} if message else {}
        self.json({"error": message}, status, headers)

    def file(self, blob: Blob, headers: dict[str, str]) -> None:
        """A file or the range of it that was asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.entry.range)
        if not wanted or self.fault.ignore_range:
            return self.reply(200, headers, blob)
        start, stop = int(wanted[1]), min(int(wanted[2] or blob.size) + 1, blob.size)
        if start >= blob.size:
            return self.reply(416, {"Content-Range": f"bytes */{blob.size}"}, Blob(b"", False))
        return self.reply(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{blob.size}"}, blob, start, stop)

    def repo(self, repo_id: str) -> Repo | None:
        """The repository, if the client may know of it; else the answer has been given."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.token not in repo.readers):
            self.refuse(
                404 if self.token else 401, "RepoNotFound", "Repository not found" if self.token else "Invalid username or password."
            )
            return None
        return repo

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]] | None:
        sha = repo.resolve(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repo.commits[sha]


@route("GET", r"/api/whoami-v2")
def whoami(request: Handler) -> None:
    if not request.token:
        return request.refuse(401, "", "Invalid username or password.")
    return request.json({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})


@route("GET", rf"/api/models/{REPO_PATTERN}/tree/(?P<revision>[^/]+)/?")
def tree(request: Handler, repo: str, revision: str) -> None:
    if (repository := request.repo(repo)) and (commit := request.files(repository, revision)):
        request.json([_tree_entry(name, blob) for name, blob in sorted(commit[1].items())])


@route("GET", rf"/api/models/{REPO_PATTERN}/revision/(?P<revision>[^/]+)")
@route("GET", rf"/api/models/{REPO_PATTERN}")
def model_info(request: Handler, repo: str, revision: str = "main") -> None:
    # As on the real Hub, everyone may list the files of a gated repository.
    if not (repository := request.repo(repo)) or not (commit := request.files(repository, revision)):
        return
    siblings: list[dict[str, Any]] = []
    for name, blob in sorted(commit[1].items()):
        entry: dict[str, Any] = {"rfilename": name}
        if "blobs" in request.query:
            entry |= {"size": blob.size, "blobId": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
        siblings.append(entry)
    gated: Any = "manual" if repository.gated else False
    request.json({"id": repository.id, "sha": commit[0], "private": repository.private, "gated": gated, "tags": [], "siblings": siblings})


@route("GET", rf"/{REPO_PATTERN}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Handler, repo: str, revision: str, path: str) -> None:
    if not (repository := request.repo(repo)):
        return
    if repository.gated and request.token not in repository.readers:
        return request.refuse(403 if request.token else 401, "GatedRepo", f"Access to model {repo} is restricted.")
    if not (commit := request.files(repository, revision)):
        return
    sha, files = commit
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if path not in files:
        return request.json({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
    blob = files[path]
    if not blob.lfs:
        return request.file(blob, {**headers, "ETag": f'"{blob.oid}"'})
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "ETag": f'"{blob.oid}"'}
    headers["Location"] = f"{request.hub.cdn}/cdn/{repo}/{blob.sha256}"
    return request.reply(302, headers, Blob(b"", False))


@route("GET", rf"/cdn/{REPO_PATTERN}/(?P<sha256>[0-9a-f]{{64}})")
def cdn(request: Handler, repo: str, sha256: str) -> None:
    blobs = (b for files in request.hub.repos[repo].commits.values() for b in files.values() if b.lfs and b.sha256 == sha256)
    request.file(next(blobs), {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


def _tree_entry(name: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": name}
    return entry | ({"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.lfs else {})


def client_environment(server: HubServer, home: Path) -> dict[str, str]:
    """Points a client process at the server, with a cache of its own and no token."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server; this process's huggingface_hub talks to it, and to nothing else."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with HubServer() as server:
        home = tmp_path / "hf-home"
        for name, value in client_environment(server, home).items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        # The library read its environment when it was imported; all its modules look these up in `constants`.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        close_session()  # a client made earlier keeps the proxies of its day
        yield server
        close_session()
