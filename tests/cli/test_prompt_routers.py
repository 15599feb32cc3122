"""`hf-grow experts --router prompts`: router rows measured on the source are those of the grown checkpoint and of its plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make, on_disk, save
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_grow import api
from hf_grow.checkpoint.reader import open_folder
from hf_grow.cli import main
from hf_grow.convert.in_memory import grow_model
from hf_grow.convert.router_init import router_rows
from hf_grow.errors import PlanError
from hf_grow.methods.experts.prompts import PromptsFile

WORDS = ["sum", "loop", "tale", "king", "verb", "noun", "the", "of"]
PROMPTS = {"experts": [{"positive": ["sum of the loop", "loop"]}, {"positive": ["tale of the king"], "negative": ["verb noun"]}, {"positive": ["noun the verb"]}]}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = save(make(BY_NAME["llama"]), tmp_path / "source")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["prompts", "cheap-embed"])
def test_the_router_has_the_measured_rows(kind: Any, source: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text(json.dumps(PROMPTS))
    out = tmp_path / "out"
    words = ["experts", str(source), "--experts", "3", "--router", kind, "--prompts", str(tmp_path / "prompts.yaml"), "--router-std", "0.1"]
    assert main([*words, "--dry-run"]) == 0  # needs no weights
    assert main([*words, "-o", str(out)]) == 0
    rows = router_rows(open_folder(source), PromptsFile.model_validate(PROMPTS), kind=kind)
    found = load_file(out / "model.safetensors")
    for layer, wanted in rows.items():
        assert torch.allclose(
            found[f"model.layers.{layer}.block_sparse_moe.gate.weight"], wanted * 0.1 * 48**0.5, atol=4e-4
        )  # kept in 16 bit
    (tmp_path / "prompts.yaml").unlink()  # growth.json holds the prompts and the rows
    assert api.verify(source, out).ok
    record = json.loads((out / "growth.json").read_text())
    assert record["growth"]["options"]["prompts"]["experts"][1]["negative"] == ["verb noun"]
    assert len(record["growth"]["data"]) == (4 if kind == "prompts" else 1)


def test_cheap_rows_are_means_of_embeddings(source: Path, tmp_path: Path) -> None:
    """From prompts to weights, against a reference computed by hand."""
    api.grow(source, tmp_path / "out", "experts", experts=3, router="cheap-embed", prompts=PROMPTS, router_std=1.0)
    embedding = on_disk(make(BY_NAME["llama"]))["model.embed_tokens.weight"].double()
    ids = {w: i + 1 for i, w in enumerate(WORDS)}

    def mean(text: str) -> torch.Tensor:
        return torch.stack([embedding[ids[w]] for w in text.split()]).mean(0)

    second = mean("tale of the king") - mean("verb noun")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.block_sparse_moe.gate.weight"]
    assert torch.allclose(found[1].double(), second / second.norm() * 48**0.5, atol=4e-3)


def test_pooling_can_take_the_last_token(source: Path, tmp_path: Path) -> None:
    for pooling in ("mean", "last"):
        api.grow(source, tmp_path / pooling, "experts", experts=3, router="prompts", prompts=PROMPTS, prompt_pooling=pooling)
    mean, last = (load_file(tmp_path / pooling / "model.safetensors") for pooling in ("mean", "last"))
    name = "model.layers.0.block_sparse_moe.gate.weight"
    assert not torch.equal(mean[name], last[name])
    rows = router_rows(open_folder(source), PromptsFile.model_validate(PROMPTS), kind="prompts", pooling="last")
    assert torch.allclose(last[name], rows[0] * 0.02 * 48**0.5, atol=4e-4)


def test_an_unmeasured_plan_is_refused(source: Path) -> None:
    model = make(BY_NAME["llama"])
    plan = api.plan(model, "experts", experts=3, router="prompts", prompts=PROMPTS)
    assert plan.growth.measurements
    with pytest.raises(PlanError, match="router rows measured on the source"):
        grow_model(model, plan)


def test_a_prompted_router_in_a_later_step_is_refused(source: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    steps = [{"method": "identity"}, {"method": "experts", "experts": 3, "router": "prompts", "prompts": PROMPTS}]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"source": str(source), "steps": steps}))
    assert main(["grow", str(tmp_path / "recipe.yaml")]) == 2
    assert "first step" in capsys.readouterr().err
