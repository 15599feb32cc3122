"""No flag is ignored in silence: in every pair of flags each changes what is done, or the pair is refused.

What is done is looked at from outside: the growth that is planned, and the calls that do the work. A flag counts as heard if some other value of it
(or leaving it out) changes that, or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make, save
from option_pairs import REFUSED, Outcome, unheard, words

from hf_grow import api
from hf_grow.api import growth_job
from hf_grow.api.output_options import OutputOptions
from hf_grow.checkpoint.tensor_cache import TensorCache
from hf_grow.checkpoint.writer import Result, layout
from hf_grow.cli import grow, main, train, verify
from hf_grow.cli.grow import CommandOptions
from hf_grow.cli.verify import CompareOptions
from hf_grow.errors import GrowError
from hf_grow.growth.tensormap import Expr, Noise, Orthogonal
from hf_grow.methods import METHODS
from hf_grow.options import Excludes, Options, Requires, combined, unmet_requirements, validate
from hf_grow.publish.push import PushResult
from hf_grow.publish.stream import StreamSink
from hf_grow.training.config.fisher_options import FisherFileOptions, FisherOptions
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.config.train_config import TrainRecipe


def random(expr: Expr) -> bool:
    return isinstance(expr, Noise | Orthogonal) or any(map(random, expr.children()))


# ---- growths -------------------------------------------------------------------------------------------------------------------------------

SAMPLES: dict[str, list[Any]] = {
    "noise": [0.1, 0.2], "seed": [3, 4], "to": ["70K", "90K", "120K"], "layers_to": [6, 8], "drop": [1, 0], "seam_average": [1, 0], "factor": [2, 3],
    "at": ["0,2", "1"], "layers": ["0-3,3", "0-2,1-3"], "hidden": [96, 56], "intermediate": [80, 60], "expert_intermediate": [80, 60],
    "shared_intermediate": [56, 40], "heads": [12, 8], "kv_heads": [4, 2], "head_dim": [16, 24], "ffn": ["null", "copies"], "new_heads": ["null", "split"],
    "rms_mode": ["eps", "scale"], "symmetry": ["noise", "none", "split"], "strength": [0.2, 0.1], "noise_db": [10.0, 20.0], "fixed_kv": [True, False], "lossless": [True, False],
    "choose": [2, 1], "width_method": ["pad", "aki"], "depth_method": ["dus", "interleave"], "multiple_of": [16, 17, 64], "max_depth": [5, 9, 1],
    "min_depth": [5, 6, 12], "experts": [8, 4], "add": [1, 2], "top_k": [1, 2, 3], "init": ["noise", "drop", "fine-grained", "copy"], "shards": [2, 4],
    "weights": ["1,2", "1"], "shared_expert": ["zero", "half"], "router": ["zeros", "orthogonal", "normal"], "router_std": [0.1, 0.2],
    "prompt_pooling": ["last", "mean"], "copy_from": ["0,1", "1"], "utility": [{"utility": [3, 1, 1, 1]}, {"utility": [1, 1, 1, 3]}], "router_noise": [0.1, 0.2],
}  # fmt: skip
FILES = {"experts_from", "prompts"}
"""Options that read further checkpoints; their own tests lie in test_donors and test_router_init."""
FAR = {"layers": {"layers": "0-3,1"}, "hybrid": {"to": "80K"}, "experts": {"experts": 8}}
"""What a growth needs beside the pair, where the pair itself does not say how far it goes."""


def planned(source: Path, method: str, options: Mapping[str, Any]) -> Outcome:
    """Everything of the model that would be written, or REFUSED."""
    try:
        growth = api.plan(source, method, **options).growth
    except GrowError:
        return REFUSED
    return growth.config, growth.tensors, growth.axes, growth.seed if any(map(random, growth.tensors.values())) else None


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flags")
    return {n: save(make(BY_NAME[n], dtype=torch.bfloat16), root / n) for n in ("mistral", "mixtral", "qwen2_moe")}


def test_every_option_of_every_method_has_samples() -> None:
    known = {name for m in METHODS.values() for name in m.options.model_fields}
    assert known == SAMPLES.keys() | FILES


CASES = [
    pytest.param(m, f, marks=() if f == "mistral" or (m in ("tile", "experts") and f == "mixtral") else pytest.mark.slow)
    for m in METHODS
    for f in ("mistral", "mixtral", *(("qwen2_moe",) if METHODS[m].kind == "width" else ()))
]


@pytest.mark.parametrize(("method", "family"), CASES)
def test_in_every_pair_of_a_growth_both_options_are_heard_or_refused(method: str, family: str, sources: dict[str, Path]) -> None:
    names = [n for n in METHODS[method].options.model_fields if n not in FILES]
    tried = 0
    for a, b in combinations(names, 2):
        far = {k: v for k, v in FAR.get(method, {"factor": 2} if METHODS[method].kind == "width" else {}).items() if k not in (a, b)}
        for base in ({}, far) if far else ({},):
            given = {**base, a: SAMPLES[a][0], b: SAMPLES[b][0]}
            left = unheard(lambda o: planned(sources[family], method, o), given, {**SAMPLES, **{k: [v] for k, v in base.items()}})
            assert not {a, b} & set(left), (given, left)
            tried += planned(sources[family], method, given) != REFUSED
    assert tried


def test_mixtral_has_one_size_of_experts(sources: dict[str, Path]) -> None:
    with pytest.raises(GrowError, match="give one"):
        api.plan(sources["mixtral"], "tile", intermediate=80, expert_intermediate=120)
    assert api.plan(sources["mixtral"], "tile", expert_intermediate=120).growth.config["intermediate_size"] == 120


def test_an_option_that_does_nothing_is_refused_for_flags_recipes_steps_and_python_alike(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources["mistral"]
    assert main(["depth", str(source), "--method", "stack", "--seed", "3", "--dry-run"]) == 2
    assert "--seed has no effect here" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text(f"source: {source}\nmethod: stack\nseed: 3\ndry_run: true\n")
    assert main(["grow", str(tmp_path / "r.yaml")]) == 2
    assert "--seed has no effect here" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text(
        f"source: {source}\ndry_run: true\nsteps: [{{method: stack}}, {{method: tile, factor: 2, symmetry: none, strength: 0.1}}]\n"
    )
    assert main(["grow", str(tmp_path / "r.yaml")]) == 2
    assert "Step 2 (tile): --strength has no effect here" in capsys.readouterr().err
    with pytest.raises(GrowError, match="--seed has no effect here"):
        api.plan(source, "stack", seed=3)
    assert api.plan(source, "stack", seed=3, noise=0.1).growth.seed == 3


# ---- how a growth is written and published --------------------------------------------------------------------------------------------------

OUTPUT: dict[str, list[Any]] = {
    "output": ["{tmp}/a", "{tmp}/b"], "max_shard_size": ["1MB", "2MB"], "resume": [True], "overwrite": [True], "memory_budget": ["1MiB", "2MiB"],
    "allow_nonfinite": [True], "stream_source": [True], "source_cache": ["1GB", "3GB"], "with_optimizer": ["{tmp}/run", "{tmp}/other"],
    "optimizer_policy": ["reset", "keep-and-zero", "map"], "exact_steps": [True], "push": ["you/model", "you/other"], "private": [True],
    "push_revision": ["x", "y"], "create_pr": [True], "message": ["one", "two"], "stream_push": [True],
}  # fmt: skip


class Called(Exception):
    """The work would begin here."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command is about to do, without doing it: no file is written and no Hub is asked."""
    made: list[Any] = []

    def told(name: str, result: Any = None) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            made.append((name, *map(plain, arguments), *sorted((k, plain(v)) for k, v in named.items())))
            return result

        return call

    def plain(value: Any) -> Any:
        return (
            value
            if isinstance(value, str | int | float | bool | tuple | type(None))
            else str(value)
            if isinstance(value, Path)
            else repr(value)
            if hasattr(value, "repo")
            else ""
        )

    def told_cache(plan: Any, checkpoint: Any, shards: Any, *, keep: int) -> TensorCache:
        made.append(("cache", keep))
        return TensorCache(plan, checkpoint, shards, keep=keep)

    class ToldSink(StreamSink):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(("sink", repr(self.to)))
            self.pushed = pushed

    pushed = PushResult("you/model", "url", "c" * 40, None, 1, 1)
    monkeypatch.setattr(growth_job, "layout", lambda targets, size: made.append(("layout", size)) or layout(targets, size))
    # A source that seems to be on the Hub.
    monkeypatch.setattr(growth_job, "prefer_cached", lambda checkpoint: replace(checkpoint, folder=None))
    monkeypatch.setattr(growth_job, "_was_given_as_folder", lambda checkpoint: False)
    monkeypatch.setattr(growth_job, "fetch_companions", told("companions", Path()))
    monkeypatch.setattr("hf_grow.checkpoint.tensor_cache.TensorCache", told_cache)
    monkeypatch.setattr(growth_job, "check_trainer_checkpoint", told("check optimizer"))
    monkeypatch.setattr(growth_job, "warn_if_consolidating", told("unsettled"))
    monkeypatch.setattr(growth_job, "check_destination", told("destination"))
    monkeypatch.setattr(growth_job, "prepare_repo", lambda to: made.append(("prepare", repr(to))) or to)
    monkeypatch.setattr(growth_job, "grow_checkpoint_state", told("optimizer", "also"))
    monkeypatch.setattr(growth_job, "StreamSink", ToldSink)
    monkeypatch.setattr(growth_job.PartialFolder, "check", told("place"))
    monkeypatch.setattr("hf_grow.convert.execute.execute", told("execute", Result(Path(), {}, 1, 1.0, 0)))
    monkeypatch.setattr(growth_job, "make_manifest", lambda folder: None)
    monkeypatch.setattr(growth_job, "push", told("push", pushed))
    monkeypatch.setattr(grow, "publishing_bar", lambda *arguments, **named: nullcontext(lambda nbytes: None))
    return made


def test_every_output_option_has_samples() -> None:
    assert combined(CommandOptions, OutputOptions).model_fields.keys() == OUTPUT.keys() | {"dry_run"}


@pytest.mark.parametrize("through", ["flags", "recipe"])
def test_in_every_pair_of_output_options_both_are_heard_or_refused(
    through: str,
    calls: list[Any],
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    def outcome(options: Mapping[str, Any]) -> Outcome:
        calls.clear()
        if through == "flags":
            command = ["dus", str(sources["mistral"]), *words(options, tmp_path)]
        else:  # half in the file, half on the command line: what one needs may stand in the other
            first = dict(list(options.items())[:1])
            lines = [f"{k}: {str(v).lower() if v is True else str(v).format(tmp=tmp_path)}" for k, v in first.items()]
            (tmp_path / "recipe.yaml").write_text("\n".join([f"source: {sources['mistral']}", *lines]) + "\n")
            command = ["grow", "recipe.yaml", *words({k: v for k, v in options.items() if k not in first}, tmp_path)]
        status = main(command)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return REFUSED if status else list(calls)

    heard = 0
    for a, b in combinations(OUTPUT, 2):
        given = {a: OUTPUT[a][0], b: OUTPUT[b][0]}
        assert not unheard(outcome, given, OUTPUT), given
        heard += outcome(given) != REFUSED
    assert heard > 40


# ---- other commands -------------------------------------------------------------------------------------------------------------------------

COMPARE: dict[str, list[Any]] = {
    "structure_only": [True], "text": ["{tmp}/text", "{tmp}/more"], "tokens": [64, 32], "dtype": ["float64", "bfloat16"], "no_record": [True],
    "tasks": ["one", "two"], "limit": [1, 2], "shots": [1, 2], "batch_size": [1, 2],
}  # fmt: skip


TRAIN: dict[str, list[Any]] = {"processes": ["2"], "accelerate": ["there.yaml"]}


def test_in_every_pair_of_verify_both_flags_are_heard_or_refused(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CompareOptions.model_fields.keys() == COMPARE.keys()
    for name in ("text", "more"):
        (tmp_path / name).write_text("words")
    made: list[Any] = []

    class Fine:
        ok, checks, metrics = True, (), {}

        def add(self, *a: Any) -> None:
            pass

        def to_json(self) -> dict[str, Any]:
            return {}

    def checked(
        *a: Any, structure_only: bool, text: Any, tokens: int, dtype: str, progress: Any, notify: Any, revision: Any, **tasks: Any
    ) -> Fine:
        """What api.verify hands on: nothing of the comparison where only the structure is looked at."""
        made.append(
            (structure_only, None if structure_only else (text, tokens, dtype), sorted(tasks.items()) if tasks.get("tasks") else None)
        )
        return Fine()

    monkeypatch.setattr(verify, "verify", checked)
    monkeypatch.setattr(verify, "show_report", lambda report: None)
    monkeypatch.setattr(verify, "_store", lambda *a: made.append("recorded"))

    def outcome(options: Mapping[str, Any]) -> Outcome:
        made.clear()
        status = main(["verify", str(sources["mistral"]), str(sources["mistral"]), *words(options, tmp_path)])
        capsys.readouterr()
        return REFUSED if status else list(made)

    for a, b in combinations(COMPARE, 2):
        assert not unheard(outcome, {a: COMPARE[a][0], b: COMPARE[b][0]}, COMPARE), (a, b)


def declared(*models: type[Options]) -> list[tuple[type[Options], str, Requires | Excludes]]:
    return [
        (m, name, rule)
        for m in models
        for name, f in m.model_fields.items()
        for rule in f.metadata
        if isinstance(rule, Requires | Excludes)
    ]


@pytest.mark.parametrize(
    ("command", "models"),
    [
        (["replay", "{source}", "-o", "{tmp}/out"], [ReplayOptions]),
        (["fisher", "{source}", "-o", "{tmp}/out"], [FisherFileOptions, FisherOptions]),
        (["dus", "{source}"], [OutputOptions]),
        (["verify", "{source}", "{source}"], [CompareOptions]),
        (["train", "llama_pro_domain"], [train.RunOptions]),
    ],
    ids=lambda v: v[0] if isinstance(v[0], str) else "",
)
def test_what_a_flag_needs_is_asked_for(
    command: list[str], models: list[type[Options]], sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the declarations: alone (or beside what excludes it) each such flag is refused by its name, before anything is read."""
    found = declared(*models)
    assert found
    for model, name, rule in found:
        value = [] if rule.other == "structure_only" else TRAIN.get(rule.other, ["there"])[:1]
        other = [] if isinstance(rule, Requires) else [f"--{rule.other.replace('_', '-')}", *value]
        flag = {**OUTPUT, **COMPARE, **TRAIN}.get(name, [_sample(model, name)])[0]
        status = main([w.format(source=sources["mistral"], tmp=tmp_path) for w in command] + words({name: flag}, tmp_path) + other)
        said = capsys.readouterr().err
        assert (status, f"{name}: " in said) == (2, True) or (rule.other == "optimizer_policy" and status == 2), (name, said)
    assert not (tmp_path / "out").exists()


def _sample(model: type[Options], name: str) -> Any:
    """A value that the field takes: its default, or the only other one."""
    default = model.model_fields[name].default
    return True if default is False else "cpu" if default is None else default


def test_the_keys_of_a_training_recipe_are_asked_for_what_they_need() -> None:
    recipe = {
        "model": "m",
        "data": {"train": "t", "replay": {"self": {"prompt_tokens": 3, "revision": "x"}}},
        "regularizer": {"lambda": 3.0, "storage": "bf16", "xi": 0.1},
        "distill": {"cache": "there"},
        "monitor": {"max_reactions": 1},
    }
    parsed, wrong = validate(TrainRecipe, recipe)
    assert wrong == [] and parsed is not None
    found = {line.split(": ")[0] for line in unmet_requirements(parsed)}
    assert found == {
        "data.replay.self.prompt_tokens", "data.replay.self.revision", "regularizer.lambda", "regularizer.storage", "regularizer.xi",
        "distill.cache", "monitor.max_reactions",
    }  # fmt: skip


def test_publishing_flags_belong_to_a_repository() -> None:
    publishing = {"private", "push_revision", "create_pr", "message", "stream_push"}
    assert {name for _, name, rule in declared(OutputOptions) if rule.other == "push"} == publishing
