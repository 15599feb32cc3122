"""`hf-grow fisher` by several processes, sharded (FSDP2) or not (DDP), against one process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import start
from models import BY_NAME, make, save
from trained import tokenizer

from hf_grow.cli import main
from hf_grow.training.regularizers.importance_file import open_importance

WORDS = ("--dtype", "float64", "--tokens", "220", "--seq-length", "10", "--json")


def model(folder: Path, name: str = "llama") -> tuple[Path, Path]:
    """A checkpoint in fp64, so that only what is wrong can differ, and a text."""
    made = make(BY_NAME[name], num_hidden_layers=2).double()
    made.config.dtype = torch.float64
    save(made, folder / "model")
    tokenizer().save_pretrained(folder / "model")
    draw = random.Random(1)
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{draw.randrange(60)}" for _ in range(1500)))
    return folder / "model", text


def fisher(folder: Path, source: Path, text: Path, how: str, *words: object, processes: int = 2) -> tuple[Any, dict[str, Any]]:
    """The file and what was said: of this process, or of a launch."""
    out = folder / f"{how}.safetensors"
    words = ("fisher", source, "--text", text, "-o", out, "--overwrite", *WORDS, *words)
    if how == "one":
        assert main([*map(str, words)]) == 0
        return open_importance(out), {}
    if how == "ddp":
        words = (*words, "--device", "cpu")
    said = start(how, words, [folder / f"process-{i}" for i in range(processes)])
    assert [bool(s["out"]) for s in said] == [True] + [False] * (processes - 1), "the first process alone reports"
    return open_importance(out), json.loads(said[0]["out"])


def assert_equal(one: Any, two: Any) -> None:
    assert one.shapes == two.shapes
    assert two.metadata == one.metadata
    for name in one.shapes:  # files hold fp32
        torch.testing.assert_close(two.read(name), one.read(name), rtol=2.0**-23, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("how", "words", "processes", "name"),
    [
        (
            "fsdp2",
            ("--batch", "3", "--activation-checkpointing"),
            2,
            "llama-tied",
        ),  # a batch that does not divide, and a last one with one sequence
        pytest.param("fsdp2", ("--exact",), 2, "llama", marks=pytest.mark.slow),
        pytest.param("fsdp2", ("--kind", "empirical"), 3, "llama", marks=pytest.mark.slow),
        pytest.param("fsdp2", ("--batch", "8", "--merge", "MERGE", "--decay", "0.5"), 4, "mixtral", marks=pytest.mark.slow),
        pytest.param("ddp", ("--batch", "3"), 2, "llama", marks=pytest.mark.slow),
        pytest.param("ddp", ("--exact",), 2, "llama", marks=pytest.mark.slow),
    ],
)
def test_several_processes_give_the_fisher_of_one(
    how: str, words: tuple[str, ...], processes: int, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, text = model(tmp_path, name)
    if "MERGE" in words:
        earlier, _ = fisher(tmp_path, source, text, "one", "--seed", "3")
        words = tuple(str(earlier.path.rename(tmp_path / "earlier.safetensors")) if w == "MERGE" else w for w in words)
    plain = tuple(w for w in words if w != "--activation-checkpointing")
    capsys.readouterr()
    one, _ = fisher(tmp_path, source, text, "one", *plain)
    mean = json.loads(capsys.readouterr().out)["mean"]
    together, said = fisher(tmp_path, source, text, how, *words, processes=processes)
    assert_equal(one, together)
    assert said["mean"] == pytest.approx(mean, rel=1e-9)
