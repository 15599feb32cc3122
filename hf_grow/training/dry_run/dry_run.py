"""Dry run: memory and FLOP estimate, resolved recipe and parameter groups of `hf-grow train --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.source import open_source
from hf_grow.common.extras import require_packages
from hf_grow.common.free_memory import available_memory
from hf_grow.common.units import format_bytes
from hf_grow.errors import ExecutionError, GrowError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import DTYPE_BYTES
from hf_grow.model.architecture import Architecture
from hf_grow.model.meta_model import meta_model
from hf_grow.training.config.train_config import DEFAULTS, RecipeData, TrainRecipe, tokens_per_step
from hf_grow.training.data import survey
from hf_grow.training.distributed.launch import Launch, current_launch
from hf_grow.training.dry_run.compute import planned_flops
from hf_grow.training.dry_run.memory import MemoryEstimate, distillation_bytes, estimate_memory
from hf_grow.training.param_updates.updates import STEPPED_BY_PARAMETER
from hf_grow.training.regularizers.build import penalty_bytes
from hf_grow.training.setup.activation_checkpointing import checkpointed_layers
from hf_grow.training.setup.model_setup import (
    ModelUpdates,
    attention_of,
    make_residual_scale,
    plan_updates,
    step_flops,
    weights_dtype,
    with_lora,
)
from hf_grow.training.setup.option_checks import resolve_teacher
from hf_grow.training.setup.recipe_checks import check_recipe
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.trainer.ledger import TRAINING

if TYPE_CHECKING:
    from transformers import TrainingArguments

OUT_OF_MEMORY_HINT = (
    "Use a smaller per_device_train_batch_size with more gradient_accumulation_steps, or activation_checkpointing: true. "
    "--dry-run estimates the memory."
)


def dry_run(
    read: RecipeData,
    *,
    output: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = print,
    started: Launch | None = None,
    timed: bool = False,
) -> dict[str, Any]:
    """What a training would do and need, as JSON data. Opens config, headers and the first documents of every text; loads no weights.

    ``started``: the processes to plan for, by default those of this launch. ``timed``: also loads the model and times some steps in this process;
    the texts may be missing then. Raises InputError for a recipe with mistakes, ExecutionError if a step to be timed needs more main memory
    than is free.
    """
    require_packages("accelerate", "datasets")
    started = started or current_launch()
    setup = check_recipe(read, output=output, resume=resume, overwrite=overwrite, notify=notify, started=started, texts=not timed)
    recipe, arguments, info = setup.recipe, setup.arguments, setup.checkpoint.info
    length = recipe.data.seq_length
    texts = _survey_texts(setup, notify, required=not timed)
    model = meta_model(info.config)
    planned = plan_updates(model, setup.plan, recipe)
    make_residual_scale(model, planned.new_blocks, recipe)
    groups = [list(g) for g in planned.updates.describe(model)]
    trainable = sum(p.numel() for n, p in model.named_parameters() if planned.updates.trains[n] is not False)
    parameters = sum(p.numel() for p in model.parameters())
    width = {"float64": 8, "float32": 4}.get(weights_dtype(recipe.dtype, setup.checkpoint), 2)
    planned.updates.freeze(model)
    trained_model: Any = model
    if recipe.lora is not None:
        trained_model, updates = with_lora(model, planned.new, recipe.lora)
        groups = [list(g) for g in updates.describe(trained_model)]
        trainable = sum(p.numel() for p in trained_model.parameters() if p.requires_grad)
        parameters = sum(p.numel() for p in trained_model.parameters())
    teachers, logits = _teacher_memory(setup, started)
    memory = recipe_memory(
        recipe, arguments, info.architecture, setup.plan, width=width, length=length, planned=planned, parameters=parameters,
        trainable=trainable, teachers=teachers, logits=logits, launch=started,
    )  # fmt: skip
    step = tokens_per_step(arguments, length, started.data_processes)
    counts = [t["tokens"] for t in texts if t["use"] == "train"]
    epoch = sum(counts) if counts and all(counts) else None
    tokens = step * arguments.max_steps if arguments.max_steps > 0 else epoch and round(epoch * arguments.num_train_epochs)
    steps = arguments.max_steps if arguments.max_steps > 0 else tokens and max(1, tokens // step)
    facts: dict[str, Any] = {
        "output": str(setup.out),
        "model": setup.checkpoint.ref,
        "recipe": resolved_recipe(setup),
        "differs": non_default_settings(setup),
        "parameters": [trainable, parameters],
        "free_memory": device_free_memory(arguments),
        "texts": texts,
        "parameter_groups": groups,
        "processes": started.processes,
        "sharing": str(started),
        "memory": memory.to_json(),
        "tokens_a_step": step,
        "tokens": tokens,
        "steps": steps,
        "flops": None,
    }
    if tokens and steps:
        own, attention = step_flops(setup, trained_model), attention_of(trained_model, recipe)
        spent = planned_flops(setup, own, attention, texts, tokens=tokens, epoch=epoch or tokens, steps=steps)
        facts |= {"flops": sum(spent.get(p, 0) for p in TRAINING), "flops_by_purpose": spent}
    if timed:
        facts["time"] = _time_steps(setup, facts, notify)
    return facts


def recipe_memory(
    recipe: TrainRecipe,
    arguments: TrainingArguments,
    arch: Architecture,
    plan: GrowthPlan | None,
    *,
    width: int,
    length: int,
    planned: ModelUpdates,
    parameters: int,
    trainable: int,
    teachers: int = 0,
    logits: int = 0,
    launch: Launch,
) -> MemoryEstimate:
    """`estimate_memory` of a recipe. ``parameters``, ``trainable``: with adapters."""
    model = meta_model(arch.config)
    has_warmup = recipe.warmup.lr != 1.0 or recipe.warmup.steps > 0
    at_once = recipe.regularizer.form == "proximal" or str(getattr(arguments.optim, "value", arguments.optim)) not in STEPPED_BY_PARAMETER
    copies = 0
    if recipe.lora is None:
        copies = planned.updates.copied_bytes(model, width, new_lr=has_warmup, shards=launch.shards("rows"), at_once=at_once)
    return estimate_memory(
        arch, arguments, parameters=parameters, trainable=trainable, width=width, length=length,
        penalty=penalty_bytes(recipe.regularizer, model, plan), rows=copies, teachers=teachers,
        distillation=logits, launch=launch, checkpointed=checkpointed_layers(recipe, arguments, plan, arch.layers),
    )  # fmt: skip


def _survey_texts(setup: TrainSetup, notify: Notify, *, required: bool) -> list[dict[str, Any]]:
    try:
        return survey(setup.recipe.data, setup.tokenizer, notify=notify, vocab_size=setup.vocabulary)
    except GrowError as error:
        if required:
            raise
        notify(f"The texts cannot be read, so their size is unknown: {error}")
        return []


def _time_steps(setup: TrainSetup, facts: Mapping[str, Any], notify: Notify) -> dict[str, Any]:
    needed, free = facts["memory"]["total"], facts["free_memory"]
    if free["device"] == "cpu" and needed > free["bytes"]:  # the kernel would kill the process; accelerators raise an error
        raise ExecutionError(
            f"A step needs about {format_bytes(needed)} of memory, but only {format_bytes(free['bytes'])} are free; steps cannot be timed.",
            hint=OUT_OF_MEMORY_HINT,
        )
    from hf_grow.training.dry_run.step_time import not_timed, time_steps

    return time_steps(setup, notify).to_json(facts["steps"], not_timed(setup))


def _teacher_memory(setup: TrainSetup, launch: Launch) -> tuple[int, int]:
    """Bytes of teachers in memory, and of the logits that distillation holds for a micro-batch."""
    options, arguments = setup.recipe.distill, setup.arguments
    if options is None:
        return 0, 0
    teachers = [
        open_source(ref, revision=revision, weights=False) for ref, revision in (resolve_teacher(t, setup.plan) for t in options.teachers)
    ]
    widths = {"float32": 4, "bfloat16": 2, "float16": 2}
    teacher_width = widths.get(options.dtype) or max(DTYPE_BYTES[t.dtype] for c in teachers for t in c.info.tensors.values())
    # Autocast returns logits in fp32.
    student_width = 4 if arguments.bf16 or arguments.fp16 else widths.get(weights_dtype(setup.recipe.dtype, setup.checkpoint), 8)
    tokens = arguments.per_device_train_batch_size * setup.recipe.data.seq_length
    logits = distillation_bytes(options, setup.vocabulary, tokens, teacher_width, student_width)
    held = 0 if options.cached else sum(t.info.nbytes for c in teachers for t in c.tensors.values())
    shards = launch.processes if (launch.sharing == "fsdp2" if options.shard is None else options.shard) else launch.shards("weights")
    return held // shards, logits


def device_free_memory(arguments: TrainingArguments) -> dict[str, Any]:
    """{"device": name, "bytes": free bytes or None}; on a CPU, main memory available within the kernel's and the cgroup's limits."""
    import torch

    if arguments.device.type == "cuda":
        return {"device": str(arguments.device), "bytes": torch.cuda.mem_get_info(arguments.device)[0]}
    return {"device": "cpu" if arguments.device.type == "cpu" else str(arguments.device), "bytes": available_memory()}


def non_default_settings(setup: TrainSetup) -> dict[str, Any]:
    """Settings that differ from their defaults, as JSON data, without model and output."""
    own = setup.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    defaults = {**{f.name: f.default for f in fields(type(setup.arguments))}, **DEFAULTS}
    given = {k: v for k, v in setup.given_arguments.items() if defaults.get(k) != v}
    return {k: v for k, v in {**own, **given}.items() if k not in ("model", "output")}


def resolved_recipe(setup: TrainSetup) -> dict[str, Any]:
    """The recipe with all defaults, as JSON data; of TrainingArguments, those that were given and _SHOWN_ARGUMENTS."""
    shown = {k: v for k, v in setup.arguments.to_dict().items() if k in setup.given_arguments or k in _SHOWN_ARGUMENTS}
    return {**setup.recipe.model_dump(mode="json", by_alias=True), **shown}


_SHOWN_ARGUMENTS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "adam_beta1", "adam_beta2", "max_steps", "num_train_epochs", "max_grad_norm", "bf16", "seed", "save_steps", "eval_steps",
)  # fmt: skip
