"""Sources and places that may not be read or written: one message that names the place, exit status 1 or 2, and nothing left behind."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models import BY_NAME, make, save
from trained import FAST, text, tokenizer

from hf_grow.cli import COMMANDS, main

SOURCE = ("source", "source/config.json", "source/model.safetensors")
OUT = ("place",)
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "plan": ("plan source --to 70K", SOURCE, ()),
    "inspect": ("inspect grown", ("grown", "grown/config.json", "grown/growth.json", "grown/model.safetensors"), ()),
    "inspect --picture": ("inspect grown --picture place/map.svg", (), OUT),
    "dus": ("dus source -o place/out", (*SOURCE, "source/tokenizer.json"), OUT),
    "dus --dry-run": ("dus source -o place/out --dry-run", SOURCE, ()),
    "dus --overwrite": ("dus source -o place/old --overwrite", (), OUT),
    "depth": ("depth source --method stack -o place/out", SOURCE, OUT),
    "width": ("width source --factor 2 -o place/out", SOURCE, OUT),
    "hybrid": ("hybrid source --to 80K -o place/out", SOURCE, OUT),
    "experts": ("experts source --experts 2 -o place/out", SOURCE, OUT),
    "experts --router": (
        "experts source --experts 2 --router prompts --prompts prompts.yaml -o place/out",
        (*SOURCE, "source/tokenizer.json", "prompts.yaml"),
        OUT,
    ),
    "grow": ("grow recipe.yaml", (*SOURCE, "recipe.yaml"), OUT),
    "verify": (
        "verify source grown --tokens 16 --text words.txt",
        (*SOURCE, "source/tokenizer.json", "grown", "grown/config.json", "grown/growth.json", "grown/model.safetensors", "words.txt"),
        (),
    ),
    "card": ("card grown --offline", ("grown", "grown/growth.json"), ("grown",)),
    "card -o": ("card grown --offline -o place/card.md", ("grown/growth.json",), OUT),
    "push": ("push grown you/model --dry-run", ("grown", "grown/growth.json", "grown/model.safetensors"), ()),
    "fisher": (
        "fisher source --text text.jsonl -o place/f.safetensors --tokens 32 --seq-length 16",
        (*SOURCE, "source/tokenizer.json", "text.jsonl"),
        OUT,
    ),
    "fisher --from-growth": ("fisher grown --from-growth fisher.safetensors -o place/f.safetensors", ("grown/growth.json", "fisher.safetensors"), OUT),
    "replay": ("replay source -o place/texts --tokens 32 --batch-size 2 --max-length 16", (*SOURCE, "source/tokenizer.json"), OUT),
    "merge": (
        "merge adapter -o place/out --base source",
        ("adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", *SOURCE),
        OUT,
    ),
    "demo": ("demo --quick -o place/out", (), OUT),
    "train --dry-run": ("train train.yaml --dry-run", ("train.yaml", *SOURCE, "source/tokenizer.json", "text.jsonl", "fisher.safetensors"), ()),
    "train": ("train train.yaml", ("train.yaml", *SOURCE, "source/tokenizer.json", "text.jsonl", "fisher.safetensors"), (*OUT, "cache")),
}  # fmt: skip


def test_every_command_is_here() -> None:
    assert {words.split()[0] for words, _, _ in CASES.values()} == COMMANDS.keys()


@contextmanager
def bound_by_modes() -> Iterator[None]:
    """Root passes over modes by two capabilities, which this thread, and those that it starts, puts aside."""
    if os.getuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, held) == 0
    less = (ctypes.c_uint32 * 6)(*held)
    less[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective ones
    assert libc.capset(head, less) == 0
    try:
        yield
    finally:
        assert libc.capset(head, held) == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forbidden")
    source = save(make(BY_NAME["mistral"], dtype=torch.bfloat16), root / "source")
    tokenizer().save_pretrained(source)
    words = text(root, "text", documents=12)
    (root / "words.txt").write_text("w1 w2 w3 w4 w5 w6")
    (root / "cache").mkdir()
    assert main(["dus", str(source), "-o", str(root / "grown")]) == 0
    shutil.copytree(root / "grown", root / "place" / "old")
    fisher = ["fisher", str(source), "--text", str(words), "-o", str(root / "fisher.safetensors"), "--tokens", "32", "--seq-length", "16"]
    assert main(fisher) == 0
    (root / "recipe.yaml").write_text("source: source\nmethod: identity\nlayers_to: 6\noutput: place/out\n")
    (root / "prompts.yaml").write_text(json.dumps({"experts": [{"positive": ["w1"]}, {"positive": ["w2 w3"]}]}))
    data = {"train": "text.jsonl", "seq_length": 16, "cache": "cache"}
    penalty = {"kind": "ewc", "lambda": 3.0, "fisher": "fisher.safetensors"}
    (root / "train.yaml").write_text(
        json.dumps({**FAST, "max_steps": 1, "model": "source", "output": "place/out", "data": data, "regularizer": penalty})
    )
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    get_peft_model(AutoModelForCausalLM.from_pretrained(source), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        root / "adapter"
    )
    return root


@pytest.fixture
def there(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = Path(shutil.copytree(corpus, tmp_path / "there"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("hf_grow.cli.push.uploaded_weights", lambda cargo, to, progress: cargo.check() and None)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)


def forbid(there: Path, words: str, forbidden: str, mode: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(there)
    usual = (there / forbidden).stat().st_mode
    (there / forbidden).chmod(mode)
    try:
        with bound_by_modes():
            assert not os.access(there / forbidden, os.W_OK, effective_ids=True)
            status = main(words.split())
    finally:
        (there / forbidden).chmod(usual)
    said = capsys.readouterr().err
    assert status in (1, 2), said
    assert said.count("hf-grow: ") == 1
    assert forbidden in said and "Permission denied" in said and "Traceback" not in said
    assert contents(there) == before, "what a growth left in its partial folder can be resumed; all else is as it was"


def contents(there: Path) -> dict[Path, bytes]:
    """Files of the folder; not those of a partial folder or a cache, which are not taken for anything whole."""
    return {p: p.read_bytes() for p in there.rglob("*") if p.is_file() and not {"out.partial", "cache"} & set(p.parts)}


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")


@needs_linux
@pytest.mark.parametrize(("name", "forbidden"), [(n, path) for n, (_, reads, _) in CASES.items() for path in reads])
def test_what_may_not_be_read(name: str, forbidden: str, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forbid(there, CASES[name][0], forbidden, 0, capsys)


@needs_linux
@pytest.mark.parametrize(("name", "forbidden"), [(n, path) for n, (_, _, writes) in CASES.items() for path in writes])
def test_where_nothing_may_be_written(name: str, forbidden: str, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forbid(there, CASES[name][0], forbidden, 0o555, capsys)
