"""Importances from AdamW's exp_avg_sq of an earlier training, which cost nothing (arXiv 2507.18807).

    F = N v / (1 - beta2^t)          N: tokens per step

v is a mean over the last 1 / (1 - beta2) steps or so of g^2, for g the gradient of the mean loss over the N tokens of a step. As where squares of
batches estimate the Fisher, N makes it one per token. It is an empirical Fisher: the labels are the text's, so scores of tokens in one step are not
uncorrelated, and g^2 also holds the square of the mean gradient, which is small where the training had converged. The weights are those along the way.
What else was in g is in F: gradients that were clipped to a norm count less (all entries alike), and a penalty in the loss adds its own gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.checkpoint.reader import GROWTH
from hf_grow.common.safe_files import read_json
from hf_grow.errors import InputError, SourceError
from hf_grow.training.growth_state.optimizer_files import TRAINER_STATE
from hf_grow.training.growth_state.optimizer_state import MomentRows, OptimizerState
from hf_grow.training.param_updates.parameter_map import ParameterRows
from hf_grow.training.sharding.row_source import row_step

if TYPE_CHECKING:
    from torch import Tensor

SECOND_MOMENT = "exp_avg_sq"
_HINT = "Estimate the Fisher instead: --text OLD_DATA."


def importance_from_moments(
    state: OptimizerState, places: Mapping[str, ParameterRows], shapes: Mapping[str, Sequence[int]], tokens_per_step: float
) -> Iterator[tuple[str, int, Tensor]]:
    """(name on disk, first row, rows of F in fp64) of all tensors, a block of rows in memory at a time. ``places``: `parameter_map` of the model.

    Raises InputError, before the first block, if a parameter has no second moment of AdamW's.
    """
    factors = {place.parameter: tokens_per_step / _bias(state, place.parameter) for place in places.values()}
    moments = MomentRows(state, SECOND_MOMENT, places, shapes)
    for name, place in places.items():
        step = row_step(shapes[name])
        for start in range(0, shapes[name][0], step):
            rows = moments.rows(name, start, min(start + step, shapes[name][0]))
            yield name, start, rows.double().mul_(factors[place.parameter])


def _bias(state: OptimizerState, parameter: str) -> float:
    """1 - beta2^t of a parameter."""
    held = state.state.get(parameter, {})
    if not held:
        raise InputError(f"The optimizer has no state of {parameter}: was it frozen? Its importance is not known.", hint=_HINT)
    group = next(g for g in state.groups if parameter in g["params"])
    moment = held.get(SECOND_MOMENT)
    if moment is None or isinstance(moment, (int, float)) or not moment.dtype.is_floating_point or "betas" not in group:
        kept = ", ".join(sorted(held))
        raise InputError(f"The optimizer keeps no {SECOND_MOMENT} of {parameter} as AdamW does, but {kept}.", hint=_HINT)
    step = state.number(parameter)
    if step < 1:
        raise InputError(f"The optimizer has made no step with {parameter}.", hint=_HINT)
    beta = float(group["betas"][1])
    return float(1.0 - beta**step)


def recorded_tokens_per_step(checkpoint: Path) -> float | None:
    """Tokens per step of the training that wrote a checkpoint: from growth.json, else from Trainer's count; None where neither tells."""
    for file, section, tokens, steps in (
        (GROWTH, "training", "tokens", "steps"),
        (TRAINER_STATE, None, "num_input_tokens_seen", "global_step"),
    ):
        try:
            record = read_json(checkpoint / file)
            facts = record if section is None else record[section]
            if facts[tokens] > 0 and facts[steps] > 0:
                return float(facts[tokens] / facts[steps])
        except (SourceError, LookupError, TypeError):
            continue
    return None
