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
from hf_grow.model.config_compat import portable_config
from hf_grow.model.loading import output_flags
from hf_grow.training.config.train_config import RecipeData
from hf_grow.training.dry_run.dry_run import dry_run
from hf_grow.training.setup import result_dtype as storing
from hf_grow.training.setup.assembly import bring_companions, facts, make_trainer, prepare, tokens_of
from hf_grow.training.setup.checks import check, clear_output
from hf_grow.training.setup.provenance import kept, note_files, record_of
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.trainer.checkpointing import last_checkpoint, write_json
from hf_grow.training.trainer.events import EVENTS_FILE

if TYPE_CHECKING:
    from hf_grow.training.data import TrainData
    from hf_grow.training.trainer.trainer import BaseGrowTrainer

__all__ = ["TrainResult", "dry_run", "train"]

RECORD = "training.json"
PENALTY_FOLDER = "penalty"
"""What a penalty leaves to a later run (the importances of SI)."""


@dataclass(frozen=True)
class TrainResult:
    output: Path
    steps: int
    tokens: int
    flops: float
    seconds: float
    loss: float
    """Mean training loss of the steps of this call."""
    start: Mapping[str, float]
    """Loss of each named set at the start, nats a token."""
    end: Mapping[str, float]
    source: Mapping[str, float]
    """Loss of the source of the growth, where it is what forgetting is measured against."""
    forgetting: float | None
    """How far the old set's loss lies above that of the source, else that at the start; None without such a set."""
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
) -> TrainResult:
    """Carries a recipe out. Raises InputError before anything is written if something is wrong with it.

    ``resume`` goes on from the newest whole checkpoint in the output (from the start where there is none yet). ``notify`` gets what the user
    should know, ``show`` the progress where there is no terminal.
    """
    require_packages("accelerate", "datasets")
    began = time.perf_counter()
    checked = check(read, output=output, resume=resume, overwrite=overwrite, notify=notify)
    out, arguments = checked.out, checked.arguments
    come_from = last_checkpoint(out) if resume else None
    if resume:
        _same_run(checked, notify)
        if come_from is None:
            notify(f"{out} has no whole checkpoint yet; the training begins anew.")
    ready = prepare(checked, notify)
    with arguments.main_process_first(desc="the output folder"):
        if arguments.should_save:
            if overwrite:
                clear_output(out)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / RECORD, {"recipe": kept(read.given), "model": checked.checkpoint.ref, "made_by": versions()})
            (out / EVENTS_FILE).touch()
    trainer = make_trainer(checked, ready, notify, show, come_from is not None)
    start_from = str(come_from or arguments.resume_from_checkpoint or "") or None
    trainer.growing.announce = "start" if come_from is None else "resume"
    found = trainer.train(resume_from_checkpoint=start_from)
    return _finish(trainer, checked, ready.data, found, time.perf_counter() - began)


def _same_run(checked: TrainSetup, notify: Notify) -> None:
    """Tells what a resumed run does otherwise than it began. Raises OutputError if it is of another model."""
    try:
        before = read_json(checked.out / RECORD)["recipe"]
    except (SourceError, KeyError):
        return
    now = kept(checked.read.given)
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if "model" in changed:
        raise OutputError(
            f"{checked.out} is the training of {before.get('model')}, not of {checked.recipe.model}.", hint="Choose another -o."
        )
    if changed:
        notify(f"Other than when this training began: {', '.join(changed)}.")


def _finish(trainer: BaseGrowTrainer, checked: TrainSetup, data: TrainData, found: Any, seconds: float) -> TrainResult:
    """The last evaluation, and the model in the output folder."""
    g, out, step = trainer.growing, checked.out, int(trainer.state.global_step)
    rounded = checked.recipe.lora is None and storing.settle(trainer, checked)
    if checked.recipe.data.eval and (rounded or g.evaluated_at != step or checked.arguments.load_best_model_at_end):
        trainer.evaluate()
    if checked.recipe.monitor.contribution_steps and g.contributed_at != step:
        trainer.contributions()
    tokens = tokens_of(checked, step)
    stopped = "" if step >= trainer.state.max_steps else "early stopping"
    if stopped:
        g.events.write("stop", step, reason=stopped)
    spent = {"flops": trainer.state.total_flos, "train_loss": found.training_loss}
    g.record = lambda step: record_of(checked, facts(checked, data, g, step) | spent)
    if checked.recipe.lora is not None:
        g.save_extra = lambda folder: bring_companions(checked, folder)
        trainer.model = trainer.model.merge_and_unload()
        storing.settle(trainer, checked)
    trainer.save_model(str(out))
    if checked.arguments.should_save:
        config = read_json(out / "config.json")
        # Trainer turns the cache off, for training, and what a model returns was set to what is read here.
        config |= output_flags(checked.checkpoint.config)
        config |= {"use_cache": checked.checkpoint.config.get("use_cache", True), "dtype": storing.dtype_of(out)}
        write_json(out / "config.json", portable_config(config))
        note_files(out)
    if g.penalty is not None:  # beside the model, not among its weights: some loaders take every *.safetensors of a folder
        if checked.arguments.should_save:
            (out / PENALTY_FOLDER).mkdir(exist_ok=True)
        g.penalty.finish(out / PENALTY_FOLDER, trainer.accelerator.unwrap_model(trainer.model))
        if checked.arguments.should_save and not any((out / PENALTY_FOLDER).iterdir()):
            (out / PENALTY_FOLDER).rmdir()
    old = checked.recipe.old_set
    forgetting = g.last_losses[old] - g.baseline(old) if old in g.last_losses and old in g.start_losses else None
    result = TrainResult(
        out, step, tokens, float(trainer.state.total_flos), seconds, float(found.training_loss), dict(g.start_losses), dict(g.last_losses),
        dict(g.source_losses), forgetting, stopped,
    )  # fmt: skip
    g.events.write("end", step, output=str(out), loss=float(found.training_loss))
    if checked.arguments.should_save:
        kept = read_json(out / RECORD)
        write_json(out / RECORD, {**kept, "result": result.to_json()})
    return result
