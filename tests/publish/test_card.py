"""The model card: what it says of each kind of growth, what it inherits, and what it must never let through."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import cards
import hub_server
import jinja2
import pytest
import yaml
from cards import flat
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt
from models import BY_NAME, make, save

from hf_grow import api
from hf_grow.cli import main
from hf_grow.errors import InputError, OutputError, SourceError
from hf_grow.growth.growth import compose
from hf_grow.growth.plan import GrowthPlan, make_plan
from hf_grow.growth.source_info import SourceInfo
from hf_grow.methods import METHODS
from hf_grow.publish import licenses
from hf_grow.publish.card import FUNCTIONS, CardOptions, make_card, render_card, template, write_card
from hf_grow.publish.facts import card_facts
from hf_grow.publish.inherited import Inherited
from hf_grow.publish.source_card import parse_card

hub = hub_server.hub
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# tiny\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache with the cards of the examples, no token, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    cards.cached_sources(tmp_path / "cache")
    return tmp_path / "cache"


def cached(cache: Path, ref: str, text: str) -> None:
    snapshot = cache / f"models--{ref.replace('/', '--')}" / "snapshots" / cards.COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "README.md").write_text(text)


def grown(tmp_path: Path, method: str = "dus", **changes: Any) -> Path:
    """A grown folder; changes go into growth.json: {"source.ref": ...}."""
    folder = cards.folder_of(cards.plan_of(method), tmp_path / f"grown-{method}", changes.pop("verification", None))
    record = json.loads((folder / "growth.json").read_text())
    for path, value in changes.items():
        *parts, last = path.split("__")
        at = record
        for part in parts:
            at = at[part]
        at[last] = value
    (folder / "growth.json").write_text(json.dumps(record))
    return folder


# Examples


def test_every_method_has_an_example() -> None:
    assert set(cards.EXAMPLES) == set(METHODS)
    assert {p.name for p in cards.ROOT.iterdir() if p.is_dir()} == set(cards.KEPT)


@pytest.mark.parametrize("name", cards.KEPT)
def test_the_kept_examples_are_what_the_code_renders(name: str, tmp_path: Path) -> None:
    rendered = cards.render(name, tmp_path)
    assert rendered == {p.name: p.read_text() for p in (cards.ROOT / name).iterdir()}, "see model_cards/README.md"


SECTIONS = ["What was done", "Guarantee and verification", "Continue training", "Reproduce", "License", "Limits"]


@pytest.mark.parametrize("name", cards.NAMES)
def test_the_card_of_every_method_is_whole(name: str, tmp_path: Path) -> None:
    rendered = cards.render(name, tmp_path)
    text = rendered["README.md"]
    expected = [*SECTIONS[:1], "Training after it was grown", *SECTIONS[1:]] if name == cards.TRAINED else SECTIONS
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == expected
    method = "identity" if name == cards.TRAINED else name
    assert f"by `{method}`" in flat(text)
    assert f"Guarantee: **{cards.plan_of(method).guarantee.kind}**" in text
    assert ModelCard(text).data.tags[:3] == ["hf-grow", "model-growth", method]
    for leftover in ("{{", "}}", "{%", "None", "\n\n\n", "Undefined"):
        assert leftover not in text
    assert rendered["layer-map.svg"].startswith("<svg")


@pytest.mark.parametrize("method", METHODS)
def test_the_command_in_the_card_makes_the_model_again(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = cards.EXAMPLES[method]
    source = save(make(BY_NAME[example.case]), tmp_path / "small model")
    api.grow(source, tmp_path / "grown", method, **example.options)
    card = render_card(tmp_path / "grown")
    (command,) = re.findall(r"^hf-grow .*$", card.split("## Reproduce")[1], re.MULTILINE)
    words = shlex.split(command)
    assert str(tmp_path) not in card
    assert words[-1] == "grown"
    monkeypatch.chdir(tmp_path)
    assert main([*words[1:-1], "again"]) == 0
    first, second = (json.loads((tmp_path / n / "growth.json").read_text()) for n in ("grown", "again"))
    assert second["growth"] == first["growth"]
    assert second["target"] == first["target"]  # with the SHA-256 of the weights


def test_several_steps_become_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(make(BY_NAME["llama"]), tmp_path / "small")
    steps = [{"method": "tile", "factor": 2}, {"method": "identity", "layers_to": 6}]
    (tmp_path / "steps.yaml").write_text(yaml.safe_dump({"source": str(source), "steps": steps, "output": str(tmp_path / "grown")}))
    assert main(["grow", str(tmp_path / "steps.yaml")]) == 0
    card = render_card(tmp_path / "grown")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert "hf-grow grow recipe.yaml -o grown" in card
    assert str(tmp_path) not in card
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main(["grow", "recipe.yaml", "-o", "again"]) == 0
    first, second = (json.loads((tmp_path / n / "growth.json").read_text()) for n in ("grown", "again"))
    assert second["target"] == first["target"]


def test_a_growth_of_unknown_method_claims_no_command(tmp_path: Path) -> None:
    card = render_card(grown(tmp_path, growth__method="of-tomorrow"))
    assert "No command makes this growth" in card
    assert "hf-grow depth" not in card


# Metadata


def test_the_metadata_are_read_back_by_huggingface_hub(tmp_path: Path, cache: Path) -> None:
    cached(cache, "example-org/tiny-mistral", "---\nlicense: apache-2.0\nlanguage: [en, no]\ndatasets: c4\n---\n")
    folder = grown(tmp_path, "experts")
    write_card(folder, make_card(folder))
    wanted = {
        "base_model": "example-org/tiny-mistral",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["en", "no"],  # Norwegian, which YAML 1.1 takes for false
        "datasets": ["c4"],
        "tags": ["hf-grow", "model-growth", "experts", "moe"],
    }
    assert metadata_load(folder / "README.md") == wanted
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == wanted
    assert card.text.lstrip().startswith("# grown-experts")


def test_evaluations_stand_in_the_text_and_in_the_model_index(tmp_path: Path) -> None:
    scores = {
        "acc": [0.5, 0.25],
        "acc_stderr": [0.0625, 0.03125],
        "acc_norm": [None, 0.375],
        "em,strict": [1, 0],
        "em_stderr,strict": [0.5, None],
    }
    settings = {"harness": "lm-eval 0.4.9", "dtype": "float32", "limit": 20, "tasks": {"arc_easy": {"shots": 5}}}
    tasks = {"arc_easy": scores, "bad": {"x": [1], "y": "0.5"}, "worse": 3}
    verification = {"ok": True, "checks": [], "metrics": {"tasks": tasks, "task_settings": settings}}
    folder = grown(tmp_path, verification=verification)
    card = make_card(folder, CardOptions(name="org/Grown"))
    table = [
        "| arc\\_easy | acc | 5 | 0.5 ± 0.062 | 0.25 ± 0.031 |",
        "| arc\\_easy | acc\\_norm | 5 | - | 0.375 |",
        "| arc\\_easy | em,strict | 5 | 1 ± 0.5 | 0 |",
    ]
    assert "\n".join(table) in card.text
    assert "(lm-eval 0.4.9, computed in float32, **only the first 20 examples of each task**)" in card.text
    found = ModelCard(card.text).data.eval_results or []
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in found] == [
        ("arc_easy", "acc", 0.25), ("arc_easy", "acc_norm", 0.375), ("arc_easy", "em,strict", 0.0),
    ]  # fmt: skip
    assert card.metadata["model-index"][0]["name"] == "org/Grown"


def others(tmp_path: Path, **refs: tuple[str, str]) -> Path:
    """A growth with further sources."""
    plan = cards.plan_of("dus")
    s = plan.source
    more = {label: SourceInfo(ref, revision, s.config, s.tensors) for label, (ref, revision) in refs.items()}
    info = SourceInfo(s.ref, s.revision, s.config, s.tensors, {}, (), more)
    return cards.folder_of(GrowthPlan(info, plan.growth, plan.targets), tmp_path / "mix")


def test_several_sources_are_a_merge_of_all_of_them(tmp_path: Path, cache: Path) -> None:
    cached(cache, "org/coder", "---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n")
    card = make_card(others(tmp_path, code=("org/coder", cards.COMMIT), local=("/home/somebody/private/maths", "")))
    assert card.metadata["base_model"] == ["example-org/tiny-mistral", "org/coder"]
    assert card.metadata["base_model_relation"] == "merge"
    assert card.metadata["language"] == ["en", "de"]
    assert "license" not in card.metadata  # of the local one it is unknown
    assert "maths" in card.text
    assert "/home" not in card.text
    assert "|-- code: org/coder (0123456789ab)" in card.text
    assert "The further sources must be at the commits named above." in card.text
    own = sum(t.nbytes for t in cards.plan_of("dus").source.tensors.values())
    assert f"| weights on disk | {own / 1e6:.2f} MB |" in card.text
    assert f"| weights of 2 further sources | {2 * own / 1e6:.2f} MB |" in card.text
    assert "with 2 more checkpoints" in card.files["layer-map.svg"]


def test_sources_of_different_licenses_give_none(tmp_path: Path, cache: Path) -> None:
    cached(cache, "org/coder", "---\nlicense: mit\n---\n")
    card = make_card(others(tmp_path, code=("org/coder", cards.COMMIT)))
    assert "license" not in card.metadata
    assert "different licenses (example-org/tiny-mistral: apache-2.0; org/coder: mit)" in card.text
    assert any("--license" in note for note in card.notes)
    assert make_card(others(tmp_path, code=("org/coder", cards.COMMIT)), CardOptions(license="mit")).metadata["license"] == "mit"


# Licenses


def test_the_license_is_that_of_the_recorded_commit(tmp_path: Path, hub: hub_server.HubServer) -> None:
    source = save(make(BY_NAME["mistral"]), tmp_path / "repo")
    (source / "README.md").write_text(CARD)
    hub.add("org/tiny", source)
    api.grow("org/tiny", tmp_path / "grown", "dus")
    (source / "README.md").write_text(CARD.replace("apache-2.0", "mit"))
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "README.md").write_text(CARD.replace("apache-2.0", "mit"))
    hub.repos["org/tiny"].commits = {sha: dict(files) for sha, files in hub.repos["org/tiny"].commits.items()}
    first = hub.repos["org/tiny"].refs["main"]
    hub.repos["org/tiny"].commits[first]["README.md"] = hub_server.Blob(CARD.encode(), False)
    hub.add("org/tiny", fresh)
    card = make_card(tmp_path / "grown")
    assert card.metadata["license"] == "apache-2.0"
    assert card.metadata["base_model"] == "org/tiny"
    assert "as on the card of org/tiny" in card.text
    asked = len(hub.log)
    assert make_card(tmp_path / "grown", CardOptions(offline=True)).metadata == card.metadata  # now from the cache
    assert len(hub.log) == asked


def test_an_unreachable_hub_leaves_the_license_out(tmp_path: Path, hub: hub_server.HubServer) -> None:
    hub.faults.append(hub_server.Fault(path="/api/models/org/gone", status=500))
    folder = grown(tmp_path, source__ref="org/gone")
    card = make_card(folder)
    assert "license" not in card.metadata
    assert "unknown: ask the owner of the source" in flat(card.text.replace("Unknown", "unknown"))
    assert any("answered with status 500" in note for note in card.notes)


def test_offline_says_that_the_hub_was_not_asked(tmp_path: Path) -> None:
    card = make_card(grown(tmp_path, source__ref="org/unseen"), CardOptions(offline=True))
    assert "license" not in card.metadata
    assert any("not in the cache, and the Hub was not queried (--offline)" in note for note in card.notes)
    assert card.metadata["base_model"] == "org/unseen"


def local(tmp_path: Path, text: str = CARD) -> tuple[Path, Path]:
    source = save(make(BY_NAME["mistral"]), tmp_path / "small")
    (source / "README.md").write_text(text)
    api.grow(source, tmp_path / "big", "dus")
    return source, tmp_path / "big"


def test_a_local_source_gives_its_license_while_it_is_the_source(tmp_path: Path) -> None:
    source, folder = local(tmp_path)
    card = make_card(folder)
    assert card.metadata["license"] == "apache-2.0"
    assert "base_model" not in card.metadata
    assert any("--base-model" in note for note in card.notes)
    assert make_card(folder, CardOptions(base_model="org/tiny")).metadata["base_model"] == "org/tiny"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert any("now holds another model" in note for note in make_card(folder).notes)
    for path in source.iterdir():
        path.unlink()
    source.rmdir()
    card = make_card(folder)
    assert "license" not in card.metadata
    assert any("no longer exists" in note for note in card.notes)


def test_a_chain_of_local_growths_reaches_the_hub(tmp_path: Path) -> None:
    """The license and the base model of the nearest ancestor that is on the Hub."""
    step = {"source": {"ref": "example-org/Llama-tiny", "revision": cards.COMMIT}, "method": "tile", "options": {}, "layers": [4, 4],
            "guarantee": {"kind": "lossless", "because": ""}}  # fmt: skip
    folder = grown(tmp_path, source__ref="./between", source__revision="", source__history=[step])
    card = make_card(folder)
    assert card.metadata["base_model"] == "example-org/Llama-tiny"
    assert card.metadata["license"] == "llama3.1"
    assert "as on the card of example-org/Llama-tiny" in card.text
    assert "`-- between, grown by tile, layers 4 -> 4, lossless\n    `-- example-org/Llama-tiny (0123456789ab)" in card.text


def test_a_license_of_the_publishers_own_is_told_from_that_of_the_source(tmp_path: Path) -> None:
    card = make_card(grown(tmp_path), CardOptions(license="mit"))
    assert card.metadata["license"] == "mit"
    assert "as the publisher says; the card of the source says apache-2.0" in card.text
    assert any("not what the card of the source says" in note for note in card.notes)


def test_another_name_and_link_come_along(tmp_path: Path, cache: Path) -> None:
    front = "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n"
    cached(cache, "example-org/tiny-mistral", front)
    card = make_card(grown(tmp_path))
    link = f"https://huggingface.co/example-org/tiny-mistral/blob/{cards.COMMIT}/LICENSE"
    assert {k: card.metadata[k] for k in ("license", "license_name", "license_link")} == {
        "license": "other", "license_name": "qwen-research", "license_link": link,
    }  # fmt: skip
    assert f"[Qwen RESEARCH LICENSE AGREEMENT]({link})" in card.text
    assert "**Built with Qwen**" in card.text
    assert card.files["NOTICE"].startswith("Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, Copyright (c) Alibaba Cloud.")


@pytest.mark.parametrize(
    ("license", "words", "start"),
    [
        ("llama3", "Built with Meta Llama 3", "Llama 3"),
        ("llama3.1", "Built with Llama", "Llama"),
        ("llama3.3", "Built with Llama", "Llama"),
    ],
)
def test_the_naming_duty_of_llama(license: str, words: str, start: str, tmp_path: Path, cache: Path) -> None:
    cached(cache, "example-org/tiny-mistral", f"---\nlicense: {license}\n---\n")
    folder = grown(tmp_path)
    card = make_card(folder)
    body = card.text.split("---\n", 2)[2]
    assert body.split("\n\n")[1] == f"**{words}**"  # right below the title
    assert f'does not begin with "{start}" yet' in body
    assert any(f'begin with "{start}"' in note for note in card.notes)
    assert any("no LICENSE file" in note for note in card.notes)
    assert "All Rights Reserved." in card.files["NOTICE"]
    write_card(folder, card)
    assert (folder / "NOTICE").read_text() == card.files["NOTICE"]
    (folder / "LICENSE.txt").touch()
    named = make_card(folder, CardOptions(name="org/Llama-3-Grown"))
    assert named.notes == ()
    assert "NOTICE" not in named.files  # it is there now, and stays as it is
    assert "does not begin" not in named.text


def test_what_begins_as_the_license_wants() -> None:
    llama3 = licenses.LICENSES["llama3"]
    fits = {n: licenses.name_fits(llama3, n) for n in ("org/Llama-3-X", "llama3-x", "Llama 3", "Llama-2-x", "My-Llama-3", "Llama")}
    assert [n for n, good in fits.items() if good] == ["org/Llama-3-X", "llama3-x", "Llama 3"]
    assert not licenses.LICENSES["llama2"].name_start
    assert licenses.find("other", "Qwen") is licenses.LICENSES["qwen"]
    assert licenses.find("other", "my own") is None


# What the card says first


def test_a_growth_that_changes_the_function_is_told_at_the_top(tmp_path: Path) -> None:
    text = render_card(grown(tmp_path, "dus")).split("---\n", 2)[2]
    assert text.split("\n\n")[1].startswith("> **Not ready for use: continue pretraining first.**")
    text = render_card(grown(tmp_path, "identity")).split("---\n", 2)[2]
    assert "Not ready for use" not in text
    assert "> **A start for training.** As it stands, this model computes the same function as its source" in text


@pytest.mark.parametrize(
    ("verification", "expected_text"),
    [
        (None, "**Not verified.**"),
        ("yes", "**Failed.**"),
        ({"ok": True, "checks": [], "metrics": {}}, "**Verified in structure only:** no model was run."),
        ({"ok": True, "metrics": {"kl_nats_per_token": 0.5}}, "**Verified.**"),
        ({"ok": 1, "metrics": {"kl_nats_per_token": 0.5}}, "**Failed.**"),
        ({"ok": True, "checks": 3, "metrics": []}, "**Verified in structure only:**"),
        ({"ok": True, "warnings": ["worse than *guessing*"]}, r"- **Warning:** worse than \*guessing\*"),
        ({"ok": True, "warnings": {"a": 1}}, "**Verified in structure only:**"),
    ],
)
def test_the_state_of_the_verification(verification: Any, expected_text: str, tmp_path: Path) -> None:
    if verification == "yes":
        verification = {"ok": False, "checks": [{"name": "tensors", "status": "fail", "detail": "3 of 9 differ"}]}
        assert "| tensors | **failed** | 3 of 9 differ |" in render_card(grown(tmp_path, verification=verification))
    text = render_card(grown(tmp_path, verification=verification))
    assert expected_text in text
    assert ("The verification of this checkpoint failed" in text) == ("Failed" in expected_text)


def test_what_routers_do_stands_in_a_table(tmp_path: Path) -> None:
    """By the figures that `verify` measures (tests/verification/test_routing.py holds them against plain computations)."""
    source = save(make(BY_NAME["mixtral"], num_hidden_layers=2), tmp_path / "small")
    api.grow(source, tmp_path / "big", "identity", layers_to=3)
    report = api.verify(source, tmp_path / "big")
    record = json.loads((tmp_path / "big" / "growth.json").read_text())
    (tmp_path / "big" / "growth.json").write_text(json.dumps(record | {"verification": report.to_json()}))
    text = render_card(tmp_path / "big")
    experts = report.metrics["experts"]
    old, new = experts["old"], experts["new"]
    for row in (
        f"| router entropy, nats | {old['entropy']:.3g} | {new['entropy']:.3g} |",
        f"| most loaded expert, share of its layer | {old['most_loaded']['share']:.1%} | {new['most_loaded']['share']:.1%} |",
        f"| coefficient of variation of the load | {old['load_variation']:.2f} | {new['load_variation']:.2f} |",
        f"| dead experts, all layers | {len(old['dead'])} | {len(new['dead'])} |",
    ):
        assert row in text
    assert experts["agreement"]["inherited"] == 1
    assert f"{experts['agreement']['mean']:.1%} of the experts that the grown model selects for a token descend from one" in text
    assert "Routers on the same text" not in render_card(grown(tmp_path, "experts"))


def test_a_path_in_the_verification_stays_here(tmp_path: Path) -> None:
    source, folder = local(tmp_path)
    text = tmp_path / "secret-place" / "text.txt"
    text.parent.mkdir()
    report = api.verify(source, folder, structure_only=True).to_json()
    report["metrics"] = {"kl_nats_per_token": 0.5, "text": str(text), "tokens": 3, "dtype": "float32", "perplexity_old": 2.0}
    record = json.loads((folder / "growth.json").read_text())
    (folder / "growth.json").write_text(json.dumps(record | {"verification": report}))
    card = make_card(folder)
    assert "text.txt" in card.text
    assert str(tmp_path) not in "".join([card.text, *card.files.values()])
    assert "secret-place" not in card.text


# Hostile content

BOMB = "a: &a {x: 1}\n" + "\n".join(f"b{i}: &b{i} {{<<: [*{p}, *{p}]}}" for i, p in enumerate(["a", *(f"b{n}" for n in range(40))]))


@pytest.mark.parametrize(
    "text",
    [
        "", "# no metadata", "---\nlicense: mit\n", "---\n- mit\n---\n", "---\nlicense: [mit\n---\n", "---\n\t: :\n---\n", "---\n" + "[" * 50_000 + "\n---\n",
        "---\nlicense: mit\nx: '" + "y" * 400_000 + "'\n---\n", "---\n!!python/object/apply:os.system [id]\n---\n", "---\n---\n",
    ],
    ids=["empty", "none", "no end", "list", "broken", "tabs", "deep", "huge", "object", "blank"],
)  # fmt: skip
def test_a_broken_source_card_is_an_unknown_license(text: str, tmp_path: Path, cache: Path) -> None:
    cached(cache, "example-org/tiny-mistral", text)
    card = make_card(grown(tmp_path))
    assert "license" not in card.metadata
    assert "Unknown: ask the owner of the source" in card.text
    assert len(card.text) < 20_000


def test_bytes_that_are_no_text_do_no_harm(tmp_path: Path, cache: Path) -> None:
    snapshot = cache / "models--example-org--tiny-mistral" / "snapshots" / cards.COMMIT
    (snapshot / "README.md").write_bytes(b"---\nlicense: mit\nlanguage: \xff\xfe\x00\n---\n")
    assert "language" not in make_card(grown(tmp_path)).metadata


def test_a_yaml_bomb_is_read_in_no_time(tmp_path: Path) -> None:
    assert parse_card("a/b", "", f"---\n{BOMB}\nlicense: mit\n---\n").license == "mit"


def test_only_values_of_the_right_form_are_inherited() -> None:
    card = parse_card(
        "a/b",
        cards.COMMIT,
        """---
license: "<script>"
license_name: "x](javascript:alert(1))"
license_link: "https://user:secret@host/x"
language: [en, "<b>", "en\\nfoo: bar", {a: b}, EN, zh-Hans]
datasets: [c4, "../../etc", "a/b/c", "org/data", "hf_x y"]
base_model: ["../x", "ok/model"]
---
""",
    )
    assert (card.license, card.license_name, card.license_link) == ("", "", "")
    assert card.language == ("en", "zh-Hans")
    assert card.datasets == ("c4", "org/data")
    assert card.base_model == "ok/model"


def test_several_licenses_are_none(tmp_path: Path, cache: Path) -> None:
    cached(cache, "example-org/tiny-mistral", "---\nlicense: [mit, apache-2.0]\n---\n")
    card = make_card(grown(tmp_path))
    assert "license" not in card.metadata
    assert any("several licenses: mit, apache-2.0" in note for note in card.notes)


EVIL = "x](javascript:alert(1)) <script>alert(1)</script> <img src=//evil.example/p.png> ![p](http://evil.example/q.png)\n# heading\n| cell | `tick` $$x$$ www.evil.example"


DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"a": DEEP}
TRAINING = {
    "steps": 3,
    "recipe": {"data": {EVIL: [EVIL]}, EVIL: EVIL, "train": [EVIL], "regularizer": {"kind": EVIL, EVIL: EVIL}, "distill": {"teachers": [EVIL]},
               "lora": {EVIL: EVIL}, "old_set": EVIL, "learning_rate": EVIL, "hub_token": EVIL},
    "model": EVIL,
    "revision": EVIL,
    "data": [{"use": EVIL, "label": EVIL, "tokens": EVIL}, {"use": ["train"], "label": "x"}, 3],
    "losses": {"start": {EVIL: 1.0}, "end": {EVIL: 2.0, "x": EVIL}},
    "flops": EVIL,
    "verification_before": {"ok": True, "checks": [{"name": "tensors", "status": "pass", "detail": EVIL}], "metrics": EVIL},
    "earlier": {"adapter": {EVIL: EVIL}, "merged_into": [EVIL], "earlier": {"steps": 2, "model": [EVIL], "recipe": {"a": [EVIL]}, "data": EVIL,
                "losses": {"start": [], "end": {}}, "earlier": {"steps": 9, "recipe": DEEP, "earlier": {"steps": -1, "earlier": {"steps": 5}}}}},
}  # fmt: skip


VERIFICATION = {
    "ok": True,
    "checks": [{"name": EVIL, "status": "pass", "detail": EVIL}],
    "warnings": [EVIL],
    "metrics": {"kl_nats_per_token": 1.0, "text": EVIL, "dtype": EVIL, "tasks": {EVIL: {EVIL: [1, 2]}},
                "task_settings": {"harness": EVIL, "dtype": EVIL, "limit": EVIL, "tasks": EVIL},
                "experts": {"old": EVIL, "new": {"entropy": EVIL, "dead": EVIL, "most_loaded": [EVIL]}, "agreement": {"mean": EVIL}}},
}  # fmt: skip


def check_harmless(body: str) -> str:
    """A card with hostile text in it has the headings, links and images of the template, and no others; returns its HTML."""
    html = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").render(body)
    assert "<script" not in html
    assert re.findall(r"<img[^>]*src=\"([^\"]*)\"", html) == ["layer-map.svg"]
    assert html.count("<img") == 1
    assert all(h.startswith(("https://arxiv.org/abs/", "https://huggingface.co/")) for h in re.findall(r'href="([^"]*)"', html))
    assert len(re.findall(r"<h1", html)) == 1
    assert "$$" not in body.replace("\\$\\$", "")
    assert "://evil" not in re.sub(r"```.*?```|`[^`]*`", "", body, flags=re.DOTALL)
    return html


@pytest.mark.parametrize("training", [None, TRAINING], ids=["grown", "trained"])
@pytest.mark.parametrize("revision", ["", cards.COMMIT])
def test_names_and_reasons_stay_text(revision: str, training: Any, tmp_path: Path) -> None:
    plan = cards.plan_of("dus")
    folder = grown(
        tmp_path,
        verification=VERIFICATION,
        source__ref=EVIL,
        source__revision=revision,
        source__history=[{"source": {"ref": EVIL, "revision": EVIL}, "method": EVIL, "guarantee": {"kind": EVIL}, "layers": [1, 2]}],
        growth__method=EVIL,
        growth__guarantee={"kind": "changes the function", "because": EVIL},
        growth__warnings=[EVIL],
        growth__dropped=dict.fromkeys(list(plan.source.tensors)[:1], EVIL),
        growth__training={"new_layers": [EVIL]},
        made_by={"hf_grow": EVIL},
    )
    if training:
        record = json.loads((folder / "growth.json").read_text())
        (folder / "growth.json").write_text(json.dumps(record | {"training": training}))
    evil = folder.rename(tmp_path / "evil <script>`$$")
    card = make_card(evil)
    html = check_harmless(ModelCard(card.text).text)
    titles = ["What was done", "Guarantee and verification", "Evaluation", "Continue training", "Reproduce", "License", "Limits"]
    titles[1:1] = ["Training after it was grown"] if training else []
    assert re.findall(r"<h2>(.*?)</h2>", html) == titles
    assert set(card.metadata["tags"]) == {"hf-grow", "model-growth"}
    assert "<script" not in card.files["layer-map.svg"]


def full_facts(method: str) -> dict[str, Any]:
    """The facts of a card that has all its sections."""
    measured = json.loads(cards.MEASURED.read_text())
    plan = cards.plan_of(method)
    donors = {
        "code": SourceInfo("org/coder", cards.COMMIT, plan.source.config, plan.source.tensors),
        "maths": SourceInfo("/home/me/maths", "", plan.source.config, plan.source.tensors),
    }
    info = SourceInfo(plan.source.ref, cards.COMMIT, plan.source.config, plan.source.tensors, {}, (), donors)
    plan = GrowthPlan(info, plan.growth, plan.targets)
    training = dict(measured["training"])
    recipe = {**training["recipe"], "freeze": ["embeddings"], "distill": {"teachers": ["source"]}, "lora": {"r": 8}, "seed": 3}
    recipe |= {"regularizer": {"kind": "ewc", "lambda": 3, "fisher": "fisher.safetensors"}}
    training |= {"recipe": recipe, "earlier": {"adapter": {"r": 8, "lora_alpha": 16}}}
    verification = measured["experts"] | {"warnings": ["worse than guessing"]}
    verification["metrics"] = verification["metrics"] | {
        "tasks": {"arc_easy": {"acc": [0.5, 0.25], "acc_stderr": [0.1, 0.1]}}, "task_settings": {"harness": "lm-eval 0.4.9", "dtype": "float32", "limit": 20},
    }  # fmt: skip
    known = licenses.LICENSES["llama3.1"]
    inherited = Inherited(
        license="llama3.1",
        license_link="https://huggingface.co/org/coder/blob/main/LICENSE",
        known=known,
        origin="as on the card of org/coder",
    )
    facts = card_facts(
        plan, {**plan.to_json(), "made_by": {"hf_grow": "1"}, "training": training, "verification": verification}, inherited, "org/Grown"
    )
    return facts | {"dropped": [("not needed", 3)], "plan_warnings": ["odd"], "lineage": "a\n`-- b"}


COMPILED = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(template())


def rendered(facts: Any) -> str:
    return COMPILED.render(**FUNCTIONS, **facts, card_data="x: y").split("---\n", 2)[2]


@pytest.mark.parametrize("method", METHODS)
def test_the_template_asks_for_no_fact_that_is_not_there(method: str) -> None:
    plan = cards.plan_of(method)
    rendered(card_facts(plan, plan.to_json(), Inherited(), "org/Grown"))
    rendered(full_facts(method))


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Any:
    """The place of every string in nested data."""
    if isinstance(data, str):
        yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ():
        yield from leaves(value, (*path, key))


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The same data with one place changed."""
    if not path:
        return value
    if isinstance(data, dict):
        return {k: replaced(v, path[1:], value) if k == path[0] else v for k, v in data.items()}
    return type(data)(replaced(v, path[1:], value) if i == path[0] else v for i, v in enumerate(data))


@pytest.mark.parametrize("change", [{}, {"training": None}, {"reproduce__command": ""}], ids=["trained", "grown", "recipe"])
def test_every_text_in_the_facts_is_escaped(change: dict[str, Any]) -> None:
    """Each string by itself is replaced by a hostile one, whatever the code that computes it lets through."""
    facts = full_facts("experts")
    facts["reproduce"]["recipe"] = "method: dus\n"
    for path, value in change.items():
        facts = replaced(facts, tuple(path.split("__")), value)
    original = rendered(facts)
    before = re.findall(r"<h\d>", check_harmless(original))
    shown = 0
    places = list(leaves(facts))
    for path in places:
        if path[-1] not in ("state", "status"):  # chosen by the code from a few words
            body = rendered(replaced(facts, path, EVIL))
            shown += body != original
            assert re.findall(r"<h\d>", check_harmless(body)) == before, path
    assert shown > len(places) / 2


def test_no_token_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "s3cretT0ken" * 3
    monkeypatch.setenv("HF_TOKEN", token)
    card = make_card(grown(tmp_path))
    assert token not in "".join([card.text, *card.files.values(), *card.notes])
    for value in (token, "hf_" + "A" * 34):
        with pytest.raises(InputError, match="would hold an access token"):
            render_card(grown(tmp_path, growth__warnings=[f"with {value}"]))
    monkeypatch.setenv("HF_TOKEN", "plain-secret-of-a-mirror")
    with pytest.raises(InputError, match="would hold an access token") as refused:
        render_card(grown(tmp_path, growth__warnings=["plain-secret-of-a-mirror"]))
    assert "plain-secret" not in str(refused.value)


# Files


def test_an_edited_card_is_not_overwritten(tmp_path: Path) -> None:
    folder = grown(tmp_path)
    card = make_card(folder)
    assert write_card(folder, card) == [folder / "README.md", folder / "layer-map.svg"]
    write_card(folder, make_card(folder, CardOptions(name="Other")))  # nobody touched it
    text = (folder / "README.md").read_text()
    assert "# Other" in text
    (folder / "README.md").write_text(text.replace("# Other", "# My own words"))
    with pytest.raises(OutputError, match="was edited, or not written by hf-grow"):
        write_card(folder, card)
    assert "# My own words" in (folder / "README.md").read_text()
    write_card(folder, card, overwrite=True)
    assert (folder / "README.md").read_text() == card.text
    (folder / "layer-map.svg").write_text("<svg/>")
    with pytest.raises(OutputError, match=r"layer-map\.svg was edited"):
        write_card(folder, card)


def test_the_command_writes_refuses_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = grown(tmp_path)
    assert main(["card", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [Path(f).name for f in told["files"]] == ["README.md", "layer-map.svg"]
    assert told["metadata"]["base_model"] == "example-org/tiny-mistral"
    (folder / "README.md").write_text("mine")
    assert main(["card", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "mine"
    elsewhere = tmp_path / "card.md"
    assert main(["card", str(folder), "-o", str(elsewhere), "--license", "mit"]) == 0
    assert metadata_load(elsewhere)["license"] == "mit"
    assert (tmp_path / "layer-map.svg").exists()
    assert "--license mit is not what the card of the source says" in flat(capsys.readouterr().out)
    assert main(["card", str(folder), "-o", str(tmp_path / "no" / "where.md")]) == 2


@pytest.mark.parametrize(
    ("options", "expected_text"),
    [
        ({"license": "MIT or so"}, "not a license identifier"),
        ({"license": "other"}, "names no license"),
        ({"base_model": "tiny"}, "not a Hub id"),
        ({"base_model": "org/another"}, "the source is example-org/tiny-mistral"),
        ({"name": "a/b/c"}, "not a valid model name"),
        ({"name": "x\n# y"}, "not a valid model name"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], expected_text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected_text):
        render_card(grown(tmp_path), CardOptions(**options))


def test_folders_that_were_not_grown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain").mkdir()
    assert main(["card", str(tmp_path / "plain")]) == 2
    message = capsys.readouterr().err
    assert "was not grown by hf-grow" in message and "Give the folder of a grown checkpoint" in message
    for damage in ({"format": 99}, {"growth__layers": []}, {"growth__layers": [{"sources": ["0"], "weights": [1], "new": 0, "identity": 0}] * 6},
                   {"target__config": {"model_type": "llama"}}):  # fmt: skip
        with pytest.raises(SourceError):
            render_card(grown(tmp_path, **damage))


def test_a_composed_growth_in_python_has_a_card(tmp_path: Path) -> None:
    plan = cards.plan_of("tile")
    deeper = METHODS["identity"]
    both = compose(plan.growth, deeper.build(plan.architecture, deeper.options(layers_to=6)))
    card = render_card(cards.folder_of(make_plan(plan.source, both), tmp_path / "both"))
    assert "hf-grow grow recipe.yaml -o both" in card
    assert metadata_load is not None and ModelCard(card).data.tags == ["hf-grow", "model-growth", "tile", "identity"]
