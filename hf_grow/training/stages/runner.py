"""Carries out a recipe with `stages`: each stage is a training of `hf_grow.training.train`, each growth happens while the next one is loaded.

    RUN/initial/                    a fresh model, before the first stage
    RUN/stage-00/ ... stage-NN/     as `hf-grow train` writes them: checkpoints, events.jsonl, and at the stage's end a plain model with growth.json
    RUN/run.json                    the stages that have ended, and the checkpoint that the next one starts from
    RUN/events.jsonl                one line for each stage that begins, and each that ends

A growth has no files of its own, so there is nothing to repair: noise depends on seed and names alone, and a stage that was interrupted before its
first checkpoint grows again from the checkpoint of the stage before, to the same weights.
"""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.reader import GROWTH, Checkpoint
from hf_grow.checkpoint.source import open_source
from hf_grow.common.safe_files import read_json
from hf_grow.convert.metadata import unwritten_checkpoint
from hf_grow.errors import ExecutionError, InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import DTYPE_NAMES
from hf_grow.model.flops import count_flops
from hf_grow.model.param_count import count_parameters
from hf_grow.options import parse, raise_errors
from hf_grow.training.config.data_options import DataOptions
from hf_grow.training.config.stage_options import FreshModel, Stage, read_stages, recipe_of
from hf_grow.training.config.train_config import RecipeData, collect_mistakes
from hf_grow.training.distributed.launch import is_main_process
from hf_grow.training.growth_state.state_files import GROWTH_STATE
from hf_grow.training.regularizers.importance_file import open_importance
from hf_grow.training.regularizers.origin import PenaltyOrigin
from hf_grow.training.regularizers.si import IMPORTANCE_FILE
from hf_grow.training.setup.growth_at_load import plan_growth
from hf_grow.training.setup.recipe_checks import arguments_for, check_data, check_output, clear_output, default_output
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.sharding.row_source import StoredRows
from hf_grow.training.stages.forecast import StageGrowth
from hf_grow.training.stages.fresh_model import describe_fresh, write_fresh
from hf_grow.training.stages.run_log import RUN_FILE, RunLog
from hf_grow.training.stages.stop import StageStop
from hf_grow.training.stages.triggers import StageEnd
from hf_grow.training.train import PENALTY_FOLDER, TrainResult, train
from hf_grow.training.trainer.checkpointing import last_checkpoint
from hf_grow.training.trainer.events import EVENTS_FILE, EventLog

INITIAL = "initial"


@dataclass(frozen=True)
class RunResult:
    """What a run in stages reports: the stages of this call, in order. `output` is the folder of the run, `last` that of the trained model."""

    output: Path
    stages: Sequence[TrainResult]
    log: Sequence[Mapping[str, Any]]

    @property
    def last(self) -> TrainResult:
        return self.stages[-1]

    def to_json(self) -> dict[str, Any]:
        return {"output": str(self.output), "stages": [s.to_json() for s in self.stages], "ended": list(self.log)}


def train_stages(
    read: RecipeData,
    *,
    output: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = lambda message: None,
    show: Callable[[str], None] = lambda line: None,
) -> RunResult:
    """Carries out all stages of a recipe. Raises InputError before anything is written if something is wrong with any of them.

    ``resume`` goes on in the stage that was interrupted; the weights are those of a run that was not.
    """
    raise_errors(read.where, read.mistakes)
    stages = read_stages(read.given)
    run = StagedRun(read, stages, output, notify, show)
    check_output(run.folder, resume=resume, overwrite=overwrite)
    run.plan_growths()
    run.begin(resume=resume, overwrite=overwrite)
    results = [run.train_stage(stage) for stage in stages[len(run.log.ended) :]]
    if not results:
        raise InputError(f"All stages of {run.folder} have ended.", hint="Start another run with -o, or replace this one with --overwrite.")
    return RunResult(run.folder, results, run.log.ended)


class StagedRun:
    """A run in stages: planned by `plan_growths`, opened by `begin`, carried out stage by stage by `train_stage`."""

    log: RunLog
    events: EventLog
    models: Sequence[Checkpoint]
    """The model of every stage, without weights."""
    dtype: str
    """Of the model that the run started from; results are stored in it."""

    def __init__(self, read: RecipeData, stages: Sequence[Stage], output: str | None, notify: Notify, show: Callable[[str], None]) -> None:
        self.read, self.stages, self.notify, self.show = read, stages, notify, show
        model = read.given["model"]
        self.fresh = parse(FreshModel, model, where="model") if isinstance(model, Mapping) else None
        self.revision: str | None = read.given.get("revision")
        name = Path(self.fresh.config).stem if self.fresh is not None else str(model)
        self.folder = Path(output or read.given.get("output") or default_output(name))
        self.model = str(self.folder / INITIAL) if self.fresh is not None else str(model)
        """What the first stage starts from."""

    def plan_growths(self) -> list[Checkpoint]:
        """The model of every stage, without weights: each growth is planned from the target of the one before. Raises InputError with all mistakes."""
        current: Checkpoint | None
        current = describe_fresh(self.fresh) if self.fresh is not None else open_source(self.model, revision=self.revision, weights=False)
        errors: list[str] = []
        models, donors = [], False
        for stage in self.stages:
            growth = stage.keys.grow
            recipe = recipe_of(stage, self.model).recipe
            if recipe is not None:
                wrong: list[str] = []
                check_data(recipe, wrong, self.notify)
                for path in recipe.regularizer.fisher:
                    collect_mistakes(wrong, "regularizer.fisher", partial(open_importance, path))
                errors += [f"stages.{stage.index}.{line}" for line in wrong]
            if growth is not None and current is not None:
                before = current
                plan = collect_mistakes(errors, f"stages.{stage.index}.grow", lambda: plan_growth(before, growth, self.notify))  # noqa: B023
                current = unwritten_checkpoint(plan, before) if plan is not None else None
                donors = donors or (plan is not None and bool(plan.source.donors))
            kind = (stage.recipe.get("regularizer") or {}).get("kind", "none")
            if donors and kind not in ("none", "si") and stage.keys.anchor == "run":
                errors.append(f"stages.{stage.index}.anchor: run does not go through a growth with further sources. Set anchor: stage.")
            if current is None:
                break
            models.append(current)
        if len(models) == len(self.stages):
            self.models = models
            for stage in self.stages:
                until = stage.keys.until
                if until is not None:
                    collect_mistakes(errors, f"stages.{stage.index}.until", partial(StageEnd, until, self._growth_after(stage, 0.0, ())))
        raise_errors(self.read.where, errors)
        return models

    def _growth_after(self, stage: Stage, spent: float, earlier: Sequence[tuple[int, Any]]) -> StageGrowth | None:
        """The growth at the end of a stage, for a forecast; None without one. ``spent``: FLOPs before it; ``earlier``: as of `StageGrowth`."""
        following = stage.index + 1
        if following == len(self.stages) or self.stages[following].keys.grow is None:
            return None
        pair = self.models[stage.index], self.models[following]
        first, second = (count_parameters(m.info.architecture).active for m in pair)
        length = int(stage.recipe["data"].get("seq_length") or DataOptions.model_fields["seq_length"].default)
        cost, dearer = (count_flops(m.config).train.rows(1, length) / length for m in pair)
        return StageGrowth((first, second), (cost, dearer), spent, earlier)

    def begin(self, *, resume: bool, overwrite: bool) -> None:
        """Opens the folder of the run, and makes a fresh model."""
        from accelerate.utils import wait_for_everyone

        if resume and (self.folder / RUN_FILE).is_file():
            self.log = RunLog.open(self.folder)
            if changed := self.log.check_same(self.read.given):
                self.notify(f"Settings changed since this run began: {', '.join(changed)}.")
        else:
            self.log = RunLog.create(self.folder, self.read.given)
        recipe = recipe_of(self.stages[0], self.model)
        assert recipe.recipe is not None
        arguments = arguments_for(recipe.recipe, recipe.arguments, self.folder)  # starts the process group
        wait_for_everyone()  # all have checked the folder before the first one writes to it
        with arguments.main_process_first(desc="the folder of the run"):
            self._make_folder(overwrite)
        self.dtype = _main_dtype(open_source(self.model, revision=self.revision, weights=False))
        self.events = EventLog(self.folder / EVENTS_FILE if is_main_process() else None, self.notify)

    def _make_folder(self, overwrite: bool) -> None:
        if is_main_process():
            if overwrite:
                clear_output(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / EVENTS_FILE).touch()
            if self.fresh is not None and not (self.folder / INITIAL).is_dir():
                partial_folder = self.folder / f"{INITIAL}.partial"
                shutil.rmtree(partial_folder, ignore_errors=True)
                write_fresh(self.fresh, partial_folder, int(self.read.given.get("seed", 42)))
                partial_folder.rename(self.folder / INITIAL)
            self.log.write()

    def train_stage(self, stage: Stage) -> TrainResult:
        """Trains one stage to its end, from where it stands."""
        from accelerate.utils import wait_for_everyone

        out, start = self.folder / stage.folder, self.log.spent
        if start.step >= self.read.given["max_steps"]:
            raise ExecutionError(
                f"{stage.title} cannot begin: the stages before it took all {start.step} steps of the run.",
                hint="Raise max_steps and go on with --resume, or let earlier stages end sooner (at_latest).",
            )
        if is_main_process():
            _remove_unfinished(out)
        wait_for_everyone()  # all look for checkpoints after that
        previous = self.log.last_checkpoint
        changes: dict[str, Any] = {} if previous is None else {"resume_from_checkpoint": str(previous)}
        if stage.recipe.get("save_dtype", "auto") == "auto" and self.dtype != "float64":
            changes["save_dtype"] = self.dtype  # not that of the checkpoint before, which holds weights as they are trained
        if previous is not None:
            changes["monitor"] = {"baseline": "start", **(stage.recipe.get("monitor") or {})}
        if previous is None and self.revision is not None and self.fresh is None:
            changes["revision"] = self.revision
        recipe = recipe_of(stage, str(previous or self.model), **changes, **self._regularizer(stage))
        raise_errors(recipe.where, recipe.mistakes)
        stops: list[StageStop] = []

        def stop(setup: TrainSetup) -> StageStop:
            growth = self._growth_after(stage, start.flops, [(e["active"], e["curve"]) for e in self.log.ended if e.get("curve")])
            blending = setup.options.warmup.alpha_steps if stage.keys.grow is not None else 0
            stops.append(StageStop(stage.keys.until, start, setup.tokens_per_step, setup.arguments.max_steps, growth, blending))
            return stops[0]

        begun = (out / EVENTS_FILE).is_file()
        if not begun:
            self.events.write("stage", start.step, stage=stage.index, name=stage.title, grow=stage.keys.grow)
        result = train(
            recipe, output=str(out), resume=begun, notify=self.notify, show=self.show, stop=stop, origin=self._origin(stage)
        )  # fmt: skip
        gc.collect()  # the old model, before the next one is loaded
        wait_for_everyone()
        checkpoint = last_checkpoint(out) or out
        if checkpoint == out and stage.index < len(self.stages) - 1:
            raise ExecutionError(
                f"{out} has no checkpoint of the stage's end, from which the next stage starts.", hint="Keep save_strategy: steps."
            )
        spent = stops[0].spent(result.steps, result.flops)
        reason = result.stopped or "the end of the run"
        facts: dict[str, Any] = {"losses": dict(result.end), "active": count_parameters(self.models[stage.index].info.architecture).active}
        if (curve := stops[0].curve()) is not None:
            facts["curve"] = curve.to_json()
        self.log.end_stage(stage, checkpoint, spent, reason, write=is_main_process(), **facts)
        self.events.write("stage_end", result.steps, stage=stage.index, reason=reason, tokens=spent.tokens, flops=spent.flops)
        return result

    def _origin(self, stage: Stage) -> PenaltyOrigin | None:
        """Where a regularizer comes from: the run's first weights, through the growths of all stages that have ended."""
        plans = [
            GrowthPlan.from_json(read_json(self.folder / e["checkpoint"] / GROWTH))
            for e in self.log.ended
            if self.stages[e["stage"]].keys.grow
        ]
        kind = (stage.recipe.get("regularizer") or {}).get("kind", "none")
        if kind in ("none", "si") or (not self.log.ended and stage.keys.grow is None):
            return None  # SI holds the weights at the last consolidation: those that the stage starts from
        first = open_source(self.model, revision=self.revision, weights=True)
        return PenaltyOrigin(StoredRows(first), plans, anchored=stage.keys.anchor == "run")

    def _regularizer(self, stage: Stage) -> dict[str, Any]:
        """With SI, the importances of the stage before, which has consolidated them at its end; each stage adds its own."""
        section = stage.recipe.get("regularizer")
        if not self.log.ended or not isinstance(section, Mapping) or section.get("kind") != "si":
            return {}
        file = self.folder / self.stages[self.log.ended[-1]["stage"]].folder / PENALTY_FOLDER / IMPORTANCE_FILE
        if not file.is_file():
            return {}
        # With a file alone no path would be followed. No stage has as many steps as the run, so it consolidates at its end only.
        return {"regularizer": {"consolidate_every": self.read.given["max_steps"], **section, "fisher": str(file)}}


def _main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most values, by torch's name."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] += tensor.info.nbytes
    return DTYPE_NAMES[sizes.most_common(1)[0][0]]


def _remove_unfinished(out: Path) -> None:
    """Of a stage that was interrupted: a folder in which training had not begun, and checkpoints of its end, after which its model was not written.

    Training goes on from the checkpoint before, to the same end.
    """
    if out.is_dir() and not (out / EVENTS_FILE).is_file():
        shutil.rmtree(out)
    while (last := last_checkpoint(out)) is not None and read_json(last / GROWTH_STATE).get("stop", {}).get("reason"):
        (last / "trainer_state.json").unlink()
        shutil.rmtree(last)
