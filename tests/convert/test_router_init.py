"""Router rows from prompts, against the whole model in memory, hooks on its FFNs and numpy."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grown import grown_by
from models import BY_NAME, CASES, Case, make, save
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hf_grow.checkpoint.reader import open_folder
from hf_grow.checkpoint.stored_tensors import StoredTensors
from hf_grow.convert import layer_streaming as layerwise
from hf_grow.convert.router_init import router_rows
from hf_grow.errors import InputError, PlanError, SourceError
from hf_grow.methods.experts.prompts import PromptsFile, load_prompts
from hf_grow.options import parse

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "if", "def", "return", "x1", "x2", "sum", "prove", "let", "lemma", "sea", "wind", "ship"]
CODE = ["def a return x1", "if x1 return x2 if x2 return sum a b c"]  # of other lengths, and longer than the windows
MATHS = ["let x1 sum x2 lemma prove a b", "prove lemma"]
SEA = ["wind sea ship a", "ship"]
EXPERTS = [{"positive": CODE, "negative": [*MATHS, SEA[0]]}, {"positive": MATHS, "negative": CODE}, {"positive": SEA}]
DENSE = [c for c in CASES if c.family in ("llama", "mistral", "qwen2", "qwen3")]


def tokenizer(*, bos: bool = True, unknown: bool = True, first: int = 4) -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {w: first + i for i, w in enumerate(WORDS)}
    # A model of single words drops what it does not know, if there is no token for that.
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>") if unknown else models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>" if unknown else None)


def stored(model: PreTrainedModel, folder: Path, *, sharded: bool = False, **options: Any) -> Path:
    save(model, folder, sharded=sharded)
    tokenizer(**options).save_pretrained(folder)
    return folder


def prompts(experts: list[dict[str, Any]]) -> PromptsFile:
    return parse(PromptsFile, {"experts": experts}, where="test")


def ids_of(text: str) -> list[int]:
    """What `tokenizer` makes of a text."""
    return [1, *(4 + WORDS.index(w) for w in text.split())]


def ffn_inputs(model: PreTrainedModel, ids: list[int]) -> list[np.ndarray]:
    """What the FFN of every layer reads when the whole model runs on one prompt: [tokens, hidden]."""
    seen: dict[int, np.ndarray] = {}
    hooks = [
        layer.mlp.register_forward_hook(lambda m, inputs, out, i=i: seen.__setitem__(i, inputs[0][0].float().numpy()))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [seen[i] for i in range(len(seen))]


def reference(vectors: Callable[[str], np.ndarray], experts: list[dict[str, Any]]) -> np.ndarray:
    """[experts, hidden] of one layer, from the vector of each prompt."""
    rows = []
    for expert in experts:
        row = np.mean([vectors(t) for t in expert["positive"]], axis=0)
        if expert.get("negative"):
            row = row - np.mean([vectors(t) for t in expert["negative"]], axis=0)
        rows.append(row / np.sqrt((row**2).sum()))
    return np.array(rows)


def check_against_the_whole_model(folder: Path, rows: dict[int, torch.Tensor], pooling: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = {text: AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in {*CODE, *MATHS, *SEA}}
    # transformers reads any tokenizer of a qwen2 model as Qwen2's own, which splits the words.
    assert whole.config.model_type == "qwen2" or ids == {text: ids_of(text) for text in ids}
    inputs = {text: ffn_inputs(whole, ids[text]) for text in ids}
    assert list(rows) == list(range(whole.config.num_hidden_layers))
    for layer, found in rows.items():
        pooled = {t: states[layer].mean(0) if pooling == "mean" else states[layer][-1] for t, states in inputs.items()}
        assert found.dtype == torch.float32 and not found.is_inference()
        np.testing.assert_allclose(found.numpy(), reference(pooled.__getitem__, EXPERTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_rows_are_those_of_the_whole_model_in_memory(case: Case, tmp_path: Path) -> None:
    folder = stored(make(case), tmp_path / "source")
    rows = router_rows(open_folder(folder), prompts(EXPERTS), kind="prompts")
    check_against_the_whole_model(folder, rows, "mean")


def test_the_last_token_of_a_sharded_bf16_checkpoint_computed_in_fp32(tmp_path: Path) -> None:
    folder = stored(make(BY_NAME["llama-tied"], dtype=torch.bfloat16), tmp_path / "source", sharded=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    rows = router_rows(open_folder(folder), prompts(EXPERTS), kind="prompts", pooling="last")
    check_against_the_whole_model(folder, rows, "last")


def test_the_vectors_are_what_the_router_of_the_grown_model_reads(tmp_path: Path) -> None:
    """One positive prompt alone gives the direction of the mean input of the gate, in the mixture that the dense model becomes."""
    model = make(BY_NAME["llama"])
    rows = router_rows(open_folder(stored(model, tmp_path / "source")), prompts([{"positive": [CODE[1]]}]), kind="prompts")
    mixture = grown_by(model, "experts", experts=2)
    gates: list[torch.Tensor] = []
    for layer in mixture.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda m, inputs: gates.append(inputs[0].reshape(-1, inputs[0].shape[-1]).mean(0)))
    with torch.no_grad():
        mixture(torch.tensor([ids_of(CODE[1])]), use_cache=False)
    assert len(gates) == len(rows) == 4
    for read, row in zip(gates, rows.values(), strict=True):
        assert torch.allclose(row[0], read / read.norm(), rtol=0, atol=1e-5)


def test_cheap_embed_is_the_mean_of_embeddings_and_reads_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(BY_NAME["qwen3-tied"])
    folder = stored(model, tmp_path / "source")
    read: list[tuple[str, int, int]] = []
    rows_of = StoredTensors.rows
    monkeypatch.setattr(StoredTensors, "rows", lambda self, key, *span: read.append((key, *span)) or rows_of(self, key, *span))
    rows = router_rows(open_folder(folder), prompts(EXPERTS), kind="cheap-embed")
    matrix = model.model.embed_tokens.weight.detach().numpy()
    expected = reference(lambda text: matrix[ids_of(text)].mean(0), EXPERTS)
    assert list(rows) == [0, 1, 2, 3]
    for found in rows.values():
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    assert {key for key, _, _ in read} == {"model.embed_tokens.weight"}
    assert {i for _, start, stop in read for i in range(start, stop)} == {i for t in (*CODE, *MATHS, *SEA) for i in ids_of(t)}
    assert rows[0].data_ptr() != rows[1].data_ptr()


def test_cheap_embed_needs_no_dense_source(tmp_path: Path) -> None:
    checkpoint = open_folder(stored(make(BY_NAME["mixtral"]), tmp_path / "source"))
    assert router_rows(checkpoint, prompts(EXPERTS), kind="cheap-embed")[3].shape == (3, 48)
    with pytest.raises(PlanError, match="is a mixture"):
        router_rows(checkpoint, prompts(EXPERTS), kind="prompts")


class CountedTensors(StoredTensors):
    nbytes = 0

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        found = super().rows(key, start, stop)
        self.nbytes += found.nbytes
        return found


def test_one_layer_is_in_memory_at_a_time_and_every_byte_of_the_layers_is_read_once(tmp_path: Path) -> None:
    checkpoint = open_folder(stored(make(BY_NAME["llama"], intermediate_size=37, num_hidden_layers=6), tmp_path / "source"))
    alive: list[int] = []

    def pool(states: torch.Tensor) -> torch.Tensor:
        found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.shape == (37, 48) and o.device.type != "meta"]
        alive.append(len({o.data_ptr() for o in found}))
        return states.mean(0)

    tensors = CountedTensors(checkpoint)
    embedded = {text: layerwise.embed_tokens(checkpoint, tensors, ids_of(text)) for text in CODE}
    gc.collect()
    tensors.nbytes = 0
    assert len(list(layerwise.mlp_inputs(checkpoint, tensors, embedded, pool))) == 6
    assert alive == [2] * 12  # gate_proj and up_proj of one layer
    assert tensors.nbytes == sum(t.stop - t.start for n, t in checkpoint.tensors.items() if ".layers." in n)


def test_what_else_is_asked_changes_nothing(tmp_path: Path) -> None:
    """No padding: an expert's row does not depend on how long the prompts of the others are."""
    checkpoint = open_folder(stored(make(BY_NAME["mistral-tied"]), tmp_path / "source"))
    few = router_rows(checkpoint, prompts(EXPERTS[1:]), kind="prompts")
    more = router_rows(checkpoint, prompts([*EXPERTS[1:], {"positive": [" ".join(WORDS)]}]), kind="prompts")
    assert all(torch.equal(few[layer], more[layer][:2]) for layer in few)


def test_a_long_prompt_is_cut_and_told(tmp_path: Path) -> None:
    folder = stored(make(BY_NAME["llama"], max_position_embeddings=8), tmp_path / "source")
    said: list[str] = []
    long, cut = "a b c d e f g h i j", "a b c d e f g"  # with the token that begins a text, 11 and 8
    rows = router_rows(open_folder(folder), prompts([{"positive": [long]}, {"positive": SEA}]), kind="prompts", notify=said.append)
    assert said == ["1 prompt is longer than the source's 8 positions; only the first 8 tokens are used."]
    said.clear()
    expected = router_rows(open_folder(folder), prompts([{"positive": [cut]}, {"positive": SEA}]), kind="prompts", notify=said.append)
    assert not said
    assert all(torch.equal(rows[layer], expected[layer]) for layer in rows)


# ---- the file -------------------------------------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    path = folder / "prompts.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    file = load_prompts(
        written(tmp_path, "experts:\n- positive: [one, two]\n  negative: [three]\n- positive:\n  - |\n    def f():\n      pass\n")
    )
    assert [e.positive for e in file.experts] == [["one", "two"], ["def f():\n  pass\n"]]
    assert [e.negative for e in file.experts] == [["three"], []]


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = "experts:\n- {positive: []}\n- {positive: one}\n- {positive: [1, ' ', yes]}\n- {negative: [a]}\n- {positive: [a], negativ: [b]}\nseed: 1\n"
    with pytest.raises(InputError) as error:
        load_prompts(written(tmp_path, text))
    head, *lines = str(error.value).splitlines()
    assert head == f"{tmp_path / 'prompts.yaml'} has 8 mistakes:"
    assert lines == [
        "  experts.0.positive: is empty; at least one is needed",
        "  experts.1.positive: should be a valid list, got 'one'.",
        "  experts.2.positive.0: 1 is read as a number; put quotes around a word.",
        "  experts.2.positive.1: is empty",
        "  experts.2.positive.2: True is read as yes or no; put quotes around a word.",
        "  experts.3.positive: is missing.",
        "  experts.4.negativ: unknown key. Did you mean negative? Known: negative, positive.",
        "  seed: unknown key. Known: experts.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts: []", "experts: is empty"),
        ("experts: 3", "valid list"),
        ("- positive: [a]", "must hold `key: value` lines"),
        ("experts: [", "is not valid YAML"),
        ("experts:\n- {positive: [a, b], negative: [b, a]}", "0 has the same positive and negative prompts"),
        ("experts:\n- {positive: [a, b]}\n- {positive: [c]}\n- {positive: [b, a]}", "0 and 2 have the same prompts"),
    ],
)
def test_a_file_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_prompts(written(tmp_path, text))
    assert message in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot read"):
        load_prompts(tmp_path / "none.yaml")


# ---- what cannot work -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(make(BY_NAME["llama"], num_hidden_layers=2), tmp_path_factory.mktemp("llama") / "source")


def refusal(folder: Path, experts: list[dict[str, Any]] = EXPERTS, kind: str = "prompts", **options: Any) -> InputError:
    with pytest.raises(InputError) as error:
        router_rows(open_folder(folder), prompts(experts), kind=kind, **options)  # type: ignore[arg-type]
    return error.value


@pytest.mark.parametrize("kind", ["prompts", "cheap-embed"])
def test_equal_means_give_no_direction(llama: Path, kind: str) -> None:
    """The rounding of another order of summing is no direction either."""
    experts = [*EXPERTS, {"positive": CODE, "negative": [*reversed(CODE), *CODE, *CODE]}, {"positive": ["a"], "negative": ["a", "a"]}]
    error = refusal(llama, experts, kind)
    where = "in layer 0" if kind == "prompts" else "in the embedding"
    assert error.message == f"Positive and negative prompts of expert 3, 4 have the same mean {where}; that gives no direction."


@pytest.mark.parametrize("kind", ["prompts", "cheap-embed"])
def test_experts_with_equal_rows_are_refused(llama: Path, kind: str) -> None:
    error = refusal(llama, [*EXPERTS, {"positive": [*SEA, *SEA]}], kind)
    assert error.message.startswith("Experts 2 and 3 have the same router rows in every layer")


def test_experts_with_nearly_equal_rows_are_told(llama: Path) -> None:
    said: list[str] = []
    long = " ".join(2 * WORDS)
    experts = [{"positive": SEA}, {"positive": [long]}, {"positive": [f"{long} ship"]}]
    rows = router_rows(open_folder(llama), prompts(experts), kind="cheap-embed", notify=said.append)
    cosine = float(rows[0][1] @ rows[0][2])
    assert 0.99 < cosine < 1 - 1e-5
    assert len(said) == 1
    assert said[0].startswith(f"The router rows of experts 1 and 2 are nearly the same in 2 of 2 layers (cosine up to {cosine:.4f}): ")


def test_a_source_without_tokenizer(tmp_path: Path) -> None:
    error = refusal(save(make(BY_NAME["llama"]), tmp_path / "source"))
    assert isinstance(error, SourceError)
    assert "has no tokenizer" in error.message and "tokenizer.json" in error.hint


def test_a_damaged_tokenizer(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "source"))
    (folder / "tokenizer.json").write_text("{}")
    error = refusal(folder)
    assert isinstance(error, SourceError)
    assert "cannot load the tokenizer of" in error.message and "\n" not in error.message


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    error = refusal(stored(make(BY_NAME["llama"]), tmp_path / "source", first=40), kind="cheap-embed")
    assert isinstance(error, SourceError)
    assert "the embedding has 64 rows" in error.message


@pytest.mark.parametrize("bos", [True, False])
def test_prompts_of_no_token(tmp_path: Path, bos: bool) -> None:
    """Also where the tokenizer begins every text with a token of its own."""
    folder = stored(make(BY_NAME["llama"]), tmp_path / "source", bos=bos, unknown=False)
    error = refusal(folder, [{"positive": ["a", "?"]}, {"positive": ["b"], "negative": ["!"]}])
    assert "makes no tokens of experts.0.positive.1, experts.1.negative.0." in error.message


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = make(BY_NAME["llama"])
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[0, 0] = torch.nan
    error = refusal(stored(model, tmp_path / "source"))
    assert isinstance(error, SourceError)
    assert "not finite in layer 2" in error.message


def test_a_config_that_is_not_of_these_weights(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "do not match its config.json" in refusal(folder).message
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "none"}))
    error = refusal(folder)
    assert isinstance(error, SourceError)
    assert "KeyError: 'none'" in error.message and "\n" not in error.message


def test_pooling_belongs_to_hidden_states(llama: Path) -> None:
    assert "pooling last is for prompts" in refusal(llama, kind="cheap-embed", pooling="last").message
