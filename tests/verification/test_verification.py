"""Verification: it passes what is right, and finds every way in which a grown checkpoint can be wrong."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make, save
from reports import failed_checks
from safetensors.torch import load_file, save_file
from trained import grown

from hf_grow import api
from hf_grow.checkpoint.reader import open_folder
from hf_grow.cli import main
from hf_grow.errors import InputError
from hf_grow.verification import Report, verify_checkpoints
from hf_grow.verification.eval_text import builtin_text
from hf_grow.verification.function import _warn_near_uniform
from hf_grow.verification.logit_differences import TokenDifferences, compare_logits


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    save(make(BY_NAME["mixtral"], dtype=torch.bfloat16), folder / "old", sharded=True)
    api.grow(folder / "old", folder / "new", "identity", at="1,3", noise=0.02, max_shard_size=100_000)
    return folder / "old", folder / "new"


@pytest.fixture
def copy(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A pair to damage."""
    for folder in pair:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "old", tmp_path / "new"


def check(old: Path, new: Path, **options: Any) -> Report:
    return verify_checkpoints(open_folder(old), open_folder(new), **options)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_lossless_growth_passes_with_equal_logits(pair: tuple[Path, Path]) -> None:
    report = check(*pair)
    assert failed_checks(report) == set()
    assert {c.name for c in report.checks if c.status == "pass"} >= {"tensors", "SHA-256", "lossless", "logits", "source", "provenance"}
    assert report.metrics["logit_difference_max"] == 0
    assert report.metrics["kl_nats_per_token"] == 0
    assert report.metrics["greedy_agreement"] == 1
    assert report.metrics["perplexity_old"] == report.metrics["perplexity_new"]


def test_structure_only_runs_no_model(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    report = check(*pair, structure_only=True)
    assert failed_checks(report) == set()
    assert report.metrics == {}


@pytest.mark.parametrize("kind", ["copy", "computed"])
def test_one_flipped_bit_is_found(kind: str, copy: tuple[Path, Path]) -> None:
    old, new = copy
    name = {"copy": "model.layers.0.self_attn.q_proj.weight", "computed": "model.layers.2.self_attn.q_proj.weight"}[kind]
    stored = open_folder(new).tensors[name]
    with (new / stored.file).open("r+b") as f:
        f.seek(stored.stop - 7)
        byte = f.read(1)[0]
        f.seek(stored.stop - 7)
        f.write(bytes([byte ^ 1]))
    report = check(old, new, structure_only=True)
    assert failed_checks(report) == {"tensors", "SHA-256"}
    assert name in next(c.detail for c in report.checks if c.name == "tensors")


def test_another_source_is_found(copy: tuple[Path, Path]) -> None:
    old, new = copy
    stored = {k: v for f in old.glob("*.safetensors") for k, v in load_file(f).items()}
    stored["model.layers.3.self_attn.v_proj.weight"][0, 0] += 1
    for f in old.glob("*.safetensors*"):
        f.unlink()
    save_file(stored, old / "model.safetensors", {"format": "pt"})
    assert failed_checks(check(old, new, structure_only=True)) == {"tensors"}
    other = old.parent / "other"
    save(make(BY_NAME["mixtral"], num_hidden_layers=3, dtype=torch.bfloat16), other)
    assert failed_checks(check(other, new, structure_only=True)) == {"source"}


def test_a_config_that_was_changed_is_found(copy: tuple[Path, Path]) -> None:
    old, new = copy
    edit_json(new / "config.json", rms_norm_eps=1e-5)
    assert failed_checks(check(old, new, structure_only=True)) == {"config.json"}
    edit_json(new / "config.json", num_hidden_layers=5)
    assert failed_checks(check(old, new, structure_only=True)) == {"config.json", "names and shapes", "builds"}


def test_a_config_that_transformers_cannot_build_is_found(copy: tuple[Path, Path]) -> None:
    old, new = copy
    edit_json(new / "config.json", hidden_act="no_such_activation")
    assert failed_checks(check(old, new, structure_only=True)) == {"config.json", "builds"}


def test_a_provenance_of_something_else_is_found(copy: tuple[Path, Path]) -> None:
    old, new = copy
    record = json.loads((new / "growth.json").read_text())
    record["target"]["tensors"]["model.norm.weight"][1] = [7]
    (new / "growth.json").write_text(json.dumps(record))
    assert failed_checks(check(old, new, structure_only=True)) == {"provenance"}
    (new / "growth.json").write_text('{"format": 1}')
    assert failed_checks(check(old, new, structure_only=True)) == {"provenance"}
    (new / "growth.json").write_text('{"format": 99}')
    assert failed_checks(check(old, new, structure_only=True)) == {"provenance"}


def test_a_growth_that_claims_to_be_lossless_and_is_not_fails(copy: tuple[Path, Path]) -> None:
    """The map itself is wrong: the tensors follow it, but the function does not hold."""
    old, new = copy
    shutil.rmtree(new)
    api.grow(old, new, "interleave", layers_to=6)
    record = json.loads((new / "growth.json").read_text())
    record["growth"]["guarantee"]["kind"] = "lossless"
    (new / "growth.json").write_text(json.dumps(record))
    assert failed_checks(check(old, new)) == {"lossless"}


def test_without_provenance_nothing_is_promised_and_the_models_are_compared_all_the_same(copy: tuple[Path, Path]) -> None:
    old, new = copy
    (new / "growth.json").unlink()
    report = check(old, new)
    assert failed_checks(report) == set()
    assert {c.name for c in report.checks if c.status == "skip"} == {"provenance", "lossless"}
    assert report.metrics["logit_difference_max"] == 0


def test_a_text_needs_a_tokenizer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("words")
    with pytest.raises(InputError, match="no tokenizer"):
        check(*pair, text=tmp_path / "text")


def test_measures_equal_a_plain_computation_over_tokens_and_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 11, (5,), generator=generator)
    found = compare_logits([ids], [before], [after]).metrics
    kl = loss_old = loss_new = 0.0
    for t in range(5):
        p = [math.exp(x) for x in before[t].tolist()]
        q = [math.exp(x) for x in after[t].tolist()]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        if t < 4:
            loss_old -= math.log(p[ids[t + 1]])
            loss_new -= math.log(q[ids[t + 1]])
    assert found["kl_nats_per_token"] == pytest.approx(kl / 5)
    assert found["perplexity_old"] == pytest.approx(math.exp(loss_old / 4))
    assert found["perplexity_new"] == pytest.approx(math.exp(loss_new / 4))
    assert found["greedy_agreement"] == sum(int(a.argmax() == b.argmax()) for a, b in zip(before, after, strict=True)) / 5
    assert found["logit_difference_max"] == pytest.approx(float((before - after).abs().max()))


def test_two_broken_models_do_not_agree_and_the_report_stays_json() -> None:
    bad = torch.full((4, 7), float("nan"))
    found = compare_logits([torch.arange(4)], [bad], [bad]).metrics
    assert found["greedy_agreement"] == 0
    report = Report("a", "b", metrics=found)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["metrics"]["loss_old"] is None


@pytest.mark.parametrize(
    ("name", "method", "options"), [("mixtral", "experts", {"experts": 8, "top_k": 4}), ("llama", "tile", {"factor": 2})]
)
def test_a_lossless_growth_of_an_fp64_checkpoint_passes(name: str, method: str, options: dict[str, int], tmp_path: Path) -> None:
    """transformers computes parts of an fp64 model in fp32, and its fused experts not at all."""
    source = save(make(BY_NAME[name], dtype=torch.float64), tmp_path / "source")
    api.grow(source, tmp_path / "out", method, **options)
    report = api.verify(source, tmp_path / "out")
    assert report.ok, report.checks
    assert report.metrics["dtype"] == "float64"
    assert report.metrics["logit_difference_max"] < 1e-4


def recorded(new: Path) -> dict[str, Any]:
    return json.loads((new / "growth.json").read_text())["verification"]


def run_verify(old: Path, new: Path, *words: str, status: int = 0) -> None:
    assert main(["verify", str(old), str(new), *words]) == status


def test_a_later_look_at_the_structure_keeps_what_was_measured_on_the_same_weights(copy: tuple[Path, Path]) -> None:
    old, new = copy
    run_verify(old, new)
    before = recorded(new)
    assert before["metrics"]["kl_nats_per_token"] == 0
    run_verify(old, new, "--structure-only")
    after = recorded(new)
    assert after["metrics"] == before["metrics"]
    assert {c["name"]: c for c in after["checks"]} == {c["name"]: c for c in before["checks"]}
    assert after["ok"]


def test_what_was_measured_goes_with_the_weights_or_the_config_it_was_measured_on(copy: tuple[Path, Path]) -> None:
    old, new = copy
    run_verify(old, new)
    config = (new / "config.json").read_text()
    edit_json(new / "config.json", rms_norm_eps=0.5)
    run_verify(old, new, "--structure-only", status=1)
    assert "kl_nats_per_token" not in recorded(new)["metrics"]
    (new / "config.json").write_text(config)
    run_verify(old, new)
    stored = open_folder(new).tensors["model.norm.weight"]
    with (new / stored.file).open("r+b") as f:
        f.seek(stored.start)
        f.write(b"\x00\x3f")
    run_verify(old, new, "--structure-only", status=1)
    assert recorded(new)["metrics"] == {}


def test_a_function_that_failed_stays_failed_until_it_is_measured_again(copy: tuple[Path, Path]) -> None:
    old, new = copy
    run_verify(old, new)
    record = json.loads((new / "growth.json").read_text())
    next(c for c in record["verification"]["checks"] if c["name"] == "lossless")["status"] = "fail"
    record["verification"]["ok"] = False
    (new / "growth.json").write_text(json.dumps(record))
    run_verify(old, new, "--structure-only")
    assert recorded(new)["ok"] is False
    run_verify(old, new)
    assert recorded(new)["ok"] is True


@pytest.mark.parametrize(
    "earlier", [7, {}, {"checks": 3}, {"checks": [{"name": "SHA-256", "status": "pass"}]}, {"checks": [None], "metrics": []}]
)
def test_an_earlier_record_of_any_form_is_replaced(earlier: Any, copy: tuple[Path, Path]) -> None:
    old, new = copy
    edit_json(new / "growth.json", verification=earlier)
    run_verify(old, new, "--structure-only")
    assert recorded(new)["metrics"] == {}
    assert recorded(new)["ok"]


def test_where_fp32_does_not_fit_bf16_is_taken_and_the_report_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(make(BY_NAME["llama"], dtype=torch.bfloat16), tmp_path / "old")
    api.grow(source, tmp_path / "new", "tile", factor=3)
    monkeypatch.setattr("hf_grow.verification.models.available_memory", lambda: 10**6)
    report = api.verify(source, tmp_path / "new")
    assert failed_checks(report) == set()
    assert report.metrics["dtype"] == "bfloat16"
    assert "are free" in report.metrics["dtype_because"]
    assert report.metrics["dtype_because"] in next(c.detail for c in report.checks if c.name == "lossless")
    run_verify(source, tmp_path / "new")
    assert "computed in bfloat16 (float32 needs about 1.0" in " ".join(capsys.readouterr().out.split())


def test_what_has_room_is_compared_in_fp32_whatever_it_is_stored_in(pair: tuple[Path, Path]) -> None:
    report = check(*pair)
    assert report.metrics["dtype"] == "float32"
    assert "dtype_because" not in report.metrics


@pytest.mark.parametrize(("vocab", "old", "new", "said"), [
    (64, 2.0, 13.7, "worse than uniform"), (64, 2.0, 3.75, "hardly better than uniform"), (64, 2.0, 3.73, ""), (1000, 2.0, 3.75, ""),
    (64, 4.2, 4.2, "The source itself"),
])  # fmt: skip
def test_a_growth_no_better_than_uniform_predictions_gives_a_warning(vocab: int, old: float, new: float, said: str) -> None:
    """log 64 = 4.159 nats, of which nine tenths are 3.743."""
    report, none = Report("a", "b"), torch.zeros(1)
    _warn_near_uniform(report, TokenDifferences(none, none, none, True, {"loss_old": old, "loss_new": new}), vocab)
    assert [said in w for w in report.warnings] == ([True] if said else [])
    assert report.metrics["loss_of_guessing"] == pytest.approx(math.log(vocab))
    assert report.ok


def test_the_warning_ends_the_report_and_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model knows nothing of any text; on random tokens nobody would, so nothing is said there."""
    new = grown(tmp_path)
    run_verify(tmp_path / "source", new)
    said = capsys.readouterr().out.strip()
    assert re.search(r"\nwarning +The source\s+itself\s+is\s+hardly\s+better\s+than\s+uniform\s+predictions[^\n]*(\n[^\n]+)?$", said)
    assert recorded(new)["warnings"]
    (tmp_path / "source" / "tokenizer.json").unlink()
    run_verify(tmp_path / "source", new)
    assert "uniform predictions" not in capsys.readouterr().out


def test_fewer_tokens_than_asked_for_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = grown(tmp_path)
    used = check(tmp_path / "source", new, tokens=100_000).metrics["tokens"]
    assert 2 < used < 100_000
    run_verify(tmp_path / "source", new, "--tokens", "100000")
    captured = capsys.readouterr()
    assert f"{used} tokens are compared, not 100000: the built-in text has no more" in " ".join(captured.err.split())
    assert f"{used} of the 100000 tokens asked for, built-in text" in " ".join(captured.out.split())
    run_verify(tmp_path / "source", new, "--tokens", "50")
    assert "50 tokens, built-in text" in " ".join(capsys.readouterr().out.split())


def test_a_vocabulary_too_large_for_all_tokens_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, said = grown(tmp_path), []
    monkeypatch.setattr("hf_grow.verification.function.LOGITS_BYTES", 300 * 4 * 64)
    report = check(tmp_path / "source", new, notify=said.append)
    assert report.metrics["tokens"] == 300
    assert any("300 tokens are compared, not 2048: the logits of a vocabulary of 64" in s for s in said)


def test_the_built_in_text_is_long_enough_and_of_several_kinds() -> None:
    """Large vocabularies take about 4.5 bytes of English a token, and fewer of anything else."""
    text = builtin_text()
    assert len(text.encode()) / 4.5 > 2048
    for part in (
        "def ",
        "#include",
        "SELECT",
        "<ul",
        r"\frac",
        "Assistant:",
        '"name":',
        "| city",
        "Großmutter",
        "pêcheurs",
        "más",
        "Летом",
        "春天",
        "駅前",
        "الصباح",
    ):
        assert part in text, part


def test_two_looks_at_one_pair_give_the_same_figures(tmp_path: Path) -> None:
    source = save(make(BY_NAME["mixtral"], dtype=torch.bfloat16), tmp_path / "old")
    api.grow(source, tmp_path / "new", "experts", experts=8, top_k=4)
    first, second = (api.verify(source, tmp_path / "new") for _ in range(2))
    assert first.ok
    assert first.metrics == second.metrics


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_of_odd_sizes_are_compared_too(dtype: str, tmp_path: Path) -> None:
    """torch multiplies experts in groups only where rows are multiples of 16 bytes."""
    source = save(make(BY_NAME["mixtral"], dtype=torch.bfloat16), tmp_path / "old")
    api.grow(source, tmp_path / "new", "pad", intermediate=50)
    assert api.verify(source, tmp_path / "new", dtype=dtype).ok
