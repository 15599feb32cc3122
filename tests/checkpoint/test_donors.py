"""Growths that read several checkpoints: Branch-Train-MiX, and experts of other origin for a mixture; against plain references."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import logits
from models import BY_NAME, make, on_disk, save, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_grow import api
from hf_grow.cli import main
from hf_grow.common.units import format_bytes
from hf_grow.convert.in_memory import disk_tensors, grow_model
from hf_grow.errors import InputError, PlanError, SourceError
from hf_grow.growth.plan import GrowthPlan

SIBLINGS = ["llama-tied", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def family(tmp_path: Path, request: pytest.FixtureRequest) -> list[tuple[Path, PreTrainedModel]]:
    """Three siblings, in folders and in memory."""
    models = [make(BY_NAME[request.param], seed=s) for s in range(3)]
    return [(save(m, tmp_path / f"sibling{s}", sharded=s == 1), m) for s, m in enumerate(models)]


def trained_expert(name: str, expert: int) -> str:
    """The dense tensor that must stand in an expert's place, in words of the paper: its FFN."""
    part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    last = name.split(".")[-2]
    return ".".join([*name.split(".")[:3], "mlp", part.get(last, last), "weight"])


@pytest.mark.parametrize("family", SIBLINGS, indirect=True)
def test_branch_train_mix_is_the_paper_s(family: list[tuple[Path, PreTrainedModel]], tmp_path: Path) -> None:
    (main_folder, _), *others = family
    weights = torch.tensor([2.0, 1.0, 1.0])
    plan = api.plan(main_folder, "experts", experts_from=[str(p) for p, _ in others], experts=6, weights=[2, 1, 1])
    api.grow(main_folder, tmp_path / "out", "experts", experts_from=[str(p) for p, _ in others], experts=6, weights=[2, 1, 1])
    states = [on_disk(m) for _, m in family]
    found = disk_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert not plan.guarantee.lossless
    experts = averaged = 0
    half = 0.5 if BY_NAME["qwen2"].family == plan.source.config["model_type"] else 1.0
    for name, tensor in found.items():
        if ".experts." in name:
            expert = int(name.split(".experts.")[1].split(".")[0])
            wanted = states[expert % 3][trained_expert(name, expert)]
            assert torch.equal(tensor, wanted * half if "down_proj" in name else wanted)
            experts += 1
        elif name in states[0]:
            mean = sum(w * s[name].double() for w, s in zip(weights / weights.sum(), states, strict=True))
            assert torch.allclose(tensor.double(), mean, atol=1e-6)
            averaged += 1
    assert experts == 4 * 6 * 3
    assert averaged > 20
    memory = grow_model(family[0][1], plan, {str(i): m for i, (_, m) in enumerate(others, 1)})
    assert all(torch.equal(t, found[n]) for n, t in disk_tensors(memory).items())


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_verify_and_growth_json_know_all_sources(family: list[tuple[Path, PreTrainedModel]], tmp_path: Path, capsys: Any) -> None:
    folders = [str(p) for p, _ in family]
    out = tmp_path / "out"
    assert main(["experts", folders[0], "--experts-from", ",".join(folders[1:]), "-o", str(out), "--json"]) == 0
    record = json.loads((out / "growth.json").read_text())
    assert [o["ref"] for o in record["source"]["others"].values()] == folders[1:]
    again = json.loads(json.dumps(GrowthPlan.from_json(record).to_json()))
    del record["growth"]["training"]  # told by the writer, from the plan
    assert (again["source"], again["growth"]) == (record["source"], record["growth"])
    assert api.verify(folders[0], out, structure_only=True).ok
    # A sibling that changed since is noticed, tensor by tensor.
    save(make(BY_NAME["llama"], seed=9), Path(folders[2]))
    report = api.verify(folders[0], out, structure_only=True)
    assert [c.status for c in report.checks if c.name == "tensors"] == ["fail"]
    shutil.rmtree(folders[2])
    with pytest.raises(InputError, match="no folder"):
        api.verify(folders[0], out, structure_only=True)


def test_the_plan_tells_each_source_s_own_size(tmp_path: Path, capsys: Any) -> None:
    """Beside the parameters of the first stand its bytes, not those of all."""
    models = [make(BY_NAME["mistral"], seed=s) for s in range(3)]
    folders = [str(save(m, tmp_path / f"sibling{s}")) for s, m in enumerate(models)]
    words = ["experts", folders[0], "--experts-from", ",".join(folders[1:]), "-o", str(tmp_path / "out"), "--dry-run"]
    parameters = sum(t.numel() for t in on_disk(models[0]).values())
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["plan"]
    assert (facts["parameters"][0], facts["bytes"][0]) == (parameters, 4 * parameters)
    assert [(o["source"], o["parameters"], o["bytes"]) for o in facts["further_sources"].values()] == [
        (folder, parameters, 4 * parameters) for folder in folders[1:]
    ]
    assert main(words) == 0
    said = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    size = format_bytes(4 * parameters)
    assert any(line.startswith(f"weights on disk {size} ") for line in said)
    assert f"weights of 2 further sources {format_bytes(8 * parameters)}" in said


def test_equal_siblings_are_the_source_itself(tmp_path: Path, exact_math: None) -> None:
    """Averaging equal models and mixing equal experts changes nothing: a check of the whole way that needs no other reference."""
    model = make(BY_NAME["llama"], dtype=torch.float64)
    folder = save(model, tmp_path / "source")
    plan = api.plan(model, "experts", experts_from=[str(folder)] * 3)
    assert plan.architecture.size("experts") == 4
    grown = grow_model(model, plan, dict.fromkeys("123", model))
    assert (logits(grown, tokens(model)) - logits(model, tokens(model))).abs().max() < 1e-10


@pytest.mark.parametrize("router", ["normal", "zeros", "orthogonal"])
def test_a_dense_checkpoint_becomes_a_new_expert_of_a_mixture(router: str, tmp_path: Path) -> None:
    mixture, dense = make(BY_NAME["mixtral"]), make(BY_NAME["llama"], seed=5)
    source, donor = save(mixture, tmp_path / "mixture"), save(dense, tmp_path / "dense")
    api.grow(source, tmp_path / "out", "experts", experts_from=[str(donor)], router=router)
    old, new, ffn = on_disk(mixture), disk_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), on_disk(dense)
    assert {n for n in new if ".experts.4." in n}
    for name, tensor in new.items():
        if ".experts.4." in name:
            assert torch.equal(tensor, ffn[trained_expert(name, 4)])
        elif name.endswith("block_sparse_moe.gate.weight"):
            assert torch.equal(tensor[:4], old[name])
            assert tensor[4].norm().item() == pytest.approx(0 if router == "zeros" else 0.02 * 48**0.5, rel=0.35)
        else:
            assert torch.equal(tensor, old[name])
    lists = json.loads((tmp_path / "out" / "growth.json").read_text())["growth"]["training"]
    assert lists["old_experts"] == [0, 1, 2, 3]
    assert lists["new_experts"] == [4]
    assert len(lists["routers"]) == 4


def with_vocabulary(folder: Path, vocab: dict[str, int]) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": [{"content": "<s>", "id": 60}]}))
    return folder


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"case": "mistral"}, "MistralForCausalLM"),
    "layers": ({"num_hidden_layers": 3}, "num_hidden_layers 3"),
    "width": ({"intermediate_size": 44}, "inter 44"),
    "vocab": ({"vocab_size": 66}, "vocab 66"),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
    "eps": ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_checkpoints_that_are_no_siblings_are_refused_with_the_difference(case: str, tmp_path: Path) -> None:
    changes, words = UNLIKE[case]
    name = changes.get("case", "llama")
    other = save(make(BY_NAME[name], **{k: v for k, v in changes.items() if k != "case"}), tmp_path / "other")
    with pytest.raises(PlanError, match=words):
        api.plan(save(make(BY_NAME["llama"]), tmp_path / "source"), "experts", experts_from=[str(other)])


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    one = with_vocabulary(save(make(BY_NAME["llama"]), tmp_path / "one"), {"a": 0, "b": 1})
    two = with_vocabulary(save(make(BY_NAME["llama"], seed=1), tmp_path / "two"), {"a": 0, "b": 1, "c": 2})
    api.plan(one, "experts", experts_from=[str(two)])  # a token more is no contradiction
    with_vocabulary(two, {"a": 1, "b": 0})
    with pytest.raises(SourceError, match=r"different tokenizers.*'a'"):
        api.plan(one, "experts", experts_from=[str(two)])
    (two / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(SourceError, match="no readable vocabulary"):
        api.plan(one, "experts", experts_from=[str(two)])


def test_donors_that_do_not_fit_a_mixture_are_refused(tmp_path: Path) -> None:
    source = save(make(BY_NAME["mixtral"]), tmp_path / "source")
    for case, changes, words in (
        ("mixtral", {}, "is an MoE model"),
        ("llama", {"intermediate_size": 44}, "FFN 44"),
        ("llama-bias", {}, "biases"),
    ):
        other = save(make(BY_NAME[case], **changes), tmp_path / f"{case}{len(changes)}")
        with pytest.raises(PlanError, match=words):
            api.plan(source, "experts", experts_from=[str(other)])
