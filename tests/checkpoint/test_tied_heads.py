"""A head that is stored beside the embedding although config.json ties them: what transformers makes of it, every way of growing keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from adam_states import adamw, train
from hub_server import HubServer
from models import BY_NAME, make, save, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_grow import api
from hf_grow.checkpoint.reader import CHUNK_SIZE, open_folder
from hf_grow.checkpoint.writer import layout
from hf_grow.cli import main
from hf_grow.convert.execute import execute
from hf_grow.convert.in_memory import describe_model, grow_model
from hf_grow.errors import SourceError
from hf_grow.growth.plan import EMBEDDING, HEAD, untied_head_warning
from hf_grow.training.setup.model_setup import load_model

hub = hub_server.hub
SOURCE = "someone/tied"


def stored_head(folder: Path, head: torch.Tensor | None = None, case: str = "llama-tied", seed: int = 0, **changes: Any) -> Path:
    """A tied checkpoint with this head beside the embedding; None: the embedding once more."""
    save(make(BY_NAME[case], seed=seed, **changes), folder)
    tensors = load_file(folder / "model.safetensors")
    assert HEAD not in tensors
    tensors[HEAD] = tensors[EMBEDDING].clone() if head is None else head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    return folder


def other_head(seed: int = 5) -> torch.Tensor:
    return torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)) * 48**-0.5


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return stored_head(tmp_path / "own", other_head())


@torch.no_grad()
def logits(model: Path | PreTrainedModel) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, Path) else model
    return loaded(tokens(loaded)).logits


def test_transformers_uses_a_head_that_differs_and_ties_one_that_does_not(own: Path, tmp_path: Path) -> None:
    """The premise. Should a later transformers think otherwise, this fails, and hf-grow must follow."""
    assert torch.equal(AutoModelForCausalLM.from_pretrained(own).lm_head.weight, other_head())
    same = AutoModelForCausalLM.from_pretrained(stored_head(tmp_path / "same"))
    assert same.lm_head.weight is same.model.embed_tokens.weight


@pytest.mark.parametrize(("case", "method", "options"), [
    ("llama-tied", "identity", {"at": "1"}), ("llama-tied", "tile", {"factor": 2}), ("mixtral-tied", "identity", {"at": "1"}),
    ("llama-tied", "experts", {"experts": 3}), ("qwen3-tied", "tile", {"hidden": 96}),
])  # fmt: skip
def test_lossless_growth_keeps_the_head(case: str, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = stored_head(tmp_path / "source", other_head(), case)
    api.grow(source, tmp_path / "out", method, **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert HEAD in open_folder(tmp_path / "out").tensors
    before = logits(source)
    assert float((logits(tmp_path / "out") - before).abs().max()) < 1e-4 * float(before.abs().max())
    assert api.verify(source, tmp_path / "out").ok
    assert untied_head_warning(str(source)) in json.loads((tmp_path / "out" / "growth.json").read_text())["growth"]["warnings"]


def test_a_head_that_differs_in_its_last_byte_is_another(tmp_path: Path) -> None:
    """Where both take many pieces of the comparison, too."""
    source = stored_head(tmp_path / "source", vocab_size=9000)
    assert open_folder(source).head == "equal"
    stored = open_folder(source).tensors[HEAD]
    assert stored.stop - stored.start > CHUNK_SIZE
    with (source / stored.file).open("r+b") as f:
        f.seek(stored.stop - 1)
        byte = f.read(1)[0]
        f.seek(stored.stop - 1)
        f.write(bytes([byte ^ 1]))
    assert open_folder(source).head == "own"
    assert api.plan(source, "identity", at="1").architecture.tied is False


def test_an_equal_head_is_dropped_with_its_reason(tmp_path: Path) -> None:
    source = stored_head(tmp_path / "source")
    plan = api.plan(source, "identity", at="1")
    assert plan.architecture.tied
    assert plan.growth.dropped == {HEAD: "equal to the embedding, to which it is tied"}
    api.grow(source, tmp_path / "out", "identity", at="1")
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    assert api.verify(source, tmp_path / "out").ok


def test_verify_finds_an_output_that_lost_its_head(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as if the head were tied, without looking at it."""
    with monkeypatch.context() as patched:
        patched.setattr("hf_grow.checkpoint.reader.Checkpoint.head_unresolved", False)
        api.grow(own, tmp_path / "out", "identity", at="1")
    assert HEAD not in open_folder(tmp_path / "out").tensors
    report = api.verify(own, tmp_path / "out", structure_only=True)
    found = {c.name: c.detail for c in report.checks if c.status == "fail"}
    assert found.keys() == {"source"}
    assert "dropped it" in found["source"]


def test_in_memory(own: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(own)
    assert describe_model(model).head == "own"
    plan = api.plan(model, "tile", factor=2)
    assert plan.growth.warnings[-1] == untied_head_warning(str(own))
    grown = grow_model(model, plan)
    assert grown.config.tie_word_embeddings is False
    assert float((logits(grown) - logits(model)).abs().max()) < 1e-3
    assert torch.equal(logits(grow_model(model, api.plan(own, "identity", at="1"))), logits(model))


def headers_alone(folder: Path) -> Any:
    """What is known of a repository before its weights are read."""
    held = open_folder(folder)
    return replace(held, head="", config=json.loads((folder / "config.json").read_text())).info


def test_a_plan_made_from_headers_alone_is_refused_for_weights_that_say_otherwise(own: Path, tmp_path: Path) -> None:
    info = headers_alone(own)
    plan = api.plan_for(info, api.find_method("identity"), api.find_method("identity").options(at=(1,)))
    assert "compared when the weights are read" in plan.growth.dropped[HEAD]
    with pytest.raises(SourceError, match="differs from the embedding"):
        execute(plan, open_folder(own), tmp_path / "out", layout(plan.targets))
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(SourceError, match="another model"):
        grow_model(AutoModelForCausalLM.from_pretrained(own), plan)


@pytest.mark.parametrize("extra", [[], ["--stream-source"]], ids=["downloaded", "streamed"])
@pytest.mark.parametrize("same", [True, False], ids=["equal", "own"])
def test_from_the_hub(extra: list[str], same: bool, hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned from headers, decided when the weights are read, or both tensors alone."""
    source = stored_head(tmp_path / "source", None if same else other_head())
    hub.add(SOURCE, source)
    out = tmp_path / "out"
    words = ["depth", SOURCE, "--method", "identity", "--at", "1", "-o", str(out), *extra]
    assert main([*words, "--dry-run"]) == 0
    assert "compared when the weights are read" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", SOURCE]) == 0
    assert f"tied, if the stored {HEAD} equals" in " ".join(capsys.readouterr().out.split())
    assert main(words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert ("but the stored lm_head.weight differs" in said) is not same
    assert (HEAD in open_folder(out).tensors) is not same
    assert torch.equal(logits(out), logits(source))
    assert main(["verify", SOURCE, str(out)]) == 0


def test_siblings_must_agree_in_it(own: Path, tmp_path: Path) -> None:
    sibling = stored_head(tmp_path / "sibling", other_head(6), seed=3)
    api.grow(own, tmp_path / "out", "experts", experts_from=[str(sibling)])
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.allclose(new[HEAD], (other_head() + other_head(6)) / 2)
    assert api.verify(own, tmp_path / "out").ok
    tied = stored_head(tmp_path / "tied", seed=4)
    with pytest.raises(Exception, match="tie_word_embeddings"):
        api.plan(own, "experts", experts_from=[str(tied)])


def test_the_optimizer_grows_along(own: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(own)
    optimizer = adamw(model)
    train(model, optimizer, 2)
    state = tmp_path / "checkpoint-2"
    model.save_pretrained(state)
    torch.save(optimizer.state_dict(), state / "optimizer.pt")
    (state / "trainer_state.json").write_text('{"global_step": 2}')
    out = tmp_path / "out"
    assert main(["width", str(state), "--factor", "2", "--symmetry", "none", "--with-optimizer", str(state), "-o", str(out)]) == 0
    grown = AutoModelForCausalLM.from_pretrained(out)
    carried = adamw(grown)
    carried.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    before, after = (o.state[m.lm_head.weight]["exp_avg"] for m, o in ((model, optimizer), (grown, carried)))
    assert after.shape == (64, 96)
    assert before.any()
    # Both copies of a hidden unit get the gradient of one, as far as the head reads it.
    ratio = after[:, :48][before.abs() > 1e-6] / before[before.abs() > 1e-6]
    assert float(ratio.max() - ratio.min()) < 1e-3


def test_inspect_and_training_know_it(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(own)]) == 0
    assert "untied: config.json ties them" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(own), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tied"] is False
    assert facts["parts"]["head"] == 64 * 48
    model = load_model(str(own), None, "auto", None, lambda message: None)
    assert model.config.tie_word_embeddings is False  # it is saved, and frozen by parts, as what it is
