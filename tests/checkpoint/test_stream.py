"""Growing past the disk: shards sent while others are written, source tensors fetched when they are needed, and every way to be interrupted."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from hub_commands import REPO, files_of, open_hub, process, published, run, watched, without_card
from hub_server import Fault, HubServer
from hub_uploads import WRITE, received
from models import BY_NAME, make, save
from transformers import AutoModelForCausalLM

from hf_grow.checkpoint.partial_folder import PartialFolder

__all__ = ["hub", "open_hub"]
hub = hub_server.hub
SHARD = 60_000  # bytes; the target has about ten of them


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(
        make(BY_NAME["mistral"], dtype=torch.float32, num_hidden_layers=6), tmp_path_factory.mktemp("stream") / "small", sharded=True
    )
    (folder / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "LICENSE", "additional_chat_templates/tool.jinja"):
        (folder / name).write_text("{}")
    return folder


def growing(source: object, out: Path, *extra: object) -> list[object]:
    return ["depth", source, "--method", "interleave", "--layers-to", 12, "--max-shard-size", SHARD, "-o", out, *extra]


def streaming(source: object, out: Path, *extra: object) -> list[object]:
    return growing(source, out, "--push", REPO, "--stream-push", *extra)


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    """What an ordinary growth writes."""
    out = source.parent / "whole"
    assert run(*growing(source, out)) == 0
    return files_of(out)


# --- pushing shard by shard


def test_what_is_streamed_is_what_would_be_written_and_two_shards_lie_here_at_most(
    open_hub: HubServer, source: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_hub.faults[:] = [Fault("/upload/", "PUT", delay=0.05)]  # the network is slower than the disk
    with watched(tmp_path / "work") as seen:
        assert run(*streaming(source, tmp_path / "work" / "out", "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    shards = {n: len(data) for n, data in whole.items() if n.endswith(".safetensors")}
    assert len(shards) > 6
    assert seen[1] > 50
    assert max(shards.values()) < seen[0] <= 2 * max(shards.values())
    assert seen[0] < sum(shards.values()) / 3
    there = published(open_hub)
    assert without_card(there) == whole  # growth.json, index and the nested template too
    assert said["pushed"]["commit"] == open_hub.repos[REPO].refs["main"]
    assert said["pushed"]["bytes"] == sum(map(len, there.values()))
    assert list((tmp_path / "work").iterdir()) == []
    model = AutoModelForCausalLM.from_pretrained(REPO)
    assert model.config.num_hidden_layers == 12
    assert received(open_hub) == sum(shards.values())


def test_nothing_is_visible_before_the_commit(open_hub: HubServer, source: Path, tmp_path: Path) -> None:
    open_hub.faults[:] = [Fault("/commit/", "POST", status=500)]
    assert run(*streaming(source, tmp_path / "out")) == 1
    assert published(open_hub) == {}
    open_hub.faults.clear()
    open_hub.log.clear()
    assert run(*streaming(source, tmp_path / "out", "--resume")) == 0
    assert received(open_hub) == 0
    assert len(published(open_hub)) > 10


def test_a_pull_request_and_a_branch(open_hub: HubServer, source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    assert run(*streaming(source, tmp_path / "a", "--push-revision", "trial")) == 0
    assert without_card(published(open_hub, branch="trial")) == whole
    assert published(open_hub) == {}
    assert run(*streaming(source, tmp_path / "b", "--create-pr")) == 0
    assert without_card(published(open_hub, branch="refs/pr/1")) == whole


@pytest.mark.parametrize("fault", [Fault("/upload/", "PUT", cut_after=5000), Fault("/upload/", "PUT", status=503)], ids=["cut", "503"])
def test_a_connection_that_breaks_off(
    open_hub: HubServer, source: Path, whole: dict[str, bytes], tmp_path: Path, fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    open_hub.faults[:] = [*(Fault("/upload/", "PUT", times=1) for _ in range(3)), fault]
    assert run(*streaming(source, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "--resume" in said[said.index("hf-grow: ") :]
    assert "Traceback" not in said
    assert len(open_hub.objects) == 3
    assert published(open_hub) == {}
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) <= 2
    open_hub.faults.clear()
    open_hub.log.clear()
    arrived = sum(map(len, open_hub.objects.values()))
    assert run(*streaming(source, tmp_path / "out", "--resume")) == 0
    assert "3 shards were uploaded by the interrupted run" in capsys.readouterr().err
    assert without_card(published(open_hub)) == whole
    assert received(open_hub) == sum(len(d) for n, d in whole.items() if n.endswith(".safetensors")) - arrived


def test_shards_that_the_hub_forgot_are_made_again(
    open_hub: HubServer, source: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_hub.faults[:] = [Fault("/commit/", "POST", status=500)]
    assert run(*streaming(source, tmp_path / "out")) == 1
    for lost in random.Random(0).sample(sorted(open_hub.objects), 3):
        del open_hub.objects[lost]
    open_hub.faults.clear()
    assert run(*streaming(source, tmp_path / "out", "--resume")) == 0
    assert "3 are no longer on the Hub and are written again" in capsys.readouterr().err
    assert without_card(published(open_hub)) == whole


def test_a_stream_with_other_shards_is_another_plan(
    open_hub: HubServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_hub.faults[:] = [Fault("/commit/", "POST", status=500)]
    assert run(*streaming(source, tmp_path / "out")) == 1
    open_hub.faults.clear()
    assert run(*streaming(source, tmp_path / "out", "--resume", "--max-shard-size", SHARD + 4096)) == 2
    assert "belongs to a different plan" in capsys.readouterr().err


CRASHES = {
    "sent, not noted": ("note_sent", False),
    "noted, not removed": ("note_sent", True),
    "committed, not noted": ("note_committed", False),
    "noted, folder still there": ("note_committed", True),
}


@pytest.mark.parametrize("point", CRASHES)
def test_a_crash_between_any_two_steps(
    open_hub: HubServer, source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    name, after = CRASHES[point]
    real, calls = getattr(PartialFolder, name), []

    def crashing(self: PartialFolder, *args: Any) -> None:
        calls.append(args)
        if len(calls) == (3 if name == "note_sent" else 1):
            if after:
                real(self, *args)
            raise KeyboardInterrupt
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PartialFolder, name, crashing)
        assert run(*streaming(source, tmp_path / "out")) == 1
    assert run(*streaming(source, tmp_path / "out", "--resume")) == 0
    assert without_card(published(open_hub)) == whole
    assert received(open_hub) == sum(len(d) for n, d in whole.items() if n.endswith(".safetensors"))  # nothing twice
    assert len(open_hub.repos[REPO].messages) == 1  # no second commit of the same files
    assert not list(tmp_path.glob("out*"))


def test_refused_combinations(source: Path, tmp_path: Path, open_hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*growing(source, tmp_path / "out", "--stream-push")) == 2
    assert "requires push" in capsys.readouterr().err
    assert run(*streaming(source, tmp_path / "out", "--with-optimizer", tmp_path)) == 2
    assert "stream_push: cannot be combined with with_optimizer" in capsys.readouterr().err
    assert open_hub.log == []


def test_a_dry_run_needs_room_for_two_shards_only(
    open_hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * SHARD))
    assert run(*growing(source, tmp_path / "out", "--dry-run")) == 2
    assert "needs" in capsys.readouterr().err
    assert run(*streaming(source, tmp_path / "out", "--dry-run")) == 0
    assert run(*streaming(source, tmp_path / "out")) == 0


def test_bad_weights_stop_a_stream_before_anything_is_visible(
    open_hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(BY_NAME["mistral"])
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    source = save(model, tmp_path / "bad")
    assert run(*streaming(source, tmp_path / "out", "--layers-to", 8)) == 2
    assert "NaN" in capsys.readouterr().err
    assert published(open_hub) == {}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_an_interrupted_process_goes_on(
    open_hub: HubServer, source: Path, whole: dict[str, bytes], tmp_path: Path, how: signal.Signals
) -> None:
    """Interrupted in the middle of an upload that would take long: a Ctrl-C does not wait for its end."""
    open_hub.faults[:] = [*(Fault("/upload/", "PUT", times=1) for _ in range(3)), Fault("/upload/", "PUT", delay=200, times=1)]
    child = process(open_hub, tmp_path / "home", streaming(source, tmp_path / "out"))
    deadline = time.monotonic() + 300
    while sum(r.method == "PUT" for r in open_hub.log) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    child.send_signal(how)
    _, said = child.communicate(timeout=150)
    assert time.monotonic() - began < 100
    assert child.returncode == (1 if how == signal.SIGINT else -signal.SIGKILL), said
    if how == signal.SIGINT:
        assert "--resume" in said
    assert "Traceback" not in said
    assert published(open_hub) == {}
    assert WRITE.encode() not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    open_hub.faults.clear()
    assert run(*streaming(source, tmp_path / "out", "--resume")) == 0
    assert without_card(published(open_hub)) == whole
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_xet_stores_what_repeats_once_and_an_interrupted_stream_goes_on(open_hub: HubServer, tmp_path: Path) -> None:
    """With huggingface_hub's default way of sending, into hf_xet's own offline store. The test's Hub does not know its objects before a commit."""
    pytest.importorskip("hf_xet")
    source = save(make(BY_NAME["mistral"], num_hidden_layers=4, hidden_size=256, intermediate_size=1024), tmp_path / "source")
    open_hub.xet = tmp_path / "store"
    open_hub.xet.mkdir()
    words = ["depth", source, "--method", "interleave", "--layers-to", 8, "--max-shard-size", "5MB", "-o", tmp_path / "out"]
    words += ["--push", REPO, "--stream-push"]
    open_hub.faults[:] = [Fault("/commit/", "POST", status=500, times=1)]
    stored = []
    for extra, expected in (([], 1), (["--resume"], 0)):
        child = process(open_hub, tmp_path / "home", [*words, *extra], HF_HUB_DISABLE_XET="0")
        _, said = child.communicate(timeout=300)
        assert child.returncode == expected, said
        assert "%" not in said  # no bars in a log
        stored.append(sum(p.stat().st_size for p in open_hub.xet.rglob("*") if p.is_file()))
    there = published(open_hub)
    total = sum(len(data) for name, data in there.items() if name.endswith(".safetensors"))
    assert len(there) > 8
    assert received(open_hub) == 0
    assert stored[0] < 0.7 * total
    assert stored[1] < 1.05 * stored[0]
