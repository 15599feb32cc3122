"""From a checked recipe to what the trainer needs: the model, who trains when, the penalty, the teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.source import open_source
from hf_grow.convert.in_memory import untie_config
from hf_grow.errors import InputError, SourceError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.model import flops
from hf_grow.model.loading import reset_output_flags, transformers_errors
from hf_grow.model.meta_model import meta_model
from hf_grow.training.config.distill_options import DistillOptions, Teacher
from hf_grow.training.config.train_config import TrainRecipe
from hf_grow.training.distillation.distill import Distiller, teacher_from_model
from hf_grow.training.distillation.logit_cache import write_logit_cache
from hf_grow.training.param_updates import param_provenance
from hf_grow.training.param_updates.masks import EVERYTHING, Mask, select
from hf_grow.training.param_updates.parameter_map import parameter_map
from hf_grow.training.param_updates.residual_scale import ResidualScale
from hf_grow.training.param_updates.updates import ParamUpdates
from hf_grow.training.peft import lora
from hf_grow.training.setup.checks import resolve
from hf_grow.training.setup.train_setup import Notify, TrainSetup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Who:
    """Which entries of which parameters are new, and which train."""

    updates: ParamUpdates
    new: Mapping[str, Mask]
    new_blocks: tuple[int, ...]


def weights_dtype(recipe: TrainRecipe, checkpoint: Checkpoint) -> str:
    """What from_pretrained is told: fp32, whatever is computed in and whatever the checkpoint is stored in (fp64 stays fp64).

    In bf16 most steps are lost to rounding; in fp16 Adam's epsilon is zero and squared gradients underflow.
    """
    if recipe.dtype != "auto":
        return recipe.dtype
    return "float64" if any(t.dtype == "F64" for t in checkpoint.info.tensors.values()) else "float32"


def load_model(ref: str, revision: str | None, dtype: str, attention: str | None, notify: Notify) -> PreTrainedModel:
    """The model of a checkpoint, its weights downloaded if need be. Raises SourceError for what cannot be loaded whole."""
    from transformers import AutoModelForCausalLM

    held = open_source(ref, revision=revision, weights=True, notify=notify)
    assert held.folder is not None
    options = {} if attention is None else {"attn_implementation": attention}
    with transformers_errors(f"the model of {ref}"):
        model, found = AutoModelForCausalLM.from_pretrained(
            held.folder, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise SourceError(f"The weights of {ref} lack {missing[0]} ({len(missing)} tensors); they would be random.")
    loaded: PreTrainedModel = model
    untie_config(loaded)
    reset_output_flags(loaded.config)
    return loaded


def plan_updates(model: PreTrainedModel, plan: GrowthPlan | None, recipe: TrainRecipe) -> Who:
    """Raises InputError where the recipe names a part that this model has not."""
    names = [n for n, _ in model.named_parameters()]
    new = param_provenance.new_masks(model, plan)
    wanted = {p for p in (*recipe.train, *recipe.freeze, *(q for phase in recipe.phases for q in phase.train)) if p != EVERYTHING}
    parts = param_provenance.parts(model, plan) if wanted else {}
    trains = select(names, parts, recipe.train, but=recipe.freeze)
    phases = [select(names, parts, phase.train) for phase in recipe.phases]
    blocks = tuple(i for i, o in enumerate(plan.growth.layers) if o.new or o.identity) if plan is not None else ()
    return Who(ParamUpdates(trains, new, phases), new, blocks)


def zero_new_blocks(model: PreTrainedModel, plan: GrowthPlan) -> int:
    """Sets to zero what new blocks write to the residual stream; returns how many tensors. They are identity blocks then."""
    import torch

    where, held, count = parameter_map(model), dict(model.named_parameters()), 0
    with torch.no_grad():
        for name, entry in plan.architecture.tensors.items():
            if entry.writes_residual and plan.growth.layers[entry.layer].new:
                where[name].of(held[where[name].parameter]).zero_()
                count += 1
    return count


def make_residual_scale(model: Any, who: Who, recipe: TrainRecipe) -> ResidualScale | None:
    """Where new blocks are blended in or measured; None where there are none. Raises InputError if the recipe wants it all the same."""
    wanted = recipe.warmup.alpha_steps or recipe.monitor.contribution_steps
    if not who.new_blocks:
        if wanted:
            raise InputError("warmup.alpha_steps and monitor.contribution_steps are about new blocks, and this model has none.")
        return None
    return ResidualScale(model, who.new_blocks)


def with_lora(model: PreTrainedModel, who: Who, recipe: TrainRecipe) -> tuple[Any, ParamUpdates]:
    """The peft model, and who trains in it under its names."""
    assert recipe.lora is not None
    wrapped = lora.add_lora(model, recipe.lora, who.new)
    full = set(lora.fully_trained_parameters(wrapped))
    names = {n: bool(p.requires_grad) for n, p in wrapped.named_parameters()}
    return wrapped, ParamUpdates(names, {n: n in full for n in names})


def training_flops(checked: TrainSetup) -> float:
    """FLOPs a token of the model that trains, with what the recipe freezes or adds."""
    model: Any = meta_model(checked.checkpoint.info.config)
    who = plan_updates(model, checked.plan, checked.recipe)
    who.updates.freeze(model)
    if checked.recipe.lora is not None:
        model, _ = with_lora(model, who, checked.recipe)
    return flops.training_flops(model, checked.recipe.data.seq_length)


def distiller(checked: TrainSetup, data: Any, notify: Notify) -> tuple[Distiller | None, float, list[dict[str, Any]]]:
    """The teachers, the FLOPs a token that those in memory cost, and events about them."""
    options = checked.recipe.distill
    if options is None:
        return None, 0.0, []
    speakers, cost, events = [], 0.0, []
    for i, teacher in enumerate(options.teachers):
        ref, revision = resolve(teacher, checked.plan)
        if options.top_k is None:
            model = load_model(ref, revision, options.dtype, checked.recipe.attn_implementation, notify)
            cost += flops.forward_flops(open_source(ref, revision=revision, weights=False).info.config, checked.recipe.data.seq_length)
            speakers.append(teacher_from_model(model))
            events.append({"model": ref, "cache": "", "covered": 1.0})
            continue
        folder = _cache_folder(options, checked.out, i)
        cache = _cached(checked, options, teacher, data, folder, notify)
        speakers.append(cache)
        events.append({"model": ref, "cache": str(folder), "covered": cache.meta.get("covered")})
    return Distiller(options, speakers), cost, events


def _cache_folder(options: DistillOptions, out: Path, number: int) -> Path:
    return (Path(options.cache) if options.cache else out / "teacher-logits") / f"teacher-{number}"


def _cached(checked: TrainSetup, options: DistillOptions, teacher: Teacher, data: Any, folder: Path, notify: Notify) -> Any:
    assert options.top_k is not None
    if not hasattr(data.train, "__len__"):
        raise InputError("distill.top_k needs text that is not streamed: the teacher reads it beforehand.", hint="Leave top_k out.")
    ref, revision = resolve(teacher, checked.plan)
    held = open_source(ref, revision=revision, weights=False)
    identity = f"{ref}@{revision or ''} {sorted((f, str(sorted(facts.items()))) for f, facts in held.files.items())}"
    if not folder.is_dir():
        notify(f"{ref} reads the training text; its {options.top_k} largest logits a position go to {folder}.")
    model = load_model(ref, revision, options.dtype, checked.recipe.attn_implementation, notify)
    model.to(checked.arguments.device)
    rows = Collated(data.train, data.collator)
    return write_logit_cache(model, rows, folder, top_k=options.top_k, dtype=options.cache_dtype, identity=identity)


@dataclass(frozen=True)
class Collated(Sequence[Mapping[str, Any]]):
    """Rows as the trainer sees their input ids (a row that is not full is filled)."""

    rows: Any
    collate: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return {"input_ids": self.collate([self.rows[int(index)]])["input_ids"][0].numpy()}
