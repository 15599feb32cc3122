"""`hf-grow train`: a recipe carried out from start to end, or resumed.

The output folder holds checkpoint-N/ (Trainer's, each a plain model), events.jsonl and training.json from the start; the trained model itself
appears there at the end, so that a folder with config.json is a finished one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common.extras import require_packages
from hf_grow.common.safe_files import read_json
from hf_grow.convert.metadata import versions
from hf_grow.errors import OutputError, SourceError
from hf_grow.training.config.train_config import RecipeData
from hf_grow.training.dry_run.dry_run import dry_run
from hf_grow.training.setup.build import RecipeHooks, make_parts, make_recipe_trainer, merge_adapters, read_texts, trained_tokens
from hf_grow.training.setup.provenance import recorded_settings
from hf_grow.training.setup.recipe_checks import check_recipe, clear_output
from hf_grow.training.setup.result_dtype import round_weights
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.trainer.checkpointing import last_checkpoint, write_json
from hf_grow.training.trainer.events import EVENTS_FILE

if TYPE_CHECKING:
    from hf_grow.training.regularizers.origin import PenaltyOrigin
    from hf_grow.training.trainer.state import StopCondition
    from hf_grow.training.trainer.trainer import BaseGrowTrainer

__all__ = ["TrainResult", "dry_run", "train"]

RECORD = "training.json"
PENALTY_FOLDER = "penalty"
"""What a penalty leaves to a later run (the importances of SI)."""


@dataclass(frozen=True)
class TrainResult:
    """What `hf-grow train` reports; losses in nats per token."""

    output: Path
    steps: int
    tokens: int
    flops: int
    flops_by_purpose: Mapping[str, int]
    """Of the ledger: train, recompute, teacher, evaluation, sampling, discarded."""
    seconds: float
    loss: float
    """Mean training loss of the steps of this call."""
    start: Mapping[str, float]
    """Loss of each named set at the start."""
    end: Mapping[str, float]
    source: Mapping[str, float]
    """Loss of the growth's source, where it is the baseline of forgetting."""
    forgetting: float | None
    """Loss of the old set minus that of the source, else that at the start; None without such a set."""
    stopped: str
    """Why it ended before its last step, or empty."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output)}


def train(
    read: RecipeData,
    *,
    output: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = lambda message: None,
    show: Callable[[str], None] = lambda line: None,
    stop: Callable[[TrainSetup], StopCondition] | None = None,
    origin: PenaltyOrigin | None = None,
) -> TrainResult:
    """Carries a recipe out. Raises InputError before anything is written if something is wrong with it.

    ``resume`` goes on from the newest whole checkpoint in the output (from the start where there is none yet). ``notify`` gets what the user
    should know, ``show`` the progress where there is no terminal. ``stop``: makes what may end the training before its last step. ``origin``:
    where a regularizer's anchors and importances come from, if the model was grown since.
    """
    require_packages("accelerate", "datasets")
    start_time = time.perf_counter()
    setup = check_recipe(read, output=output, resume=resume, overwrite=overwrite, notify=notify, origin=origin)
    out, arguments = setup.out, setup.arguments
    checkpoint = last_checkpoint(out) if resume else None
    if resume:
        _check_same_run(setup, notify, same_model=stop is None)
        if checkpoint is None:
            notify(f"{out} has no complete checkpoint yet; training starts from the beginning.")
    parts = make_parts(setup, setup.recipe.model, setup.recipe.revision, notify, origin)
    data = read_texts(setup, notify)
    with arguments.main_process_first(desc="the output folder"):
        if arguments.should_save:
            if overwrite:
                clear_output(out)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / RECORD, {"recipe": recorded_settings(setup.given), "model": setup.checkpoint.ref, "made_by": versions()})
            (out / EVENTS_FILE).touch()
    trainer = make_recipe_trainer(setup, parts, data, notify, show, stop(setup) if stop is not None else None)
    trained = trainer.train(resume_from_checkpoint=str(checkpoint or arguments.resume_from_checkpoint or "") or None)
    return _finish(trainer, setup, float(trained.training_loss), time.perf_counter() - start_time)


def _check_same_run(setup: TrainSetup, notify: Notify, *, same_model: bool) -> None:
    """Reports settings that differ from those a resumed run began with. Raises OutputError if it is the training of another model."""
    try:
        before = read_json(setup.out / RECORD)["recipe"]
    except (SourceError, KeyError):
        return
    current = recorded_settings(setup.given)
    changed = sorted(k for k in before.keys() | current.keys() if before.get(k) != current.get(k))
    if "model" in changed and same_model:  # a stage starts from a checkpoint of its run, whose folder may have been moved
        raise OutputError(
            f"{setup.out} contains a training of {before.get('model')}, not of {setup.recipe.model}.", hint="Choose another folder with -o."
        )
    if changed:
        notify(f"Settings changed since this training began: {', '.join(changed)}.")


def _finish(trainer: BaseGrowTrainer, setup: TrainSetup, loss: float, seconds: float) -> TrainResult:
    """The last evaluation, and the model in the output folder. ``loss``: mean training loss."""
    recipe, out, step = setup.recipe, setup.out, int(trainer.state.global_step)
    events, state, hooks = trainer.growth.events, trainer.growth_state, trainer.hooks
    assert isinstance(hooks, RecipeHooks)
    rounded = _round_result(trainer)
    if recipe.data.eval and (rounded or state.evaluated_at != step or setup.arguments.load_best_model_at_end):
        trainer.evaluate()
    if recipe.monitor.contribution_steps and state.contributed_at != step:
        trainer.contributions()
    trainer.store_flos()  # with the last evaluation
    stopped = "" if step >= trainer.state.max_steps else "early stopping"
    if trainer.growth.stop is not None and trainer.growth.stop.reason:
        stopped = trainer.growth.stop.reason
    if stopped:
        events.write("stop", step, reason=stopped)
    hooks.after_training = {"flops": trainer.state.total_flos, **trainer.ledger_facts(), "train_loss": loss}
    if recipe.lora is not None:
        merge_adapters(trainer)
        _round_result(trainer)
    trainer.save_model(str(out))
    if trainer.growth.penalty is not None:
        _finish_penalty(trainer, out / PENALTY_FOLDER)
    old = recipe.old_set
    forgetting = state.last_losses[old] - state.baseline(old) if old in state.last_losses and old in state.start_losses else None
    result = TrainResult(
        out, step, trained_tokens(trainer, setup, step), trainer.state.total_flos, trainer.growth.ledger.by_purpose(), seconds, loss, dict(state.start_losses),
        dict(state.last_losses), dict(state.source_losses), forgetting, stopped,
    )  # fmt: skip
    events.write("end", step, output=str(out), loss=loss)
    if setup.arguments.should_save:
        write_json(out / RECORD, {**read_json(out / RECORD), "result": result.to_json()})
    return result


def _round_result(trainer: BaseGrowTrainer) -> bool:
    """Rounds weights to the dtypes of the result, so that they are evaluated as they are stored. Returns whether any had to be."""
    if trainer.is_deepspeed_enabled:  # its shards are rounded when they are gathered to be saved
        return False
    return round_weights(trainer.accelerator.unwrap_model(trainer.model), trainer.hooks.result_dtypes(trainer))


def _finish_penalty(trainer: BaseGrowTrainer, folder: Path) -> None:
    """What a penalty leaves to later runs, beside the model: some loaders take every *.safetensors file of a model's folder."""
    assert trainer.growth.penalty is not None
    if trainer.args.should_save:
        folder.mkdir(exist_ok=True)
    trainer.growth.penalty.finish(folder, trainer.accelerator.unwrap_model(trainer.model))
    if trainer.args.should_save and not any(folder.iterdir()):
        folder.rmdir()
