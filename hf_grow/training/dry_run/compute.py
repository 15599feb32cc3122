"""FLOPs of a training that was not run: by purpose, as the ledger of a run counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_grow.checkpoint.source import open_source
from hf_grow.model.flops import Cost, ModelFlops, count_flops
from hf_grow.training.config.distill_options import Teacher
from hf_grow.training.setup.option_checks import resolve_teacher
from hf_grow.training.setup.train_setup import TrainSetup


def planned_flops(
    setup: TrainSetup, own: ModelFlops, attention: str, texts: Sequence[Mapping[str, Any]], *, tokens: int, epoch: int, steps: int
) -> dict[str, int]:
    """FLOPs by purpose. Rows are taken as one document; what self-replay samples is not known before.

    ``own``: of the model that trains; ``tokens``: trained on in all ``steps``; ``epoch``: tokens of one pass over the texts.
    """
    recipe, length = setup.recipe, setup.recipe.data.seq_length

    def forward(teacher: Teacher) -> Cost:
        ref, revision = resolve_teacher(teacher, setup.plan)
        return count_flops(open_source(ref, revision=revision, weights=False).info.config).forward

    evaluated = sum(t["tokens"] or 0 for t in texts if t["use"].startswith("eval "))
    compared = recipe.kl_rows * length
    spent = {
        "train": own.train.tokens(tokens, length, attention),
        "recompute": own.recompute.tokens(tokens, length, attention),
        "evaluation": own.forward.tokens(evaluations(setup, steps) * (evaluated + compared), length, attention),
    }
    if recipe.distill is not None:
        read = min(tokens, epoch) if recipe.distill.cached else tokens
        spent["teacher"] = sum(forward(t).tokens(read, length, attention) for t in recipe.distill.teachers)
    of_source = compared + (evaluated if recipe.monitor.baseline == "source" else 0)
    if of_source:
        spent["evaluation"] += forward(Teacher()).tokens(of_source, length, attention)
    return {purpose: flops for purpose, flops in spent.items() if flops}


def evaluations(setup: TrainSetup, steps: int) -> int:
    """How often the named sets are evaluated: at the start, every so many steps, and at the end."""
    arguments = setup.arguments
    if not setup.recipe.data.eval:
        return 0
    during = last = 0
    if arguments.eval_strategy.value == "steps":
        given = arguments.eval_steps or arguments.logging_steps
        every = max(1, round(given if given >= 1 else given * steps))
        during, last = steps // every, steps % every
    return bool(arguments.eval_on_start) + during + (during == 0 or last != 0)
