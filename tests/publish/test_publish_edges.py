"""Publishing at its edges: odd names, odd tokens, repositories that keep files out, what was forgotten on the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import hub_server
import pytest
from hub_commands import REPO, open_hub, refused, run
from hub_server import Fault, HubServer
from hub_uploads import READ, WRITE
from models import BY_NAME, make, save

from hf_grow import api
from hf_grow.errors import InputError
from hf_grow.verification.lm_eval import _declared

__all__ = ["hub", "open_hub"]
hub = hub_server.hub


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
    output = capsys.readouterr().out
    assert f"verify: {source} -> {out}" in output
    assert "[bold]x.txt" in output
    assert "y[/z].txt" in output


def test_a_token_that_may_only_read_is_told_before_the_growth(
    open_hub: HubServer, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("push", grown, REPO) == 0
    monkeypatch.setenv("HF_TOKEN", READ)
    again = ("depth", tmp_path / "small", "--method", "identity", "--layers-to", 4, "-o", tmp_path / "more", "--push", REPO)
    assert "may not write to someone/grown" in refused(capsys, *again)
    assert "no such branch" in refused(capsys, *again, "--create-pr", "--push-revision", "nowhere")
    assert not list(tmp_path.glob("more*"))


def test_an_empty_destination_is_no_growth_without_one(
    open_hub: HubServer, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `--push "$REPO"` gives where REPO is not set."""
    words = ("depth", tmp_path / "small", "--method", "identity", "--layers-to", 4, "-o", tmp_path / "more", "--push", "")
    assert "is not a valid repository id" in refused(capsys, *words)
    assert not list(tmp_path.glob("more*"))


@pytest.mark.parametrize("name", ["_grown", "grown_"])
def test_a_name_that_the_hub_takes_has_a_card(open_hub: HubServer, grown: Path, name: str) -> None:
    assert run("push", grown, f"someone/{name}") == 0
    assert "README.md" in open_hub.repos[f"someone/{name}"].commits[open_hub.repos[f"someone/{name}"].refs["main"]]


def test_what_the_license_wants_of_the_name_is_told_before_anything_is_sent(
    open_hub: HubServer, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small" / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    words = ("depth", tmp_path / "small", "--method", "identity", "--layers-to", 4, "--push", REPO, "--dry-run")
    assert run(*words) == 0
    assert 'to begin with "Llama"; someone/grown does not' in capsys.readouterr().err
    assert REPO not in open_hub.repos


def test_a_pull_request_against_a_branch_takes_its_old_weights_away(open_hub: HubServer, grown: Path) -> None:
    assert run("push", grown, REPO, "--revision", "dev") == 0
    repo = open_hub.repos[REPO]
    repo.commit({"model-00001-of-00001.safetensors": hub_server.Blob(b"old", True)}, branch="dev")
    (grown / "README.md").write_text("# Better\n")
    assert run("push", grown, REPO, "--revision", "dev", "--create-pr") == 0
    assert {n for n in repo.commits[repo.refs["refs/pr/1"]] if n.endswith(".safetensors")} == {"model.safetensors"}
    assert set(repo.commits[repo.refs["main"]]) == {".gitattributes"}


def test_a_pull_request_without_a_change_is_none(open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (grown / "README.md").write_text("# Same\n")
    assert run("push", grown, REPO) == 0
    assert run("push", grown, REPO, "--create-pr") == 0
    assert "no pull request was opened" in capsys.readouterr().err
    assert list(open_hub.repos[REPO].refs) == ["main"]


def test_what_the_repository_ignores_is_not_left_out_in_silence(
    open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("push", grown, REPO, "--revision", "dev") == 0
    repo = open_hub.repos[REPO]
    before = repo.commit({".gitignore": hub_server.Blob(b"*.safetensors\n", False)})
    assert "excludes model.safetensors." in refused(capsys, "push", grown, REPO)
    assert repo.refs["main"] == before


def test_the_way_to_go_on_is_the_whole_command(open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_hub.faults.append(Fault("/commit/", "POST", 500))
    output = refused(capsys, "push", grown, REPO, "--private", "--revision", "dev", "--message", "It is new", status=1)
    assert f"hf-grow push {grown} {REPO} --private --revision dev --message 'It is new'`" in output


def test_ctrl_c_while_publishing_says_how_to_publish(
    open_hub: HubServer, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_grow.publish.push.commit_files", interrupt)
    out = tmp_path / "more"
    words = ("depth", tmp_path / "small", "--method", "identity", "--layers-to", 4, "-o", out, "--push", REPO)
    output = refused(capsys, *words, status=1)
    assert f"Repeat with `hf-grow push {out} {REPO}`" in output
    monkeypatch.undo()


def test_signed_addresses_stay_out_of_the_log(open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    open_hub.faults.append(Fault("^/upload/", "PUT", cut_after=1000, times=1))
    heard = logging.StreamHandler()
    logging.getLogger("huggingface_hub").addHandler(heard)
    try:
        assert run("push", grown, REPO) == 0
    finally:
        logging.getLogger("huggingface_hub").removeHandler(heard)
    output = capsys.readouterr().err
    assert "thrown while requesting PUT" in output
    assert "secret-signature" not in output


def test_tokens_that_cannot_be(
    open_hub: HubServer, grown: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for token in ("hf_bäd", "hf_a b"):
        monkeypatch.setenv("HF_TOKEN", token)
        assert "contains invalid characters" in refused(capsys, "push", grown, REPO)


def test_a_file_that_holds_the_token_is_not_sent(open_hub: HubServer, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (grown / "notes").mkdir()
    (grown / "notes" / "run.sh").write_bytes(b"\xff export HF_TOKEN=" + WRITE.encode())
    assert "notes/run.sh holds your access token" in refused(capsys, "push", grown, REPO)
    assert not open_hub.objects


def test_names_that_are_no_text_are_left_out(open_hub: HubServer, grown: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    for name in (b"\xff.txt", b"new\nline.txt"):
        Path(os.fsdecode(os.fsencode(grown) + b"/" + name)).write_text("")
    assert run("push", grown, REPO, "--dry-run", "--json") == 0
    facts = json.loads(capsysbinary.readouterr().out.decode())
    assert facts["left_out"] == ["\\udcff.txt", "new\\nline.txt"]
    assert run("push", grown, REPO) == 0
    assert "new\nline.txt" not in open_hub.repos[REPO].commits[open_hub.repos[REPO].refs["main"]]


def test_without_card_and_record(open_hub: HubServer, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "small"
    for extra in ((), ("--dry-run",)):
        assert "no README.md, and no growth.json" in refused(capsys, "push", plain, REPO, *extra)
    (plain / "README.md").write_bytes(b"\xff\xfe")
    assert "README.md is not UTF-8 text" in refused(capsys, "push", plain, REPO)
    (plain / "README.md").write_text("# Plain\n")
    assert run("push", plain, REPO) == 0


def test_a_stream_that_was_committed_elsewhere_is_sent_again(open_hub: HubServer, grown: Path, tmp_path: Path) -> None:
    """Killed between the commit and the end, and then resumed for another repository."""
    words = ["depth", tmp_path / "small", "--method", "identity", "--layers-to", 4, "-o", tmp_path / "more", "--stream-push"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_grow.checkpoint.partial_folder.PartialFolder.discard", lambda folder: None)
        assert run(*words, "--push", REPO) == 0
    assert (tmp_path / "more.partial").is_dir()
    assert run(*words, "--push", "someone/other", "--resume") == 0
    first, second = (open_hub.repos[r].commits[open_hub.repos[r].refs["main"]] for r in (REPO, "someone/other"))
    assert first["model.safetensors"].sha256 == second["model.safetensors"].sha256
    assert not (tmp_path / "more.partial").exists()


def test_a_card_elsewhere_leaves_the_notice_there(grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small" / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    there = tmp_path / "there"
    there.mkdir()
    (there / "NOTICE").write_text("mine\n")
    assert run("card", grown, "-o", there / "README.md") == 0
    assert (there / "NOTICE").read_text() == "mine\n"
    assert sorted(p.name for p in there.iterdir()) == ["NOTICE", "README.md", "layer-map.svg"]
    assert "is a folder" in refused(capsys, "card", grown, "-o", there)
    assert "Cannot write" in refused(capsys, "card", grown, "-o", there / "NOTICE" / "README.md", lines=1)


@pytest.mark.parametrize("words", [["card"], ["inspect", "--picture", "map.svg"]])
def test_a_full_disk_leaves_nothing_torn(words: list[str], grown: Path, tmp_path: Path) -> None:
    import resource
    import subprocess
    import sys

    before = sorted(tmp_path.rglob("*"))
    found = subprocess.run(
        [sys.executable, "-m", "hf_grow", words[0], grown, *words[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )
    assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
    assert "File too large" in found.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_task_file_nested_without_end_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("[" * 5000 + "]" * 5000)
    with pytest.raises(InputError, match="is not valid YAML"):
        _declared(tmp_path / "deep.yaml")


def test_no_bars_in_a_log(open_hub: HubServer, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_hub.add("someone/small", tmp_path / "small")
    words = ("depth", "someone/small", "--method", "identity", "--layers-to", 4, "-o", tmp_path / "more", "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", None)
        assert run(*words) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["bytes"] > 0
    assert "Fetching" not in output.err
    assert "%|" not in output.err
