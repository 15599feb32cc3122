"""Growing from a Hub source that never is here as a whole: what is fetched, how much lies on the disk, and what a bad connection does."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import hub_server
import hub_uploads
import pytest
import torch
from hub_commands import files_of, process, published, run, watched, without_card
from hub_server import Fault, HubServer
from hub_uploads import WRITE
from models import BY_NAME, make, save

from hf_grow import api
from hf_grow.checkpoint.partial_folder import SOURCE_CACHE
from hf_grow.checkpoint.tensor_cache import schedule
from hf_grow.checkpoint.writer import layout
from hf_grow.common.units import format_bytes
from hf_grow.growth.plan import GrowthPlan

hub = hub_server.hub
SOURCE = "someone/small"
WAYS: dict[str, list[Any]] = {
    "interleave": ["depth", "--method", "interleave", "--layers-to", 12],
    "stack-noise": ["depth", "--method", "stack", "--noise", 0.05],
    "seam": ["dus", "--drop", 1, "--seam-average", 1],
    "wide": ["width", "--method", "tile", "--hidden", 72],
    "experts": ["experts", "--experts", 3],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save(make(BY_NAME["llama"], num_hidden_layers=6, dtype=torch.float32), tmp_path_factory.mktemp("spool") / "small", sharded=True)
    (made / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "LICENSE", "additional_chat_templates/tool.jinja"):
        (made / name).write_text('{"model": {"vocab": {"a": 0}}}')
    return made


@pytest.fixture
def served(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    hub.add(SOURCE, folder)
    hub_uploads.allow(hub, "someone")
    monkeypatch.setenv("HF_TOKEN", WRITE)
    hub_uploads.no_pauses(monkeypatch, "hf_grow.checkpoint.byte_ranges")
    return hub


def words(way: str, out: Path, *extra: object) -> list[object]:
    command, *options = WAYS[way]
    return [command, SOURCE, *options, "-o", out, *extra]


def order_of(plan: GrowthPlan) -> list[str]:
    return [slot.name for shard in layout(plan.targets, 10**9) for slot in shard.slots]


def fetched_bytes(hub: HubServer) -> int:
    """Bytes of weights sent for ranges that do not begin in a header."""
    return sum(r.sent for r in hub.log if r.path.startswith("/cdn/") and r.range and int(r.range[6:].split("-")[0]) > 8)


# --- the schedule


def by_hand(plan: GrowthPlan, keep: int) -> int:
    """Bytes fetched by Belady's rule, with every next use looked up afresh."""
    order = order_of(plan)
    needs = [list(dict.fromkeys(s.key for s in plan.growth.tensors[t].sources())) for t in order]
    size = {k: t.nbytes for k, t in plan.source.by_key.items()}

    def next_use(key: str, at: int) -> int:
        return next((i for i in range(at + 1, len(needs)) if key in needs[i]), 10**9)

    here: set[str] = set()
    fetched = 0
    for at, keys in enumerate(needs):
        fetched += sum(size[k] for k in keys if k not in here)
        here = {k for k in here | set(keys) if next_use(k, at) < 10**9}
        while sum(size[k] for k in here) > keep:
            here.discard(max(here, key=lambda k: (next_use(k, at), -at)))
    return fetched


@pytest.mark.parametrize("way", WAYS)
def test_the_schedule_fetches_what_beladys_rule_does(way: str, folder: Path) -> None:
    command, *options = WAYS[way]
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    method = pairs.pop("--method", command)
    plan = api.plan(folder, str(method), **{str(k)[2:].replace("-", "_"): v for k, v in pairs.items()})
    remote = frozenset(plan.source.tensors)
    used = {s.key for e in plan.growth.tensors.values() for s in e.sources()}
    once = sum(plan.source.tensors[k].nbytes for k in used)
    each = sum(plan.source.tensors[k].nbytes for e in plan.growth.tensors.values() for k in {s.key for s in e.sources()})
    found = {}
    for keep in (0, 5_000, 30_000, 10**9):
        made = schedule(plan, order_of(plan), remote, keep)
        assert made.waiting <= keep
        assert made.once == once
        # Equal next uses are a matter of taste; sizes then differ by single tensors.
        assert made.fetched == pytest.approx(by_hand(plan, keep), rel=0.02)
        found[keep] = made.fetched
    assert found[0] == each
    assert found[10**9] == once
    assert sorted(found.values(), reverse=True) == list(found.values())


def test_what_is_here_is_not_fetched(folder: Path) -> None:
    plan = api.plan(folder, "stack")
    made = schedule(plan, order_of(plan), frozenset({"lm_head.weight"}), 0)
    assert made.fetched == plan.source.tensors["lm_head.weight"].nbytes
    assert [t for t, keys in made.needs.items() if keys] == ["lm_head.weight"]


# --- the growth


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way in ("seam", "experts", "stack-noise"))) for way in WAYS])
def test_the_result_is_that_of_a_whole_source(way: str, served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for keep, workers in ((0, 4), (20_000, 1)):
        monkeypatch.setattr("hf_grow.api.growth_job.WORKERS", workers)
        served.log.clear()
        out = tmp_path / f"streamed-{keep}-{workers}"
        assert run(*words(way, out, "--stream-source", "--source-cache", keep, "--max-shard-size", "50KB", "--json")) == 0
        assert not list((tmp_path / "hf-home").rglob("*.safetensors"))
        plan = GrowthPlan.from_json(json.loads((out / "growth.json").read_text()))
        order = [slot.name for shard in layout(plan.targets, 50_000) for slot in shard.slots]
        planned = schedule(plan, order, frozenset(plan.source.tensors), keep).fetched
        assert fetched_bytes(served) == planned if workers == 1 else fetched_bytes(served) <= planned  # threads may share
    assert not [r for r in served.log if r.authorization and r.host.startswith("localhost")], "the token left the Hub"
    assert run(*words(way, tmp_path / "plain", "--max-shard-size", "50KB")) == 0
    assert files_of(out) == files_of(tmp_path / "plain") == files_of(tmp_path / "streamed-0-4")
    assert {"LICENSE", "additional_chat_templates/tool.jinja"} <= files_of(out).keys()


def test_little_lies_on_the_disk_on_either_side(served: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served.faults[:] = [Fault("/cdn/", delay=0.005), Fault("/upload/", "PUT", delay=0.02)]
    work = tmp_path / "work"
    extra = ["--stream-source", "--source-cache", "20KB", "--push", "someone/grown", "--stream-push", "--max-shard-size", "30KB"]
    with watched(work, "*") as seen, watched(tmp_path / "hf-home", "*") as cache:
        assert run(*words("interleave", work / "out", *extra)) == 0
    said = capsys.readouterr().out
    assert "by byte ranges" in said
    plan = api.plan(SOURCE, "interleave", layers_to=12)
    largest = max(t.nbytes for t in plan.targets.values())
    shards = [s.size for s in layout(plan.targets, 30_000)]
    assert seen[1] > 50
    bound = 2 * max(shards) + 20_000 + 4 * largest
    assert seen[0] < bound + 60_000  # and config, index, journal, growth.json
    assert bound < sum(shards) / 2
    assert cache[0] < 20_000
    assert list(work.iterdir()) == []
    served.faults.clear()
    assert run(*words("interleave", tmp_path / "plain", "--max-shard-size", "30KB")) == 0
    served.repos["someone/grown"].id = "someone/grown"
    assert without_card(published(served)) == files_of(tmp_path / "plain")


def test_a_dry_run_fetches_headers_only_and_says_what_would_be(
    served: HubServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words("interleave", tmp_path / "out", "--stream-source", "--source-cache", 0, "--dry-run")) == 0
    said = capsys.readouterr().out
    plan = api.plan(folder, "interleave", layers_to=12)
    facts = schedule(plan, order_of(plan), frozenset(plan.source.tensors), 0)
    assert (
        f"fetching   {format_bytes(facts.fetched)} by byte ranges ({format_bytes(facts.fetched - facts.once)} of them a second time)"
        in said
    )
    assert fetched_bytes(served) == 0


def test_what_is_here_already(served: HubServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words("seam", tmp_path / "a")) == 0
    served.log.clear()
    assert run(*words("seam", tmp_path / "b", "--stream-source")) == 0
    assert "nothing to fetch" in capsys.readouterr().err
    assert not [r for r in served.log if r.path.startswith("/cdn/") and r.sent > 10_000]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    for more in ([], ["--dry-run"]):
        assert "Remove it" in refused(capsys, "dus", folder, "--stream-source", "-o", tmp_path / "c", *more, status=2)
    assert not (tmp_path / "c").exists()


def test_several_sources_are_streamed_alike(served: HubServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save(make(BY_NAME["llama"], num_hidden_layers=6, seed=1), tmp_path / "other")
    (other / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    served.add("someone/other", other)
    command = ["experts", SOURCE, "--experts-from", "someone/other", "--experts", 2, "--max-shard-size", "50KB"]
    assert run(*command, "--stream-source", "-o", tmp_path / "a") == 0
    assert run(*command, "-o", tmp_path / "b") == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


# --- what goes wrong


def test_connections_that_break_off_are_taken_up_where_they_were(served: HubServer, tmp_path: Path) -> None:
    served.faults[:] = [Fault("/cdn/", cut_after=1000, times=40)]
    assert run(*words("interleave", tmp_path / "out", "--stream-source")) == 0
    assert sum(r.sent == 1000 for r in served.log if r.path.startswith("/cdn/")) > 10
    plan = GrowthPlan.from_json(json.loads((tmp_path / "out" / "growth.json").read_text()))
    assert fetched_bytes(served) == plan.source_nbytes  # not one byte twice
    served.faults.clear()
    assert run(*words("interleave", tmp_path / "plain")) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def refused(capsys: pytest.CaptureFixture[str], *argv: object, status: int) -> str:
    capsys.readouterr()
    assert run(*argv) == status
    said = capsys.readouterr().err
    said = said[said.index("hf-grow: ") :]
    assert "Traceback" not in said
    assert said.count("\n") == 2, said
    assert WRITE not in said
    return said


@pytest.mark.parametrize(
    "fault", [Fault("/cdn/", cut_after=0), pytest.param(Fault("/cdn/", status=503), marks=pytest.mark.slow)], ids=["cut", "503"]
)
def test_a_network_that_stays_away(served: HubServer, tmp_path: Path, fault: Fault, capsys: pytest.CaptureFixture[str]) -> None:
    """After some tensors were fetched; what is written then is not fetched again."""
    good = [Fault("/cdn/", times=1) for _ in range(30)]
    served.faults[:] = [*good, fault]
    said = refused(capsys, *words("interleave", tmp_path / "out", "--stream-source"), status=1)
    assert "--resume" in said
    assert not (tmp_path / "out.partial" / SOURCE_CACHE).exists()
    first = fetched_bytes(served)
    assert first > 0
    served.faults.clear()
    served.log.clear()
    assert run(*words("interleave", tmp_path / "out", "--stream-source", "--resume")) == 0
    plan = GrowthPlan.from_json(json.loads((tmp_path / "out" / "growth.json").read_text()))
    assert fetched_bytes(served) < plan.source_nbytes
    assert run(*words("interleave", tmp_path / "plain")) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_an_interrupted_process_goes_on(served: HubServer, tmp_path: Path, how: signal.Signals) -> None:
    served.faults[:] = [Fault("/cdn/", times=40 + random.Random(how).randrange(20)), Fault("/cdn/", delay=1)]
    child = process(served, tmp_path / "home", words("interleave", tmp_path / "out", "--stream-source", "--source-cache", 0))
    deadline = time.monotonic() + 300
    while fetched_bytes(served) < 20_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(how)
    _, said = child.communicate(timeout=300)
    assert child.returncode == (1 if how == signal.SIGINT else -signal.SIGKILL), said
    assert "Traceback" not in said
    served.faults.clear()
    assert run(*words("interleave", tmp_path / "out", "--stream-source", "--source-cache", 0, "--resume")) == 0
    assert run(*words("interleave", tmp_path / "plain")) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def test_a_server_that_knows_no_ranges(served: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served.faults[:] = [Fault("/cdn/", ignore_range=True)]
    assert "Remove --stream-source" in refused(capsys, *words("seam", tmp_path / "out", "--stream-source"), status=2)


def test_a_file_that_is_another_one_meanwhile(
    served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commit is the same, so the Hub itself would be at fault; both the hash that it names and the size are looked at."""
    repo = served.repos[SOURCE]
    blobs = [b for n, b in repo.commits[repo.refs["main"]].items() if n.endswith(".safetensors")]
    originals = [b.sha256 for b in blobs]
    from hf_grow.api import growth_job

    real = growth_job.fetch_companions

    def then_change(checkpoint: Any) -> Path:
        folder = real(checkpoint)
        for blob in blobs:
            blob.__dict__["sha256"] = "0" * 64
        return folder

    monkeypatch.setattr(growth_job, "fetch_companions", then_change)
    said = refused(capsys, *words("seam", tmp_path / "out", "--stream-source"), status=2)
    assert "is not the one that was listed" in said
    for blob, sha256 in zip(blobs, originals, strict=True):
        blob.__dict__["sha256"] = sha256


CHANGED = {
    "commit": (r"/resolve/.*\.safetensors$", {"X-Repo-Commit": "0" * 40}),
    "hash": (r"/resolve/.*\.safetensors$", {"X-Linked-Etag": f'"{"0" * 64}"'}),
    "ETag": ("/cdn/", {"ETag": '"another"'}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_any_range_whose_headers_are_of_another_file_ends_the_growth(
    what: str, served: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After some answers that were as they should be."""
    path, headers = CHANGED[what]
    served.faults[:] = [Fault(path, times=20), Fault(path, headers=headers)]
    said = refused(capsys, *words("seam", tmp_path / "out", "--stream-source"), status=2)
    assert "is not the one that was listed" in said
    assert not (tmp_path / "out").exists()


def test_a_weak_etag_says_nothing(served: HubServer, tmp_path: Path) -> None:
    served.faults[:] = [*(Fault("/cdn/", headers={"ETag": f'W/"{i}"'}, times=1) for i in range(10))]
    assert run(*words("seam", tmp_path / "out", "--stream-source")) == 0


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("more", [["--stream-source"], []], ids=["streamed", "whole"])
def test_small_files_must_have_the_hash_that_was_listed(
    name: str, more: list[str], served: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = served.repos[SOURCE]
    blob = repo.commits[repo.refs["main"]][name]
    oid, size = blob.oid, blob.size  # as listed
    content = b"".join(blob.chunks())
    blob.content = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
    blob.__dict__ |= {"oid": oid, "size": size}
    said = refused(capsys, *words("seam", tmp_path / "out", *more), status=2)
    assert f"{name} of {SOURCE} is not the one that was listed" in said


def test_what_a_streamed_source_proves_is_said(served: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words("seam", tmp_path / "a", "--stream-source")) == 0
    assert "checked by `hf-grow verify`" in capsys.readouterr().out
    assert run(*words("seam", tmp_path / "b", "--stream-source", "--json")) == 0
    assert "hf-grow verify" in json.loads(capsys.readouterr().out)["source_checked"]
    assert run(*words("seam", tmp_path / "c")) == 0
    assert "checked by" not in capsys.readouterr().out


def test_bytes_that_a_server_changed_under_true_headers_are_found_by_verify(
    served: HubServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What streaming cannot know: the whole file's hash."""
    repo = served.repos[SOURCE]
    for name, blob in repo.commits[repo.refs["main"]].items():
        if name.endswith(".safetensors"):
            data = bytearray((folder / name).read_bytes())
            data[-1] ^= 1
            assert blob.sha256
            blob.content = bytes(data)
    assert run(*words("seam", tmp_path / "out", "--stream-source")) == 0
    assert run("verify", folder, tmp_path / "out", "--structure-only", "--no-record") == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_tensor_that_differs_the_second_time(served: HubServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the same hash: only the bytes themselves can tell."""
    repo = served.repos[SOURCE]
    for name, blob in repo.commits[repo.refs["main"]].items():
        if name.endswith(".safetensors"):
            data = bytearray((folder / name).read_bytes())
            blob.content = data  # type: ignore[assignment]
            blob.chunks = _flipping(data)  # type: ignore[method-assign]
    said = refused(capsys, *words("interleave", tmp_path / "out", "--stream-source", "--source-cache", 0), status=1)
    assert "was downloaded twice, and the two copies differ" in said


def _flipping(data: bytearray) -> Any:
    """Serves a range as it is the first time, and with one bit turned the second."""
    seen: set[tuple[int, int]] = set()

    def chunks(start: int = 0, stop: int | None = None) -> Any:
        piece = bytes(data[start:stop])
        if (start, len(piece)) in seen and start > 8 and len(piece) > 100:
            piece = piece[:-1] + bytes([piece[-1] ^ 1])
        seen.add((start, len(piece)))
        yield piece

    return chunks


def test_values_that_are_not_finite_are_named(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(BY_NAME["llama"])
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    hub.add("someone/bad", save(model, tmp_path / "bad"))
    said = refused(capsys, "dus", "someone/bad", "--stream-source", "-o", tmp_path / "out", status=2)
    assert "model.layers.2.mlp.up_proj.weight in model.safetensors" in said
