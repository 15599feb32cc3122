"""What `fisher` and `train` warn of: penalties that hold damage, decay beside a penalty, instruct models that unlearn to chat."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from penalties import fisher_of
from replay_samples import CHATML
from trained import grown, recipe, tokenizer

from hf_grow.cli import main
from hf_grow.training.config.recipe_files import load_recipe
from hf_grow.training.setup.recipe_checks import check_recipe

DAMAGE, DECAY, CHAT = "near damaged ones", "pulls weights to zero, and the penalty", "forget how to chat"


def told(path: Path) -> str:
    notes: list[str] = []
    check_recipe(load_recipe(path, {}), output=None, resume=False, overwrite=False, notify=notes.append)
    return "\n".join(notes)


@pytest.mark.parametrize(("method", "options", "damaged"), [("identity", {"layers_to": 4}, False), ("stack", {"layers_to": 4}, True)])
def test_a_penalty_right_after_a_growth_that_changed_the_function(
    tmp_path: Path, method: str, options: dict[str, int], damaged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = grown(tmp_path, method=method, **options)
    fisher = tmp_path / "f.safetensors"
    words = ["fisher", str(model), "--text", str(tmp_path / "old.jsonl"), "-o", str(fisher), "--tokens", "64", "--seq-length", "16"]
    path = recipe(tmp_path, model, regularizer={"kind": "ewc", "fisher": str(fisher)})
    assert main(words) == 0
    assert (DAMAGE in " ".join(capsys.readouterr().err.split())) is damaged
    assert (DAMAGE in told(path)) is damaged
    assert (DAMAGE in told(recipe(tmp_path, model, regularizer={"kind": "l2sp"}))) is damaged
    assert DAMAGE not in told(recipe(tmp_path, model))
    record = json.loads((model / "growth.json").read_text())
    (model / "growth.json").write_text(json.dumps({**record, "training": {"steps": 5}}))
    assert DAMAGE not in told(path)


def test_the_source_s_fisher_mapped_holds_what_mattered_before_the_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path, method="stack", layers_to=4)
    own = fisher_of(tmp_path / "source", tmp_path / "source.safetensors")
    assert main(["fisher", str(model), "--from-growth", str(own), "-o", str(tmp_path / "mapped.safetensors")]) == 0
    assert "damage" not in capsys.readouterr().err
    assert DAMAGE not in told(recipe(tmp_path, model, regularizer={"kind": "ewc", "fisher": str(tmp_path / "mapped.safetensors")}))


def test_decay_is_off_beside_a_penalty_and_told_where_it_is_on(tmp_path: Path) -> None:
    model = grown(tmp_path)

    def decay(**keys: object) -> float:
        read = load_recipe(recipe(tmp_path, model, **keys), {})
        return check_recipe(read, output=None, resume=False, overwrite=False, notify=lambda m: None).arguments.weight_decay

    held = {"regularizer": {"kind": "l2sp"}}
    assert (decay(), decay(**held), decay(**held, weight_decay=0.1), decay(weight_decay=0.0)) == (0.1, 0.0, 0.1, 0.0)
    assert DECAY in told(recipe(tmp_path, model, **held, weight_decay=0.1))
    assert DECAY not in told(recipe(tmp_path, model, **held)) + told(recipe(tmp_path, model, weight_decay=0.1))


def test_an_instruct_model_that_is_trained_on_plain_text(tmp_path: Path) -> None:
    """Known by the template that ends an answer as the model ends its texts; not told where conversations are mixed in."""
    model = grown(tmp_path)
    assert CHAT not in told(recipe(tmp_path, model))
    chatty = tokenizer()
    chatty.chat_template = CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "<s> ")
    chatty.save_pretrained(model)
    path = recipe(tmp_path, model)
    assert CHAT in told(path)
    data = load_recipe(path, {}).given["data"]

    def with_replay(**replay: object) -> Path:
        return recipe(tmp_path, model, data={**data, "replay": replay})

    assert CHAT not in told(with_replay(share=0.5, self={}))
    assert CHAT in told(with_replay(share=0.5, self={"chat_share": 0.0}))
    assert CHAT in told(with_replay(share=0.5, path=str(tmp_path / "old.jsonl")))


def test_fisher_wants_room_for_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    model = grown(tmp_path)
    recipe(tmp_path, model)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=1000))
    words = ["fisher", str(model), "--text", str(tmp_path / "old.jsonl"), "-o", str(tmp_path / "f.safetensors")]
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == 2
        assert re.search(r"f\.safetensors needs 0\.\d\d MB", " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "f.safetensors").exists()
