"""Opening checkpoints from folders and from a Hub on the loopback interface, with everything that can go wrong there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import torch
from hub_server import Fault, HubServer, client_environment
from models import BY_NAME, make, save
from safetensors import safe_open

from hf_grow.checkpoint import source
from hf_grow.checkpoint.model_ids import ALIASES, MODELS, similar_ids
from hf_grow.checkpoint.reader import open_folder
from hf_grow.checkpoint.source import companions, is_companion, open_source
from hf_grow.errors import InputError, SourceError

hub = hub_server.hub

REPO = "someone/tiny"
TOKEN = "hf_secretsecretsecret"
TOKENIZER = ["LICENSE", "additional_chat_templates/tool.jinja", "generation_config.json", "modeling_own.py", "tokenizer.json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Mistral as save_pretrained writes it, with what else lies in repositories."""
    folder = tmp_path_factory.mktemp("made")
    save(make(BY_NAME["mistral"]), folder, sharded=True)
    (folder / "additional_chat_templates").mkdir()
    for name in (*TOKENIZER, "README.md", "pytorch_model.bin", "consolidated.safetensors", "original/params.json"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(b"{}")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "source"))


@pytest.fixture
def served(hub: HubServer, folder: Path) -> Iterator[HubServer]:
    hub.add(REPO, folder)
    yield hub
    assert not [r for r in hub.log if r.authorization and r.host.startswith("localhost")], "the token left the Hub"


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refused(ref: str = REPO, *, weights: bool = False, revision: str | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(ref, revision=revision, weights=weights)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert TOKEN not in text
    assert len(text) < (900 if "gguf_file" in text else 500)  # a command to be pasted
    assert text.count("\n") <= 1
    return text


def headers_only(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


def log_in(monkeypatch: pytest.MonkeyPatch, hub: HubServer, *, known: bool = True) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if known:
        hub.tokens.add(TOKEN)


# --- from the Hub


def test_planning_reads_exactly_the_headers(served: HubServer, folder: Path) -> None:
    here, there = open_folder(folder), open_source(REPO, weights=False)
    shards = sorted(here.files)
    assert len(shards) > 3
    assert there.tensors == here.tensors
    assert there.config == here.config
    assert (there.ref, there.revision, there.folder, there.growth) == (REPO, served.repos[REPO].refs["main"], None, None)
    blobs = served.repos[REPO].commits[there.revision]
    assert there.files == {s: {"size": (folder / s).stat().st_size, "sha256": blobs[s].sha256} for s in shards}
    assert served.sent(".safetensors") == sum(headers_only(folder / s) for s in shards)
    assert {r.path.rpartition("/")[2] for r in served.log if "/resolve/" in r.path} == {
        *shards,
        "config.json",
        "model.safetensors.index.json",
    }


def test_weights_are_those_of_the_folder(served: HubServer, folder: Path) -> None:
    plan = open_source(REPO, weights=False)
    said: list[str] = []
    opened = open_source(REPO, revision=plan.revision, weights=True, notify=said.append)
    assert opened.folder is not None
    assert replace(opened, folder=None) == plan  # also that a plan made from headers has the same fingerprint
    model = make(BY_NAME["mistral"]).state_dict()
    assert model.keys() == opened.tensors.keys()
    for file in opened.files:
        with safe_open(opened.path(file), "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                assert torch.equal(handle.get_tensor(name), model[name])
    fetched = {p.relative_to(opened.folder).as_posix() for p in opened.folder.rglob("*") if p.is_file()}
    assert fetched == {*opened.files, "config.json", "model.safetensors.index.json", *TOKENIZER}
    assert [c.as_posix() for c in companions(opened.folder)] == TOKENIZER
    assert len(said) == 1
    assert re.match(r"Downloading 0\.\d\d MB of someone/tiny", said[0])


def test_a_single_file_and_its_growth(served: HubServer, folder: Path, tmp_path: Path) -> None:
    grown = save(make(BY_NAME["llama-tied"]), tmp_path / "grown")
    (grown / "growth.json").write_text('{"format": 1}')
    # A single file comes before an index, as in transformers.
    shutil.copy(folder / "model.safetensors.index.json", grown)
    served.add("someone/grown", grown)
    for weights in (False, True):
        opened = open_source("someone/grown", weights=weights)
        assert opened.growth == {"format": 1}
        assert opened.tensors == open_folder(grown).tensors
        assert list(opened.files) == ["model.safetensors"]


def test_revisions(served: HubServer, folder: Path) -> None:
    first = served.repos[REPO].refs["main"]
    config = json.loads((folder / "config.json").read_text())
    older = Path(shutil.copytree(folder, folder.parent / "older"))
    (folder / "config.json").write_text(json.dumps({**config, "marked": 1}))
    second = served.add(REPO, folder, branch="feature/x")
    served.repos[REPO].commits[first]["config.json"].content = older / "config.json"
    for revision, commit, marked in ((None, first, None), ("feature/x", second, 1), (second, second, 1), (first, first, None)):
        opened = open_source(REPO, revision=revision, weights=False)
        assert (opened.revision, opened.config.get("marked")) == (commit, marked)
    text = refused(revision="v9")
    assert "has no revision 'v9'" in text
    assert f"/{REPO}/tree/main" in text


def test_a_branch_that_moves_on_meanwhile(served: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = served.repos[REPO].refs["main"]
    fetch = source.hub.fetch_listing

    def then_push(ref: str, revision: str | None) -> source.hub.Listing:
        remote = fetch(ref, revision)
        changed = Path(shutil.copytree(folder, folder.parent / "changed"))
        (changed / "config.json").write_text("{}")
        served.add(REPO, changed)
        return remote

    monkeypatch.setattr(source.hub, "fetch_listing", then_push)
    opened = open_source(REPO, weights=False)
    assert opened.revision == first != served.repos[REPO].refs["main"]
    assert opened.config["model_type"] == "mistral"


def test_cached_files_are_not_fetched_again(served: HubServer) -> None:
    open_source(REPO, weights=True)
    served.log.clear()
    said: list[str] = []
    opened = open_source(REPO, weights=True, notify=said.append)
    assert said == []
    assert served.sent(".safetensors") == 0
    assert sum(r.sent for r in served.log if "/resolve/" in r.path) == 0
    assert replace(opened, folder=None) == open_source(REPO, weights=False)


def test_a_damaged_cache_is_found_out(served: HubServer) -> None:
    opened = open_source(REPO, weights=True)
    blob = opened.path(next(iter(opened.files))).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    assert "is truncated" in refused()


# --- without the Hub


def test_offline_needs_a_whole_copy(served: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    online = open_source(REPO, weights=False)
    offline(monkeypatch)
    served.log.clear()
    text = refused()
    assert "lacks model-00001-of-" in text
    assert "more files" in text
    assert f"hf download {REPO}" in text
    assert "someone/other is not in the cache" in refused("someone/other")
    assert "hf download someone/tiny --revision v1" in refused(revision="v1")
    assert f"(commit {online.revision[:12]})" in text
    assert served.log == []


def test_offline_reads_the_cache(served: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    online = open_source(REPO, weights=True)
    offline(monkeypatch)
    served.log.clear()
    for weights in (False, True):
        for revision in (None, online.revision):
            assert open_source(REPO, revision=revision, weights=weights) == online  # sha256 too, from the names of the blobs
    assert served.log == []
    assert online.folder is not None
    for path in companions(online.folder):
        (online.folder / path).unlink()
    said: list[str] = []
    open_source(REPO, weights=True, notify=said.append)
    assert "no tokenizer" in said[0]


@pytest.mark.parametrize(
    "fault", [Fault("/api/", status=503), Fault("/api/", delay=2.0), Fault("/api/", cut_after=5)], ids=["503", "slow", "cut"]
)
def test_a_hub_that_is_down(served: HubServer, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    monkeypatch.setattr(source.hub, "LISTING_TIMEOUT", 0.5)
    served.faults.append(fault)
    text = refused()
    assert ("status 503" if fault.status else "cannot be reached") in text
    assert "ry again" in text
    served.faults.clear()
    online = open_source(REPO, weights=True)
    served.faults.append(fault)
    said: list[str] = []
    assert open_source(REPO, weights=True, notify=said.append) == online
    assert f"Using the copy in the cache (commit {online.revision[:12]})" in said[0]


def test_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://user:{TOKEN}@127.0.0.1:{port}")
    assert f"http://127.0.0.1:{port} cannot be reached (ConnectError)" in refused()


def test_something_else_answers(served: HubServer) -> None:
    served.faults.append(Fault("/api/", status=200, body="log in to the hotel"))
    assert "does not respond like a Hugging Face Hub" in refused()


# --- repositories that cannot be used


def test_unknown_repository(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = refused("mistralai/Mistral-7B-v0.4")
    assert "There is no repository mistralai/Mistral-7B-v0.4" in text
    assert "mistralai/Mistral-7B-v0.3" in text
    assert "hf auth login" in text
    log_in(monkeypatch, hub)
    assert "permissions of your token" in refused("nobody/nothing-like-it")


def test_private(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, folder, private=True)
    assert "if it is private, log in" in refused().replace("If", "if")
    log_in(monkeypatch, hub)
    hub.repos[REPO].readers.add(TOKEN)
    assert open_source(REPO, weights=True).folder is not None
    mine = [r for r in hub.log if r.authorization]
    assert mine
    assert all(r.host.startswith("127.0.0.1") for r in mine)


def test_gated(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, folder, gated=True)
    text = refused()
    assert "is gated" in text
    assert "`hf auth login`" in text
    assert f"{hub.url}/{REPO}" in text
    log_in(monkeypatch, hub)
    assert "no access" in refused(weights=True)
    hub.repos[REPO].readers.add(TOKEN)
    assert open_source(REPO, weights=False).tensors == open_folder(folder).tensors


def test_a_token_that_is_not_accepted(served: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, served, known=False)
    assert "does not accept your token" in refused()


def test_a_server_that_repeats_the_token(served: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, served)
    for status in (400, 403, 418, 500):
        served.faults[:] = [Fault("/api/", status=status, body=f"bad token {TOKEN}")]
        refused()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter"),
        (["tiny.Q4_K_M.gguf"], "is a GGUF checkpoint"),
        (["config.json", "nested/model.safetensors"], "has no model.safetensors"),
        (["model.safetensors"], "it has no config.json"),
    ],
)
def test_no_checkpoint(hub: HubServer, tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        path = tmp_path / "repo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    hub.add(REPO, tmp_path / "repo")
    assert message in refused()
    assert message in refused(weights=True)
    assert message in refused(str(tmp_path / "repo"))


@pytest.mark.parametrize(
    "file", ["../model-1.safetensors", "/etc/passwd", "sub/model-1.safetensors", "pytorch_model.bin", "*.safetensors", 7]
)
def test_hostile_index(hub: HubServer, folder: Path, file: object) -> None:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(data))
    hub.add(REPO, folder)
    assert "only names of .safetensors files" in refused(weights=True)
    assert not [r for r in hub.log if "/cdn/" in r.path]


def test_index_and_shards_that_differ(hub: HubServer, folder: Path) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    hub.add(REPO, folder)
    hub.repos[REPO].commit({}, delete=(shards[0].name,))
    assert f"names {shards[0].name}, which the repository does not have" in refused(weights=True)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**data["weight_map"], "model.nowhere": shards[0].name}}))
    hub.add(REPO, folder)
    assert f"lists model.nowhere in {shards[0].name}" in refused()
    index.write_text(json.dumps(data))
    shutil.copy(shards[1], shards[0])
    hub.add(REPO, folder)
    assert "but the index lists it in" in refused()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 2**60) + b"{}" * 1000, "its header length is 1152921504606846976 bytes"),
        (struct.pack("<Q", 5000) + b"{}" * 1000, "is truncated"),
        (b"abc", "is truncated: 3 bytes"),
        (b"", "is truncated: 0 bytes"),
        (struct.pack("<Q", 0), "damaged header"),
        (struct.pack("<Q", 2) + b"{]" + b"0" * 90, "damaged header"),
        (struct.pack("<Q", 2) + b"{}" + b"0" * 90, "is too long"),
    ],
)
def test_hostile_headers(hub: HubServer, folder: Path, content: bytes, message: str) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.write_bytes(content)
    hub.add(REPO, folder)
    assert message in refused(weights=True)
    assert [r for r in hub.log if r.method == "GET" and shard.name in r.path and r.range not in ("bytes=0-7", "bytes=8-9")] == []


# --- servers that misbehave


def test_a_server_that_ignores_ranges(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    big = Path(shutil.copytree(folder, tmp_path / "big", ignore=shutil.ignore_patterns("*.safetensors*")))
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**24], "data_offsets": [0, 2**26]}}).encode()
    with (big / "model.safetensors").open("wb") as handle:
        handle.write(struct.pack("<Q", len(header)) + header)
        handle.truncate(8 + len(header) + 2**26)  # a hole: no disk is used
    hub.add(REPO, big)
    hub.faults.append(Fault("/cdn/", ignore_range=True))
    opened = open_source(REPO, weights=False)
    assert opened.tensors["x"].shape == (2**24,)
    assert [r.status for r in hub.log if "/cdn/" in r.path] == [200, 200]
    assert hub.sent(".safetensors") < 2**25  # what fits into the buffers of two sockets, of 2 * 2**26


def test_a_connection_that_breaks_off(served: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    served.faults.append(Fault("/cdn/", cut_after=3, times=1))
    assert open_source(REPO, weights=False).tensors == open_folder(folder).tensors
    served.faults[:] = [Fault("/cdn/", cut_after=3)]
    assert "cannot be reached (RemoteProtocolError)" in refused()
    served.faults[:] = [Fault("/cdn/", status=500)]
    assert "status 500" in refused()


def test_a_download_resumes(served: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what breaks off within a chunk is lost
    plan = open_source(REPO, weights=False)
    served.log.clear()
    served.faults.append(Fault("/cdn/", cut_after=6000, whole=True, times=3))
    opened = open_source(REPO, weights=True)
    assert replace(opened, folder=None) == plan
    assert [r.range for r in served.log if r.range.startswith("bytes=6000-")] == ["bytes=6000-"] * 3


def test_the_disk_is_full(served: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    text = refused(weights=True)
    assert re.search(r"needs 0\.\d\d MB more", text)
    assert "HF_HOME" in text
    assert served.sent(".safetensors") == sum(headers_only(s) for s in folder.glob("model-*.safetensors"))
    assert open_source(REPO, weights=False)  # planning needs no room


# --- folders and names


def test_folders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for ref in (str(folder), "source", "./source", "~/source"):
        opened = open_source(ref, weights=True)
        assert opened.ref == ref
        assert opened.revision == ""
        assert opened.path("config.json").is_file()
    with pytest.raises(InputError, match="has no revision 'main'"):
        open_source("source", revision="main", weights=False)


@pytest.mark.parametrize("ref", ["", ".x", "./none", "/none/at/all", "~/none", "a/b/c", "none/", "a\\b", "~nobody/x"])
def test_paths_that_lead_nowhere(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "There is no folder" in refused(ref)


def test_a_missing_path_is_not_looked_for_on_the_hub(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny-grown").mkdir(parents=True)
    cases = {
        "models/tiny": "although there is a folder 'models'", "models/tiny-grow": "Did you mean models/tiny-grown?", "out/checkpoint-500": "no Hub id",
        "checkpoint-500": "an owner", "my-model": "an owner", "someone/model.safetensors": "no Hub id", "run/model.partial": "no Hub id",
        "Qwen/Qwen3-8B-Base/": "Did you mean Qwen/Qwen3-8B-Base?", "Llama-3.1-8b": "Did you mean meta-llama/Llama-3.1-8B?",
        str(tmp_path / "models" / "tiny-grow"): f"Did you mean {tmp_path / 'models' / 'tiny-grown'}?",
    }  # fmt: skip
    for ref, words in cases.items():
        said = refused(ref)
        assert said.startswith(f"There is no folder {ref!r}")
        assert words in said
    assert hub.log == []


def test_a_folder_named_like_an_owner_hides_no_known_model(
    served: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    served.add("Qwen/Qwen3-8B-Base", folder)
    assert open_source("Qwen/Qwen3-8B-Base", weights=False).revision


def test_an_adapter_is_sent_to_merge(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in (("safe", "adapter_model.safetensors"), ("pickled", "adapter_model.bin")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / file).write_text("{}")
    assert "hf-grow merge safe -o safe-merged" in refused("safe")
    hub.add("someone/lora", tmp_path / "safe")
    assert "hf download someone/lora --local-dir lora && hf-grow merge lora -o lora-merged" in refused("someone/lora")
    assert "pickled" in refused("pickled")


def test_a_gguf_file_is_dequantized_by_the_command_in_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small Llama in Q8_0 with a byte-level tokenizer, as converters write them; the message's own words make a checkpoint of it."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's").mkdir()
    file = tmp_path / "it's" / "tiny-Q8_0.gguf"
    weights = write_gguf(gguf, file)
    said = refused("it's")
    assert said.replace("it\\'s", "it's") == refused(str(file)).replace(str(tmp_path) + "/", "").replace("it\\'s", "it's")
    python, flag, code = shlex.split(said[said.index("python -c") :])
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    made = open_source("tiny-Q8_0", weights=True)
    assert made.info.architecture.layers == 2
    with safe_open(tmp_path / "tiny-Q8_0" / "model.safetensors", "pt") as f:
        for name, (there, value) in weights.items():
            assert torch.equal(f.get_tensor(there), torch.from_numpy(value).to(torch.bfloat16)), name
    assert (tmp_path / "tiny-Q8_0" / "tokenizer.json").is_file()


def write_gguf(gguf: Any, file: Path) -> dict[str, tuple[str, Any]]:
    """GGUF name -> the tensor's name in transformers and its values after rounding to Q8_0."""
    hidden, inter, heads, layers = 64, 96, 2, 2
    words = [chr(c) for c in range(33, 127)] + ["ab", "<s>", "</s>"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inter)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(words) - 2)
    writer.add_eos_token_id(len(words) - 1)
    rng, kept = np.random.default_rng(0), {}
    names = {"token_embd": "model.embed_tokens", "output": "lm_head"}
    for i in range(layers):
        for ours, theirs in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
                             ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):  # fmt: skip
            names[f"blk.{i}.{ours}"] = f"model.layers.{i}.{theirs}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", rng.normal(1, 0.1, hidden).astype(np.float32))
    writer.add_tensor("output_norm.weight", rng.normal(1, 0.1, hidden).astype(np.float32))
    for name, theirs in names.items():
        kind = name.rpartition(".")[2]
        rows = {"token_embd": len(words), "output": len(words), "ffn_gate": inter, "ffn_up": inter}.get(kind, hidden)
        packed = gguf.quants.quantize(
            rng.normal(0, 0.1, (rows, inter if kind == "ffn_down" else hidden)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
        )
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        if kind not in ("attn_q", "attn_k"):  # whose rows stand in another order in GGUF
            kept[name] = (f"{theirs}.weight", gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def test_files_addresses_and_impossible_ids(folder: Path, hub: HubServer) -> None:
    assert f"Give the folder of the whole checkpoint, as in {folder}." in refused(str(folder / "config.json"))
    assert "is a URL" in refused("https://huggingface.co/mistralai/Mistral-7B-v0.1")
    for ref in ("a/b c", "o/a--b", "o/" + "x" * 200, "a/b\0", "o/-a"):
        assert "neither a folder nor a Hub id" in refused(ref)
    assert hub.log == []


def test_short_names(hub: HubServer, folder: Path) -> None:
    hub.add("mistralai/Mistral-7B-v0.1", folder)
    said: list[str] = []
    opened = open_source("mistralai/Mistral-7B", weights=False, notify=said.append)
    assert said == ["mistralai/Mistral-7B is short for mistralai/Mistral-7B-v0.1."]
    assert opened.ref == "mistralai/Mistral-7B-v0.1"
    open_source("mistralai/Mistral-7B-v0.1", weights=False, notify=said.append)
    assert len(said) == 1


def test_the_table_of_names() -> None:
    assert len(set(MODELS)) == len(MODELS)
    assert set(ALIASES.values()) <= set(MODELS)
    assert all(k == k.lower() for k in ALIASES)
    assert not ALIASES.keys() & {m.lower() for m in MODELS}, "an alias would hide a model"
    assert similar_ids("mistral/Mistral-7B-v0.1")[0] == "mistralai/Mistral-7B-v0.1"
    assert similar_ids("Qwen/Qwen3-8B-base")[0] == "Qwen/Qwen3-8B-Base"
    assert similar_ids("me/my-very-own-thing") == []


def test_companions_stay_inside(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    (folder / "notice.txt").symlink_to(secret)
    (folder / "tokenizer.model").symlink_to(folder / "tokenizer.json")
    (folder / "LICENSES").mkdir()
    (folder / "LICENSES" / "MIT").write_text("x")
    (folder / "merges.txt").symlink_to(tmp_path / "nothing")
    (folder / "license.bin").write_text("x")
    assert [c.as_posix() for c in companions(folder)] == sorted([*TOKENIZER, "tokenizer.model"])


def test_companions_in_the_cache(tmp_path: Path) -> None:
    """Blobs may be links into a store that repositories share; what leads elsewhere is not taken."""
    snapshot, blobs, store = (tmp_path / d for d in ("models--a--b/snapshots/c0ffee", "models--a--b/blobs", "blobs/ab"))
    for d in (snapshot, blobs, store):
        d.mkdir(parents=True)
    (store / "abcd").write_text("x")
    (blobs / "1234").symlink_to("../../blobs/ab/abcd")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1234")
    (tmp_path / "models--a--b" / "token").write_text("x")
    (snapshot / "vocab.json").symlink_to("../../token")
    assert companions(snapshot) == [Path("tokenizer.json")]


def test_what_comes_along() -> None:
    yes = (
        "tokenizer.model.v3 tekken.json qwen.tiktoken chat_template.jinja LICENSE.txt LICENCE License.md USE_POLICY.md Notice modeling_x.py"
    )
    no = "README.md model.safetensors tokenizer.model.bin LICENSE.pkl sub/tokenizer.json config.json growth.json additional_chat_templates/a/b.jinja"
    assert [p for p in yes.split() if not is_companion(p)] == []
    assert [p for p in no.split() if is_companion(p)] == []


# --- the client as users run it


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=100, check=False
    )


def test_a_process_of_its_own(served: HubServer, tmp_path: Path) -> None:
    """With nothing patched: HF_ENDPOINT and HF_HUB_OFFLINE are read by huggingface_hub itself."""
    code = f"from hf_grow.checkpoint.source import open_source as o; c = o({REPO!r}, weights=%s); print(c.revision, len(c.tensors))"
    environment = {**client_environment(served, tmp_path / "another-home"), "TQDM_POSITION": "-1"}  # bars though it is no terminal
    for weights, offline in ((False, "0"), (True, "0"), (True, "1")):
        done = run(code % weights, **{**environment, "HF_HUB_OFFLINE": offline})
        assert done.stdout.split() == [served.repos[REPO].refs["main"], "39"], done.stderr
        if not weights:
            assert done.stderr == ""  # no progress bars for a config
        elif offline == "0":
            assert "100%" in done.stderr


def test_importing_is_cheap(tmp_path: Path) -> None:
    code = "import sys, hf_grow.checkpoint.source; print([m for m in ('huggingface_hub', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"
