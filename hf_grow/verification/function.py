"""Running both models on the same text: what each says of it, and whether a growth that promises the same function keeps it.

A promise is judged against what rounding does to this source on this text, measured by running the source once more with every weight moved at
random by as much as rounding would. Two kinds of rounding are told apart:

- that of the computation: both models compute the same function in another order. In fp32 it is small, and so is what passes;
- that of storing weights in 16 bits, where some were computed and are no copies. The map is judged without it: the grown model is made of the
  source in fp32, before anything is rounded, and must agree as two computations do. What is stored is that, rounded (`structure.rederive` compares
  the bytes); how far it moves the function must be what as much rounding does to the source.
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
from hf_grow.verification.logit_differences import LEAST, Compared, Difference, compare_logits
from hf_grow.verification.models import LOGITS_BYTES, fits, load_model, logits, mapped_model, rounded_once_more
from hf_grow.verification.report import Report
from hf_grow.verification.routing import Routing, compare_routing, settled_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Half a unit in the last place, relative to a value. (In an fp64 model transformers computes norms, softmax, routing and rotary angles in fp32.)
COMPUTED = {"float64": 2.0**-24, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
STORED = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
MARGIN_FINE, MARGIN_COARSE = 8.0, 2.0
"""How many times the effect of such rounding passes: in fp32 and fp64 the order of summing matters beside it, in 16 bits one step outweighs that."""
GUESSING = 0.9
"""From this share of the loss of guessing on, verify warns."""


@dataclass
class Runs:
    """The source's logits on the text, and everything that is held against them."""

    old: Checkpoint
    plan: GrowthPlan | None
    windows: list[Tensor]
    dtype: str
    vocab: int
    before: list[Tensor]
    routing: Routing

    def against(self, model: PreTrainedModel, routing: Routing) -> Compared:
        return compare_logits(self.windows, self.before, logits(model, self.windows, self.vocab, routing))

    def rounding(self, share: float) -> tuple[Difference, int]:
        """What moving every weight by that share does, at most; and in how many windows of the text a router then chooses otherwise."""
        routing = Routing(self.old.info.architecture)
        found = self.against(rounded_once_more(load_model(self.old, self.dtype), share), routing)
        settled = settled_tokens([len(w) for w in self.windows], self.routing, routing, None)
        margin = MARGIN_FINE if share <= COMPUTED["float32"] else MARGIN_COARSE
        steady, changed = (None, 0) if settled is None else settled
        # Judged like what it is held against: without the tokens that routers decide by rounding, as long as some are left.
        limit = found.difference(steady if steady is not None and bool(steady.any()) else None).times(margin)
        least = Difference(*(max(a, b) for a, b in zip(_parts(limit), _parts(LEAST), strict=True)))
        return least, changed

    def judged(self, found: Compared, routing: Routing, changed_by_rounding: int) -> tuple[Difference, str]:
        """The difference; of a mixture without what follows a router's changed choice, where rounding would change as many. And what to say of it."""
        settled = settled_tokens([len(w) for w in self.windows], self.routing, routing, self.plan)
        if settled is None:
            return found.difference(), ""
        steady, changed = settled
        allowed = max(1, len(self.windows) // 8, 2 * changed_by_rounding)
        if changed > allowed or not bool(steady.any()):
            return found.difference(), ""
        return found.difference(steady), f"; {int((~steady).sum())} tokens left out, where rounding makes a router choose another expert"


def _parts(d: Difference) -> tuple[float, float, float]:
    return d.kl, d.relative, d.worst


def compare(
    old: Checkpoint,
    new: Checkpoint,
    report: Report,
    *,
    text: Path | None,
    tokens: int,
    dtype: str,
    why_dtype: str = "",
    notify: Callable[[str], None],
    plan: GrowthPlan | None,
    since: str = "",
) -> None:
    """Fills the report's metrics, and checks what the guarantee promises; nothing is without a plan, or where the weights were trained `since`.

    `dtype` is one of torch; `why_dtype` says why it is not that of the promise.
    """
    sizes = [c.info.architecture.size("vocab") for c in (old, new)]
    vocab = min(sizes)
    if sizes[0] != sizes[1]:
        notify("The vocabularies differ in size; only the common part is compared.")
    most = max(WINDOW, LOGITS_BYTES // (4 * vocab))
    windows, what = token_windows(old, text, min(tokens, most), vocab)
    used = sum(map(len, windows))
    if most < min(tokens, used + 2):
        notify(f"{used} tokens are compared, not {tokens}: the logits of a vocabulary of {vocab} fill {LOGITS_BYTES >> 30} GiB.")
    elif used + 1 < tokens and what != RANDOM:  # one token alone at the end predicts none
        notify(f"{used} tokens are compared, not {tokens}: the {what} has no more.")
    routers = Routing(old.info.architecture), Routing(new.info.architecture)
    before = list(logits(load_model(old, dtype), windows, vocab, routers[0]))
    runs = Runs(old, plan, windows, dtype, vocab, before, routers[0])
    found = runs.against(load_model(new, dtype), routers[1])
    report.metrics |= {"text": what, "tokens": used, "tokens_asked": tokens, "dtype": dtype, **found.metrics}
    if why_dtype:
        report.metrics["dtype_because"] = why_dtype
    experts = compare_routing(plan, *routers)
    if experts is not None:
        report.metrics["experts"] = experts
    report.add("logits", found.finite, "finite on every token" if found.finite else "NaN or infinite: the grown model is broken")
    if not found.finite:
        return
    if what != RANDOM:
        _warn_of_guessing(report, found, vocab)
    if plan is None or since or not plan.guarantee.lossless:
        why = "no growth.json" if plan is None else f"{since} since the growth" if since else "the method changes the function"
        report.add("lossless", None, f"not promised: {why}")
        return
    _judge(runs, found, routers[1], plan, report, fits(old, new, copies=2))


def _judge(runs: Runs, found: Compared, routing: Routing, plan: GrowthPlan, report: Report, room: bool) -> None:
    """The checks `lossless` and, where weights were rounded when they were stored, `rounding`."""
    dtype = runs.dtype
    if not bool(found.moved.any()):
        report.add("lossless", True, "the same logits, bit for bit")
        return
    computed, stored = COMPUTED[dtype], _stored_rounding(plan)
    apart = stored > computed and room
    limit, changed = runs.rounding(computed if apart else max(computed, stored))
    difference, left_out = runs.judged(found, routing, changed)
    why = f"rounding in {dtype}" if apart or computed >= stored else "rounding the stored weights once more"
    if not apart or difference.within(limit):
        report.metrics["rounding"] = {"allowed": limit.to_json()}
        coarse = f". {report.metrics['dtype_because']}" if "dtype_because" in report.metrics else ""
        report.add("lossless", difference.within(limit), f"{difference}{left_out}; {why} explains {limit}{coarse}")
        return
    mapped = Routing(plan.architecture)
    unrounded = runs.against(mapped_model(plan, runs.old, dtype), mapped)
    of_map, left_out = runs.judged(unrounded, mapped, changed)
    report.add("lossless", of_map.within(limit), f"the map in {dtype}: {of_map}{left_out}; {why} explains {limit}")
    shaken, changed = runs.rounding(stored)
    limit_stored = shaken + limit
    difference, left_out = runs.judged(found, routing, changed)
    detail = f"as stored: {difference}{left_out}; rounding the source's weights once more does up to {limit_stored}"
    report.add("rounding", difference.within(limit_stored), detail)
    report.metrics["rounding"] = {"allowed": limit.to_json(), "map": of_map.to_json(), "allowed_stored": limit_stored.to_json()}


def _stored_rounding(plan: GrowthPlan) -> float:
    """Half a unit in the last place of the coarsest dtype that computed weights are stored in; 0 where all are copies or zeros."""
    copies = plan.copies()
    computed = (n for n, e in plan.growth.tensors.items() if n not in copies and not isinstance(e, Fill))
    return max((STORED[plan.targets[n].dtype] for n in computed), default=0.0)


def _warn_of_guessing(report: Report, found: Compared, vocab: int) -> None:
    """A loss of log(vocabulary) is that of a model that gives every token the same probability."""
    guess, old, new = math.log(vocab), found.metrics["loss_old"], found.metrics["loss_new"]
    report.metrics["loss_of_guessing"] = guess
    if new < GUESSING * guess:
        return
    if old >= GUESSING * guess:
        report.warnings.append(f"The source itself knows next to nothing of this text: {old:.3g} nats a token, guessing {guess:.3g}.")
        return
    how = "worse than guessing" if new > guess else "hardly better than guessing"
    report.warnings.append(
        f"The grown model is {how} on this text: {new:.3g} nats a token, where the source has {old:.3g} and equal probabilities for all {vocab} "
        f"tokens {guess:.3g}. Almost nothing of what the source knows shows until it is trained; another method may start better."
    )
