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

from hf_grow.checkpoint.source import TOKENIZER_CONFIG, companion_bytes, companions
from hf_grow.errors import OutputError, SourceError
from hf_grow.execute import versions
from hf_grow.portable import portable_config
from hf_grow.training import adapters, estimate, storing
from hf_grow.training.ahead import one_ahead
from hf_grow.training.baseline import beside_the_source
from hf_grow.training.check import Checked, Notify, check, clear_output
from hf_grow.training.checkpoints import last_checkpoint, write_json
from hf_grow.training.data import build
from hf_grow.training.events import NAME as EVENTS
from hf_grow.training.events import EventLog
from hf_grow.training.extras import need
from hf_grow.training.launch import launched
from hf_grow.training.monitor import Monitor
from hf_grow.training.prepare import blend_for, distiller, load_model, training_flops, weights_dtype, who_trains, with_lora, zero_new_blocks
from hf_grow.training.recipe import Read
from hf_grow.training.reckon import dry_run
from hf_grow.training.record import kept, note_files, record_of
from hf_grow.training.regularizers import make_penalty
from hf_grow.training.skeleton import skeleton
from hf_grow.untrusted import read_json

if TYPE_CHECKING:
    from hf_grow.training.blocks import Blend
    from hf_grow.training.data import TrainData
    from hf_grow.training.growing import Growing
    from hf_grow.training.regularizers import Penalty
    from hf_grow.training.trainer import GrowTrainer
    from hf_grow.training.updates import Updates

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
    read: Read,
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
    need("accelerate", "datasets")
    began = time.perf_counter()
    checked = check(read, output=output, resume=resume, overwrite=overwrite, notify=notify)
    out, arguments = checked.out, checked.arguments
    come_from = last_checkpoint(out) if resume else None
    if resume:
        _same_run(checked, notify)
        if come_from is None:
            notify(f"{out} has no whole checkpoint yet; the training begins anew.")
    ready = _prepare(checked, notify)
    with arguments.main_process_first(desc="the output folder"):
        if arguments.should_save:
            if overwrite:
                clear_output(out)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / RECORD, {"recipe": kept(read.given), "model": checked.checkpoint.ref, "made_by": versions()})
            (out / EVENTS).touch()
    trainer = _trainer(checked, ready, notify, show, come_from is not None)
    start_from = str(come_from or arguments.resume_from_checkpoint or "") or None
    trainer.growing.announce = "start" if come_from is None else "resume"
    found = trainer.train(resume_from_checkpoint=start_from)
    return _finish(trainer, checked, ready.data, found, time.perf_counter() - began)


@dataclass(frozen=True)
class _Ready:
    """What is loaded before anything is written."""

    model: Any
    data: TrainData
    updates: Updates
    blend: Blend | None
    penalty: Penalty | None


def _prepare(checked: Checked, notify: Notify) -> _Ready:
    """Also where a run is resumed, the model comes with the weights that it started from: the penalty holds it near those."""
    from transformers import set_seed

    recipe, arguments = checked.recipe, checked.arguments
    set_seed(arguments.seed)  # adapters are drawn before Trainer does this
    model = load_model(recipe.model, recipe.revision, weights_dtype(recipe, checked.checkpoint), recipe.attn_implementation, notify)
    # Under ZeRO-3 the model that is loaded is in pieces without a shape.
    who = who_trains(skeleton(checked.checkpoint.info.config) if launched().sharing == "zero3" else model, checked.plan, recipe)
    blend = blend_for(model, who, recipe)
    if recipe.warmup.zero_init and checked.plan is not None:
        zero_new_blocks(model, checked.plan)
    penalty = make_penalty(recipe.regularizer, model, checked.plan)
    rows = None
    if arguments.max_steps > 0:
        rows = arguments.max_steps * estimate.tokens_a_step(arguments, 1, arguments.world_size)
    with one_ahead(arguments, "the texts"):
        data = build(
            recipe.data,
            checked.tokenizer,
            notify=notify,
            vocab_size=checked.vocabulary,
            sequences=rows,
            model=str(checked.checkpoint.folder or recipe.model),
        )
    if rows is None and data.sequences is not None and data.sequences < arguments.per_device_train_batch_size:
        notify(f"There are only {data.sequences} training sequences; one batch has {arguments.per_device_train_batch_size}.")
    updates = who.updates
    trained: Any = model
    if recipe.lora is not None:
        trained, updates = with_lora(model, who, recipe)
    if lost := storing.lost_steps(trained, arguments.learning_rate):
        notify(lost)
    return _Ready(trained, data, updates, blend, penalty)


def _trainer(checked: Checked, ready: _Ready, notify: Notify, show: Callable[[str], None], resumed: bool) -> GrowTrainer:
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback

    from hf_grow.training.growing import Growing
    from hf_grow.training.progress import Progress
    from hf_grow.training.trainer import GrowTrainer

    recipe, arguments, data = checked.recipe, checked.arguments, ready.data
    arch = checked.checkpoint.info.architecture
    events = EventLog(checked.out / EVENTS if arguments.should_save else None, notify)
    with one_ahead(arguments, "the teachers"):
        teach, flops, told = distiller(checked, data, notify)
    for facts in told:
        events.write("teacher", 0, **facts)
    growing = Growing(
        updates=ready.updates, blend=ready.blend, warmup=recipe.warmup, phases=recipe.phases, after=recipe.after_growth, penalty=ready.penalty,
        distiller=teach, monitor=Monitor(recipe.monitor), events=events, old_set=recipe.old_set if recipe.old_set in data.evals else None,
        flops_per_token=training_flops(checked) + flops, save_extra=lambda folder: _companions(checked, folder),
        trains=[*recipe.train, *(f"but {p}" for p in recipe.freeze)], start_facts={"model": checked.checkpoint.ref},
        given=frozenset(checked.read.arguments),
    )  # fmt: skip
    if arch.is_moe and recipe.moe.aux_loss:
        given = recipe.moe.aux_coefficient
        growing.aux_loss = float(ready.model.config.router_aux_loss_coef if given is None else given)
        base = ready.model.get_base_model() if recipe.lora is not None else ready.model
        base.router_aux_loss_coef = growing.aux_loss
    if recipe.lora is not None:
        growing.save_extra = lambda folder: adapters.save_in_full(ready.model, folder)
        growing.load_extra = lambda folder: adapters.load_in_full(ready.model, folder)
    beside_the_source(checked, data, growing, notify, resumed=resumed)
    progress = Progress(estimate.tokens_a_step(arguments, data.seq_length, arguments.world_size), show)
    growing.told = progress.evaluated
    trainer = GrowTrainer(
        model=ready.model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evals or None,
        data_collator=data.collator,
        growing=growing,
    )
    growing.record = lambda step: record_of(checked, _facts(checked, data, growing, step))
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(progress)
    if recipe.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping_patience, recipe.early_stopping_threshold))
    return trainer


def _same_run(checked: Checked, notify: Notify) -> None:
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


def _companions(checked: Checked, folder: Path) -> None:
    """Tokenizer, generation config and licence, as they come along; only another tokenizer than the model's own is written anew."""
    source = checked.checkpoint.folder
    if source is not None:
        for relative in companions(source):
            (folder / relative).parent.mkdir(exist_ok=True)
            (folder / relative).write_bytes(companion_bytes(source / relative))
    if source is None or checked.recipe.tokenizer is not None:
        checked.tokenizer.save_pretrained(folder)
        (folder / TOKENIZER_CONFIG).write_bytes(companion_bytes(folder / TOKENIZER_CONFIG))


def _tokens(checked: Checked, steps: int) -> int:
    return steps * estimate.tokens_a_step(checked.arguments, checked.recipe.data.seq_length, checked.arguments.world_size)


def _facts(checked: Checked, data: TrainData, growing: Growing, steps: int) -> dict[str, Any]:
    """What growth.json tells of a training after so many steps."""
    losses = {"start": dict(growing.start_losses), "end": dict(growing.last_losses)}
    losses |= {"source": dict(growing.source_losses)} if growing.source_losses else {}
    return {"steps": steps, "tokens": _tokens(checked, steps), "data": data.describe(), "losses": losses}


def _finish(trainer: GrowTrainer, checked: Checked, data: TrainData, found: Any, seconds: float) -> TrainResult:
    """The last evaluation, and the model in the output folder."""
    g, out, step = trainer.growing, checked.out, int(trainer.state.global_step)
    rounded = checked.recipe.lora is None and storing.settle(trainer, checked)
    if checked.recipe.data.eval and (rounded or g.evaluated_at != step or checked.arguments.load_best_model_at_end):
        trainer.evaluate()
    if checked.recipe.monitor.contribution_steps and g.contributed_at != step:
        trainer.contributions()
    tokens = _tokens(checked, step)
    stopped = "" if step >= trainer.state.max_steps else "early stopping"
    if stopped:
        g.events.write("stop", step, reason=stopped)
    spent = {"flops": trainer.state.total_flos, "train_loss": found.training_loss}
    g.record = lambda step: record_of(checked, _facts(checked, data, g, step) | spent)
    if checked.recipe.lora is not None:
        g.save_extra = lambda folder: _companions(checked, folder)
        trainer.model = trainer.model.merge_and_unload()
        storing.settle(trainer, checked)
    trainer.save_model(str(out))
    if checked.arguments.should_save:
        config = read_json(out / "config.json")
        # Trainer turns the cache off, for training.
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
