"""Uploads for the test Hub of hub_server.py: repositories made, files sent plainly or by LFS, commits, branches, pull requests.

Import it to have the endpoints. Tokens may write where `writers` says so; objects are kept by SHA-256 and checked, as the real store does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import time
from fnmatch import fnmatch
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import LFS_SUFFIXES, REPO_PATTERN, Blob, Handler, HubServer, Repo, route

WRITE = "hf_writewritewrite"
READ = "hf_readreadreadread"


def allow(hub: HubServer, *owners: str) -> None:
    """Makes WRITE a token that may write for `owners`, and READ one that may only read."""
    hub.tokens |= {WRITE, READ}
    hub.writers = {owner: {WRITE} for owner in owners}


def no_pauses(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """These modules do not sleep between tries; everything else, the server's delays among it, still does."""
    for module in ("huggingface_hub.utils._http", *modules):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))


def received(hub: HubServer) -> int:
    """Bytes of weights that arrived, also of uploads that broke off."""
    return sum(r.received for r in hub.log if r.method == "PUT")


def body(request: Handler) -> bytes | None:
    """The request's body; None if the fault says that the connection breaks off in it."""
    cut = request.fault.cut_after
    got = bytearray()
    while request.unread and (cut < 0 or len(got) < cut):
        piece = request.rfile.read(min(request.unread, 1 << 16 if cut < 0 else cut - len(got)))
        if not piece:
            break
        got += piece
        request.unread -= len(piece)
        request.entry.received += len(piece)
    if cut >= 0:
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)
        return None
    return bytes(got)


def may_write(request: Handler, owner: str) -> bool:
    return request.token in request.hub.writers.get(owner, set())


def writable(request: Handler, repo_id: str, *, read_will_do: bool = False) -> Repo | None:
    repo = request.repo(repo_id)
    if repo is None:
        return None
    if not request.token:
        request.refuse(401, "", "Invalid username or password.")
        return None
    if not read_will_do and not may_write(request, repo_id.split("/")[0]):
        request.refuse(403, "", "Forbidden: you don't have the rights to write here.")
        return None
    return repo


@route("POST", r"/api/repos/create")
def create_repo(request: Handler) -> None:
    payload = json.loads(body(request) or b"{}")
    if not request.token:
        return request.refuse(401, "", "Invalid username or password.")
    owner = payload.get("organization") or "tester"
    if not may_write(request, owner):
        return request.refuse(403, "", f"You don't have the rights to create a model under the namespace {owner!r}.")
    repo_id = f"{owner}/{payload['name']}"
    url = f"{request.hub.url}/{repo_id}"
    if repo_id in request.hub.repos:
        return request.json({"error": "You already created this model repo", "url": url}, 409)
    private = payload.get("visibility") == "private"
    repo = request.hub.repos[repo_id] = Repo(repo_id, private=private, readers={request.token})
    repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
    return request.json({"url": url, "name": repo_id})


@route("POST", r"/api/validate-yaml")
def validate_yaml(request: Handler) -> None:
    import yaml

    content = json.loads(body(request) or b"{}")["content"]
    head = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    try:
        data = yaml.safe_load(head[1]) if head else {}
        errors = [] if isinstance(data.get("license", ""), str) else [{"message": '"license" must be a string'}]
    except yaml.YAMLError:
        errors = [{"message": "not YAML"}]
    request.json({"errors": errors, "warnings": []}, 400 if errors else 200)


@route("POST", rf"/api/models/{REPO_PATTERN}/preupload/(?P<revision>[^/]+)")
def preupload(request: Handler, repo: str, revision: str) -> None:
    payload = json.loads(body(request) or b"{}")
    repository = writable(request, repo, read_will_do="create_pr" in request.query)
    if not repository or not (commit := request.files(repository, revision)):
        return
    files = []
    ignored = b"".join(commit[1][".gitignore"].chunks()).decode().split() if ".gitignore" in commit[1] else []
    for file in payload["files"]:
        lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10_000_000
        ignore = any(fnmatch(file["path"], line) for line in ignored)
        entry: dict[str, Any] = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignore}
        if blob := commit[1].get(file["path"]):
            entry["oid"] = blob.sha256 if blob.lfs else blob.oid
        files.append(entry)
    request.json({"files": files, "commitOid": commit[0]})


@route("POST", rf"/{REPO_PATTERN}\.git/info/lfs/objects/batch")
def lfs_batch(request: Handler, repo: str) -> None:
    payload = json.loads(body(request) or b"{}")
    hub = request.hub
    if not writable(request, repo, read_will_do=True):
        return None
    objects = []
    for item in payload["objects"]:
        entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in hub.objects:
            target = f"{hub.cdn}/upload/{item['oid']}?X-Amz-Signature=secret-signature"
            entry["actions"] = {"upload": {"href": target}, "verify": {"href": f"{hub.url}/lfs/verify/{item['oid']}"}}
        objects.append(entry)
    wanted = sum(o["size"] for o in objects if "actions" in o)
    if wanted + sum(len(data) for data in hub.objects.values()) > hub.quota:
        return request.refuse(403, "", "Private repository storage limit reached, please upgrade your plan.")
    return request.json({"transfer": "basic", "objects": objects})


@route("PUT", r"/upload/(?P<sha256>[0-9a-f]{64})")
def lfs_upload(request: Handler, sha256: str) -> None:
    data = body(request)
    if data is None:
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        return request.refuse(400, "", "XAmzContentSHA256Mismatch")
    request.hub.objects[sha256] = data
    return request.json({})


@route("POST", r"/lfs/verify/(?P<sha256>[0-9a-f]{64})")
def lfs_verify(request: Handler, sha256: str) -> None:
    payload = json.loads(body(request) or b"{}")
    data = request.hub.objects.get(sha256)
    if data is None or len(data) != payload["size"]:
        return request.refuse(404, "", "object is not there")
    return request.json({})


@route("POST", rf"/api/models/{REPO_PATTERN}/commit/(?P<revision>[^/]+)")
def commit(request: Handler, repo: str, revision: str) -> None:
    sent = body(request)
    pull = "create_pr" in request.query
    repository = writable(request, repo, read_will_do=pull)
    if sent is None or not repository or not request.files(repository, revision):
        return None
    lines = [json.loads(line) for line in sent.splitlines()]
    add: dict[str, Blob] = {}
    delete = []
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            repository.messages.append(value["summary"])
        elif line["key"] == "file":
            add[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif line["key"] == "lfsFile":
            data = request.hub.objects.get(value["oid"])
            if request.hub.xet and data is None:
                data = bytes(value["size"])  # the content is in hf_xet's store, which only hf_xet reads
            if data is None or len(data) != value["size"]:
                return request.refuse(400, "", "LFS pointer pointed to a file that does not exist")
            add[value["path"]] = Blob(data, True)
        elif line["key"] == "deletedFile":
            delete.append(value["path"])
    branch = revision
    if pull:
        branch = f"refs/pr/{len([r for r in repository.refs if r.startswith('refs/pr/')]) + 1}"
        repository.refs[branch] = repository.refs[revision]
    sha = repository.commit(add, branch=branch, delete=tuple(delete))
    url = f"{request.hub.url}/{repo}"
    number = branch.rpartition("/")[2]
    return request.json(
        {
            "commitOid": sha,
            "commitUrl": f"{url}/commit/{sha}",
            "pullRequestUrl": f"{url}/discussions/{number}" if pull else None,
        }
    )


@route("GET", rf"/api/models/{REPO_PATTERN}/xet-(?:read|write)-token/(?P<revision>[^/]+)")
def xet_token(request: Handler, repo: str, revision: str) -> None:
    if writable(request, repo, read_will_do=True):
        facts = {"casUrl": f"local://{request.hub.xet}", "accessToken": "for-this-only", "exp": int(time.time()) + 3600}
        headers = {
            "X-Xet-Cas-Url": facts["casUrl"],
            "X-Xet-Access-Token": facts["accessToken"],
            "X-Xet-Token-Expiration": str(facts["exp"]),
        }
        request.json(facts, headers=headers)


@route("POST", rf"/api/models/{REPO_PATTERN}/branch/(?P<branch>[^/]+)")
def create_branch(request: Handler, repo: str, branch: str) -> None:
    body(request)
    repository = writable(request, repo)
    if not repository:
        return None
    if branch in repository.refs:
        return request.refuse(409, "", "Reference already exists")
    repository.refs[branch] = repository.refs["main"]
    return request.json({})
