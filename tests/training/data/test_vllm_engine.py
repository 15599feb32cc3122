"""Self-replay sampled by vLLM: with a small stand-in, and with vLLM itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make
from replay_samples import base_tokenizer, chat_tokenizer, data_options_with_replay, replay_options, sampled_texts

from hf_grow.checkpoint.reader import open_folder
from hf_grow.cli import main
from hf_grow.errors import ExecutionError, InputError
from hf_grow.training.data import build, vllm_engine
from hf_grow.training.data.replay_files import read_record, resume_command
from hf_grow.training.data.sampling import Sampler
from hf_grow.training.data.self_replay import sample_from_source
from hf_grow.training.data.shared_batches import SamplingGroup
from hf_grow.training.data.vllm_engine import VllmEngine, engine_of

STANDIN = Path(__file__).parents[2] / "support" / "standin"
SAMPLING = {"tokens": 300, "max_length": 24, "batch_size": 8, "min_tokens": 4}
real = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The stand-in in the place of vLLM; the engines that were started."""
    held = {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] == "vllm"}
    monkeypatch.syspath_prepend(str(STANDIN))
    import vllm

    yield vllm.ENGINES
    del sys.modules["vllm"]
    sys.modules.update(held)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "model", base_tokenizer(), bos_token_id=0, eos_token_id=1)


def save(folder: Path, tokenizer: Any, **config: Any) -> Path:
    """A model that ends some texts, and not others."""
    # vLLM has kernels for heads of 32 and more
    model = make(BY_NAME["llama"], vocab_size=300, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, **config)
    model.generation_config.eos_token_id = [config["eos_token_id"], *range(100, 115)]
    model.generation_config.repetition_penalty = 5.0  # of no effect
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(saved: Path, out: Path, *more: str) -> list[str]:
    flags = [word for name, value in SAMPLING.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["replay", str(saved), "-o", str(out), "--json", *flags, *more]


def same_greedy_samples(folder: Path, tokenizer: Any, chat: bool, **more: Any) -> list[Any]:
    """One candidate a token leaves no choice, so both engines give the same tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    options = replay_options(top_k=1, start="random", max_length=48, chat_share=0.5 if chat else 0.0, engine="vllm", **more)
    own = Sampler(model, tokenizer, options.model_copy(update={"engine": "transformers"})).draw(3, 6, chat=chat)
    engine = engine_of(options, open_folder(folder))
    assert engine is not None
    with engine:
        sampler = Sampler(model, tokenizer, options, engine=engine)
        assert sampler.draw(3, 6, chat=chat) == own
        assert sampler.flops > 0
    return own


@pytest.mark.parametrize("chat", [False, True])
def test_greedy_texts_are_those_of_transformers(chat: bool, tmp_path: Path, engines: list[Any]) -> None:
    """Prefixes, end tokens, room for answers after messages of different lengths, decoding: all but the choice among candidates."""
    tokenizer = chat_tokenizer() if chat else base_tokenizer()
    folder = save(
        tmp_path / "chat", tokenizer, **({"bos_token_id": 2, "eos_token_id": 3} if chat else {"bos_token_id": 0, "eos_token_id": 1})
    )
    own = same_greedy_samples(folder, tokenizer, chat, max_surprise=3.0)
    assert all(s.surprise is not None for s in own)
    (engine,) = engines
    assert not engine.running, "its device is free again"
    assert engine.arguments == {"skip_tokenizer_init": True, "load_format": "safetensors", "generation_config": "vllm"}


@pytest.mark.slow
@real
@pytest.mark.parametrize("chat", [False, True])
def test_greedy_texts_of_vllm_itself(chat: bool, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer() if chat else base_tokenizer()
    folder = save(
        tmp_path / "real", tokenizer, **({"bos_token_id": 2, "eos_token_id": 3} if chat else {"bos_token_id": 0, "eos_token_id": 1})
    )
    same_greedy_samples(folder, tokenizer, chat)


def test_texts_depend_on_seed_batch_and_row(saved: Path, engines: list[Any]) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), base_tokenizer()
    with VllmEngine(saved, "model") as engine:
        options = replay_options(engine="vllm", temperature=0.7, top_k=20, top_p=0.9)
        first = Sampler(model, tokenizer, options, engine=engine)
        drawn = first.draw(1, 6)
        assert len({s.ids for s in drawn}) > 1
        assert first.draw(2, 6) != drawn
        again = Sampler(model, tokenizer, options, engine=engine)
        again.warm_up()
        assert again.draw(1, 6) == drawn
        assert Sampler(model, tokenizer, options.model_copy(update={"seed": 1}), engine=engine).draw(1, 6) != drawn
    given = engines[0].given
    assert {(p.temperature, p.top_k, p.top_p, p.ignore_eos) for p in given} == {(0.7, 20, 0.9, True)}
    assert len({p.seed for p in given[:12]}) == 12


def test_command_samples_and_continues(saved: Path, engines: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(saved, tmp_path / "own", "--engine", "transformers")) == 0
    assert "engine" not in read_record(tmp_path / "own")["settings"], "as before there was a choice"
    assert not engines
    assert main(command(saved, tmp_path / "vllm", "--engine", "vllm")) == 0
    record = read_record(tmp_path / "vllm")
    assert record["settings"]["engine"] == "vllm" and record["complete"]
    assert "--engine vllm" in resume_command(record, tmp_path / "vllm")
    assert sampled_texts(tmp_path / "vllm") != sampled_texts(tmp_path / "own")
    assert main(command(saved, tmp_path / "auto", "--engine", "auto", "--tokens", "100")) == 0
    assert main(command(saved, tmp_path / "auto", "--engine", "auto")) == 0
    assert sampled_texts(tmp_path / "auto")[:3] == sampled_texts(tmp_path / "vllm")[:3]
    capsys.readouterr()
    assert main(command(saved, tmp_path / "own", "--engine", "vllm")) == 2
    assert "other settings (engine)" in capsys.readouterr().err
    assert main(command(saved, tmp_path / "dry", "--engine", "vllm", "--dry-run")) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
    assert engines and not any(e.running for e in engines)


def test_training_samples_with_vllm_once(saved: Path, engines: list[Any], tmp_path: Path) -> None:
    for engine, started in [("vllm", 1), ("auto", 1), ("transformers", 1)]:
        wanted = data_options_with_replay(tmp_path, share=0.2, self=SAMPLING | {"model": str(saved), "engine": engine})
        build(wanted, base_tokenizer(), cache=tmp_path / "cache")
        assert len(engines) == started
    folders = [f for f in (tmp_path / "cache" / "replay").iterdir() if f.is_dir()]
    assert sorted(read_record(f)["settings"].get("engine", "transformers") for f in folders) == ["transformers", "vllm"]


def test_without_vllm(saved: Path, absent: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(saved, tmp_path / "out", "--engine", "vllm")) == 2
    error = capsys.readouterr().err
    assert "vLLM, which is not installed" in error and "pip install vllm" in error
    assert not (tmp_path / "out").exists()
    wanted = data_options_with_replay(tmp_path, self=SAMPLING | {"model": str(saved), "engine": "vllm"})
    with pytest.raises(InputError, match="not installed"):
        build(wanted, base_tokenizer(), cache=tmp_path / "cache")
    assert main(command(saved, tmp_path / "out", "--engine", "auto")) == 0
    assert "engine" not in read_record(tmp_path / "out")["settings"]


def test_launch_of_several_processes(saved: Path, engines: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused on every process before any samples, unless the texts are there; `auto` is transformers."""
    wanted = data_options_with_replay(tmp_path, self=SAMPLING | {"model": str(saved), "engine": "vllm"}).replay.self

    def sample(options: Any, index: int) -> Path:
        group = SamplingGroup(index, 2, "now")
        return sample_from_source(options, tmp_path / "cache", seq_length=16, trained=None, notify=lambda text: None, group=group)[0]

    monkeypatch.setenv("WORLD_SIZE", "2")
    for index in (0, 1):
        with pytest.raises(InputError, match=r"(?s)launch of several.*hf-grow replay .* --engine vllm"):
            sample(wanted, index)
    monkeypatch.delenv("WORLD_SIZE")
    there = sample_from_source(wanted, tmp_path / "cache", seq_length=16, trained=None, notify=lambda text: None)[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [sample(wanted, index) for index in (0, 1)] == [there, there]
    assert "engine" not in read_record(sample(wanted.model_copy(update={"engine": "auto"}), 0))["settings"]


def test_bad_use_fails(saved: Path, engines: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(saved, tmp_path / "out", "--engine", "vllm", "--device", "cpu")) == 2
    assert "chooses its device itself" in capsys.readouterr().err
    assert main(command(saved, tmp_path / "out", "--engine", "fast")) == 2
    capsys.readouterr()
    model = make(BY_NAME["llama"], vocab_size=300, bos_token_id=0, eos_token_id=1, dtype=torch.float64)
    with pytest.raises(InputError, match="not from a model in memory"):
        Sampler(model, base_tokenizer(), replay_options(engine="vllm"))
    with (
        VllmEngine(saved, "mine") as engine,
        pytest.raises(ExecutionError, match=r"vLLM cannot sample from mine: Unknown dtype: float64\s"),
    ):
        Sampler(model, base_tokenizer(), replay_options(engine="vllm"), engine=engine).draw(0, 2)
