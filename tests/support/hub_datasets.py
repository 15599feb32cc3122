"""Data sets on the test Hub: the endpoints that the datasets library asks. A repository is added as "datasets/OWNER/NAME"."""

from __future__ import annotations

import json
from typing import Any

from hub_server import HubServer, _Handler, client_environment, model_info, resolve, route

__all__ = ["HubServer", "client_environment"]

_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"


@route("GET", rf"/api/datasets/{_ID}/revision/(?P<revision>[^/]+)")
@route("GET", rf"/api/datasets/{_ID}")
def dataset_info(request: _Handler, repo: str, revision: str = "main") -> None:
    model_info(request, f"datasets/{repo}", revision)


@route("GET", rf"/api/datasets/{_ID}/tree/(?P<revision>[^/]+)/?(?P<path>.*)")
def dataset_tree(request: _Handler, repo: str, revision: str, path: str = "") -> None:
    if (found := request.repo(f"datasets/{repo}")) and (commit := request.files(found, revision)):
        listed = [_entry(name, commit[1]) for name in _within(commit[1], path)]
        request.json(listed) if listed or not path else request.refuse(404, "EntryNotFound")


@route("POST", rf"/api/datasets/{_ID}/paths-info/(?P<revision>[^/]+)")
def dataset_paths(request: _Handler, repo: str, revision: str) -> None:
    asked = json.loads(request.rfile.read(request.unread))
    request.unread = 0
    if (found := request.repo(f"datasets/{repo}")) and (commit := request.files(found, revision)):
        names = set(commit[1]) | {n.rpartition("/")[0] for n in commit[1] if "/" in n}
        request.json([_entry(p, commit[1]) for p in asked["paths"] if p in names])


@route("GET", rf"/datasets/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def dataset_file(request: _Handler, repo: str, revision: str, path: str) -> None:
    resolve(request, f"datasets/{repo}", revision, path)


def _within(files: dict[str, Any], folder: str) -> list[str]:
    """Files and folders below `folder`, at any depth."""
    names = set(files)
    for name in files:
        while "/" in name:
            name = name.rpartition("/")[0]
            names.add(name)
    return sorted(n for n in names if not folder or n.startswith(folder.rstrip("/") + "/"))


def _entry(name: str, files: dict[str, Any]) -> dict[str, Any]:
    blob = files.get(name)
    if blob is None:
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    return {"type": "file", "oid": blob.oid, "size": blob.size, "path": name}
