"""From a TrainSetup to what BaseGrowTrainer needs. `hf-grow train` and `hf_grow.GrowTrainer` both build their training here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.source import TOKENIZER_CONFIG, companion_bytes, companions
from hf_grow.model.meta_model import meta_model
from hf_grow.training.config.data_options import SelfReplay
from hf_grow.training.config.train_config import tokens_per_step
from hf_grow.training.config.train_options import uses_chunked_loss
from hf_grow.training.data import build as build_data
from hf_grow.training.data.assemble import cache_root
from hf_grow.training.data.self_replay import sample_from_source
from hf_grow.training.data.shared_batches import sampling_group
from hf_grow.training.distributed.launch import current_launch, data_processes
from hf_grow.training.distributed.process_order import local_main_process_first
from hf_grow.training.distributed.processes import Processes
from hf_grow.training.param_updates.parameter_map import parameter_map
from hf_grow.training.peft import lora
from hf_grow.training.regularizers.build import make_penalty
from hf_grow.training.regularizers.origin import PenaltyOrigin
from hf_grow.training.setup import result_dtype
from hf_grow.training.setup.activation_checkpointing import checkpointed_layers
from hf_grow.training.setup.growth_at_load import grown_rows, growth_at_resume
from hf_grow.training.setup.model_setup import (
    attention_of,
    load_model,
    make_residual_scale,
    plan_updates,
    residual_writers_of_new_blocks,
    step_flops,
    weights_dtype,
    with_lora,
    zero_new_blocks,
)
from hf_grow.training.setup.provenance import finish_result, growth_record
from hf_grow.training.setup.source_baseline import SourceKL, measure_source
from hf_grow.training.setup.teachers import make_distiller
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.sharding.row_source import RowSource, ZeroedRows
from hf_grow.training.sharding.sharded_checkpoint import open_checkpoint, rows_of
from hf_grow.training.sharding.sharded_model import empty_model, fill_model
from hf_grow.training.trainer.events import EVENTS_FILE, EventLog
from hf_grow.training.trainer.ledger import Ledger, TrainerFlops
from hf_grow.training.trainer.state import GrowthSettings, StopCondition, TrainingHooks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from hf_grow.training.config.train_options import TrainOptions
    from hf_grow.training.data import TrainData
    from hf_grow.training.param_updates.residual_scale import ResidualScale
    from hf_grow.training.param_updates.updates import ParamUpdates
    from hf_grow.training.regularizers.penalty import Penalty
    from hf_grow.training.trainer.trainer import BaseGrowTrainer


@dataclass(frozen=True)
class ModelParts:
    """The model that trains, and what holds, freezes or scales its parameters."""

    model: Any
    updates: ParamUpdates
    residual_scale: ResidualScale | None
    penalty: Penalty | None
    weights: RowSource | None = None
    """Of a model on the meta device, which gets them when it is sharded."""


def read_texts(setup: TrainSetup, notify: Notify) -> TrainData:
    """All texts of a recipe, tokenised by one process of each machine."""
    recipe, arguments, tokenizer = setup.recipe, setup.arguments, setup.tokenizer
    assert tokenizer is not None
    rows = None
    if arguments.max_steps > 0:
        rows = arguments.max_steps * tokens_per_step(arguments, 1, data_processes(arguments))
    model = str(setup.checkpoint.folder or recipe.model)
    flops = 0
    if arguments.world_size > 1 and recipe.data.replay is not None and recipe.data.replay.self is not None:
        flops = _sample_together(setup, model, recipe.data.replay.self, notify)
    with local_main_process_first(arguments, "the texts"):
        data = build_data(recipe.data, tokenizer, notify=notify, vocab_size=setup.vocabulary, sequences=rows, model=model)
    if rows is None and data.sequences is not None and data.sequences < arguments.per_device_train_batch_size:
        notify(f"There are only {data.sequences} training sequences; one batch has {arguments.per_device_train_batch_size}.")
    return replace(data, sampling_flops=data.sampling_flops + flops)


def _sample_together(setup: TrainSetup, model: str, options: SelfReplay, notify: Notify) -> int:
    """Self-replay by all processes, which leaves the texts in the cache; returns the FLOPs of this one."""
    arguments, data = setup.arguments, setup.recipe.data
    root = cache_root(data) / "replay"
    local = Processes(arguments.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE") or arguments.world_size))
    group = sampling_group(Processes(arguments.process_index, arguments.world_size), local, root)
    return sample_from_source(options, root, seq_length=data.seq_length, trained=model, notify=notify, group=group)[1]


def make_parts(
    setup: TrainSetup, model: str | PreTrainedModel, revision: str | None, notify: Notify, origin: PenaltyOrigin | None = None
) -> ModelParts:
    """``model``: folder or Hub id (with ``revision``), or a model in memory.

    ``origin``: where a penalty comes from, if the model was grown since. The weights are those that
    training starts from, also where a run is resumed: the penalty holds it near those.
    """
    import torch
    from transformers import set_seed

    options, plan = setup.options, setup.plan
    set_seed(setup.arguments.seed)  # adapters are drawn before Trainer does this
    weights: RowSource | None = None
    if isinstance(model, str):
        dtype, attention = weights_dtype(options.dtype, setup.checkpoint), options.attn_implementation
        sharded = current_launch().sharing == "fsdp2"
        if sharded or setup.source is not None:
            checkpoint = open_checkpoint(model, revision=revision, weights=True, notify=notify)
            weights = rows_of(checkpoint) if setup.source is None else grown_rows(setup, checkpoint)
            if setup.source is not None and plan is not None:
                origin = (origin or PenaltyOrigin(rows_of(checkpoint), ())).then(plan)
            config = checkpoint.config if setup.source is None else setup.checkpoint.config
            model = empty_model(config, getattr(torch, dtype), checkpoint.folder, attention)
            if not sharded:
                fill_model(model, parameter_map(model), weights, "cpu")
                weights = None
        else:
            model = load_model(model, revision, dtype, attention, notify)
    # Under ZeRO-3 the model that is loaded is in pieces without a shape.
    planned = plan_updates(meta_model(setup.checkpoint.info.config) if current_launch().sharing == "zero3" else model, plan, options)
    scale = make_residual_scale(model, planned.new_blocks, options)
    if options.warmup.zero_init and plan is not None:
        if weights is None:
            zero_new_blocks(model, plan)
        else:
            weights = ZeroedRows(weights, residual_writers_of_new_blocks(plan))
    penalty = make_penalty(options.regularizer, model, plan, weights, origin)
    parts = ModelParts(model, planned.updates, scale, penalty, weights)
    if options.lora is not None:
        wrapped, updates = with_lora(model, planned.new, options.lora)
        parts = replace(parts, model=wrapped, updates=updates)
    if weights is None and (warning := result_dtype.rounding_warning(parts.model, setup.arguments.learning_rate)):
        notify(warning)
    return parts


def make_settings(
    setup: TrainSetup, parts: ModelParts, data: TrainData, notify: Notify, stop: StopCondition | None = None
) -> GrowthSettings:
    """Loads the teachers and opens the event log. ``stop``: what may end the training before its last step."""
    options, arguments = setup.options, setup.arguments
    events, ledger = EventLog(setup.out / EVENTS_FILE if arguments.should_save else None, notify), Ledger()
    ledger.add("sampling", data.sampling_flops)
    with local_main_process_first(arguments, "the teachers"):
        distiller, teacher_flops, teacher_facts = make_distiller(setup, data, ledger, notify)
    for facts in teacher_facts:
        events.write("teacher", 0, **facts)
    return GrowthSettings(
        updates=parts.updates, residual_scale=parts.residual_scale, warmup=options.warmup, phases=options.phases,
        after_growth=options.after_growth, penalty=parts.penalty, weights=parts.weights, distiller=distiller,
        chunked_loss=uses_chunked_loss(options, arguments, deepspeed=current_launch().deepspeed), aux_loss=_aux_loss(setup, parts.model),
        monitor=options.monitor, events=events, old_set=options.old_set if options.old_set in data.evals else None,
        flops=TrainerFlops(step_flops(setup), attention_of(parts.model, options), teacher_flops), ledger=ledger, given_arguments=frozenset(setup.given_arguments),
        stop=stop, growth_at_resume=growth_at_resume(setup),
        checkpointed_layers=checkpointed_layers(options, arguments, setup.plan, setup.checkpoint.info.architecture.layers),
        trained_parts=[*options.train, *(f"but {p}" for p in options.freeze)], model_ref=setup.checkpoint.ref,
    )  # fmt: skip


def _aux_loss(setup: TrainSetup, model: Any) -> float | None:
    """The coefficient of a mixture's router loss, which is also set in the model."""
    if not setup.checkpoint.info.architecture.is_moe or not setup.options.moe.aux_loss:
        return None
    given = setup.options.moe.aux_coefficient
    coefficient = float(model.config.router_aux_loss_coef if given is None else given)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.router_aux_loss_coef = coefficient
    return coefficient


def trained_tokens(trainer: BaseGrowTrainer, setup: TrainSetup, step: int) -> int:
    """Tokens trained on in a run up to a step; stages may have had other batch sizes."""
    stop = trainer.growth.stop
    return step * setup.tokens_per_step if stop is None else stop.tokens(step)


class SetupHooks(TrainingHooks):
    """growth.json, the files beside the weights, and the source of the growth as a baseline."""

    def __init__(self, setup: TrainSetup, model: Any, data: TrainData, notify: Notify) -> None:
        self.setup, self.model, self.data, self.notify = setup, model, data, notify
        self.after_training: Mapping[str, Any] = {}
        """Further facts about a finished training, for growth.json."""
        self._kl: SourceKL | None = None
        self._overflow_step = -1

    def weights_loaded(self, trainer: BaseGrowTrainer) -> None:
        if warning := result_dtype.rounding_warning(trainer.model, self.setup.arguments.learning_rate):
            self.notify(warning)

    def before_training(self, trainer: BaseGrowTrainer, resumed: bool) -> None:
        g = trainer.growth
        losses, self._kl = measure_source(self.setup, self.data, g.events, g.ledger, self.notify, trainer.accelerator, resumed=resumed)
        trainer.growth_state.source_losses |= losses

    def source_kl(self, model: Any) -> float | None:
        return None if self._kl is None else self._kl(model)

    def kl_inputs(self) -> Sequence[Mapping[str, Any]]:
        return () if self._kl is None else self._kl.inputs

    def growth_record(self, trainer: BaseGrowTrainer) -> Mapping[str, Any] | None:
        step, state = int(trainer.state.global_step), trainer.growth_state
        losses = {"start": dict(state.start_losses), "end": dict(state.last_losses)}
        losses |= {"source": dict(state.source_losses)} if state.source_losses else {}
        facts = {"steps": step, "tokens": trained_tokens(trainer, self.setup, step), "data": self.data.describe(), "losses": losses}
        return growth_record(self.setup, facts | dict(self.after_training))

    def save_files(self, folder: Path) -> None:
        if hasattr(self.model, "get_base_model"):
            lora.save_fully_trained(self.model, folder)
        else:
            copy_companions(self.setup, folder)

    def load_files(self, folder: Path) -> None:
        if hasattr(self.model, "get_base_model"):
            lora.load_fully_trained(self.model, folder)

    def result_dtypes(self, trainer: BaseGrowTrainer) -> Mapping[str, torch.dtype]:
        model, step = trainer.accelerator.unwrap_model(trainer.model), int(trainer.state.global_step)
        if hasattr(model, "get_base_model"):
            return {}
        dtypes = result_dtype.result_dtypes(self.setup.checkpoint, self.setup.options.save_dtype, model)
        if not result_dtype.overflows_anywhere(trainer, model, dtypes):
            return dtypes
        if self._overflow_step != step:
            self._overflow_step = step
            reason = "weights too large for float16: the result has the dtype of the training"
            trainer.growth.events.write("overflow", step, reason=reason)
        return {}

    def finish_result(self, folder: Path) -> None:
        if not hasattr(self.model, "get_base_model"):
            finish_result(self.setup, folder)


def copy_companions(setup: TrainSetup, folder: Path) -> None:
    """Tokenizer, generation config and license, byte for byte; another tokenizer than the model's own is saved anew."""
    source = setup.checkpoint.folder
    if source is not None:
        for relative in companions(source):
            (folder / relative).parent.mkdir(exist_ok=True)
            (folder / relative).write_bytes(companion_bytes(source / relative))
    if setup.save_tokenizer and setup.tokenizer is not None:
        setup.tokenizer.save_pretrained(folder)
        (folder / TOKENIZER_CONFIG).write_bytes(companion_bytes(folder / TOKENIZER_CONFIG))


class RecipeHooks(SetupHooks):
    """With the progress that `hf-grow train` shows."""

    def __init__(self, setup: TrainSetup, model: Any, data: TrainData, notify: Notify, show: Callable[[str], None]) -> None:
        from hf_grow.training.trainer.progress import Progress

        super().__init__(setup, model, data, notify)
        self.progress = Progress(setup.tokens_per_step, show)

    def after_evaluation(self, state: Any, metrics: Mapping[str, float]) -> None:
        self.progress.show_evaluation(state, metrics)


def make_recipe_trainer(
    setup: TrainSetup,
    parts: ModelParts,
    data: TrainData,
    notify: Notify,
    show: Callable[[str], None],
    stop: StopCondition | None = None,
) -> BaseGrowTrainer:
    """The trainer of a recipe. ``show`` gets the progress where there is no terminal; ``stop`` may end the training before its last step."""
    from transformers import PrinterCallback, ProgressCallback

    from hf_grow.training.trainer.trainer import BaseGrowTrainer

    hooks = RecipeHooks(setup, parts.model, data, notify, show)
    trainer = BaseGrowTrainer(
        model=parts.model,
        args=setup.arguments,
        train_dataset=data.train,
        eval_dataset=data.evals or None,
        data_collator=data.collator,
        growth=make_settings(setup, parts, data, notify, stop),
        hooks=hooks,
    )
    for replaced in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(replaced)
    trainer.add_callback(hooks.progress)
    add_early_stopping(trainer, setup.options)
    return trainer


def add_early_stopping(trainer: BaseGrowTrainer, options: TrainOptions) -> None:
    from transformers import EarlyStoppingCallback

    if options.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(options.early_stopping_patience, options.early_stopping_threshold))


def merge_adapters(trainer: BaseGrowTrainer) -> None:
    """Makes the trainer's LoRA model the plain model, its adapters merged into the weights."""
    assert isinstance(trainer.hooks, SetupHooks)
    trainer.hooks.model = trainer.model = trainer.model.merge_and_unload()
