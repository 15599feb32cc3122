"""Self-replay by several processes: the texts of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make
from replay_samples import base_model, base_tokenizer, chat_tokenizer, replay_options, sampled_texts

from hf_grow.errors import ExecutionError, GrowError, InputError, OutputError
from hf_grow.training.config.data_options import SelfReplay
from hf_grow.training.data import replay, self_replay
from hf_grow.training.data.replay import help_sampling, sample_replay
from hf_grow.training.data.replay_files import BATCHES_FOLDER, TEXTS_FILE
from hf_grow.training.data.sampling import Sampler
from hf_grow.training.data.shared_batches import Batch, SamplingGroup, SharedBatches, sampling_group
from hf_grow.training.distributed.processes import ALONE


def chat_model() -> Any:
    """A random model that ends some turns, and not others."""
    made = make(BY_NAME["llama"], vocab_size=300, bos_token_id=2, eos_token_id=3, dtype=torch.float64)
    made.set_attn_implementation("sdpa")  # eager attention makes NaN of filled positions in fp64
    made.generation_config.eos_token_id = [3, *range(100, 115)]
    return made


def shared(out: Path, index: int, session: str = "now") -> SharedBatches:
    return SharedBatches(out, SamplingGroup(index, 2, session))


@pytest.mark.parametrize("chat", [False, True])
def test_batches_of_others_give_the_same_texts(chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process samples what it expects to come next, whenever this one records a batch; it also began some before it was killed."""
    model, tokenizer = (chat_model(), chat_tokenizer()) if chat else (base_model(), base_tokenizer())
    options = replay_options(tokens=1200, max_surprise=3.0, **({"chat_share": 0.4, "max_length": 48} if chat else {}))
    sample_replay(model, tokenizer, tmp_path / "alone", options)
    out, write, drawn = tmp_path / "together", replay.write_record, []
    helper, own = Sampler(model, tokenizer, options), Sampler.draw

    def counted(self: Sampler, *args: Any, **more: Any) -> Any:
        drawn.append(self is helper)
        return own(self, *args, **more)

    def recorded(folder: Path, record: Any) -> None:
        write(folder, record)
        (folder / BATCHES_FOLDER).mkdir(exist_ok=True)
        shared(folder, 1, "killed")._claim(shared(folder, 1)._path(Batch(record["batches"], 8, False)))
        if not record["complete"]:
            shared(folder, 1).sample_one(helper, replay._next_batches(helper, record, 4))

    monkeypatch.setattr(replay, "write_record", recorded)
    monkeypatch.setattr(Sampler, "draw", counted)
    sample_replay(model, tokenizer, out, options, shared=shared(out, 0))
    assert sampled_texts(out) == sampled_texts(tmp_path / "alone")
    facts = [json.loads((f / "replay.json").read_text()) for f in (tmp_path / "alone", out)]
    assert facts[0] == facts[1]
    assert sum(drawn) >= 2, "the other process was of use"
    assert (out / TEXTS_FILE).read_bytes() == (tmp_path / "alone" / TEXTS_FILE).read_bytes()


def test_a_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    shared(tmp_path / "out", 0).fail("The disk is full.")
    shared(tmp_path / "out", 1).fail("Another process failed.")
    with pytest.raises(ExecutionError, match="Another process failed while sampling: The disk is full"):
        help_sampling(base_model(), base_tokenizer(), replay_options(), shared(tmp_path / "out", 1))


@pytest.mark.parametrize(("index", "kind"), [(0, InputError), (1, ExecutionError)])
def test_a_model_that_one_process_cannot_load_is_told(
    index: int, kind: type[GrowError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line prints no InputError of a process after the first, so it becomes another error there; the others are told why."""

    def full(*args: Any, **more: Any) -> Any:
        raise InputError("No memory for the model.", hint="Use a smaller one.")

    base_model().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("hf_grow.training.data.source_model.load_with_tokenizer", full)
    group = SamplingGroup(index, 2, "now")

    def sample() -> Any:
        options = SelfReplay(model=str(tmp_path / "model"), tokens=100)
        return self_replay.sample_from_source(options, tmp_path / "cache", seq_length=32, trained=None, notify=print, group=group)

    with pytest.raises(GrowError, match="No memory for the model") as caught:
        sample()
    assert type(caught.value) is kind and caught.value.hint == "Use a smaller one."
    (failure,) = (tmp_path / "cache").rglob("failed-now")
    with pytest.raises(ExecutionError, match="Another process failed while sampling: No memory for the model"):
        SharedBatches(failure.parents[1], SamplingGroup(1 - index, 2, "now")).wait()


def test_a_full_disk_in_a_helping_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **more: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SharedBatches, "_claim", full)
    monkeypatch.setattr(replay, "read_record", lambda out: {"complete": False})
    monkeypatch.setattr(replay, "_next_batches", lambda *args: [Batch(0, 8, False)])
    with pytest.raises(ExecutionError, match="No space left on device"):
        help_sampling(base_model(), base_tokenizer(), replay_options(), shared(tmp_path, 1))


def test_a_cache_that_cannot_be_written_is_told_to_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written") as caught:
        sampling_group(ALONE, ALONE, tmp_path / "file" / "replay")
    assert "data.cache" in caught.value.hint
    assert sampling_group(ALONE, ALONE, tmp_path / "replay").count == 1 and not list((tmp_path / "replay").iterdir())
