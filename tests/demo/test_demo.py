"""`hf-grow demo --quick` through the command line, with a cache of its own."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_grow.cli import main
from hf_grow.demo import domains, report
from hf_grow.demo import run as demo
from hf_grow.demo.run import DemoOptions, run
from hf_grow.demo.small_model import build_tokenizer
from hf_grow.errors import ExecutionError, InputError, OutputError
from hf_grow.training.config.train_config import read_recipe


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HOME": str(folder / "cache"), "COLUMNS": "100"}


def _demo(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_grow", "demo", "--quick", *words]
    return subprocess.run(
        command, cwd=folder, env=_environment(folder), capture_output=True, text=True, encoding="utf-8", timeout=600, check=False
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo")
    done = _demo(folder)
    assert done.returncode == 0, done.stderr
    shutil.copyfile(folder / "demo-out" / "demo.json", folder / "first.json")  # other tests run it there again
    return folder, done


def test_the_whole_demo(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = first
    numbers = json.loads((folder / "first.json").read_text())
    assert numbers["layers"] == [4, 6] and not numbers["cached"]
    pretraining = json.loads((folder / "demo-out" / "small" / "training.json").read_text())["result"]
    assert pretraining["end"]["prose"] < pretraining["start"]["prose"]  # from random weights, whose loss is that of guessing
    plain, ewc = numbers["plain"], numbers["ewc"]
    assert numbers["small"]["old"] == pytest.approx(plain["start"]["old"], abs=1e-4)  # identity is lossless
    assert plain["start"] == ewc["start"] and plain["tokens"] == ewc["tokens"]  # else there is no comparison
    assert plain["end"] != ewc["end"]
    for losses in (plain, ewc):
        assert losses["forgetting"] == pytest.approx(losses["end"]["old"] - losses["start"]["old"])
        assert losses["end"] == {k: v for k, v in losses["evaluations"][-1].items() if k != "step"}
    for line in (
        "$ hf-grow train demo-out/pretrain.yaml",
        "$ hf-grow inspect demo-out/small",
        "$ hf-grow depth demo-out/small --method identity --layers-to 6 -o demo-out/grown",
        "$ hf-grow verify demo-out/small demo-out/grown --text demo-out/text/old-heldout.jsonl",
        "$ hf-grow fisher demo-out/grown --text demo-out/text/old.jsonl",
        "$ hf-grow train demo-out/train.yaml --regularizer.kind ewc",
        f"{plain['end']['old']:.3f}",
        f"{ewc['end']['new']:.3f}",
    ):
        assert line in done.stdout
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_a_printed_command_runs_by_itself(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = first
    line = next(line for line in done.stdout.splitlines() if line.startswith("$ hf-grow train demo-out/train.yaml"))
    words = [sys.executable, "-m", "hf_grow", *line.split()[2:], "--dry-run", "--json", "--overwrite"]
    again = subprocess.run(words, cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["steps"] == 20


def test_the_figure_is_a_png(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert (first[0] / "demo-out" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_checkpoint_loads_and_generates(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = first[0] / "demo-out"
    grown = AutoModelForCausalLM.from_pretrained(out / "grown")
    for name in ("trained", "trained-ewc"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert model.config.num_hidden_layers == 6
        assert not torch.equal(grown.model.layers[3].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight)
    tokenizer = AutoTokenizer.from_pretrained(out / "trained-ewc")
    prompt = "def naïve(self):\n    return 0"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == prompt
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert made.shape[1] == ids.shape[1] + 5


def test_second_run_takes_the_cached_model(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = first
    weights = (folder / "demo-out" / "small" / "model.safetensors").read_bytes()
    done = _demo(folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "demo-out" / "demo.json").read_text())["cached"]
    assert "--fresh trains it again" in done.stdout and "pretrain.yaml" not in done.stdout
    assert (folder / "demo-out" / "small" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_an_interrupted_demo_runs_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_grow", "demo", "--quick"]
    with subprocess.Popen(command, cwd=tmp_path, env=_environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "demo-out" / "small").exists() and process.poll() is None:  # in the middle of the first training
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and b"interrupted" in err and b"Traceback" not in err
    assert json.loads((tmp_path / "demo-out" / "demo.json").read_text()) == {"unfinished": True}
    assert not (tmp_path / "cache" / "hf-grow" / "demo").exists()
    done = _demo(tmp_path)
    assert done.returncode == 0, done.stderr


class _Commands:
    """Stands in for the commands: notes what is called, and writes a small model."""

    def __init__(self, out: Path) -> None:
        self.out, self.lines = out, list[list[str]]()

    def __call__(self, line: list[str]) -> int:
        self.lines.append(line)
        (self.out / "small").mkdir()
        (self.out / "small" / "model").write_text(str(len(self.lines)))
        return 0


@pytest.mark.slow
def test_the_cache_is_reused_replaced_and_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    commands = _Commands(out)

    def pretrain(fresh: bool = False, seed: int = 0, command: Any = commands) -> tuple[bool, str]:
        demo._clear(out)
        cached = demo._Demo(out, demo.QUICK, seed, command).pretrain(fresh)
        return cached, (out / "small" / "model").read_text()

    def interrupted(line: list[str]) -> int:
        commands(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(command=interrupted)
    assert pretrain() == (False, "2")
    assert pretrain() == (True, "2")
    with pytest.raises(KeyboardInterrupt):
        pretrain(fresh=True, command=interrupted)
    assert pretrain() == (True, "2")
    assert pretrain(fresh=True) == (False, "4")
    assert pretrain(seed=1) == (False, "5") and commands.lines[-1][-4:] == ["--seed", "1", "--data.seed", "1"]
    assert pretrain() == (True, "4")
    kept = [p for p in (tmp_path / "home" / "hf-grow" / "demo").iterdir() if p.is_dir()]
    assert len(kept) == 2


def test_another_setting_text_seed_or_version_is_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(settings: demo.Settings = demo.QUICK, seed: int = 0, digest: str = "a") -> str:
        return demo._Demo(tmp_path, settings, seed, lambda line: 0).cache_key(domains.Domains({}, digest))

    keys = [key(), key(demo.FULL), key(seed=1), key(digest="b")]
    monkeypatch.setattr(demo, "version", lambda name: "0.0")
    keys.append(key())
    monkeypatch.undo()
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf-grow").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        demo._Demo(out, demo.QUICK, 0, _Commands(out)).pretrain(False)


def test_missing_packages_are_reported_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hf_grow.demo.run.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'hf-grow\[train,plot\]'"):
        run(DemoOptions(output=tmp_path / "out"), lambda line: 0)
    monkeypatch.setattr("hf_grow.demo.run.find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(InputError, match=r"needs matplotlib, which is not installed[^\0]*hf-grow\[plot\]"):
        run(DemoOptions(output=tmp_path / "out"), lambda line: 0)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_user_is_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.txt").write_text("years")
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 2
    assert "not the output of an earlier demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["small", "thesis.txt"]


def test_a_command_that_fails_ends_the_demo(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match="hf-grow verify failed with exit status 1"):
        demo._Demo(tmp_path, demo.QUICK, 0, lambda line: 1).hf_grow("verify", "a", "b")


def test_importing_the_demo_needs_no_torch() -> None:
    code = "import sys, hf_grow.demo.run; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", demo.RECIPES)
def test_the_recipes_have_no_mistake_and_take_any_folder(name: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load(Path(demo.__file__).with_name(name).read_text())
    assert read_recipe(recipe).mistakes == ()
    out = tmp_path / 'a "b" #c: ü'
    out.mkdir()
    demo._Demo(out, demo.FULL, 0, lambda line: 0)
    moved = yaml.safe_load((out / name).read_text(encoding="utf-8"))
    assert moved == json.loads(json.dumps(recipe).replace("demo-out", json.dumps(str(out))[1:-1]))


def test_text_is_the_same_each_time_and_held_out_documents_stay_out() -> None:
    texts = domains.domains()
    assert set(texts.documents) == set(domains.FILES)
    assert texts == domains.domains()
    assert all(sum(map(len, documents)) > 50_000 for documents in texts.documents.values())
    train, held_out = ({p for d in texts.documents[name] for p in d.split("\n\n")} for name in ("old", "old-heldout"))
    assert not train & held_out
    few = domains.domains(3)
    assert few.documents == {name: documents[:3] for name, documents in texts.documents.items()} and few.digest != texts.digest


def test_a_python_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match="too little text"):
        domains.domains()


def test_prose_and_code_are_split() -> None:
    text = (
        '"""A module about nothing. It has two sentences of prose."""\n\ndef f(x):\n'
        '    """Returns the thing that was given to it, unchanged and whole.\n\n    >>> f(1)\n    1\n    """\n    return x\n'
    )
    docstrings, code = domains.split(text, ast.parse(text))
    assert code == "def f(x):\n    return x"
    assert [p for s in docstrings for p in domains.paragraphs(s)] == [
        "A module about nothing. It has two sentences of prose.",
        "Returns the thing that was given to it, unchanged and whole.",
    ]


def test_the_tokenizer_is_deterministic() -> None:
    documents = ["import os\n" * 30, "the quick brown fox, naïve\n" * 30]
    first, second = build_tokenizer(documents, 300), build_tokenizer(documents, 300)
    assert first.get_vocab() == second.get_vocab()


def _numbers(forgot: float, learned_to: float) -> dict[str, Any]:
    plain = {"start": {"old": 3.6, "new": 6.0}, "end": {"old": 3.9, "new": 3.8}, "forgetting": 0.3, "tokens": 1000}
    ewc = {**plain, "end": {"old": 3.6 + forgot, "new": learned_to}, "forgetting": forgot}
    return {"layers": [8, 12], "parameters": [10, 15], "small": {"old": 3.5}, "plain": plain, "ewc": ewc}


@pytest.mark.parametrize(
    ("forgot", "learned_to", "words"),
    [
        (0.2, 3.85, "forgot 0.100 less and learned 0.050 less"),
        (0.4, 3.7, "forgot 0.100 more and learned 0.100 more"),
        (0.301, 3.8, "forgot the same and learned the same"),
    ],
)
def test_the_summary_reports_what_this_run_showed(forgot: float, learned_to: float, words: str) -> None:
    summary = report.summary(_numbers(forgot, learned_to))
    assert words in summary
    assert "prose by +0.1000" in summary and "+0.300 without EWC" in summary and f"+{forgot:.3f} with it" in summary
