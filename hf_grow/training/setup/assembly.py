"""From a checked recipe to a BaseGrowTrainer that is ready to train: the model and what holds it, the texts, the teachers, the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.source import TOKENIZER_CONFIG, companion_bytes, companions
from hf_grow.model.meta_model import meta_model
from hf_grow.training.config.train_config import tokens_per_step
from hf_grow.training.data import build
from hf_grow.training.distributed.launch import current_launch
from hf_grow.training.distributed.process_order import local_main_process_first
from hf_grow.training.peft import lora
from hf_grow.training.regularizers.build import make_penalty
from hf_grow.training.setup import result_dtype as storing
from hf_grow.training.setup.prepare import (
    distiller,
    load_model,
    make_residual_scale,
    plan_updates,
    training_flops,
    weights_dtype,
    with_lora,
    zero_new_blocks,
)
from hf_grow.training.setup.provenance import record_of
from hf_grow.training.setup.source_baseline import beside_the_source
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.trainer.events import EVENTS_FILE, EventLog
from hf_grow.training.trainer.monitor import Monitor

if TYPE_CHECKING:
    from hf_grow.training.data import TrainData
    from hf_grow.training.param_updates.residual_scale import ResidualScale
    from hf_grow.training.param_updates.updates import ParamUpdates
    from hf_grow.training.regularizers.penalty import Penalty
    from hf_grow.training.trainer.state import Growing
    from hf_grow.training.trainer.trainer import BaseGrowTrainer


@dataclass(frozen=True)
class Ready:
    """What is loaded before anything is written."""

    model: Any
    data: TrainData
    updates: ParamUpdates
    blend: ResidualScale | None
    penalty: Penalty | None


def texts(checked: TrainSetup, notify: Notify) -> TrainData:
    """All that the recipe reads, made by one process of each machine."""
    recipe, arguments = checked.recipe, checked.arguments
    rows = None
    if arguments.max_steps > 0:
        rows = arguments.max_steps * tokens_per_step(arguments, 1, arguments.world_size)
    with local_main_process_first(arguments, "the texts"):
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
    return data


def prepare(checked: TrainSetup, notify: Notify, read: Callable[[TrainSetup, Notify], TrainData] = texts) -> Ready:
    """Model, penalty, who trains, and what `read` makes of the texts.

    Also where a run is resumed, the model comes with the weights that it started from: the penalty holds it near those.
    """
    from transformers import set_seed

    recipe, arguments = checked.recipe, checked.arguments
    set_seed(arguments.seed)  # adapters are drawn before Trainer does this
    model = load_model(recipe.model, recipe.revision, weights_dtype(recipe, checked.checkpoint), recipe.attn_implementation, notify)
    # Under ZeRO-3 the model that is loaded is in pieces without a shape.
    who = plan_updates(meta_model(checked.checkpoint.info.config) if current_launch().sharing == "zero3" else model, checked.plan, recipe)
    blend = make_residual_scale(model, who, recipe)
    if recipe.warmup.zero_init and checked.plan is not None:
        zero_new_blocks(model, checked.plan)
    penalty = make_penalty(recipe.regularizer, model, checked.plan)
    data = read(checked, notify)
    updates = who.updates
    trained: Any = model
    if recipe.lora is not None:
        trained, updates = with_lora(model, who, recipe)
    if lost := storing.lost_steps(trained, arguments.learning_rate):
        notify(lost)
    return Ready(trained, data, updates, blend, penalty)


def make_trainer(checked: TrainSetup, ready: Ready, notify: Notify, show: Callable[[str], None], resumed: bool) -> BaseGrowTrainer:
    """Teachers and the source are loaded, the log is opened. ``show`` gets the progress where there is no terminal."""
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback

    from hf_grow.training.trainer.progress import Progress
    from hf_grow.training.trainer.state import Growing
    from hf_grow.training.trainer.trainer import BaseGrowTrainer

    recipe, arguments, data = checked.recipe, checked.arguments, ready.data
    arch = checked.checkpoint.info.architecture
    events = EventLog(checked.out / EVENTS_FILE if arguments.should_save else None, notify)
    with local_main_process_first(arguments, "the teachers"):
        teach, flops, told = distiller(checked, data, notify)
    for about in told:
        events.write("teacher", 0, **about)
    growing = Growing(
        updates=ready.updates, blend=ready.blend, warmup=recipe.warmup, phases=recipe.phases, after=recipe.after_growth, penalty=ready.penalty,
        distiller=teach, monitor=Monitor(recipe.monitor), events=events, old_set=recipe.old_set if recipe.old_set in data.evals else None,
        flops_per_token=training_flops(checked) + flops, save_extra=lambda folder: bring_companions(checked, folder),
        trains=[*recipe.train, *(f"but {p}" for p in recipe.freeze)], start_facts={"model": checked.checkpoint.ref},
        given=frozenset(checked.read.arguments),
    )  # fmt: skip
    if arch.is_moe and recipe.moe.aux_loss:
        given = recipe.moe.aux_coefficient
        growing.aux_loss = float(ready.model.config.router_aux_loss_coef if given is None else given)
        base = ready.model.get_base_model() if recipe.lora is not None else ready.model
        base.router_aux_loss_coef = growing.aux_loss
    if recipe.lora is not None:
        growing.save_extra = lambda folder: lora.save_fully_trained(ready.model, folder)
        growing.load_extra = lambda folder: lora.load_fully_trained(ready.model, folder)
    beside_the_source(checked, data, growing, notify, resumed=resumed)
    progress = Progress(tokens_per_step(arguments, data.seq_length, arguments.world_size), show)
    growing.told = progress.evaluated
    trainer = BaseGrowTrainer(
        model=ready.model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evals or None,
        data_collator=data.collator,
        growing=growing,
    )
    growing.record = lambda step: record_of(checked, facts(checked, data, growing, step))
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(progress)
    if recipe.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping_patience, recipe.early_stopping_threshold))
    return trainer


def bring_companions(checked: TrainSetup, folder: Path) -> None:
    """Tokenizer, generation config and licence, as they come along; only another tokenizer than the model's own is written anew."""
    source = checked.checkpoint.folder
    if source is not None:
        for relative in companions(source):
            (folder / relative).parent.mkdir(exist_ok=True)
            (folder / relative).write_bytes(companion_bytes(source / relative))
    if source is None or checked.recipe.tokenizer is not None:
        checked.tokenizer.save_pretrained(folder)
        (folder / TOKENIZER_CONFIG).write_bytes(companion_bytes(folder / TOKENIZER_CONFIG))


def tokens_of(checked: TrainSetup, steps: int) -> int:
    return steps * tokens_per_step(checked.arguments, checked.recipe.data.seq_length, checked.arguments.world_size)


def facts(checked: TrainSetup, data: TrainData, growing: Growing, steps: int) -> dict[str, Any]:
    """What growth.json tells of a training after so many steps."""
    losses = {"start": dict(growing.start_losses), "end": dict(growing.last_losses)}
    losses |= {"source": dict(growing.source_losses)} if growing.source_losses else {}
    return {"steps": steps, "tokens": tokens_of(checked, steps), "data": data.describe(), "losses": losses}
