"""Publishing a folder: what the Hub then holds, what is refused, what a broken connection costs, and that no token is ever seen."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from hub_commands import REPO, open_hub, refused, run
from hub_server import Fault, HubServer, client_environment
from hub_uploads import READ, WRITE, received
from models import BY_NAME, make, save
from transformers import AutoModelForCausalLM

from hf_grow import api

__all__ = ["hub", "open_hub"]
hub = hub_server.hub


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(make(BY_NAME["mistral"], dtype=torch.bfloat16), tmp_path_factory.mktemp("push") / "small")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    out = source.parent / "grown"
    api.grow(source, out, "identity", layers_to=6, max_shard_size=30_000)
    (out / "README.md").write_text("---\nlicense: mit\nbase_model: someone/small\ntags:\n- hf-grow\n---\n# Grown\n")
    return out


@pytest.fixture
def grown(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "grown"))


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def total(folder: Path) -> int:
    return sum(p.stat().st_size for p in weights(folder))


# --- the round trip


def test_what_was_pushed_loads_from_the_hub(open_hub: HubServer, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import ModelCard, snapshot_download

    assert run("push", grown, REPO, "--json") == 0
    output = json.loads(capsys.readouterr().out)
    repo = open_hub.repos[REPO]
    assert output["commit"] == repo.refs["main"]
    assert output["url"] == f"{open_hub.url}/{REPO}"
    assert not repo.private
    there = repo.commits[output["commit"]]
    here = {p.name: p.read_bytes() for p in grown.iterdir()}
    assert {n: b"".join(b.chunks()) for n, b in there.items() if n != ".gitattributes"} == here
    assert {n for n, b in there.items() if b.lfs} == {p.name for p in weights(grown)}
    assert output["files"] == len(here)
    assert output["bytes"] == sum(map(len, here.values()))
    fetched = Path(snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert all((fetched / n).read_bytes() == data for n, data in here.items())
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        loaded, local = (AutoModelForCausalLM.from_pretrained(where)(ids).logits for where in (REPO, grown))
    assert torch.equal(loaded, local)
    card = ModelCard.load(REPO)
    assert (card.data.license, card.data.base_model, card.data.tags) == ("mit", "someone/small", ["hf-grow"])
    assert len(repo.commits) == 2  # that of its creation, and one


def test_a_name_alone_a_private_repository_a_message_and_a_branch(
    open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("push", grown, "mine", "--private", "--revision", "v0/first", "--message", "Hello") == 0
    repo = open_hub.repos["tester/mine"]
    assert repo.private
    assert repo.messages == ["Hello"]
    assert "config.json" in repo.commits[repo.refs["v0/first"]]
    assert "config.json" not in repo.commits[repo.refs["main"]]
    assert run("push", grown, "tester/mine", "--private") == 0
    assert "config.json" in repo.commits[repo.refs["main"]]
    assert repo.messages[1] == "identity growth of small with hf-grow"
    assert run("push", grown, REPO) == 0
    assert "exists and is public" in refused(capsys, "push", grown, REPO, "--private")


def test_a_pull_request_needs_no_right_to_write(
    open_hub: HubServer, grown: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("push", grown, REPO) == 0
    before = open_hub.repos[REPO].refs["main"]
    monkeypatch.setenv("HF_TOKEN", READ)
    (grown / "README.md").write_text("# Better\n")
    assert "may not write to someone/grown" in refused(capsys, "push", grown, REPO)
    assert run("push", grown, REPO, "--create-pr") == 0
    assert f"{open_hub.url}/{REPO}/discussions/1" in capsys.readouterr().out
    repo = open_hub.repos[REPO]
    assert repo.refs["main"] == before
    assert repo.commits[repo.refs["refs/pr/1"]]["README.md"].content == b"# Better\n"


def test_weights_of_an_earlier_model_go_in_the_same_commit(open_hub: HubServer, source: Path, grown: Path) -> None:
    (source / "README.md").write_text("# Small\n")
    assert run("push", source, REPO) == 0
    assert run("push", grown, REPO) == 0
    repo = open_hub.repos[REPO]
    now = repo.commits[repo.refs["main"]]
    assert {n for n in now if n.endswith(".safetensors")} == {p.name for p in weights(grown)}
    assert run("push", source, REPO) == 0
    now = repo.commits[repo.refs["main"]]
    assert [n for n in now if "safetensors" in n] == ["model.safetensors"]
    assert len(repo.messages) == 3
    (source / "README.md").unlink()


def test_only_the_model_is_sent(open_hub: HubServer, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    stray = ["optimizer.pt", "trainer_state.json", ".env", "pytorch_model.bin", "adapter.safetensors", "checkpoint-3/x.json", ".cache/x"]
    for name in stray:
        (grown / name).parent.mkdir(exist_ok=True)
        (grown / name).write_bytes(b"x")
    (grown / "link.txt").symlink_to(secret)
    (grown / ".eval_results").mkdir()
    (grown / ".eval_results" / "a.yaml").write_text("a: 1\n")
    assert run("push", grown, REPO) == 0
    output = capsys.readouterr().err
    repo = open_hub.repos[REPO]
    there = repo.commits[repo.refs["main"]]
    assert ".eval_results/a.yaml" in there
    assert not {*stray, "link.txt"} & set(there)
    for name in ("optimizer.pt", "trainer_state.json", ".env", "pytorch_model.bin", "adapter.safetensors", "checkpoint-3/", "link.txt"):
        assert name in output


def test_a_dry_run_sends_nothing_and_knows_what_is_there(open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("push", grown, REPO, "--dry-run", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert not output["exists"]
    assert output["files"] == {p.name: p.stat().st_size for p in grown.iterdir()}
    assert output["bytes"] == sum(output["files"].values())
    assert open_hub.repos == {}
    assert run("push", grown, REPO) == 0
    assert run("push", grown, REPO, "--dry-run") == 0
    assert "there already" in capsys.readouterr().out
    before = received(open_hub)
    assert run("push", grown, REPO, "--dry-run", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert output["there_already"] == [p.name for p in weights(grown)]
    assert received(open_hub) == before


# --- as a part of a growth


def test_growing_and_publishing_in_one_command(
    open_hub: HubServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "NOTICE").write_text("of the source")
    words = ["dus", source, "--push", REPO, "--private", "--push-revision", "trial", "--message", "Up", "-o", tmp_path / "out"]
    assert run(*words, "--dry-run") == 0
    assert "someone/grown (nothing sent)" in capsys.readouterr().out
    assert open_hub.log == []
    assert run(*words, "--json") == 0
    output = json.loads(capsys.readouterr().out)
    repo = open_hub.repos[REPO]
    there = repo.commits[repo.refs["trial"]]
    assert repo.private
    assert repo.messages == ["Up"]
    assert output["pushed"]["commit"] == repo.refs["trial"]
    assert {n: b.sha256 for n, b in there.items() if b.lfs} == output["shards"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(there) - {"README.md", "layer-map.svg", ".gitattributes"}
    card = b"".join(there["README.md"].chunks()).decode()  # of its own, since the folder has none
    assert card.split("---\n", 2)[2].strip().startswith("# grown\n")  # called as the repository is, not as the folder
    assert "(layer-map.svg)" in card
    assert b"".join(there["layer-map.svg"].chunks()).startswith(b"<svg")
    (source / "NOTICE").unlink()


def test_a_destination_that_cannot_be_is_told_before_the_growth(
    open_hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["dus", source, "-o", tmp_path / "out"]
    assert "may not write" in refused(capsys, *words, "--push", "nobody/grown")
    assert "OWNER/NAME" in refused(capsys, *words, "--push", "a/b/c", "--dry-run")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(capsys, *words, "--push", REPO, "--dry-run")
    assert list(tmp_path.glob("out*")) == []


def test_a_growth_whose_upload_fails_is_kept_and_pushed_later(
    open_hub: HubServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_hub.faults[:] = [Fault("/upload/", "PUT", cut_after=5000)]
    output = refused(capsys, "dus", source, "--push", REPO, "-o", tmp_path / "out", status=1)
    assert f"hf-grow push {tmp_path / 'out'} {REPO}" in output
    open_hub.faults.clear()
    assert run("push", tmp_path / "out", REPO) == 0


# --- interrupted


@pytest.mark.parametrize("fault", [Fault("/upload/", "PUT", cut_after=5000), Fault("/upload/", "PUT", status=503)], ids=["cut", "503"])
def test_a_push_that_broke_off_sends_only_the_rest(
    open_hub: HubServer, grown: Path, fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    """All uploads but the first two fail; the library's own retries as well."""
    good = [Fault("/upload/", "PUT", times=1), Fault("/upload/", "PUT", times=1)]
    open_hub.faults[:] = [*good, fault]
    output = refused(capsys, "push", grown, REPO, status=1)
    assert f"Repeat with `hf-grow push {grown} {REPO}`" in output
    repo = open_hub.repos[REPO]
    assert set(repo.commits[repo.refs["main"]]) == {".gitattributes"}  # nothing looks whole
    arrived = sum(map(len, open_hub.objects.values()))
    assert 0 < arrived < total(grown)
    open_hub.faults.clear()
    open_hub.log.clear()
    assert run("push", grown, REPO) == 0
    assert received(open_hub) == total(grown) - arrived
    assert "config.json" in repo.commits[repo.refs["main"]]


def test_one_cut_is_mended_without_a_word(open_hub: HubServer, grown: Path) -> None:
    open_hub.faults[:] = [Fault("/upload/", "PUT", cut_after=5000, times=1)]
    assert run("push", grown, REPO) == 0
    repo = open_hub.repos[REPO]
    assert "model.safetensors.index.json" in repo.commits[repo.refs["main"]]


def test_a_commit_that_fails_costs_no_upload(open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_hub.faults[:] = [Fault("/commit/", "POST", status=500, times=1)]
    assert "failed (status 500)" in refused(capsys, "push", grown, REPO, status=1)
    open_hub.log.clear()
    assert run("push", grown, REPO) == 0
    assert received(open_hub) == 0


# --- refused by us


def edit(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "growth.json").read_text())
    (folder / "growth.json").write_text(json.dumps({**record, **changes}))


def test_what_is_not_whole_or_not_what_it_says_is_not_published(
    open_hub: HubServer, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(grown, tmp_path / name))

    assert "is not finished" in refused(capsys, "push", copy("a.partial"), REPO)
    journal = copy("journal")
    (journal / ".hf-grow-journal.jsonl").write_text("{}")
    assert "--resume" in refused(capsys, "push", journal, REPO)
    missing = copy("missing")
    weights(missing)[1].unlink()
    assert "shard model-00002-of-" in refused(capsys, "push", missing, REPO)
    failed = copy("failed")
    edit(failed, verification={"ok": False, "checks": [{"name": "lossless", "status": "fail"}, {"name": "source", "status": "pass"}]})
    assert "failed its verification (lossless)" in refused(capsys, "push", failed, REPO, status=1)
    changed = copy("changed")
    data = bytearray(weights(changed)[0].read_bytes())
    data[-1] ^= 1
    weights(changed)[0].write_bytes(data)
    assert "is not the one that growth.json records" in refused(capsys, "push", changed, REPO, status=1)
    other = copy("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    assert "do not match its config.json" in refused(capsys, "push", other, REPO)
    assert "is not a folder" in refused(capsys, "push", tmp_path / "nowhere", REPO)
    assert received(open_hub) == 0


def test_doubts_are_told(open_hub: HubServer, grown: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("push", grown, REPO) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "was not verified" in output
    assert f"will show your path {source}" in output
    edit(grown, verification={"ok": True}, source={"ref": "someone/small"})
    assert run("push", grown, REPO) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "record", [{"source": []}, {"target": [1]}, {"target": {"files": {"x": 3}}}, {"growth": 1, "training": {"steps": 1}}], ids=str
)
def test_a_record_of_no_form_is_no_traceback(open_hub: HubServer, grown: Path, record: dict[str, Any]) -> None:
    (grown / "growth.json").write_text(json.dumps(record))
    assert run("push", grown, REPO) == 0
    (grown / "growth.json").write_text(json.dumps({**record, "verification": {"ok": False, "checks": 7}}))
    assert run("push", grown, REPO) == 1


def test_a_trained_model_is_compared_with_what_its_training_recorded(
    open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its growth.json keeps nothing of the weights as they were grown."""
    record = json.loads((grown / "growth.json").read_text())
    files = record["target"].pop("files")
    trained = {**record, "training": {"steps": 3, "tokens": 96, "files": files}}
    (grown / "growth.json").write_text(json.dumps(trained))
    assert run("push", grown, REPO) == 0
    assert open_hub.repos[REPO].messages == ["identity growth of small with hf-grow, trained for 3 steps (96 tokens)"]
    assert "was not verified" in capsys.readouterr().err
    files[weights(grown)[0].name]["sha256"] = "0" * 64
    (grown / "growth.json").write_text(json.dumps(trained))
    assert "is not the one that growth.json records" in refused(capsys, "push", grown, REPO, status=1)


@pytest.mark.parametrize("repo", ["a/b/c", "no spaces", "someone/", "/abs/path"])
def test_names_that_cannot_be(open_hub: HubServer, grown: Path, repo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "OWNER/NAME" in refused(capsys, "push", grown, repo)
    assert open_hub.log == []


# --- refused by the Hub


def test_no_token_and_a_wrong_one(
    open_hub: HubServer, grown: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(capsys, "push", grown, REPO)
    assert open_hub.log == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    for extra in ([], ["--dry-run"]):
        output = refused(capsys, "push", grown, REPO, *extra)
        assert "does not accept your token" in output
        assert "hf_wrong" not in output


def test_no_right_to_write_no_namespace_no_branch(
    open_hub: HubServer, grown: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "may not write to nobody/grown" in refused(capsys, "push", grown, "nobody/grown")
    assert "no such branch or pull request" in refused(capsys, "push", grown, REPO, "--revision", "refs/pr/7")
    monkeypatch.setenv("HF_TOKEN", READ)
    assert "write access to someone" in refused(capsys, "push", grown, REPO)
    assert received(open_hub) == 0


def test_a_repository_that_goes_away(open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_hub.faults[:] = [Fault("/preupload/", "POST", status=404)]
    assert "There is no repository someone/grown" in refused(capsys, "push", grown, REPO)


def test_a_full_account(open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_hub.quota = total(grown) - 1
    output = refused(capsys, "push", grown, REPO, status=1)
    assert "storage quota of someone" in output
    assert "is exhausted" in output


def test_no_network(open_hub: HubServer, grown: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", f"http://user:{WRITE}@127.0.0.1:{port}")
        output = refused(capsys, "push", grown, REPO, status=1)
    assert f"The connection to http://127.0.0.1:{port} failed (ConnectError)" in output
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "Unset HF_HUB_OFFLINE" in refused(capsys, "push", grown, REPO)


def test_a_card_whose_metadata_the_hub_refuses(open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (grown / "README.md").write_text("---\nlicense: [1\n---\n# Grown\n")
    assert "metadata at the top of README.md" in refused(capsys, "push", grown, REPO)
    assert received(open_hub) == 0


@pytest.mark.parametrize("status", [403, 409, 418, 429, 500])
@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/lfs/objects/batch", "/commit/"])
def test_a_server_that_repeats_the_token(
    open_hub: HubServer, grown: Path, status: int, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if (path, status) == ("/api/repos/create", 409):
        pytest.skip("means that it exists")
    open_hub.faults[:] = [Fault(path, "POST", status=status, body=f"bad token {WRITE}")]
    refused(capsys, "push", grown, REPO, status=1 if status in (409, 429, 500) else 2)


def test_something_else_answers(open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for body in ("log in to the hotel", "{}"):
        open_hub.faults[:] = [Fault("/api/repos/create", "POST", status=200, body=body)]
        refused(capsys, "push", grown, REPO, status=1)


def test_a_token_is_nowhere_in_what_is_printed_or_stored(open_hub: HubServer, grown: Path, tmp_path: Path) -> None:
    """In a process of its own, with everything that huggingface_hub logs; also after a failure."""
    environment = {**client_environment(open_hub, tmp_path / "home"), "HF_TOKEN": WRITE, "HF_HUB_VERBOSITY": "debug", "PATH": ""}
    words = [sys.executable, "-m", "hf_grow", "push", str(grown), REPO]
    open_hub.faults[:] = [Fault("/commit/", "POST", status=400, times=1, body=WRITE)]
    for expected in (2, 0):
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=Path(__file__).parents[2]
        )
        assert done.returncode == expected, done.stderr
        assert WRITE not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    kept = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(kept) > 5
    assert not [p for p in kept if WRITE.encode() in p.read_bytes()]
    assert not [r for r in open_hub.log if r.authorization and r.host.startswith("localhost")], "the token went to the storage"


def test_pushing_from_python_is_the_command(grown: Path, open_hub: HubServer) -> None:
    pushed = api.push(grown, REPO, private=True, message="From Python")
    assert pushed.repo == REPO
    assert pushed.nbytes >= sum(p.stat().st_size for p in weights(grown))
    assert [r.path for r in open_hub.log if "/commit/" in r.path] == [f"/api/models/{REPO}/commit/main"]
