"""A training reckoned, not begun: the resolved recipe, parameter groups, memory, tokens and FLOPs of `hf-grow train --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hf_grow.checkpoint.source import open_source
from hf_grow.common.extras import require_packages
from hf_grow.common.free_memory import available_memory
from hf_grow.common.units import format_bytes
from hf_grow.errors import ExecutionError, GrowError
from hf_grow.growth.plan import DTYPE_BYTES
from hf_grow.model import flops
from hf_grow.model.meta_model import meta_model
from hf_grow.training.config.distill_options import Teacher
from hf_grow.training.config.train_config import DEFAULTS, Read, tokens_a_step
from hf_grow.training.data import survey
from hf_grow.training.distributed.launch import Launch, launched
from hf_grow.training.dry_run import memory as estimate
from hf_grow.training.regularizers.build import penalty_bytes
from hf_grow.training.setup.checks import check, resolve
from hf_grow.training.setup.prepare import make_residual_scale, plan_updates, weights_dtype, with_lora
from hf_grow.training.setup.train_setup import Notify, TrainSetup

SMALLER = (
    "Take a smaller per_device_train_batch_size and more gradient_accumulation_steps, or activation_checkpointing: true. --dry-run counts."
)
"""What to do where a step does not fit."""


def dry_run(
    read: Read,
    *,
    output: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = print,
    started: Launch | None = None,
    timed: bool = False,
) -> dict[str, Any]:
    """What a training would do and need, as JSON data. Opens config, headers and the first documents of every text; loads no weights.

    ``started``: the processes to reckon with; by default those that the launcher tells of. ``timed``: also load the model and time some steps
    (of this process's kind); the texts may be missing then. Raises ExecutionError where the steps to be timed need more main memory than is free.
    """
    require_packages("accelerate", "datasets")
    started = started or launched()
    checked = check(read, output=output, resume=resume, overwrite=overwrite, notify=notify, started=started, texts=not timed)
    recipe, arguments, info = checked.recipe, checked.arguments, checked.checkpoint.info
    texts = _texts(checked, notify, needed=not timed)
    model = meta_model(info.config)
    who = plan_updates(model, checked.plan, recipe)
    make_residual_scale(model, who, recipe)
    groups = [list(g) for g in who.updates.describe(model)]
    trainable = sum(p.numel() for n, p in model.named_parameters() if who.updates.trains[n] is not False)
    parameters = sum(p.numel() for p in model.parameters())
    own = {"float64": 8, "float32": 4}.get(weights_dtype(recipe, checked.checkpoint), 2)
    who.updates.freeze(model)
    counted: Any = model
    if recipe.lora is not None:
        wrapped, updates = with_lora(model, who, recipe)
        counted = wrapped
        groups = [list(g) for g in updates.describe(wrapped)]
        trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        parameters = sum(p.numel() for p in wrapped.parameters())
    teachers, logits = _teachers(checked)
    warming = recipe.warmup.lr != 1.0 or recipe.warmup.steps > 0
    copies = own * who.updates.copies(model, warming=warming) if recipe.lora is None else 0
    memory = estimate.estimate(
        info.architecture, arguments, parameters=parameters, trainable=trainable, width=own, length=recipe.data.seq_length,
        penalty=penalty_bytes(recipe.regularizer, meta_model(info.config), checked.plan), rows=copies, teachers=teachers,
        distillation=logits, launch=started,
    )  # fmt: skip
    step = tokens_a_step(arguments, recipe.data.seq_length, started.processes)
    known = [t["tokens"] for t in texts if t["use"] == "train"]
    one_pass = sum(known) if known and all(known) else None
    tokens = step * arguments.max_steps if arguments.max_steps > 0 else one_pass and round(one_pass * arguments.num_train_epochs)
    facts = {
        "output": str(checked.out),
        "model": checked.checkpoint.ref,
        "recipe": resolved(checked),
        "differs": differs(checked),
        "parameters": [trainable, parameters],
        "free_memory": free_memory(arguments),
        "texts": texts,
        "parameter_groups": groups,
        "processes": started.processes,
        "sharing": str(started),
        "memory": dict(estimate.as_json(memory)),
        "tokens_a_step": step,
        "tokens": tokens,
        "steps": arguments.max_steps if arguments.max_steps > 0 else tokens and max(1, tokens // step),
        "flops": tokens
        and tokens * flops.training_flops(counted, recipe.data.seq_length) + _beside(checked, texts, tokens, one_pass or tokens),
    }
    if timed:
        facts["time"] = _time(checked, facts, notify)
    return facts


def _texts(checked: TrainSetup, notify: Notify, *, needed: bool) -> list[dict[str, Any]]:
    try:
        return survey(checked.recipe.data, checked.tokenizer, notify=notify, vocab_size=checked.vocabulary)
    except GrowError as error:
        if needed:
            raise
        notify(f"How much text there is cannot be told: {error}")
        return []


def _time(checked: TrainSetup, facts: Mapping[str, Any], notify: Notify) -> dict[str, Any]:
    needs, free = facts["memory"]["total"], facts["free_memory"]
    if free["device"] == "cpu" and needs > free["bytes"]:  # the system would end the process; accelerators say that they are full
        raise ExecutionError(
            f"A step needs about {format_bytes(needs)} of memory, and {format_bytes(free['bytes'])} are free: none is timed.", hint=SMALLER
        )
    from hf_grow.training.dry_run.step_time import leaves_out, time_steps

    return time_steps(checked, notify).to_json(facts["steps"], leaves_out(checked))


def _teachers(checked: TrainSetup) -> tuple[int, int]:
    """Bytes of teachers in memory, and of the logits that learning from them takes."""
    options, arguments = checked.recipe.distill, checked.arguments
    if options is None:
        return 0, 0
    held = [open_source(ref, revision=revision, weights=False) for ref, revision in (resolve(t, checked.plan) for t in options.teachers)]
    widths = {"float32": 4, "bfloat16": 2, "float16": 2}
    said = widths.get(options.dtype) or max(DTYPE_BYTES[t.dtype] for h in held for t in h.info.tensors.values())
    own = widths.get(weights_dtype(checked.recipe, checked.checkpoint), 8)
    tokens = arguments.per_device_train_batch_size * checked.recipe.data.seq_length
    # Under autocast logits are given out in fp32.
    logits = estimate.distillation(options, checked.vocabulary, tokens, said, 4 if arguments.bf16 or arguments.fp16 else own)
    return (0 if options.top_k is not None else sum(t.info.nbytes for h in held for t in h.tensors.values())), logits


def _beside(checked: TrainSetup, texts: Sequence[Mapping[str, Any]], tokens: int, one_pass: int) -> float:
    """FLOPs of forward passes of other models: teachers (once for every row, where their logits are kept), and the source as a baseline."""
    recipe, total = checked.recipe, 0.0
    length = recipe.data.seq_length

    def once(teacher: Teacher) -> float:
        ref, revision = resolve(teacher, checked.plan)
        return flops.forward_flops(open_source(ref, revision=revision, weights=False).info.config, length)

    if recipe.distill is not None:
        read = tokens if recipe.distill.top_k is None else min(tokens, one_pass)
        total += read * sum(once(t) for t in recipe.distill.teachers)
    measured = recipe.kl_rows * length
    if recipe.monitor.baseline == "source":
        measured += sum(t["tokens"] or 0 for t in texts if t["use"].startswith("eval "))
    return total + (measured * once(Teacher()) if measured else 0.0)


def free_memory(arguments: Any) -> dict[str, Any]:
    """Bytes that are free on the device of this process, and its name; of main memory what the kernel and the group of processes allow."""
    import torch

    if arguments.device.type == "cuda":
        return {"device": str(arguments.device), "bytes": torch.cuda.mem_get_info(arguments.device)[0]}
    return {"device": "cpu" if arguments.device.type == "cpu" else str(arguments.device), "bytes": available_memory()}


def differs(checked: TrainSetup) -> dict[str, Any]:
    """What was asked for and is not the default, as JSON data; without the model and the output, which stand by themselves."""
    own = checked.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    standard = {**{f.name: f.default for f in fields(type(checked.arguments))}, **DEFAULTS}
    given = {k: v for k, v in checked.read.arguments.items() if standard.get(k) != v}
    return {k: v for k, v in {**own, **given}.items() if k not in ("model", "output")}


def resolved(checked: TrainSetup) -> dict[str, Any]:
    """The recipe with every default that differs from transformers' own, as JSON data."""
    changed = {k: v for k, v in checked.arguments.to_dict().items() if k in checked.read.arguments or k in _SHOWN}
    return {**checked.recipe.model_dump(mode="json", by_alias=True), **changed}


_SHOWN = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
          "adam_beta1", "adam_beta2", "max_steps", "num_train_epochs", "max_grad_norm", "bf16", "seed", "save_steps", "eval_steps")  # fmt: skip
