"""Which errors in a lossless growth `hf-grow verify` finds by running the models, and how small they may be.

    python benchmarks/injected_errors.py SOURCE [--tokens N] [--dtype float32]

SOURCE's FFN is doubled without loss by `tile`. Then errors are put into the tensor map one at a time, as a bug in a method would: the tensors
follow the map, so comparing bytes cannot find them. (An error in a file that does not follow its map differs in bytes, and is always found,
whatever its size.) Each is judged as `verify` does, on the built-in text. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hf_grow import api
from hf_grow.checkpoint.reader import Checkpoint, open_folder
from hf_grow.growth.axes import AxisMap, AxisRun, merge_runs, select
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensormap import Expr, Source, Sum, Take
from hf_grow.verification.eval_text import token_windows
from hf_grow.verification.function import COMPUTE_EPSILON, LogitComparison
from hf_grow.verification.logit_differences import LogitDifference
from hf_grow.verification.models import load_model, logits, unrounded_model
from hf_grow.verification.routing import Routing


@dataclass(frozen=True)
class Injected:
    what: str
    plan: GrowthPlan


class FaultyPlan:
    """Makes copies of a plan with one error each."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan, self.shapes = plan, {n: t.shape for n, t in plan.targets.items()}

    def tensor(self, name: str, change: Expr, *axes: tuple[str, AxisMap]) -> GrowthPlan:
        growth = self.plan.growth
        assert name in growth.tensors
        return replace(self.plan, growth=replace(growth, tensors={**growth.tensors, name: change}, axes={**growth.axes, **dict(axes)}))

    def swapped(self, name: str, dim: int, first: int, second: int, length: int = 1) -> GrowthPlan:
        size = self.shapes[name][dim]
        order = list(range(size))
        for i in range(length):
            order[first + i], order[second + i] = second + i, first + i
        return self.tensor(name, Take(self.plan.growth.tensors[name], dim, "error", "out"), ("error", select(size, order)))

    def scaled(self, name: str, gain: float, row: int | None = None) -> GrowthPlan:
        """All of a tensor, or one row of dimension 0."""
        if row is None:
            return self.tensor(name, Sum((self.plan.growth.tensors[name],), (gain,)))
        return self.tensor(name, Take(self.plan.growth.tensors[name], 0, "error", "out"), ("error", self._one(name, 0, row, gain, 1.0)))

    def weight(self, name: str, row: int, column: int, gain: float) -> GrowthPlan:
        """A single weight of a matrix."""
        of = self.plan.growth.tensors[name]
        alone = Take(Take(of, 0, "error row", "out"), 1, "error column", "out")
        axes = [("error row", self._one(name, 0, row, 1.0, 0.0)), ("error column", self._one(name, 1, column, 1.0, 0.0))]
        return self.tensor(name, Sum((of, alone), (1.0, gain - 1.0)), *axes)

    def _one(self, name: str, dim: int, at: int, gain: float, others: float) -> AxisMap:
        size = self.shapes[name][dim]
        runs = [AxisRun(i, 1, gain if i == at else others, 1.0) for i in range(size)]
        return AxisMap(size, merge_runs(runs), dual=False)

    def config(self, **changes: object) -> GrowthPlan:
        return replace(self.plan, growth=replace(self.plan.growth, config={**self.plan.growth.config, **changes}))


def errors(plan: GrowthPlan, in_text: int, not_in_text: int | None) -> Iterator[Injected]:
    """``in_text``: id of a token of the text; ``not_in_text``: of a token that does not occur in it, if there is one."""
    faulty, arch = FaultyPlan(plan), plan.architecture
    middle, width, group = arch.layers // 2, arch.size("head_dim"), arch.size("group")
    block = f"model.layers.{middle}."
    norm, q, down = block + "input_layernorm.weight", block + "self_attn.q_proj.weight", block + "mlp.down_proj.weight"
    yield Injected("two query heads of different groups swapped in q_proj, not in o_proj", faulty.swapped(q, 0, 0, group * width, width))
    if group > 1:
        yield Injected("two query heads of one group swapped in q_proj, not in o_proj", faulty.swapped(q, 0, 0, width, width))
    yield Injected(f"layer {middle} off by one: it holds layer {middle - 1}", replace(plan, growth=replace(plan.growth, tensors={
        n: _from_layer(e, middle, middle - 1) if n.startswith(block) else e for n, e in plan.growth.tensors.items()
    })))  # fmt: skip
    yield Injected("1/n missing in the FFN of one layer (n = 2)", faulty.scaled(down, 2.0))
    yield Injected("1/n missing in one unit of one FFN's output", faulty.scaled(down, 2.0, row=1))
    for part in (1.0, 0.1, 0.01, 0.001, 1e-4):
        yield Injected(f"one gain of one norm off by {part:.4g}", faulty.scaled(norm, 1 + part, row=1))
    for part in (0.01, 1e-4, 1e-5):
        yield Injected(f"all gains of one norm off by {part:.4g}", faulty.scaled(norm, 1 + part))
    for part in (1e-4, 1e-5):
        yield Injected(f"last norm off by {part:.4g}", faulty.scaled("model.norm.weight", 1 + part))
    eps, theta = arch.config["rms_norm_eps"], plan.growth.config["rope_theta"]
    for factor in (10.0, 1.1):
        yield Injected(f"rms_norm_eps {factor:g} times {eps:g}", faulty.config(rms_norm_eps=eps * factor))
    for factor in (1.1, 1.001):
        changes = {"rope_theta": theta * factor}
        if "rope_parameters" in plan.growth.config:
            changes["rope_parameters"] = {**plan.growth.config["rope_parameters"], **changes}
        yield Injected(f"rope_theta {factor:g} times {theta:g}", faulty.config(**changes))
    yield Injected("two FFN units swapped in down_proj, not in gate_proj and up_proj", faulty.swapped(down, 1, 0, 1))
    yield Injected("one row of q_proj with the wrong sign", faulty.scaled(q, -1.0, row=1))
    yield Injected("one weight of q_proj twice too large", faulty.weight(q, 1, 1, 2.0))
    yield Injected("one weight of q_proj off by 0.01", faulty.weight(q, 1, 1, 1.01))
    yield Injected("embedding of a token in the text off by 0.01", faulty.scaled("model.embed_tokens.weight", 1.01, row=in_text))
    if not_in_text is not None:
        yield Injected(
            "embedding of a token that is not in the text negated", faulty.scaled("model.embed_tokens.weight", -1.0, row=not_in_text)
        )


def _from_layer(expr: Expr, layer: int, other: int) -> Expr:
    if isinstance(expr, Source):
        return replace(expr, name=expr.name.replace(f"layers.{layer}.", f"layers.{other}."))
    return expr.map_children(lambda e: _from_layer(e, layer, other))


def judge(source: Checkpoint, tokens: int, dtype: str) -> Iterator[tuple[str, LogitDifference, LogitDifference]]:
    """Yields (error, logit difference, allowed difference), first without an error."""
    plan = api.plan(source.ref, "tile", intermediate=2 * source.info.architecture.size("inter"), symmetry="none")
    vocab = source.info.architecture.size("vocab")
    windows, _ = token_windows(source, None, tokens, vocab)
    routing = Routing(source.info.architecture)
    comparison = LogitComparison(
        source, plan, windows, dtype, vocab, list(logits(load_model(source, dtype), windows, vocab, routing)), routing
    )
    limit, _ = comparison.rounding_limit(COMPUTE_EPSILON[dtype])
    seen = {int(i) for w in windows for i in w}
    unseen = next((i for i in range(vocab) if i not in seen), None)
    for injected in [Injected("no error", plan), *errors(plan, int(windows[0][3]), unseen)]:
        found = comparison.compare(unrounded_model(injected.plan, source, dtype), Routing(plan.architecture))
        yield injected.what, found.difference(), limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=list(COMPUTE_EPSILON), default="float32")
    arguments = parser.parse_args()
    header = False
    for what, found, limit in judge(open_folder(arguments.source), arguments.tokens, arguments.dtype):
        if not header:
            print(f"Computed in {arguments.dtype}; allowed for rounding: {limit}.\n")
            print("| error | KL, nats per token | logit error | at worst | |\n|---|---|---|---|---|")
            header = True
        mark = "passes" if found.within(limit) else "found"
        print(f"| {what} | {found.kl:.1e} | {found.relative:.1e} | {found.worst:.1e} | {mark} |", flush=True)


if __name__ == "__main__":
    main()
