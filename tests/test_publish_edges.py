"""Publishing at its edges: odd names, odd tokens, repositories that keep files out, what was forgotten on the command line."""

from __future__ import annotations

from pathlib import Path

import hub_server
import pytest
from hub_server import HubServer
from models import BY_NAME, make, save
from test_push import open_hub, run

from hf_grow import api

__all__ = ["hub", "open_hub"]
hub = hub_server.hub
REPO = "someone/grown"


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    source = save(make(BY_NAME["llama"], num_hidden_layers=2), tmp_path / "small")
    api.grow(source, tmp_path / "grown", "identity", layers_to=3)
    return tmp_path / "grown"


def test_brackets_in_names_are_no_markup(open_hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(make(BY_NAME["llama"], num_hidden_layers=2), tmp_path / "a[" / "b]:smile:")
    out = tmp_path / "a[" / "c]"
    assert run("depth", source, "--method", "identity", "--layers-to", 3, "-o", out) == 0
    (out / "[bold]x.txt").write_text("")
    (out / "y[").mkdir()
    (out / "y[" / "z].txt").write_text("")
    assert run("verify", source, out, "--structure-only") == 0
    assert run("inspect", out) == 0
    assert run("push", out, REPO, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"verify: {source} -> {out}" in said
    assert "[bold]x.txt" in said
    assert "y[/z].txt" in said
