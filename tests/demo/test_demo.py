"""`hf-grow demo`, tiny: through the real entry point, with a cache of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hf_grow.cli import main
from hf_grow.demo import cache, report, show, text
from hf_grow.demo.pretrain import Point, build_tokenizer, pack, spread
from hf_grow.demo.run import DemoOptions, run
from hf_grow.demo.settings import quick
from hf_grow.errors import ExecutionError, InputError, OutputError


def _demo(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "100"}
    env.pop("HF_HOME", None)
    command = [sys.executable, "-m", "hf_grow", "demo", "--quick", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", timeout=600)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo")
    done = _demo(folder)
    assert done.returncode == 0, done.stderr
    shutil.copyfile(folder / "demo-out" / "demo.json", folder / "first.json")  # other tests run it there again
    return folder, done


def test_the_whole_story(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = first
    numbers = json.loads((folder / "first.json").read_text())
    assert (numbers["small"]["layers"], numbers["grown"]["layers"], numbers["small_going_on"]["layers"]) == (4, 6, 4)
    losses = {name: [p["loss"] for p in numbers[name]["heldout"]] for name in ("small", "grown", "small_going_on")}
    assert losses["small"][-1] < losses["small"][0]  # from random weights, whose loss is that of guessing
    # Both go on from the same weights and end at the same number of tokens: else the comparison is none.
    assert losses["small_going_on"][0] == pytest.approx(losses["small"][-1], abs=1e-3)
    assert numbers["grown"]["heldout"][-1]["tokens"] == numbers["small_going_on"]["heldout"][-1]["tokens"]
    assert not numbers["small"]["cached"]
    for line in (
        "$ hf-grow dus demo-out/small --layers-to 6 -o demo-out/grown",
        "$ hf-grow verify demo-out/small demo-out/grown --text demo-out/heldout.txt",
        "next: hf-grow inspect demo-out/grown",
    ):
        assert line in done.stdout
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_the_figure_is_a_png(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert (first[0] / "demo-out" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_checkpoint_loads_and_generates(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = first[0] / "demo-out"
    model = AutoModelForCausalLM.from_pretrained(out / "grown-trained")
    tokenizer = AutoTokenizer.from_pretrained(out / "grown-trained")
    assert model.config.num_hidden_layers == 6
    prompt = "def naïve(self):\n    return 0"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == prompt
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert made.shape[1] == ids.shape[1] + 5
    grown = AutoModelForCausalLM.from_pretrained(out / "grown")
    assert torch.equal(grown.model.layers[3].mlp.up_proj.weight, grown.model.layers[1].mlp.up_proj.weight)  # the seam of DUS: 0-2, 1-3
    assert not torch.equal(grown.model.layers[3].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight)  # it was trained


def test_second_run_takes_the_cached_model(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = first
    weights = (folder / "demo-out" / "small" / "model.safetensors").read_bytes()
    done = _demo(folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "demo-out" / "demo.json").read_text())["small"]["cached"]
    assert "--fresh trains it again" in done.stdout
    assert (folder / "demo-out" / "small" / "model.safetensors").read_bytes() == weights


def test_another_setting_text_or_version_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(0).pretraining
    keys = [
        cache.key(settings, "a"),
        cache.key(settings, "b"),
        cache.key(quick(1).pretraining, "a"),
        cache.key(replace(settings, steps=61), "a"),
    ]
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    keys.append(cache.key(settings, "a"))
    monkeypatch.undo()
    monkeypatch.setattr(cache, "version", lambda name: "0.0")
    keys.append(cache.key(settings, "a"))
    monkeypatch.undo()
    assert len(set(keys)) == len(keys)
    assert cache.key(settings, "a") == keys[0]


def test_cache_is_reused_replaced_and_never_half_written(tmp_path: Path) -> None:
    def make(content: str):  # type: ignore[no-untyped-def]
        return lambda folder: (folder / "f").write_text(content)

    def interrupted(folder: Path) -> None:
        (folder / "f").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fetch(tmp_path, "k", interrupted)
    assert list((tmp_path / "demo").iterdir()) == []
    folder, cached = cache.fetch(tmp_path, "k", make("one"))
    assert (cached, (folder / "f").read_text()) == (False, "one")
    folder, cached = cache.fetch(tmp_path, "k", make("two"))
    assert (cached, (folder / "f").read_text()) == (True, "one")
    with pytest.raises(KeyboardInterrupt):
        cache.fetch(tmp_path, "k", interrupted, fresh=True)
    assert (folder / "f").read_text() == "one"
    folder, cached = cache.fetch(tmp_path, "k", make("three"), fresh=True)
    assert (cached, (folder / "f").read_text()) == (False, "three")
    assert [p.name for p in (tmp_path / "demo").iterdir()] == ["k"]


def test_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        cache.fetch(tmp_path / "file", "k", lambda folder: None)


def test_cache_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.default_root() == tmp_path / "x" / "hf-grow"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "h"))
    assert cache.default_root() == tmp_path / "h" / "hf-grow"


def test_missing_extras_are_told_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hf_grow.demo.run.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'hf-grow\[train,plot\]'"):
        run(DemoOptions(output=tmp_path / "out"))
    monkeypatch.setattr("hf_grow.demo.run.find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(InputError, match=r"needs matplotlib, which is not installed[^\0]*hf-grow\[plot\]"):
        run(DemoOptions(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_user_is_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.txt").write_text("years")
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 2
    assert "no result of an earlier demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["small", "thesis.txt"]


def test_importing_the_demo_needs_no_torch() -> None:
    code = "import sys, hf_grow.demo.run; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_text_is_the_same_each_time_and_held_out_documents_stay_out() -> None:
    corpus = text.corpus(300_000)
    assert corpus == text.corpus(300_000)
    assert corpus.digest == text.corpus(300_000).digest != text.corpus(400_000).digest
    assert not set(corpus.train) & set(corpus.heldout)
    with pytest.raises(InputError, match="This Python came with"):
        text.corpus(10**12)


def test_moved_border_changes_the_digest() -> None:
    assert text.Corpus(("ab", "c"), ("d",)).digest != text.Corpus(("a", "bc"), ("d",)).digest
    assert text.Corpus(("a", "b"), ("c",)).digest != text.Corpus(("a",), ("b", "c")).digest


def test_tokenizer_is_deterministic_and_packing_loses_nothing() -> None:
    documents = ["import os\n" * 30, "the quick brown fox, naïve\n" * 30]
    tokenizer, again = build_tokenizer(documents, 300), build_tokenizer(documents, 300)
    assert tokenizer.get_vocab() == again.get_vocab()
    rows = pack(tokenizer, documents, 8)
    stream = [i for d in documents for i in (tokenizer.bos_token_id, *tokenizer(d)["input_ids"], tokenizer.eos_token_id)]
    assert rows.flatten().tolist() == stream[: len(stream) // 8 * 8]
    assert spread(rows, 3)[[0, 2]].tolist() == rows[[0, -1]].tolist()


def _story(grown_end: float) -> report.Story:
    small = report.Run(8, 1_000_000, (Point(0, 7.0), Point(100, 4.0)), 60.0)
    grown = report.Run(12, 1_400_000, (Point(0, 4.1), Point(50, grown_end)), 20.0)
    return report.Story(small, grown, report.Run(8, 1_000_000, (Point(0, 4.0), Point(50, 3.8)), 15.0), 0.1)


@pytest.mark.parametrize(("end", "words"), [(3.7, "0.100 ahead of"), (3.9, "0.100 behind"), (3.801, "are level")])
def test_the_verdict_says_what_came_out(end: float, words: str) -> None:
    verdict = report.verdict(_story(end))
    assert words in verdict
    assert "+0.100" in verdict
    assert "1.4 times" in verdict


def test_labels_at_line_ends_keep_apart() -> None:
    assert report._apart([1.0, 1.5], 0.2) == [1.0, 1.5]
    assert report._apart([1.0, 1.1], 0.2) == pytest.approx([0.95, 1.15])
    assert report._apart([1.1, 1.0], 0.2) == pytest.approx([1.15, 0.95])


def test_a_command_that_fails_ends_the_demo(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from rich.console import Console

    with pytest.raises(ExecutionError, match="hf-grow verify failed with exit status 2"):
        show.command(Console(), "verify", str(tmp_path / "no"), str(tmp_path / "nowhere"))
    assert "is no folder" in capfd.readouterr().err
