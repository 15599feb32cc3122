"""Evaluation tasks before and after: with a small stand-in for the harness, and (slow) with lm-evaluation-harness itself."""

from __future__ import annotations

import inspect
import json
import logging
import random
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BY_NAME, make, save
from plain_tasks import TASK, checkpoints, plain_scores, questions, task_folder

from hf_grow import api
from hf_grow.checkpoint.reader import open_folder
from hf_grow.cli import main
from hf_grow.errors import ExecutionError, InputError
from hf_grow.verification import TaskOptions, function, verify_checkpoints
from hf_grow.verification.lm_eval import TaskRunner, harness_seeds, silence_output
from hf_grow.verification.tasks import side_by_side

STANDIN = Path(__file__).parents[1] / "support" / "standin"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return checkpoints(tmp_path_factory.mktemp("tasks"))


def forget() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The stand-in in the place of the harness; what it was asked to run."""
    held = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "lm_eval"}
    forget()
    monkeypatch.syspath_prepend(str(STANDIN))
    import lm_eval

    yield lm_eval.RUNS
    forget()
    sys.modules.update(held)


def test_both_models_are_scored_recorded_and_shown(
    pair: tuple[Path, Path], runs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = pair
    task = task_folder(tmp_path)
    assert main(["verify", str(old), str(new), "--tasks", str(task), "--limit", "20", "--batch-size", "3", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    before, after = (plain_scores(folder, questions()[:20]) for folder in pair)
    assert before != after
    found = report["metrics"]["tasks"]
    assert found == {"sits": {**{m: [before[m], after[m]] for m in before}, "words,strict": [1, 1]}}
    assert report["metrics"]["task_settings"] == {
        "harness": "lm-eval 0.0-standin",
        "dtype": "float32",
        "limit": 20,
        "batch_size": 3,
        "tasks": {"sits": {"shots": 0, "examples": 20, "version": 2.0, "higher_is_better": {"acc": True}}},
        "groups": {},
    }
    assert json.loads((new / "growth.json").read_text())["verification"] == report
    assert f"Running sits on {old} (1 of 2 models)" in captured.err
    assert f"Running sits on {new} (2 of 2 models)" in captured.err
    assert "a line on stdout" not in captured.out + captured.err
    assert [run["limit"] for run in runs] == [20, 20]
    assert [run["batch_size"] for run in runs] == [3, 3]
    assert not any(run["log_samples"] for run in runs)
    assert main(["verify", str(old), str(new), "--tasks", str(task)]) == 0
    said = capsys.readouterr().out
    whole = [plain_scores(folder, questions()) for folder in pair]
    row = next(line for line in said.splitlines() if "acc " in line and "sits" in line)
    assert all(f"{scores['acc']:.4g} ± {scores['acc_stderr']:.2g}" in row for scores in whole)
    assert "examples only" not in said


def test_one_model_at_a_time_with_tasks_of_its_own_and_the_same_seeds(
    pair: tuple[Path, Path], runs: list[dict[str, Any]], tmp_path: Path
) -> None:
    api.verify(*pair, tasks=task_folder(tmp_path))
    first, second = runs
    assert [run["others_alive"] for run in runs] == [0, 0]
    assert first["model"]() is None and second["model"]() is None
    assert first["tasks"]["sits"] is not second["tasks"]["sits"]
    assert first["tasks"]["sits"].seed == second["tasks"]["sits"].seed == 1234
    assert first["random"] == second["random"]


@pytest.mark.parametrize(("said", "asked", "meant"), [(None, None, 0), (None, 3, 3), (2, None, 2), (2, 3, 3), (0, 3, 0)])
def test_shots(said: int | None, asked: int | None, meant: int, runs: list[dict[str, Any]], tmp_path: Path) -> None:
    task = task_folder(tmp_path)
    if said is not None:
        task.write_text(task.read_text() + f"num_fewshot: {said}\n")
    harness = TaskRunner(str(task), shots=asked)
    assert harness._loaded is not None
    assert harness._loaded["tasks"]["sits"].get_config("num_fewshot") == meant


def test_a_folder_gives_all_of_its_tasks_and_what_they_include_is_no_task(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    task_folder(tmp_path / "a", "sits")
    task_folder(tmp_path / "b" / "deeper", "stands")
    (tmp_path / "a" / "_common.yaml").write_text("output_type: multiple_choice\n")
    (tmp_path / "a" / "own.yaml").write_text("include: _common.yaml\nprocess: !function own.f\n")
    assert TaskRunner(str(tmp_path)).names == ["sits", "stands"]
    assert TaskRunner(f"{tmp_path / 'b'}, {tmp_path / 'a' / 'sits.yaml'}").names == ["stands", "sits"]


# Refused before anything runs


def refused(text: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        TaskRunner(text, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_unknown_names_are_told_with_near_ones(runs: list[dict[str, Any]]) -> None:
    message = refused("arc_esy,hellaswag,quite-else")
    assert "Unknown tasks: 'arc_esy' (did you mean arc_easy" in message
    assert "'quite-else'." in message
    assert "hellaswag" not in message


def test_data_that_needs_the_network_where_there_is_none(runs: list[dict[str, Any]]) -> None:
    message = refused("arc_easy")
    assert "Task arc_easy: its data cannot be downloaded: Couldn't reach 'arc_easy' on the Hub" in message
    assert "network" in message


def test_a_task_that_does_not_load_says_why_in_one_line(runs: list[dict[str, Any]]) -> None:
    assert refused("broken") == "Task broken cannot be used: TypeError: unexpected keyword argument 'misspelt'"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"task: [unclosed\n", "is not valid YAML"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"- a\n- b\n", "got list"),
        (b"dataset_path: json\n", "neither `task` nor `group`"),
    ],
)
def test_a_file_that_is_no_task(content: bytes, what: str, runs: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    assert what in refused(str(tmp_path / "bad.yaml"))
    assert "bad.yaml" in refused(str(tmp_path / "bad.yaml"))
    if what != "neither `task` nor `group`":
        assert what in refused(str(tmp_path))  # a broken file in a folder is not passed over
    else:
        assert "contains no task file" in refused(str(tmp_path))


def test_files_that_are_not_there(runs: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refused("sits.yaml")
    assert "does not exist" in refused("./tasks")
    assert "Unknown task: 'tasks'" in refused("tasks")
    task = task_folder(tmp_path)
    (tmp_path / "docs.jsonl").unlink()
    message = refused(str(task))
    assert "docs.jsonl" in message
    assert "are relative to the file's folder" in message


def test_tasks_that_cannot_be_run_here(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    assert "is multimodal" in refused(str(task_folder(tmp_path, "pictures")))
    assert "code generated by the model" in refused(str(task_folder(tmp_path, "codes")))
    task = task_folder(tmp_path, "sits")
    task.write_text(task.read_text().replace("metric: acc_norm", "metric: no_such_metric"))
    assert "metric 'no_such_metric' exists neither" in refused(str(task))
    assert "--tasks is empty" in refused(" , ")
    task_folder(tmp_path / "again", "pictures2")
    (tmp_path / "again" / "other.yaml").write_text(TASK.format(name="pictures2"))
    assert "requested twice" in refused(str(tmp_path / "again"))


def test_without_the_harness_the_message_says_how_to_install_it(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["verify", *map(str, pair), "--tasks", "arc_easy"]) == 2
    said = capsys.readouterr()
    assert "which is not installed" in said.err
    assert "pip install 'hf-grow[eval]'" in said.err
    assert said.out == ""  # nothing was checked before


def test_a_harness_that_does_not_import_is_no_traceback(runs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    assert "cannot be imported" in refused("arc_easy")


def test_flags_that_contradict_each_other(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = map(str, pair)
    assert main(["verify", old, new, "--limit", "3"]) == 2
    assert "limit without tasks" in capsys.readouterr().err
    assert main(["verify", old, new, "--tasks", "arc_easy", "--limit", "0", "--shots", "many"]) == 2
    said = capsys.readouterr().err
    assert "2 mistakes" in said and "limit" in said and "shots" in said
    assert main(["verify", old, new, "--tasks", "arc_easy", "--structure-only"]) == 2
    assert "--tasks cannot be run with --structure-only" in capsys.readouterr().err


def test_tasks_need_a_tokenizer(tmp_path: Path) -> None:
    save(make(BY_NAME["mistral"]), tmp_path / "old")
    api.grow(tmp_path / "old", tmp_path / "new", "dus")
    with pytest.raises(InputError, match="old has no tokenizer"):
        api.verify(tmp_path / "old", tmp_path / "new", tasks="arc_easy")


# While it runs, and after


def test_a_task_that_fails_half_way_is_one_message_and_status_1(
    pair: tuple[Path, Path], runs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *map(str, pair), "--tasks", str(task_folder(tmp_path, "fails"))]) == 1
    assert f"Running fails on {pair[0]} failed: ZeroDivisionError: division by zero\n" in capsys.readouterr().err
    with pytest.raises(ExecutionError):
        api.verify(*pair, tasks=str(tmp_path / "fails.yaml"))


def test_a_broken_model_is_not_evaluated(pair: tuple[Path, Path], runs: list[dict[str, Any]], tmp_path: Path) -> None:
    options = TaskOptions(tasks=str(task_folder(tmp_path)))
    old, new = map(open_folder, pair)
    new.config["rms_norm_eps"] = 1  # not the plan's
    report = verify_checkpoints(old, new, tasks=options)
    assert not report.ok
    assert runs == []
    assert "tasks" not in report.metrics


def test_results_outlive_a_verification_without_tasks_while_the_weights_are_the_same(
    pair: tuple[Path, Path], runs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = map(str, pair)

    def recorded() -> dict[str, Any]:
        return json.loads((pair[1] / "growth.json").read_text())["verification"]["metrics"]

    assert main(["verify", old, new, "--tasks", str(task_folder(tmp_path)), "--limit", "5"]) == 0
    before = recorded()
    assert before["tasks"]
    assert main(["verify", old, new, "--structure-only"]) == 0
    assert recorded() == before
    assert main(["verify", old, new]) == 0
    assert recorded() == before
    weights = pair[1] / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        assert main(["verify", old, new, "--structure-only"]) == 1
        assert recorded() == {}
    finally:
        weights.write_bytes(data)


def test_results_side_by_side() -> None:
    before = {
        "a": {"alias": "a", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": np.float32(0.25)},
        "gone": {"x,none": 1},
    }
    after = {"a": {"acc,none": 0.75, "acc_stderr,none": 0.1, "em,strict": float("nan"), "flag,none": True}}
    found = side_by_side(before, after)
    assert list(found) == ["a", "gone"]
    assert found["gone"] == {"x": [1.0, None]}
    assert found["a"]["acc"] == [0.5, 0.75]
    assert found["a"]["acc_stderr"] == [None, 0.1]
    assert found["a"]["em,strict"][0] == 0.25 and type(found["a"]["em,strict"][0]) is float
    assert set(found["a"]) == {"acc", "acc_stderr", "em,strict"}


def test_what_was_quiet_and_seeded_is_as_before() -> None:
    logger = logging.getLogger("lm_eval")
    level, python, numpy, torches = logger.level, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    drawn: list[float] = []

    def draw() -> list[float]:
        return [random.random(), np.random.rand(), float(torch.rand(()))]

    def failing() -> None:
        with silence_output(), harness_seeds():
            assert not logger.isEnabledFor(logging.CRITICAL)
            drawn.extend(draw())
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert logger.level == level
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy
    assert torch.equal(torch.get_rng_state(), torches)
    with harness_seeds():
        assert draw() == drawn


# The harness itself


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """lm-evaluation-harness, its data cached in a folder of the test, and no network."""
    lm_eval = pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return lm_eval


@pytest.mark.slow
def test_the_harness_scores_as_the_plain_way(
    harness: Any, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(checkpoint: Any, dtype: str) -> Any:
        assert not [r for r in loaded if r() is not None], "two models in memory"
        model = function.load_model(checkpoint, dtype)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("hf_grow.verification.tasks.load_model", load)
    report = api.verify(*pair, tasks=task_folder(tmp_path / "t"))
    assert len(loaded) == 2
    before, after = (plain_scores(folder, questions()) for folder in pair)
    found = report.metrics["tasks"]["sits"]
    assert set(found) == set(before)
    for metric, value in before.items():
        assert found[metric] == pytest.approx([value, after[metric]], abs=1e-9)
    assert report.metrics["task_settings"]["tasks"]["sits"] == {
        "shots": 0, "examples": 30, "version": 2.0, "higher_is_better": {"acc": True, "acc_norm": True},
    }  # fmt: skip
    assert report.metrics["task_settings"]["harness"] == f"lm-eval {harness.__version__}"
    fewer = api.verify(*pair, tasks=tmp_path / "t" / "sits.yaml", limit=7, batch_size=2).metrics["tasks"]["sits"]
    assert fewer["acc"] == [plain_scores(folder, questions()[:7])["acc"] for folder in pair]


@pytest.mark.slow
def test_figures_are_those_of_the_harness_s_own_entry_point(
    harness: Any, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With examples before each question, which are drawn by a seed."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = task_folder(tmp_path / "t")
    found = api.verify(*pair, tasks=task, shots=2)
    monkeypatch.chdir(tmp_path / "t")
    for at, folder in enumerate(pair):
        lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=8)
        wanted = harness.simple_evaluate(
            lm, tasks=[str(task)], task_manager=TaskManager(include_defaults=False), num_fewshot=2, log_samples=False
        )["results"]["sits"]
        assert {m: pair[at] for m, pair in found.metrics["tasks"]["sits"].items()} == {
            m: wanted[f"{m},none"] for m in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        }
    assert found.metrics["task_settings"]["tasks"]["sits"]["shots"] == 2


@pytest.mark.slow
def test_a_metric_script_of_evaluate_and_a_group_work_without_the_network(harness: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Paths are relative to the file's folder. The metric: characters of the answer, which the model generates greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task_folder(tmp_path)
    (tmp_path / "characters").mkdir()
    (tmp_path / "characters" / "characters.py").write_text(
        "import datasets\nimport evaluate\n\n\nclass Characters(evaluate.Metric):\n    def _info(self):\n        text = datasets.Value('string')\n"
        "        features = datasets.Features({'predictions': text, 'references': text})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n        return {'characters': sum(map(len, predictions)) / len(predictions)}\n"
    )
    says = TASK.format(name="says").replace("multiple_choice", "generate_until").replace('doc_to_choice: "{{choices}}"\n', "")
    says = says.split("metric_list:")[0].replace("{{gold}}", "{{choices[0]}}") + (
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6}\n'
        "metric_list:\n  - {metric: characters, hf_evaluate: true, aggregation: mean, higher_is_better: true}\n"
    )
    (tmp_path / "says.yaml").write_text(says)
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [sits, says]\naggregate_metric_list:\n  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    )
    found = api.verify(*pair, tasks=tmp_path / "both.yaml", limit=4).metrics
    assert set(found["task_settings"]["groups"]["both"]) == {"sits", "says"}
    assert found["tasks"]["both"]["acc"] == found["tasks"]["sits"]["acc"]
    for at, folder in enumerate(pair):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        lengths = []
        for doc in questions()[:4]:
            ids = tokenizer(doc["q"], return_tensors="pt")["input_ids"]
            said = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True)
            lengths.append(len(said.split("\n")[0]))
        assert found["tasks"]["says"]["characters"][at] == pytest.approx(np.mean(lengths))


@pytest.mark.slow
def test_the_harness_refuses_as_the_stand_in_does(harness: Any, tmp_path: Path) -> None:
    message = refused("arc_esy")
    assert "Unknown task: 'arc_esy' (did you mean arc_easy" in message
    assert "Task arc_easy: its data cannot be downloaded" in refused("arc_easy")
    task = task_folder(tmp_path)
    sound = task.read_text()
    for change, what in {
        ("docs.jsonl", "nowhere.jsonl"): "Paths in a task file are relative",
        ("test_split: test", "test_split: other"): "cannot be used: KeyError: 'other'",
        ("multiple_choice", "nonsense"): "Got invalid output_type 'nonsense'",
        ("task: sits", "task: sits\nmisspelt: 3"): "misspelt",
        ('"{{q}}"', "!function nowhere.f"): "Cannot import module 'nowhere'",
        ("metric: acc,", "metric: no_such_metric,"): "metric 'no_such_metric' exists neither",
        ("task: sits", "task: sits\ninclude: nowhere.yaml"): "Paths in a task file are relative",
        ("task: sits", "task: sits\nunsafe_code: true"): "code generated by the model",
    }.items():
        task.write_text(sound.replace(*change))
        assert what in refused(str(task)), change


@pytest.mark.slow
def test_the_harness_has_what_is_stood_in_for(harness: Any) -> None:
    """The names and parameters that hf-grow uses."""
    from lm_eval import evaluator, tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    def parameters(function: Any) -> set[str]:
        return set(inspect.signature(inspect.unwrap(function)).parameters)

    assert {"lm", "task_dict", "limit", "log_samples"} <= parameters(evaluator.evaluate)
    assert {"include_path", "include_defaults"} <= parameters(tasks.TaskManager)
    assert {"pretrained", "tokenizer", "batch_size"} <= parameters(HFLM)
    assert all(callable(getattr(ConfigurableTask, n)) for n in ("get_config", "set_config", "set_fewshot_seed"))
    assert isinstance(tasks.TaskManager(include_defaults=False).all_tasks, list)
