"""From a training to what is published: what verify proves of a trained model, what its record holds, what its card says, and that it repeats."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cards import flat
from models import BY_NAME, make, save
from safetensors.torch import load_file
from trained import grown, recipe, run, tokenizer

from hf_grow import api
from hf_grow.checkpoint.provenance import recorded_files, training_stages, training_totals
from hf_grow.checkpoint.reader import open_folder
from hf_grow.cli import main
from hf_grow.publish.card import CardOptions, make_card, render_card
from hf_grow.publish.manifest import make_manifest
from hf_grow.verification import Report

TOKEN = "hf_" + "aSecret" * 5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source/, grown/ (verified) and out/: only new blocks were trained, with a penalty and old text mixed in."""
    folder = tmp_path_factory.mktemp("work")
    model = grown(folder)
    assert main(["verify", str(folder / "source"), str(model), "--json"]) == 0
    path = recipe(folder, model, train="new_layers", regularizer={"kind": "l2sp", "lambda": 3}, max_steps=4, hub_token=TOKEN,
                  data={"replay": {"path": str(folder / "old.jsonl"), "share": 0.25}})  # fmt: skip
    assert main(["train", str(path), "--json"]) == 0
    return folder


@pytest.fixture
def pair(work: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The source, and a copy of the trained model to damage."""
    shutil.copytree(work / "out", tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    return work / "source", tmp_path / "out"


def statuses(report: Report) -> dict[str, str]:
    return {c.name.split(" in transformers")[0]: c.status for c in report.checks}


def failed(report: Report) -> set[str]:
    return {name for name, status in statuses(report).items() if status == "fail"}


def detail(report: Report, name: str) -> str:
    return next(c.detail for c in report.checks if c.name == name)


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "growth.json").read_text())
    return found


def rewrite(folder: Path, record: dict[str, Any]) -> None:
    (folder / "growth.json").write_text(json.dumps(record))


def equal_tensors(a: Path, b: Path) -> int:
    """How many tensors of two folders hold the same numbers."""
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    return sum(torch.equal(one[n].double(), other[n].double()) for n in one)


# ---- verify -------------------------------------------------------------------------------------------------------------------------------


def test_what_can_be_proved_of_a_trained_model_is_and_nothing_is_promised(work: Path) -> None:
    report = api.verify(work / "source", work / "out")
    assert report.ok
    assert statuses(report) == {
        "names and shapes": "pass", "config.json": "pass", "provenance": "pass", "source": "pass", "tensors": "skip", "SHA-256": "pass",
        "builds": "pass", "logits": "pass", "lossless": "skip",
    }  # fmt: skip
    assert detail(report, "provenance").endswith("lossless; then trained for 4 steps (128 tokens)")
    assert detail(report, "lossless") == "not claimed: trained for 4 steps (128 tokens) since the growth"
    before = api.verify(work / "source", work / "grown").metrics
    assert report.metrics["loss_old"] == before["loss_old"] == before["loss_new"]
    assert report.metrics["loss_new"] != before["loss_new"]
    assert report.metrics["kl_nats_per_token"] > 0


def test_tensors_that_did_not_train_are_counted(work: Path) -> None:
    same = equal_tensors(work / "grown", work / "out")
    assert 0 < same < 39
    assert f"; {same} of 39 are unchanged" in detail(api.verify(work / "source", work / "out", structure_only=True), "tensors")


def test_a_training_may_have_a_dtype_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights in bf16, trained in fp32 with noise in the growth: what did not train is the map's value, rounded to bf16."""
    save(make(BY_NAME["llama"], dtype=torch.bfloat16, num_hidden_layers=2), tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    api.grow(tmp_path / "source", tmp_path / "grown", "interleave", layers_to=3, noise=0.02)
    run(capsys, "train", recipe(tmp_path, tmp_path / "grown", train="new_layers", save_dtype="float32", max_steps=1))
    assert {t.dtype for t in open_folder(tmp_path / "out").tensors.values()} == {"F32"}
    report = api.verify(tmp_path / "source", tmp_path / "out", structure_only=True)
    assert report.ok
    same = equal_tensors(tmp_path / "grown", tmp_path / "out")
    assert 0 < same < len(open_folder(tmp_path / "out").tensors)
    assert f"; {same} of " in detail(report, "tensors")


def test_weights_that_changed_after_the_training_are_found(pair: tuple[Path, Path]) -> None:
    old, new = pair
    with (new / "model.safetensors").open("r+b") as f:
        f.seek(-3, 2)
        byte = f.read(1)[0]
        f.seek(-3, 2)
        f.write(bytes([byte ^ 1]))
    assert failed(api.verify(old, new, structure_only=True)) == {"SHA-256"}


def test_a_training_that_recorded_no_files_leaves_their_digests_open(pair: tuple[Path, Path]) -> None:
    old, new = pair
    record = record_of(new)
    del record["training"]["files"]
    rewrite(new, record)
    report = api.verify(old, new, structure_only=True)
    assert report.ok
    assert statuses(report)["SHA-256"] == "skip"


@pytest.mark.parametrize("section", [None, {}, {"steps": 0}, {"steps": "4"}, {"steps": True}, {"adapter": 3}, [], "trained"], ids=str)
def test_weights_that_differ_without_a_training_fail(section: Any, pair: tuple[Path, Path]) -> None:
    old, new = pair
    record = record_of(new)
    del record["training"]
    record["target"]["files"] = recorded_files(record_of(new))
    rewrite(new, record if section is None else record | {"training": section})
    report = api.verify(old, new)
    assert failed(report) == {"tensors"}
    assert statuses(report)["function"] == "skip"


def test_only_what_a_trainer_writes_may_change_in_the_config(pair: tuple[Path, Path]) -> None:
    old, new = pair
    config = json.loads((new / "config.json").read_text())
    assert config["use_cache"] == json.loads((old / "config.json").read_text())["use_cache"]  # Trainer turns it off
    (new / "config.json").write_text(json.dumps(config | {"use_cache": False, "pad_token_id": 2, "transformers_version": "9"}))
    assert api.verify(old, new, structure_only=True).ok
    for change in (
        {"rms_norm_eps": 1e-5},
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"hidden_act": "gelu"},
    ):
        (new / "config.json").write_text(json.dumps(config | change))
        report = api.verify(old, new, structure_only=True)
        assert failed(report) == {"config.json"}, change
        assert next(iter(change)) in detail(report, "config.json") or "rope_parameters" in detail(report, "config.json")


def test_another_source_is_found(work: Path, tmp_path: Path) -> None:
    other = save(make(BY_NAME["llama"], num_hidden_layers=3), tmp_path / "other")
    assert failed(api.verify(other, work / "out")) == {"source"}


def test_the_command_records_the_result_of_a_trained_model(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = pair
    found = run(capsys, "verify", old, new)
    assert record_of(new)["verification"] == found
    assert record_of(new)["training"]["verification_before"]["ok"]


# ---- the record ---------------------------------------------------------------------------------------------------------------------------


def test_the_record_of_a_training(work: Path) -> None:
    record = record_of(work / "out")
    section = record["training"]
    weights = (work / "out" / "model.safetensors").read_bytes()
    assert section["files"] == {"model.safetensors": {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}}
    assert (section["steps"], section["tokens"]) == (4, 128)
    assert section["verification_before"] == record_of(work / "grown")["verification"]
    assert {"verification", "files"} & {*record, *record["target"]} == set()
    assert {(p["use"], p["share"]) for p in section["data"]} == {("train", 0.75), ("replay", 0.25), ("eval old", None), ("eval new", None)}
    for name in ("growth.json", "training.json"):
        assert TOKEN not in (work / "out" / name).read_text()
    assert section["recipe"]["learning_rate"] == 1e-2
    told = (Path(__file__).parents[2] / "docs" / "growth-json.md").read_text()
    assert not [k for k in (*section, *section["data"][0]) if f"`{k}`" not in told]


def test_a_checkpoint_of_the_training_is_a_trained_model_too(work: Path) -> None:
    report = api.verify(work / "source", work / "out" / "checkpoint-3")
    assert report.ok
    assert {name for name, status in statuses(report).items() if status == "skip"} == {"tensors", "SHA-256", "lossless"}
    assert "trained for 3 steps (96 tokens)" in detail(report, "provenance")


def test_a_push_leaves_the_diary_of_the_training_here(work: Path) -> None:
    manifest = make_manifest(work / "out")
    assert {"training.json", "events.jsonl", "checkpoint-3/"} <= set(manifest.left_out)
    assert set(manifest.files) == {
        "config.json",
        "generation_config.json",
        "growth.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [d for d in manifest.warnings if "under training" in d] == [
        f"growth.json will show your path {work / 'cache'} and 4 more, under training; edit them there to change that."
    ]


def test_trainings_and_growths_in_turn(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = recipe(work, work / "out", output=str(tmp_path / "again"), max_steps=2)
    run(capsys, "train", again)
    record = record_of(tmp_path / "again")
    assert [s["steps"] for s in training_stages(record)] == [4, 2]
    assert training_totals(training_stages(record)) == {"steps": 6, "tokens": 192, "adapters": 0}
    assert api.verify(work / "source", tmp_path / "again", structure_only=True).ok
    seen = run(capsys, "inspect", tmp_path / "again")
    assert seen["training"]["steps"] == 6
    assert seen["lineage"]["step"] == "identity, layers 2 -> 4, lossless; then trained for 6 steps (192 tokens)"
    assert main(["inspect", str(tmp_path / "again")]) == 0
    expected_text = capsys.readouterr().out
    assert "since then" in expected_text
    assert re.sub(r"[\s│]+", " ", expected_text).count("trained for 6 steps (192 tokens)") == 2  # not cut off in the tree either
    card = render_card(tmp_path / "again")
    assert "**Trained further after it was grown: 192 tokens in 6 steps of 2 trainings.**" in card
    assert re.findall(r"^hf-grow train .*$", card, re.MULTILINE) == [
        "hf-grow train train-1.yaml -o out",
        "hf-grow train train-2.yaml -o again",
    ]
    assert card.index("**1 of 2**: 128 tokens in 4 steps.") < card.index("**2 of 2**: 64 tokens in 2 steps.")
    # Grown once more, the trainings are history.
    api.grow(tmp_path / "again", tmp_path / "larger", "stack")
    assert training_stages(record_of(tmp_path / "larger")) == ()
    tree = run(capsys, "inspect", tmp_path / "larger")["lineage"]
    assert "trained" not in tree["step"]
    assert tree["sources"][0]["step"].endswith("; then trained for 6 steps (192 tokens)")
    assert "then trained for 6 steps" in render_card(tmp_path / "larger")
    assert "This card describes the weights as they were grown" in render_card(tmp_path / "larger")


# ---- the card -----------------------------------------------------------------------------------------------------------------------------


def test_the_card_of_a_trained_model(work: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = pair
    text = render_card(new)
    assert "**The trained model was not verified.**" in text
    assert "It has not been compared with its source." in text
    found = run(capsys, "verify", old, new)["metrics"]
    text = render_card(new, CardOptions(name="me/Trained"))
    losses = record_of(new)["training"]["losses"]
    top = text.split("---\n", 2)[2].split("\n\n")[1]
    assert top.startswith("> **Trained further after it was grown: 128 tokens in 4 steps.**")
    assert f"{losses['start']['new']:.4g} to {losses['end']['new']:.4g} on `new`" in top
    assert f"its perplexity is {found['perplexity_new']:.4g}, that of the source {found['perplexity_old']:.4g}" in top
    assert ("there it is still behind its source" in top) == (found["perplexity_new"] > found["perplexity_old"])
    rise = losses["end"]["old"] - losses["start"]["old"]
    assert (
        f"| old (old text: the last column is what was forgotten) | {losses['start']['old']:.4f} | {losses['end']['old']:.4f} | {rise:+.4f} |"
        in text
    )
    assert "| old text, mixed in | `./old.jsonl` | 25.0% |" in text
    assert "| regularizer | l2sp, lambda 3 |" in text
    assert "| trained parameters | new\\_layers |" in text
    for wrong in ("of no training after that", "Not ready for use", "A start for training", "add nothing yet", str(work)):
        assert wrong not in text
    for expected_text in ("the weights after that training, whose SHA-256", "not for the trained ones", "| tensors | ok | 39 recomputed from the source",
                 "KL(source || trained)"):  # fmt: skip
        assert expected_text in text


@pytest.mark.parametrize(
    ("losses", "method", "expected_text"),
    [
        ({"start": {"new": 4.0, "old": 4.25}, "end": {"new": 3.0, "old": 4.0}, "source": {"old": 3.25}}, "dus",
         "4.25 to 4 (source 3.25) on `old`. So it forgot 0.75 nats per token of old text that its source knew. Growing changed"),
        ({"start": {"old": 3.0}, "end": {"old": 2.5}, "source": {"old": 2.75}}, "dus", "it forgot nothing, compared with its source"),
        ({"start": {"new": 4.0, "old": 4.25}, "end": {"new": 3.0, "old": 4.0}}, "dus",
         "On old text its loss fell by 0.25 nats per token since the grown model's start, which growing had already changed: what it forgot of its source was not measured."),
        ({"start": {"old": 3.0}, "end": {"old": 3.25}}, "identity", "So it forgot 0.25 nats per token of old text. It began as the same"),
        ({"start": {"new": 4.0}, "end": {"new": 3.0}}, "identity", "No old text was measured, so what it forgot is unknown. It began as the same"),
        ({"start": {}, "end": {}}, "identity", "No loss was measured, so"),
        ({"start": {"old": None}, "end": 3}, "identity", "No loss was measured, so"),
    ],
)  # fmt: skip
def test_the_first_lines_say_what_is_known(losses: Any, method: str, expected_text: str, tmp_path: Path) -> None:
    import cards

    folder = cards.folder_of(cards.plan_of(method), tmp_path / "big")
    rewrite(folder, record_of(folder) | {"training": {"steps": 7, "losses": losses, "recipe": {}}})
    text = flat(make_card(folder, CardOptions(offline=True)).text)
    assert expected_text in text
    assert "whose SHA-256" not in text  # none were recorded
    assert "or its recipe is not recorded" in text


def test_the_commands_in_the_card_make_the_trained_model_again(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = render_card(work / "out", CardOptions(name="me/Again")).split("## Reproduce")[1]
    commands = [shlex.split(c) for c in re.findall(r"^hf-grow .*$", card, re.MULTILINE)]
    assert [c[1] for c in commands] == ["depth", "train"]
    (written,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert "hub_token" not in written
    assert yaml.safe_load(written)["model"] == f"./{commands[0][-1]}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_text(written)
    for name in ("new.jsonl", "old.jsonl"):
        shutil.copy(work / name, tmp_path)
    shutil.copytree(work / "source", tmp_path / "source")
    for words in commands:
        assert main(words[1:]) == 0
    first, second = (load_file(p / "model.safetensors") for p in (work / "out", tmp_path / "Again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_files_of_other_commands_that_a_recipe_reads_are_named(tmp_path: Path) -> None:
    import cards

    folder = cards.folder_of(cards.plan_of("identity"), tmp_path / "big")
    recipe = {"regularizer": {"kind": "ewc", "fisher": "/home/me/old.fisher"}, "data": {"replay": {"path": ["/home/me/replay", "org/web"]}}}
    rewrite(folder, record_of(folder) | {"training": {"steps": 7, "losses": {}, "recipe": recipe}})
    text = flat(make_card(folder, CardOptions(offline=True)).text)
    assert "The recipe reads `./old.fisher`, written by `hf-grow fisher`. `growth.json` does not record that command" in text
    assert "Its old text is `./replay`, `org/web`. If `hf-grow replay` sampled it, `growth.json` does not record that command" in text
    assert "/home" not in text
    sampled = {"data": {"train": "new.jsonl", "replay": {"self": {}}}}  # by the training itself: the recipe says it all
    rewrite(folder, record_of(folder) | {"training": {"steps": 7, "losses": {}, "recipe": sampled}})
    assert "does not record that command" not in make_card(folder, CardOptions(offline=True)).text


def test_an_adapter_that_was_merged_is_told(tmp_path: Path) -> None:
    import cards

    folder = cards.folder_of(cards.plan_of("layers"), tmp_path / "big")
    adapter = {"adapter": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}, "merged_into": "/home/somebody/small"}
    rewrite(folder, record_of(folder) | {"training": adapter})
    text = make_card(folder, CardOptions(offline=True)).text
    assert "**An adapter was merged into it after it was grown.**" in text
    assert "| adapter | r 8, lora\\_alpha 16 |" in text
    assert "cannot be repeated" in text
    assert "/home" not in text
