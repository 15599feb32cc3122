"""Runs both models on the same text, measures how far their outputs differ, and checks a lossless guarantee.

The allowed difference is measured on the same source and text: the source runs once more with every weight perturbed at random by as much as
rounding would. Two kinds of rounding are distinguished:

- Rounding of the computation: both models compute the same function in a different order. The limit is small in fp32.
- Rounding of weights that were computed and stored in 16 bits. Check `lossless` leaves it out: the grown model is recomputed from the source in
  fp32 and must agree as closely as two fp32 computations do. Check `rounding` then compares the stored model, whose bytes are known to be the
  rounded result (`structure.recompute_tensors`), with the effect of rounding the source's weights once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensormap import Fill
from hf_grow.verification.eval_text import RANDOM, WINDOW, token_windows
from hf_grow.verification.logit_differences import SMALLEST_LIMIT, LogitDifference, TokenDifferences, compare_logits
from hf_grow.verification.models import LOGITS_BYTES, fits_in_memory, load_model, logits, perturb_weights, unrounded_model
from hf_grow.verification.report import Report
from hf_grow.verification.routing import Routing, compare_routers, unaffected_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Unit roundoff (half a unit in the last place). In an fp64 model transformers still computes norms, softmax, routing and rotary angles in fp32.
COMPUTE_EPSILON = {"float64": 2.0**-24, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
STORAGE_EPSILON = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
MARGIN_FP32, MARGIN_16_BIT = 8.0, 2.0
"""Allowed multiple of the effect of perturbed weights. It is larger in fp32 and fp64, where the order of summation contributes as much."""
NEAR_UNIFORM = 0.9
"""Warn if the loss is at least this fraction of that of a uniform distribution over the vocabulary."""


@dataclass
class LogitComparison:
    """The source's logits on the text, which the other models are compared with."""

    old: Checkpoint
    plan: GrowthPlan | None
    windows: list[Tensor]
    dtype: str
    vocab: int
    old_logits: list[Tensor]
    routing: Routing

    def compare(self, model: PreTrainedModel, routing: Routing) -> TokenDifferences:
        """Runs a model; its router choices are added to `routing`."""
        return compare_logits(self.windows, self.old_logits, logits(model, self.windows, self.vocab, routing))

    def rounding_limit(self, epsilon: float) -> tuple[LogitDifference, int]:
        """The largest difference that perturbing every weight by `epsilon` explains, and the number of windows in which a router's choice changes."""
        routing = Routing(self.old.info.architecture)
        differences = self.compare(perturb_weights(load_model(self.old, self.dtype), epsilon), routing)
        unaffected = unaffected_tokens([len(w) for w in self.windows], self.routing, routing, None)
        margin = MARGIN_FP32 if epsilon <= COMPUTE_EPSILON["float32"] else MARGIN_16_BIT
        mask, changed = (None, 0) if unaffected is None else unaffected
        # As for the grown model, tokens after a changed router choice are left out, as long as some remain.
        limit = differences.difference(mask if mask is not None and bool(mask.any()) else None).times(margin)
        return limit.at_least(SMALLEST_LIMIT), changed

    def difference(self, differences: TokenDifferences, routing: Routing, changed_by_rounding: int) -> tuple[LogitDifference, str]:
        """The difference to check, and a note for the report.

        Tokens after a changed router choice are left out if there are no more such windows than rounding explains.
        """
        unaffected = unaffected_tokens([len(w) for w in self.windows], self.routing, routing, self.plan)
        if unaffected is None:
            return differences.difference(), ""
        mask, changed = unaffected
        allowed = max(1, len(self.windows) // 8, 2 * changed_by_rounding)
        if changed > allowed or not bool(mask.any()):
            return differences.difference(), ""
        return differences.difference(mask), f"; {int((~mask).sum())} tokens left out, where rounding changes a router's choice"


def compare(
    old: Checkpoint,
    new: Checkpoint,
    report: Report,
    *,
    text: Path | None,
    tokens: int,
    dtype: str,
    dtype_reason: str = "",
    notify: Callable[[str], None],
    plan: GrowthPlan | None,
    since: str = "",
) -> None:
    """Adds metrics to the report, and the checks `logits`, `lossless` and `rounding`.

    ``dtype`` is a torch dtype; ``dtype_reason`` says why memory decided it. ``lossless`` is skipped without a plan, for a growth that changes the
    function, and for weights trained ``since`` (a description of that training).
    """
    sizes = [c.info.architecture.size("vocab") for c in (old, new)]
    vocab = min(sizes)
    if sizes[0] != sizes[1]:
        notify("The vocabulary sizes differ; only the common part is compared.")
    most = max(WINDOW, LOGITS_BYTES // (4 * vocab))
    windows, source_text = token_windows(old, text, min(tokens, most), vocab)
    used = sum(map(len, windows))
    if most < min(tokens, used + 2):
        notify(f"{used} tokens are compared, not {tokens}: the logits of a vocabulary of {vocab} fill {LOGITS_BYTES >> 30} GiB.")
    elif used + 1 < tokens and source_text != RANDOM:  # a single token at the end is dropped
        notify(f"{used} tokens are compared, not {tokens}: the {source_text} has no more.")
    routers = Routing(old.info.architecture), Routing(new.info.architecture)
    old_logits = list(logits(load_model(old, dtype), windows, vocab, routers[0]))
    comparison = LogitComparison(old, plan, windows, dtype, vocab, old_logits, routers[0])
    differences = comparison.compare(load_model(new, dtype), routers[1])
    report.metrics |= {"text": source_text, "tokens": used, "tokens_asked": tokens, "dtype": dtype, **differences.metrics}
    if dtype_reason:
        report.metrics["dtype_because"] = dtype_reason
    experts = compare_routers(plan, *routers)
    if experts is not None:
        report.metrics["experts"] = experts
    report.add(
        "logits", differences.finite, "finite for every token" if differences.finite else "NaN or infinite: the grown model is broken"
    )
    if not differences.finite:
        return
    if source_text != RANDOM:
        _warn_near_uniform(report, differences, vocab)
    if plan is None or since or not plan.guarantee.lossless:
        reason = "no growth.json" if plan is None else f"{since} since the growth" if since else "the method changes the function"
        report.add("lossless", None, f"not claimed: {reason}")
        return
    _check_lossless(comparison, differences, routers[1], plan, report, fits_in_memory(old, new, copies=2))


def _check_lossless(
    comparison: LogitComparison, differences: TokenDifferences, routing: Routing, plan: GrowthPlan, report: Report, room: bool
) -> None:
    """The check `lossless` and, where computed weights were rounded when stored, `rounding`; ``room``: two models fit into memory."""
    dtype = comparison.dtype
    if not bool(differences.squared_error.any()):
        report.add("lossless", True, "logits bit-identical")
        return
    computed, stored = COMPUTE_EPSILON[dtype], _storage_epsilon(plan)
    separate = stored > computed and room
    limit, changed = comparison.rounding_limit(computed if separate else max(computed, stored))
    difference, left_out = comparison.difference(differences, routing, changed)
    cause = f"rounding in {dtype}" if separate or computed >= stored else "rounding the stored weights once more"
    if not separate or difference.within(limit):
        report.metrics["rounding"] = {"allowed": limit.to_json()}
        coarse = f". {report.metrics['dtype_because']}" if "dtype_because" in report.metrics else ""
        report.add("lossless", difference.within(limit), f"{difference}{left_out}; allowed for {cause}: {limit}{coarse}")
        return
    unrounded_routing = Routing(plan.architecture)
    unrounded = comparison.compare(unrounded_model(plan, comparison.old, dtype), unrounded_routing)
    of_map, left_out = comparison.difference(unrounded, unrounded_routing, changed)
    report.add("lossless", of_map.within(limit), f"before storing, in {dtype}: {of_map}{left_out}; allowed for {cause}: {limit}")
    perturbed, changed = comparison.rounding_limit(stored)
    limit_stored = perturbed + limit
    difference, left_out = comparison.difference(differences, routing, changed)
    detail = f"as stored: {difference}{left_out}; allowed for rounding the source's weights once more: {limit_stored}"
    report.add("rounding", difference.within(limit_stored), detail)
    report.metrics["rounding"] = {"allowed": limit.to_json(), "map": of_map.to_json(), "allowed_stored": limit_stored.to_json()}


def _storage_epsilon(plan: GrowthPlan) -> float:
    """The largest unit roundoff among the dtypes of computed weights; 0 if all weights are copies or constants."""
    copies = plan.copies()
    computed = (n for n, e in plan.growth.tensors.items() if n not in copies and not isinstance(e, Fill))
    return max((STORAGE_EPSILON[plan.targets[n].dtype] for n in computed), default=0.0)


def _warn_near_uniform(report: Report, differences: TokenDifferences, vocab: int) -> None:
    """Warns if the loss is near log(vocab), that of a uniform distribution over the vocabulary."""
    uniform, old, new = math.log(vocab), differences.metrics["loss_old"], differences.metrics["loss_new"]
    report.metrics["loss_of_guessing"] = uniform
    if new < NEAR_UNIFORM * uniform:
        return
    if old >= NEAR_UNIFORM * uniform:
        report.warnings.append(
            f"The source itself is hardly better than uniform predictions on this text: {old:.3g} nats per token; uniform: {uniform:.3g}."
        )
        return
    level = "worse than" if new > uniform else "hardly better than"
    report.warnings.append(
        f"The grown model is {level} uniform predictions on this text: {new:.3g} nats per token; source: {old:.3g}; uniform over {vocab} tokens: "
        f"{uniform:.3g}. It needs training before use; another method may start from a lower loss."
    )
