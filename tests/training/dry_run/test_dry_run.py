"""`hf-grow train --dry-run` for people: something at once, and what matters first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from trained import grown, recipe

from hf_grow.cli import main
from hf_grow.cli.train import summary

FACTS = {
    "output": "there", "model": "small", "parameters": [5, 10], "tokens": 4096, "steps": 4, "tokens_a_step": 1024, "flops": 1e9, "processes": 1,
    "memory": {"total": 3_000_000_000}, "free_memory": {"device": "cpu", "bytes": 2_000_000_000},
}  # fmt: skip


def test_summary_shows_non_default_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path, grown(tmp_path), learning_rate=1e-4, weight_decay=0.0, seed=42, regularizer={"kind": "none"})
    assert main(["train", str(path), "--dry-run", "-o", "elsewhere", "--max_steps", "3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"output       {tmp_path / 'elsewhere'} ")
    assert [line.split()[0] for line in said[1:4]] == ["model", "training", "memory"]
    assert "free on cpu" in said[3]
    start = said.index("not the defaults:")
    shown = [line.split(":")[0].strip() for line in said[start + 1 :] if line.startswith("  ") and not line.startswith("   ")]
    assert {"weight_decay", "max_steps", "data"} <= set(shown)
    assert not {"learning_rate", "seed", "regularizer", "model", "output", "lora", "monitor"} & set(shown)


def test_too_little_memory_is_shown_in_capitals() -> None:
    assert "MORE THAN IS FREE" in summary(FACTS)[-1]
    assert "MORE" not in summary(FACTS | {"free_memory": {"device": "cpu", "bytes": 4_000_000_000}})[-1]
    assert "is unknown" in summary(FACTS | {"free_memory": {"device": "cpu", "bytes": None}})[-1]


def test_message_before_heavy_imports(tmp_path: Path) -> None:
    """However slow the machine: the first words come before torch and transformers, which take seconds."""
    (tmp_path / "recipe.yaml").write_text("model: ./nowhere\ndata: {train: nowhere.txt}\n")
    code = (
        "import sys\n"
        "from hf_grow.cli import main, render\n"
        "def note(text): print(text, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))\n"
        "render.note = note\n"
        "main(['train', 'recipe.yaml', '--dry-run'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.stdout.splitlines()[0] == "Reading recipe.yaml ... []", done.stderr
