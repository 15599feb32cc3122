"""Options of a training besides the model, its texts and TrainingArguments: those that a recipe and GrowConfig share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hf_grow.options import Options
from hf_grow.training.config.distill_options import DistillOptions
from hf_grow.training.config.lora_options import LoraOptions
from hf_grow.training.config.monitor_options import MonitorOptions
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.config.schedules import AfterGrowth, NumberOfSteps, Parts, Phase, Positive, Warmup, as_list


class MoeOptions(Options):
    """Mixtures of experts."""

    aux_loss: bool = True
    """Train with the router's load-balancing loss."""
    aux_coefficient: Annotated[float, Field(ge=0)] | None = None
    """Its coefficient. Default: router_aux_loss_coef of the model's config."""


class TrainOptions(Options):
    """What trains and how, in a recipe and in GrowConfig."""

    train: Parts = Field(default=["everything"])
    """Parts that train: everything, or a list of new, old, new_layers, routers, new_experts, old_experts, embeddings, norms, head."""
    freeze: Annotated[list[str], BeforeValidator(as_list)] = Field(default=[])
    """Parts that do not train, even if `train` names them."""
    warmup: Warmup = Warmup()
    """Warm-up of new parameters and blocks: zero_init, lr, steps, alpha_steps."""
    phases: list[Phase] = Field(default=[])
    """First steps in which only some parts train, as [{steps: 100, train: [new]}]: old parameters are frozen meanwhile."""
    after_growth: AfterGrowth = AfterGrowth()
    """Settling (a lower learning rate, then restored) and consolidation."""
    regularizer: PenaltyOptions = PenaltyOptions()
    """Penalty on the distance from the initial weights: kind, lambda, fisher, form (docs/regularizers.md)."""
    distill: DistillOptions | None = None
    """Teachers: {} takes the source of the growth."""
    chunked_loss: bool | None = None
    """Compute the loss in chunks of tokens, without the logits of a batch, the model's or a teacher's. Default: with `distill`, where it works."""
    lora: LoraOptions | None = None
    """LoRA on old layers; {} takes the defaults."""
    moe: MoeOptions = MoeOptions()
    """Router loss of mixtures."""
    monitor: MonitorOptions = MonitorOptions()
    """Detection of instability and forgetting, and reactions."""
    old_set: str = "old"
    """The set of data.eval that forgetting is measured on."""
    kl_rows: NumberOfSteps = 0
    """Rows of the old set on which KL(source || model) is measured at every evaluation. Default: 0, none; the source's logits of them stay in memory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in training. Default: auto, float32 (float64 for checkpoints in float64); in 16 bits most updates are lost to rounding."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the result. Default: auto, that of `model`; checkpoints to resume from keep the training's."""
    attn_implementation: str | None = None
    """sdpa, eager or flash_attention_2, as in from_pretrained."""
    checkpointed_layers: Literal["new_layers", "old_layers"] | Annotated[list[int], Field(min_length=1)] | None = None
    """With activation_checkpointing: the decoder layers that it applies to, as [0, 1, 5], new_layers or old_layers. Default: all."""
    early_stopping_patience: Positive | None = None
    """Stop when metric_for_best_model has not improved for this many evaluations."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Minimum change that counts as an improvement."""


_NEED_LOGITS = ("use_liger_kernel", "label_smoothing_factor", "torch_compile")
"""TrainingArguments with which the loss is not computed in chunks: they replace it, or the model's code."""


def uses_chunked_loss(options: TrainOptions, arguments: Any, *, deepspeed: bool) -> bool:
    """``arguments``: TrainingArguments. By default with distillation, where nothing else needs the logits."""
    if options.chunked_loss is not None:
        return options.chunked_loss
    return options.distill is not None and not deepspeed and not any(getattr(arguments, a) for a in _NEED_LOGITS)


def contradictions(options: TrainOptions, arguments: Mapping[str, Any], eval_sets: Collection[str]) -> list[str]:
    """What cannot hold together, one line each. ``arguments``: TrainingArguments that were given; ``eval_sets``: names of the evaluation sets."""
    errors = []
    steps = arguments.get("max_steps")
    if isinstance(steps, int) and steps > 0 and options.warmup.alpha_steps > steps:
        errors.append(
            f"warmup.alpha_steps: {options.warmup.alpha_steps} is more than max_steps {steps}: the saved model would differ from the trained one."
        )
    if isinstance(steps, int) and steps > 0 and (total := sum(p.steps for p in options.phases)) >= steps:
        errors.append(f"phases: take {total} steps, but max_steps is {steps}: the other parts would never train.")
    if options.warmup.zero_init and options.regularizer.fisher:
        errors.append("warmup.zero_init: changes the weights that the Fisher was estimated at; grow with method identity instead.")
    if options.distill and arguments.get("use_liger_kernel"):
        errors.append("distill: needs the logits, and use_liger_kernel computes the loss without them. Remove one of them.")
    if options.chunked_loss and (found := [a for a in _NEED_LOGITS if arguments.get(a)]):
        errors.append(f"chunked_loss: does not work with {found[0]}. Remove one of them.")
    if options.dtype == "float16" and arguments.get("fp16"):
        errors.append("dtype: float16 does not work with fp16, which keeps the weights in float32. Remove dtype.")
    if "old_set" in options.model_fields_set and options.old_set not in eval_sets:
        errors.append(f"old_set: there is no evaluation set {options.old_set!r}.")
    if options.early_stopping_threshold and not options.early_stopping_patience:
        errors.append("early_stopping_threshold: requires early_stopping_patience.")
    if options.kl_rows and options.old_set not in eval_sets:
        errors.append(f"kl_rows: there is no evaluation set {options.old_set!r}.")
    if options.lora and options.regularizer.kind != "none":
        errors.append("regularizer: has no effect with `lora`, which does not change old weights.")
    if options.lora and (options.train != ["everything"] or options.freeze or options.phases):
        errors.append("lora: determines what trains; remove train, freeze and phases.")
    return errors


def default_best_metric(eval_sets: Collection[str]) -> str:
    """metric_for_best_model where none is given: the loss of `new`, else of the first set."""
    return f"eval_{'new' if 'new' in eval_sets else next(iter(eval_sets))}_loss"


def missing_eval_set(options: TrainOptions, arguments: Mapping[str, Any], where: str) -> list[str]:
    """What needs an evaluation set, one line each, where there is none. ``where``: the place that names the sets."""
    asked = {
        "load_best_model_at_end": arguments.get("load_best_model_at_end"),
        "save_strategy": arguments.get("save_strategy") == "best",
        "eval_strategy": arguments.get("eval_strategy", "no") != "no",
        "early_stopping_patience": options.early_stopping_patience,
    }
    return [f"{key}: needs an evaluation set ({where})." for key, value in asked.items() if value]
