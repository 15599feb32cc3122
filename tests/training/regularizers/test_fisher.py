"""The Fisher diagonal: against its definition, through growth, in files, and by the command."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from grown import plan_of, through
from models import BY_NAME, make, on_disk, save
from penalties import random_importance
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from hf_grow.checkpoint.reader import open_folder
from hf_grow.cli import main
from hf_grow.convert.in_memory import disk_names
from hf_grow.errors import ExecutionError, InputError
from hf_grow.training.calibrate import calibrate, shortened
from hf_grow.training.config.fisher_options import FisherOptions
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.data.document_masking import forward_arguments, position_ids
from hf_grow.training.data.source_model import load_with_tokenizer
from hf_grow.training.distributed.processes import Processes
from hf_grow.training.regularizers.build import make_penalty
from hf_grow.training.regularizers.fisher import _sample_labels, estimate_fisher, sample_sequences, sequence_seed
from hf_grow.training.regularizers.importance_file import open_importance, write_importance
from hf_grow.training.regularizers.importance_growth import grow_importance
from hf_grow.training.regularizers.penalty import QuadraticPenalty

WORDS = [
    "the",
    "model",
    "reads",
    "old",
    "text",
    "and",
    "a",
    "fisher",
    "says",
    "what",
    "each",
    "weight",
    "of",
    "it",
    "is",
    "worth",
    "when",
    "new",
    "text",
    "comes",
    "in",
]


def small(name: str = "llama", **changes: Any) -> PreTrainedModel:
    return make(BY_NAME[name], **{"num_hidden_layers": 2, **changes})


def rows(model: PreTrainedModel, count: int, length: int = 6) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(3))


def options(**given: Any) -> FisherOptions:
    return FisherOptions(**given)


# ---- the definition ---------------------------------------------------------------------------------------------------------------------


def by_definition(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Every token that could be drawn, at every place: F = mean over places of sum_y p(y) (d log p(y) / dw)^2."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    for row in ids:
        log = model(row[None], use_cache=False).logits[0].log_softmax(-1)
        for place in log:
            for value in place:
                grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                for t, g in zip(total, grads, strict=True):
                    if g is not None:
                        t += value.detach().exp() * g**2
    return {n: t / ids.numel() for n, t in zip(names, total, strict=True)}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_true_fisher_equals_its_definition(name: str, exact: bool) -> None:
    model = small(name, num_hidden_layers=1, vocab_size=7)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)  # no token is so rare that it is never drawn, and would matter
    ids = rows(model, 3, 4)
    right = by_definition(model, ids)
    found, tokens = estimate_fisher(model, ids.repeat(120, 1), options(batch=3, exact=exact))
    assert tokens == 1440
    for n, f in right.items():
        if f.any():
            assert float(found[n].sum() / f.sum()) == pytest.approx(1, rel=0.1), n
            assert torch.nn.functional.cosine_similarity(found[n].flatten(), f.flatten(), dim=0) > 0.97, n


def test_fisher_does_not_depend_on_batch_size() -> None:
    """Token-normalised: without N the sums would differ sixteenfold."""
    model = small()
    ids = rows(model, 128, 8)
    sums = [float(sum(f.sum() for f in estimate_fisher(model, ids, options(batch=b))[0].values())) for b in (1, 4, 16)]
    assert max(sums) / min(sums) < 1.15


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_fisher_within_documents(kind: str) -> None:
    """Empirical: the gradient of a row is the sum of those of its documents alone. True: labels at the places where the next token is of the same document."""
    model, lengths = small(), [[3, 1, 5], [9], [2, 7]]
    ids, positions = rows(model, 3, 9), position_ids([{"seq_lengths": n} for n in lengths])
    found, tokens = estimate_fisher(model, ids, options(kind=kind, batch=2), positions=positions)
    assert tokens == sum(n - 1 for row in lengths for n in row)
    if kind == "true":
        single, count = estimate_fisher(model, ids[:1, :4], options(), positions=torch.tensor([[0, 1, 0, 0]]))
        model.zero_grad()
        logits = model(ids[:1, :2], use_cache=False).logits
        drawn = _sample_labels(model(ids[:1, :4], **forward_arguments(model.config, torch.tensor([[0, 1, 0, 0]]))).logits.detach(),
                               [sequence_seed(options().seed, 0)])  # fmt: skip
        torch.nn.functional.cross_entropy(logits[0, :1], drawn[0, :1]).backward()
        assert count == 1
        for n, p in model.named_parameters():
            torch.testing.assert_close(single[n], p.grad.square(), rtol=1e-3, atol=1e-8)
        return
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row, pieces in zip(ids, lengths, strict=True):
        model.zero_grad()
        for document in row.split(pieces):
            if len(document) > 1:
                ((len(document) - 1) * model(document[None], labels=document[None], use_cache=False).loss).backward()
        for n, p in model.named_parameters():
            total[n] += p.grad.square()
    for n, square in total.items():
        torch.testing.assert_close(found[n], square / tokens, rtol=1e-3, atol=1e-8)


def test_empirical_fisher_squares_gradients_per_sequence() -> None:
    model = small("mixtral")
    ids = rows(model, 5, 9)
    found, tokens = estimate_fisher(model, ids, options(kind="empirical", batch=4))
    assert tokens == 5 * 8
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row in ids:
        model.zero_grad()
        (8 * model(row[None], labels=row[None], use_cache=False).loss).backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                total[n] += p.grad**2 / 40
    for n, right in total.items():
        torch.testing.assert_close(found[n], right, rtol=1e-4, atol=1e-8)


def test_estimate_is_reproducible_and_leaves_model_unchanged() -> None:
    model = small("mixtral").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    one, other, third = (estimate_fisher(model, rows(model, 6), options(batch=2, seed=s))[0] for s in (1, 1, 2))
    assert all(torch.equal(one[n], other[n]) for n in one) and any(not torch.equal(one[n], third[n]) for n in one)
    assert one["model.embed_tokens.weight"].any()
    assert model.training and not model.model.embed_tokens.weight.requires_grad
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_gradients_are_freed_before_the_next_layer(name: str) -> None:
    """Never more than one parameter has a gradient; with activation checkpointing F is the same."""
    model, counts = small(name), []
    model.train()

    def counted(p: Tensor) -> None:
        counts.append(sum(q.grad is not None for q in model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(counted)
    one, _ = estimate_fisher(model, rows(model, 6), options())
    assert len(counts) == 2 * len(list(model.parameters())) and set(counts) == {1}
    other, _ = estimate_fisher(model, rows(model, 6), options(activation_checkpointing=True))
    for n, f in one.items():
        torch.testing.assert_close(other[n], f, rtol=1e-5, atol=1e-9)
    assert model.training and not model.is_gradient_checkpointing


def test_bf16_squares_are_summed_in_fp32() -> None:
    model = small(dtype=torch.bfloat16)
    found, _ = estimate_fisher(model, rows(model, 8), options())
    wide, _ = estimate_fisher(small(dtype=torch.bfloat16).float(), rows(model, 8), options())
    assert all(f.dtype == torch.float32 for f in found.values())
    assert float(sum(f.sum() for f in found.values()) / sum(f.sum() for f in wide.values())) == pytest.approx(1, rel=0.3)


def test_non_finite_weights_are_reported(recwarn: Any) -> None:
    model = small()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e30
        model.model.norm.weight.fill_(1e30)
    with pytest.raises((ExecutionError, RuntimeError)):
        estimate_fisher(model, rows(model, 2), options())


# ---- through growth ---------------------------------------------------------------------------------------------------------------------

GROWTHS: dict[str, dict[str, Any]] = {
    "x2": {"method": "tile", "factor": 2, "symmetry": "none"},
    "x2 split": {"method": "tile", "factor": 2},
    "uneven": {"method": "tile", "hidden": 60, "heads": 10, "kv_heads": 2, "intermediate": 50},
    "x3": {"method": "tile", "factor": 3},
    "pad": {"method": "pad", "hidden": 96, "heads": 8, "kv_heads": 2, "new_heads": "null"},
    "fpi": {"method": "fpi", "factor": 2},
    "aki": {"method": "aki", "factor": 2},
    "lossless aki": {"method": "aki", "factor": 2, "lossless": True},
    "net2net": {"method": "net2net", "hidden": 60, "heads": 12, "kv_heads": 2},
    "hypercloning": {"method": "hypercloning", "factor": 2},
    "head_dim": {"method": "tile", "head_dim": 24},
    "stack": {"method": "stack"},
    "dus": {"method": "dus", "drop": 1},
    "interleave": {"method": "interleave", "layers_to": 6},
    "identity": {"method": "identity"},
    "width and depth": {"method": "tile", "factor": 2, "deeper": "after"},
    "experts": {"method": "experts", "experts": 8},
}


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "qwen3"])
def test_grown_importance_keeps_the_penalty(name: str, growth: str) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    given = dict(GROWTHS[growth])
    if name == "qwen3" and growth == "experts":
        given["experts"] = 4
    plan = plan_of(model, given.pop("method"), **given)
    generator = torch.Generator().manual_seed(0)
    weights = on_disk(model)
    fisher = {n: torch.rand(t.shape, generator=generator, dtype=torch.float64) for n, t in weights.items()}
    move = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in weights.items()}
    for gone in plan.growth.dropped:
        move[gone].zero_()
    start, end = through(plan, weights, "weight"), through(plan, {n: weights[n] + move[n] for n in weights}, "weight")
    mapped = dict(grow_importance(plan, lambda n: fisher[n]))
    assert {n: tuple(f.shape) for n, f in mapped.items()} == {n: t.shape for n, t in plan.targets.items()}
    assert all((f >= 0).all() for f in mapped.values())
    cost = sum(float((fisher[n] * move[n] ** 2).sum()) for n in fisher)
    assert sum(float((mapped[n] * (end[n] - start[n]) ** 2).sum()) for n in mapped) == pytest.approx(cost, rel=1e-10)


def test_grown_importance_of_even_copies() -> None:
    """F' = F * c_in / c_out, c the copies of a column and of a row; identity blocks hold nothing."""
    model = make(BY_NAME["llama"], dtype=torch.float64)
    plan = plan_of(model, "tile", deeper="after", factor=2, symmetry="none")
    ones = {n: torch.ones_like(t) for n, t in on_disk(model).items()}
    mapped = dict(grow_importance(plan, lambda n: ones[n]))
    new = next(i for i, o in enumerate(plan.growth.layers) if o.identity)
    expected = {
        "model.embed_tokens.weight": 0.5, "model.norm.weight": 0.5, "lm_head.weight": 2.0, "model.layers.0.mlp.up_proj.weight": 1.0,
        "model.layers.0.self_attn.q_proj.weight": 1.0, f"model.layers.{new}.self_attn.q_proj.weight": 0.0,
    }  # fmt: skip
    for n, value in expected.items():
        torch.testing.assert_close(mapped[n], torch.full_like(mapped[n], value))


def test_grown_importance_of_averaged_layers_is_between_theirs() -> None:
    model = make(BY_NAME["llama"], dtype=torch.float64, num_hidden_layers=8)
    plan = plan_of(model, "dus", drop=2, seam_average=1)
    fisher = {n: torch.full_like(t, 1.0 + float(n.split(".")[2]) if "layers" in n else 1.0) for n, t in on_disk(model).items()}
    mapped = dict(grow_importance(plan, lambda n: fisher[n]))
    averaged = next(i for i, o in enumerate(plan.growth.layers) if len(o.sources) > 1)
    for value in mapped[f"model.layers.{averaged}.mlp.up_proj.weight"].unique():
        assert 0 < float(value) < 20


# ---- files ---------------------------------------------------------------------------------------------------------------------------------


def test_importance_file_is_written_atomically(tmp_path: Path) -> None:
    def broken() -> Any:
        yield "a", torch.ones(2)
        yield "b", torch.tensor([1.0, math.nan])

    path = tmp_path / "f.safetensors"
    with pytest.raises(ExecutionError, match="b is not finite"):
        write_importance(path, {"a": (2,), "b": (2,)}, broken(), {"sample": ""})
    assert not list(tmp_path.iterdir())
    write_importance(path, {"a": (2,), "b": (3,)}, iter([("b", torch.zeros(3)), ("a", torch.ones(2))]), {"sample": ""}, storage="bf16")
    found = open_importance(path)
    assert found.shapes == {"a": (2,), "b": (3,)}
    assert found.read("a").dtype == torch.bfloat16 and found.read("a").tolist() == [1, 1]
    assert found.metadata["made_by"].startswith("hf-grow ")


# ---- the command -----------------------------------------------------------------------------------------------------------------------------


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {w: i for i, w in enumerate(["<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def text(path: Path, seed: int, words: int = 3000) -> Path:
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(WORDS[seed::2]) for _ in range(words)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(small(), tmp_path / "model")


def saved(model: PreTrainedModel, folder: Path) -> Path:
    save(model, folder)
    tokenizer(folder)
    return folder


def fisher(*words: Any) -> int:
    small = ["--tokens", "512", "--seq-length", "16"] if "--text" in words else []
    return main(["fisher", *map(str, words), *small])


def test_fisher_command_writes_file_for_penalty(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, out = text(tmp_path / "old.txt", 0), tmp_path / "fisher.safetensors"
    assert fisher(folder, "--text", old, "-o", out, "--json", "--batch", "8") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == 512 and told["kind"] == "true" and told["model"] == str(folder)
    model, read = load_with_tokenizer(open_folder(folder), "float32", "cpu")
    file = open_importance(out)
    assert file.metadata["tokens"] == "512"
    ids, _ = sample_sequences([str(old)], model, read, length=16, count=32, seed=0)
    found, _ = estimate_fisher(model, ids, options(batch=8))
    assert all(torch.equal(file.read(n), f) for n, f in disk_names(model, found).items())
    penalty = make_penalty(PenaltyOptions(kind="ewc", fisher=(out,)), small())
    assert penalty is not None
    assert fisher(folder, "--text", old, "-o", out) == 2
    assert "exists" in capsys.readouterr().err
    assert fisher(folder, "--text", old, "-o", out, "--overwrite", "--storage", "bf16", "--kind", "empirical") == 0
    assert "empirical Fisher" in capsys.readouterr().out
    assert open_importance(out).read("lm_head.weight").dtype == torch.bfloat16


def test_merge_equals_online_ewc(folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.safetensors" for n in ("one", "two", "both")]
    texts = [text(tmp_path / f"{n}.txt", i) for i, n in enumerate(("a", "b"))]
    assert fisher(folder, "--text", texts[0], "-o", paths[0]) == 0
    assert fisher(folder, "--text", texts[1], "-o", paths[1]) == 0
    assert fisher(folder, "--text", texts[1], "-o", paths[2], "--merge", paths[0], "--decay", "0.5") == 0
    one, two, both = map(open_importance, paths)
    for n in both.shapes:
        torch.testing.assert_close(both.read(n), 0.5 * one.read(n) + two.read(n))


@pytest.mark.parametrize("flags", [["width", "--factor", "2"], ["depth", "--method", "identity"]])
def test_fisher_from_growth(flags: list[str], folder: Path, tmp_path: Path, capsys: Any) -> None:
    source = random_importance(small(), tmp_path / "f.safetensors", kind="true", tokens=7)
    grown = tmp_path / "grown"
    assert main([flags[0], str(folder), *flags[1:], "-o", str(grown)]) == 0
    out = tmp_path / "mapped.safetensors"
    assert fisher(grown, "--from-growth", tmp_path / "f.safetensors", "-o", out) == 0
    from hf_grow.training.param_updates.param_provenance import load_plan

    plan = load_plan(grown)
    assert plan is not None
    file = open_importance(out)
    for n, f in grow_importance(plan, lambda n: source[n]):
        torch.testing.assert_close(file.read(n), f.float())
    from transformers import AutoModelForCausalLM

    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(grown, dtype=dtype)
        assert make_penalty(PenaltyOptions(kind="ewc", fisher=(out,)), model, plan) is not None
    random_importance(small(seed=4), tmp_path / "g.safetensors")
    assert fisher(grown, "--from-growth", tmp_path / "g.safetensors", "-o", tmp_path / "no.safetensors") == 2
    assert "the weights differ" in capsys.readouterr().err
    assert fisher(folder, "--from-growth", tmp_path / "f.safetensors", "-o", tmp_path / "no.safetensors") == 2
    assert "no growth.json" in capsys.readouterr().err


def test_expert_utility_is_sum_over_expert_tensors(tmp_path: Path, capsys: Any) -> None:
    folder = saved(make(BY_NAME["qwen3_moe-mixed"]), tmp_path / "moe")
    out, table = tmp_path / "f.safetensors", tmp_path / "utility.json"
    assert fisher(folder, "--text", text(tmp_path / "t.txt", 0), "-o", out, "--utility", table) == 0
    rows = json.loads(table.read_text())["utility"]
    file = open_importance(out)
    assert [len(r) for r in rows] == [4] * 6
    for layer, row in enumerate(rows):
        for expert, value in enumerate(row):
            parts = [n for n in file.shapes if f"layers.{layer}.mlp.experts.{expert}." in n]
            assert value == pytest.approx(sum(float(file.read(n).double().sum()) for n in parts), rel=1e-5)
    assert max(rows[1]) > 0 and rows[0] == [0] * 4
    words = ["experts", str(folder), "--add", "2", "--utility", str(table), "-o", str(tmp_path / "more"), "--dry-run"]
    assert main(words) == 0, capsys.readouterr().err


def test_fisher_dry_run_writes_nothing(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "f.safetensors"
    assert fisher(folder, "--text", text(tmp_path / "t.txt", 0), "-o", out, "--dtype", "float32", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    sizes = sorted(p.numel() for p in small().parameters())
    weights, gradients = 4 * sum(sizes), 4 * sum(sizes[-2:])
    assert told["memory_bytes"] == {"weights": weights, "gradients": gradients, "squares": weights, "total": 2 * weights + gradients}
    random_importance(small(), tmp_path / "source.safetensors")
    assert fisher(folder, "--from-growth", tmp_path / "source.safetensors", "-o", out, "--dry-run") == 0
    assert not out.exists()


@pytest.mark.parametrize("more", [[], ["--activation-checkpointing"]])
def test_fisher_dry_run_counts_the_flops_of_the_run(more: list[str], folder: Path, tmp_path: Path, capsys: Any) -> None:
    told = []
    for last in ("--dry-run", "--overwrite"):
        words = ["--text", text(tmp_path / "t.txt", 0), "-o", tmp_path / "f.safetensors", "--tokens", "60", "--seq-length", "16"]
        assert fisher(folder, *words, *more, "--json", last) == 0
        told.append(json.loads(capsys.readouterr().out)["flops"])
    assert told[0] == told[1]


def test_fisher_dry_run_counts_the_width_of_auto(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert fisher(folder, "--text", text(tmp_path / "t.txt", 0), "-o", tmp_path / "f.safetensors", "--dry-run", "--json") == 0
        weights.append(json.loads(capsys.readouterr().out)["memory_bytes"]["weights"])
    assert weights[0] == 2 * weights[1]


@dataclass(frozen=True)
class OneOfTwo(Processes):
    """A process whose partner has nothing to say."""

    count: int = 2

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor


def test_logits_that_are_not_finite_do_not_end_one_process_of_several() -> None:
    """It raises after the last collective, where the others raise too."""
    model = small()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    done = list[int]()
    with pytest.raises(ExecutionError, match=r"Fisher of .* is not finite"):
        estimate_fisher(model, rows(model, 4), options(batch=1), processes=OneOfTwo(), progress=done.append)
    assert len(done) == 2
    with pytest.raises(ExecutionError, match="logits are not finite"):
        estimate_fisher(model, rows(model, 4), options(batch=1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --text"),
        (["--text", "a", "--from-growth", "b"], "either --text"),
        (["--from-growth", "b", "--merge", "c", "--utility", "u.json", "--calibrate", "1"], "has 6 mistakes"),
        (["--text", "a", "--decay", "0.5"], "decay: requires merge"),
        (["--text", "a", "--calibrate", "0.1"], "require each other"),
        (["--text", "a", "--storage", "fp16"], "'fp32' or 'bf16'"),
        (["--text", "a", "--dtype", "float16"], "should be 'auto', 'float32', 'bfloat16' or 'float64'"),
        (["--text", "MISSING/nothing.txt"], "nothing.txt"),
        (["--text", "EMPTY"], "empty.txt"),
        (["--text", "TEXT", "--utility", "u.json"], "has no experts"),
        (["--text", "TEXT", "--merge", "no.safetensors"], "does not exist"),
        (["--text", "TEXT", "--merge", "OTHER"], "belongs to another model"),
        (["--text", "gone.txt", "--calibrate", "0.1", "--on", "away.txt", "--merge", "no.safetensors", "--dry-run"], "has 3 mistakes"),
        (["--text", "TEXT", "--utility", "FOLDER"], "is a folder"),
        (["--text", "TEXT", "--device", "cuda"], "cannot be moved to cuda"),
        (["--text", "TEXT", "FSDP1"], "no access to single gradients"),
        (["--text", "TEXT", "--calibrate", "0.1", "--on", "TEXT", "--device", "cuda:1", "TWO"], "has 3 mistakes"),
        (["--from-growth", "no.safetensors", "TWO"], "start it without a launcher"),
    ],
)
def test_fisher_input_errors(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = {"FSDP1": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "TWO": {"WORLD_SIZE": "2", "RANK": "0"}}
    for name in launches.keys() & set(words):
        for key, value in launches[name].items():
            monkeypatch.setenv(key, value)
    words = [w for w in words if w not in launches]
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty.txt").write_text(" ")
    random_importance(small(num_hidden_layers=1), tmp_path / "other.safetensors")
    known = {"EMPTY": tmp_path / "empty.txt", "TEXT": text(tmp_path / "t.txt", 0), "OTHER": tmp_path / "other.safetensors",
             "MISSING/nothing.txt": tmp_path / "nothing.txt", "FOLDER": tmp_path}  # fmt: skip
    assert fisher(folder, *(known.get(w, w) for w in words), "-o", tmp_path / "f.safetensors") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "f.safetensors").exists()


def test_out_of_memory_is_one_message(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("hf_grow.training.fisher.estimate_fisher", full)
    assert fisher(folder, "--text", text(tmp_path / "t.txt", 0), "-o", tmp_path / "f.safetensors") == 1
    said = capsys.readouterr().err
    assert "out of memory" in said and "--batch" in said and "Traceback" not in said


# ---- calibration --------------------------------------------------------------------------------------------------------------------------------


def test_calibration_finds_smallest_tolerated_lambda(tmp_path: Path) -> None:
    model = small()
    data = rows(model, 60, 12) % 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        model(data[:16], labels=data[:16], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    data[20:] += 32  # the new text has other words
    found, _ = estimate_fisher(model, data[:16], options())
    penalty = QuadraticPenalty("ewc", 1.0, {n: p.detach().clone() for n, p in model.named_parameters()}, lambda n, p: found[n])
    penalty.attach(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings: dict[str, Any] = {
        "old": data[:8],
        "train": data[20:50],
        "new": data[50:],
        "arguments": training(tmp_path, learning_rate=3e-3, max_steps=6),
    }
    plain = calibrate(model, penalty, tolerated=1e9, **settings)
    assert plain.chosen == 0 and len(plain.trials) == 1 and plain.trials[0].rise > 0
    done = calibrate(model, penalty, tolerated=plain.trials[0].rise / 2, **settings)
    kept = [t for t in done.trials if t.rise <= plain.trials[0].rise / 2]
    assert done.chosen == min(t.strength for t in kept) > 0
    assert done.trials[0] == plain.trials[0]  # every trial starts alike
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert done.old == pytest.approx(loss_on(model, data[:8]))
    with pytest.raises(InputError, match="still rises by"):
        calibrate(model, QuadraticPenalty("ewc", 1.0, dict(before), lambda n, p: 0.0), tolerated=1e-6, **settings)


@torch.no_grad()
def loss_on(model: PreTrainedModel, ids: Tensor) -> float:
    return float(model(input_ids=ids, labels=ids).loss)


def training(folder: Path, **more: Any) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 4,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder / "trainer"), **{**settings, **more})


def test_trial_equals_a_trainer_run(tmp_path: Path) -> None:
    """The losses after Trainer's own run, with its decay, schedule, clipping and micro-batches, over as many steps."""
    from transformers import Trainer

    how = training(
        tmp_path, learning_rate=3e-3, weight_decay=0.3, lr_scheduler_type="cosine", warmup_steps=0.34, gradient_accumulation_steps=2,
        max_steps=6, max_grad_norm=0.5, adam_beta2=0.9, per_device_train_batch_size=3,
    )  # fmt: skip
    one, two = small(), small()
    data = rows(one, 52, 12)
    train, old, new = data[:36], data[36:44], data[44:]
    penalty = QuadraticPenalty("ewc", 0.0, {n: p.detach().clone() for n, p in one.named_parameters()}, lambda n, p: 0.0)
    found = calibrate(one, penalty, old=old, train=train, new=new, tolerated=1e9, arguments=how)
    Trainer(model=two, args=how, train_dataset=[{"input_ids": r, "labels": r} for r in train]).train()
    assert found.new == pytest.approx(loss_on(small(), new))
    assert found.trials[0].old == pytest.approx(loss_on(two, old), rel=1e-4)
    assert found.trials[0].new == pytest.approx(loss_on(two, new), rel=1e-4) != found.new


@pytest.mark.parametrize("form", ["loss", "proximal"])
def test_diverging_trial_is_not_tolerated(form: str, tmp_path: Path) -> None:
    """A lambda far too large for the learning rate ends in weights that are not finite, or in a held model; both are an answer."""
    model = small()
    data = rows(model, 24, 12)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    penalty = QuadraticPenalty("l2sp", 1.0, dict(before), lambda n, p: 1e8, proximal=form == "proximal")
    how = training(tmp_path, learning_rate=1.0, max_steps=4, optim="sgd", max_grad_norm=0.0)
    settings: dict[str, Any] = {"old": data[:8], "train": data[8:16], "new": data[16:], "tolerated": 1e-9, "arguments": how}
    if form == "loss":
        with pytest.raises(InputError, match="still rises by nan"):
            calibrate(model, penalty, **settings)
    else:
        assert calibrate(model, penalty, **settings).chosen > 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_trial_schedule_is_compressed(tmp_path: Path) -> None:
    """Warm-up keeps its share: 100 of 1000 steps are 2 of 20."""
    from transformers import get_scheduler

    how = shortened(training(tmp_path, learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=100, max_steps=1000), 20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rates, seen = get_scheduler(how.lr_scheduler_type, optimizer, how.get_warmup_steps(how.max_steps), how.max_steps), []
    for _ in range(20):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
    assert seen == pytest.approx([0, 0.5, *(1 - i / 18 for i in range(18))])


def test_calibration_uses_recipe(folder: Path, tmp_path: Path, capsys: Any) -> None:
    old, new = text(tmp_path / "old.txt", 0), text(tmp_path / "new.txt", 1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\ndata: {train: new.txt, seq_length: 24}\nregularizer: {kind: l2sp, form: proximal}\nlearning_rate: 0.003\nmax_steps: 100\n"
        "per_device_train_batch_size: 2\ngradient_accumulation_steps: 2\nlr_scheduler_type: linear\nweight_decay: 0.05\nuse_cpu: true\n"
    )

    def of_recipe(name: str, *more: str) -> int:
        words = [
            "fisher",
            folder,
            "--text",
            old,
            "-o",
            tmp_path / name,
            "--tokens",
            "96",
            "--calibrate",
            "50",
            "--on",
            new,
            "--calibrate-steps",
            "3",
        ]
        return main([*map(str, words), "--recipe", str(recipe), "--device", "cpu", *more])

    assert of_recipe("f", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    found = {k: told["calibration"][k] for k in ("lr", "weight_decay", "schedule", "batch", "kind", "form")}
    assert found == {"lr": 0.003, "weight_decay": 0.05, "schedule": "linear", "batch": 4, "kind": "l2sp", "form": "proximal"}
    assert told["seq_length"] == 24
    assert of_recipe("g", "--calibrate-lr", "0.1") == 2
    assert "calibrate_lr: cannot be combined with recipe" in capsys.readouterr().err
    recipe.write_text("model: m\ndata: {train: new.txt}\nregularizer: {kind: si}\n")
    assert of_recipe("g") == 2
    assert "supports ewc and l2sp, not si" in capsys.readouterr().err
    recipe.write_text("model: m\ndata: {train: new.txt, intra_document_masking: true}\nregularizer: {kind: ewc, fisher: f}\n")
    assert of_recipe("g") == 2
    assert "without data.intra_document_masking" in capsys.readouterr().err
    assert of_recipe("g", "--intra-document-masking") == 2
    assert "--intra-document-masking: cannot be combined with --calibrate" in capsys.readouterr().err


def test_calibration_evaluates_on_held_out_text(folder: Path, tmp_path: Path, capsys: Any) -> None:
    old, new = text(tmp_path / "old.txt", 0), text(tmp_path / "new.txt", 1)
    words = ["--calibrate", "50", "--on", new, "--calibrate-steps", "5", "--calibrate-lr", "0.003"]
    assert fisher(folder, "--text", old, "-o", tmp_path / "f.safetensors", *words, "--json") == 0
    told = json.loads(capsys.readouterr().out)["calibration"]
    chosen = next(t for t in told["trials"] if t["lambda"] == told["lambda"])
    assert chosen["rise"] <= 50 and len(told["trials"]) >= 1
    assert fisher(folder, "--text", old, "-o", tmp_path / "g.safetensors", *words) == 0
    assert "<-" in capsys.readouterr().out
