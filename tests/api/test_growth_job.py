"""One growth service for Python and the command line: the same bytes by either, and each source opened, planned and checked once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_server
import hub_uploads
import pytest
import torch
from hub_server import HubServer
from hub_uploads import WRITE
from models import BY_NAME, make, save

import hf_grow
from hf_grow.api import growth_job
from hf_grow.api.growth_job import GrowthJob
from hf_grow.api.output_options import OutputOptions
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.cli import main
from hf_grow.convert.planning import find_method
from hf_grow.growth.plan import HEAD

hub = hub_server.hub
SOURCE = "someone/small"
STEPS = [{"method": "tile", "factor": 2, "symmetry": "none"}, {"method": "identity", "at": "1,3"}]
GROWTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("identity", {"layers_to": 6, "noise": 0.1, "max_shard_size": "50KB"}),
    "stream-source": ("interleave", {"layers_to": 8, "stream_source": True, "source_cache": "20KB", "max_shard_size": "50KB"}),
    "with-optimizer": ("tile", {"factor": 2, "with_optimizer": "{checkpoint}", "optimizer_policy": "keep-and-zero", "exact_steps": True}),
    "push": ("identity", {"layers_to": 6, "push": "someone/{by}", "private": True, "message": "grown"}),
    "stream-push": ("stack", {"push": "someone/{by}", "stream_push": True, "max_shard_size": 60_000}),
    "pipeline": ("pipeline", {"steps": STEPS, "memory_budget": "2MiB"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that is a Trainer checkpoint too."""
    model = make(BY_NAME["llama"])
    made = save(model, tmp_path_factory.mktemp("job") / "small", sharded=True)
    (made / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    optimizer = torch.optim.AdamW(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), made / "optimizer.pt")
    (made / "trainer_state.json").write_text('{"global_step": 1}')
    return made


@pytest.fixture
def served(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    hub.add(SOURCE, folder)
    hub_uploads.allow(hub, "someone")
    monkeypatch.setenv("HF_TOKEN", WRITE)
    return hub


def files_of(place: Path) -> dict[str, bytes]:
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def published(hub: HubServer, repo: str) -> dict[str, bytes]:
    """Everything but the card and its picture, which name the repository."""
    found = hub.repos[repo]
    files = {n: b"".join(b.chunks()) for n, b in found.commits[found.refs["main"]].items()}
    return {n: data for n, data in files.items() if n not in ("README.md", "layer-map.svg", ".gitattributes")}


@pytest.mark.parametrize("case", GROWTHS)
def test_python_and_the_command_line_write_and_publish_the_same_bytes(
    case: str, served: HubServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, options = GROWTHS[case]

    def filled(by: str) -> dict[str, Any]:
        return {k: v.format(checkpoint=folder, by=by) if isinstance(v, str) else v for k, v in options.items()}

    source = SOURCE if case == "stream-source" else str(folder)
    result = hf_grow.grow(source, tmp_path / "python", method, **filled("python"))
    recipe = {"source": source, "method": method, "output": str(tmp_path / "command"), **filled("command")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["grow", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (result.nbytes, dict(result.shards)) == (facts["bytes"], facts["shards"])
    if "push" in options:
        assert published(served, "someone/python") == published(served, "someone/command")
        assert result.pushed is not None
        assert (result.pushed.repo, facts["pushed"]["repository"]) == ("someone/python", "someone/command")
        assert served.repos["someone/python"].messages[-1] == served.repos["someone/command"].messages[-1]
    if case == "stream-push":
        assert not (tmp_path / "python").exists()
        assert not (tmp_path / "command").exists()
    else:
        assert files_of(tmp_path / "python") == files_of(tmp_path / "command")
        assert ("optimizer.pt" in files_of(tmp_path / "python")) == (case == "with-optimizer")


def test_every_output_option_stands_in_the_help_of_grow() -> None:
    assert hf_grow.grow.__doc__ is not None
    assert not [name for name in OutputOptions.model_fields if f"``{name}``" not in hf_grow.grow.__doc__]


def test_mistakes_in_options_of_both_kinds_are_reported_together(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(hf_grow.InputError, match="3 mistakes") as caught:
        hf_grow.grow(folder, tmp_path / "out", "identity", layer_to=6, max_shard_size="much", exact_step=True)
    assert "Did you mean layers_to?" in str(caught.value) and "Did you mean exact_steps?" in str(caught.value)
    for options, words in (
        ({"exact_steps": True}, "exact_steps: requires with_optimizer"),
        ({"private": True}, "private: requires push"),
        ({"stream_source": True}, "nothing to fetch"),
        ({"with_optimizer": tmp_path}, "optimizer"),
    ):
        with pytest.raises(hf_grow.GrowError, match=words):
            hf_grow.grow(folder, tmp_path / "out", "identity", at="1", **options)
    assert list(tmp_path.iterdir()) == []


def counted(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    real: Callable[..., Any] = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *a, **k: calls.append(a) or real(*a, **k))
    return calls


@pytest.mark.parametrize("extra", [{}, {"stream_source": True}], ids=["downloaded", "streamed"])
def test_a_hub_source_is_opened_and_planned_once(
    extra: dict[str, Any], served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {name: counted(monkeypatch, growth_job, name) for name in ("open_sources", "plan_for")}
    calls["check"] = counted(monkeypatch, PartialFolder, "check")
    hf_grow.grow(SOURCE, tmp_path / "out", "identity", at="1", **extra)
    assert {name: len(made) for name, made in calls.items()} == {"open_sources": 1, "plan_for": 1, "check": 1}


def test_it_is_planned_again_where_only_the_weights_tell_whether_a_tied_head_is_stored_twice(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    tied = save(make(BY_NAME["llama-tied"]), tmp_path / "tied")
    tensors = load_file(tied / "model.safetensors")
    save_file({**tensors, HEAD: tensors["model.embed_tokens.weight"] + 1}, tied / "model.safetensors", {"format": "pt"})
    hub.add("someone/tied", tied)
    plans = counted(monkeypatch, growth_job, "plan_for")
    notes: list[str] = []
    hf_grow.grow("someone/tied", tmp_path / "out", "identity", at="1", notify=notes.append)
    assert len(plans) == 2
    assert any("differs" in note for note in notes)


def test_a_job_goes_step_by_step(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    method = find_method("identity")
    job = GrowthJob(str(folder), method, method.options.model_validate({"at": "1"}), OutputOptions())
    assert job.out.name.startswith("small-identity-")
    job.check()
    job.check_room()
    job.prepare()
    assert list(tmp_path.iterdir()) == []
    result = job.carry_out()
    assert result.out == job.out
    assert job.publish() is None
    assert hf_grow.verify(folder, job.out, structure_only=True).ok
    with pytest.raises(hf_grow.OutputError, match="exists"):
        GrowthJob(str(folder), method, job.options, OutputOptions()).check()
