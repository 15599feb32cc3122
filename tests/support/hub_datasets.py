"""Data sets on the test Hub: the endpoints that the datasets library asks. A repository is added as "datasets/OWNER/NAME"."""

from __future__ import annotations

import json
from typing import Any

from hub_server import Handler, HubServer, client_environment, model_info, resolve, route

__all__ = ["HubServer", "client_environment"]

DATASET_PATTERN = r"(?P<repo>[\w.-]+/[\w.-]+)"


@route("GET", rf"/api/datasets/{DATASET_PATTERN}/revision/(?P<revision>[^/]+)")
@route("GET", rf"/api/datasets/{DATASET_PATTERN}")
def dataset_info(request: Handler, repo: str, revision: str = "main") -> None:
    model_info(request, f"datasets/{repo}", revision)


@route("GET", rf"/api/datasets/{DATASET_PATTERN}/tree/(?P<revision>[^/]+)/?(?P<path>.*)")
def dataset_tree(request: Handler, repo: str, revision: str, path: str = "") -> None:
    if (repository := request.repo(f"datasets/{repo}")) and (commit := request.files(repository, revision)):
        listed = [_entry(name, commit[1]) for name in _within(commit[1], path)]
        request.json(listed) if listed or not path else request.refuse(404, "EntryNotFound")


@route("POST", rf"/api/datasets/{DATASET_PATTERN}/paths-info/(?P<revision>[^/]+)")
def dataset_paths(request: Handler, repo: str, revision: str) -> None:
    payload = json.loads(request.rfile.read(request.unread))
    request.unread = 0
    if (repository := request.repo(f"datasets/{repo}")) and (commit := request.files(repository, revision)):
        names = set(commit[1]) | {n.rpartition("/")[0] for n in commit[1] if "/" in n}
        request.json([_entry(p, commit[1]) for p in payload["paths"] if p in names])


@route("GET", rf"/datasets/{DATASET_PATTERN}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def dataset_file(request: Handler, repo: str, revision: str, path: str) -> None:
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
