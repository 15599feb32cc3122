"""Configs and tokenizers that transformers does not take: one message and exit status 2, whichever command loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make, real_config, save
from trained import FAST, text, tokenizer

from hf_grow.cli import main
from hf_grow.errors import InputError, SourceError
from hf_grow.model.architecture import Architecture
from hf_grow.model.loading import load_tokenizer, transformers_errors

COMMANDS = {
    "verify": "verify source grown --tokens 16",
    "train": "train train.yaml",
    "train --dry-run": "train train.yaml --dry-run",
    "fisher": "fisher source --text text.jsonl -o f.safetensors --tokens 32 --seq-length 16",
    "replay": "replay source -o texts --tokens 32 --batch-size 2 --max-length 16",
    "merge": "merge adapter -o out",
    "experts --router": "experts source --experts 2 --router prompts --prompts prompts.yaml -o out",
}
ODD: dict[str, tuple[str, dict[str, Any], str]] = {
    "an activation that is none": ("config.json", {"hidden_act": "none"}, "KeyError: 'none'"),
    "an activation that is a number": ("config.json", {"hidden_act": 7}, "expected str, got int"),
    "words where numbers belong": ("config.json", {"attention_dropout": "much", "initializer_range": "small"}, "expected float, got str"),
    "rotary frequencies of no known kind": ("config.json", {"rope_parameters": {"rope_type": "odd", "rope_theta": 1e4}}, "KeyError: 'odd'"),
    "a number type that is none": ("config.json", {"dtype": "odd", "torch_dtype": "odd"}, "no attribute 'odd'"),
    "labels that are a number": ("config.json", {"id2label": 3}, "AttributeError"),
    "a token id that is a word": ("config.json", {"pad_token_id": "x"}, "pad_token_id"),
    "a length that is a word": ("generation_config.json", {"max_new_tokens": "x"}, "TypeError"),
}

GENERATES = ("verify", "train", "fisher", "replay", "merge")
"""Those that load a whole model, and its generation_config.json with it."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loading")
    source = save(make(BY_NAME["mistral"], dtype=torch.bfloat16), root / "source")
    tokenizer().save_pretrained(source)
    text(root, "text", documents=12)
    settings = {**FAST, "max_steps": 1, "model": "source", "output": "out", "data": {"train": "text.jsonl", "seq_length": 16}}
    (root / "train.yaml").write_text(json.dumps(settings))
    (root / "prompts.yaml").write_text(json.dumps({"experts": [{"positive": ["w1"]}, {"positive": ["w2 w3"]}]}))
    assert main(["dus", str(source), "-o", str(root / "grown")]) == 0
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    get_peft_model(AutoModelForCausalLM.from_pretrained(source), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        root / "adapter"
    )
    config = root / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "source"}))
    return root


@pytest.mark.parametrize(
    ("odd", "command"), [(o, c) for o, (file, *_) in ODD.items() for c in COMMANDS if file == "config.json" or c in GENERATES]
)
def test_an_odd_config_is_one_message(
    odd: str, command: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(corpus, tmp_path, dirs_exist_ok=True)
    file, changes, says = ODD[odd]
    path = tmp_path / "source" / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))
    monkeypatch.chdir(tmp_path)
    status = main(COMMANDS[command].split())
    said = capsys.readouterr().err
    assert status == 2
    assert says in said and "cannot load" in said
    assert not any((tmp_path / name).exists() for name in ("out", "out.partial", "texts", "f.safetensors"))


@pytest.mark.parametrize(
    ("command", "config", "says"),
    [
        ("train", {"attention_dropout": -1.0}, "cannot run the model: ValueError: dropout probability has to be between 0 and 1"),
        ("replay", {"sliding_window": 0}, "cannot sample from the model: RuntimeError"),
        ("fisher", {"rope_parameters": {"rope_type": "dynamic", "factor": 0.0, "rope_theta": 0.0}}, "logits are not finite"),
    ],
)
def test_a_config_that_loads_and_does_not_run(
    command: str,
    config: dict[str, Any],
    says: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(corpus, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    monkeypatch.chdir(tmp_path)
    assert main(COMMANDS[command].split()) in (1, 2)
    assert says in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in ("out/config.json", "f.safetensors"))


@pytest.mark.parametrize("command", COMMANDS)
def test_what_config_json_says_of_outputs_changes_nothing(
    command: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(corpus, tmp_path, dirs_exist_ok=True)
    odd = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    for path in (tmp_path / "source" / "config.json", tmp_path / "grown" / "config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), **odd}))
    monkeypatch.chdir(tmp_path)
    status, said = main(COMMANDS[command].split()), capsys.readouterr().err
    # verify: config.json is not as planned; a model that knows nothing writes nothing that is kept.
    assert status == 0 or (command == "verify" and not said) or (command == "replay" and "was kept" in said), said
    if (tmp_path / "out" / "config.json").is_file():
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert {k: written[k] for k in odd} == odd


@pytest.mark.parametrize("key", ["return_dict", "output_hidden_states", "output_attentions"])
def test_a_switch_is_true_or_false(key: str) -> None:
    with pytest.raises(SourceError, match=f"{key} must be true or false"):
        Architecture({**real_config(BY_NAME["mistral"]).to_dict(), key: 5.0}).layers  # noqa: B018 (a property that checks)


@pytest.mark.parametrize("length", [-1, 0, True, "x", 5.0, [1]])
def test_a_model_has_a_whole_number_of_positions(length: Any) -> None:
    config = real_config(BY_NAME["mistral"]).to_dict()
    assert Architecture(config).layers == 4
    with pytest.raises(SourceError, match="max_position_embeddings must be a positive integer"):
        Architecture({**config, "max_position_embeddings": length})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), InputError("ours"), torch.OutOfMemoryError("of the GPU")])
def test_what_says_nothing_of_the_file_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, transformers_errors("it"):
        raise error
    assert found.value is error


def test_the_error_of_the_library_is_told_and_kept() -> None:
    with pytest.raises(SourceError) as found, transformers_errors("the model of there", "Do this."):
        raise TypeError("first line\n  second line")
    assert str(found.value).startswith("transformers ")
    assert str(found.value).endswith(" cannot load the model of there: TypeError: first line second line.\n  Do this.")
    assert isinstance(found.value.__cause__, TypeError)


def test_a_tokenizer_that_loads_and_does_not_work(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["unk_token"] = "[gone]"
    path.write_text(json.dumps(data))
    with pytest.raises(SourceError, match="cannot load the tokenizer of there"):
        load_tokenizer(tmp_path, "there")
