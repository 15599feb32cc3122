"""Growth options for a target size: what each method makes of a source, nearest first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hf_grow.convert.planning import plan_for
from hf_grow.growth.growth import Method
from hf_grow.growth.plan import GrowthPlan, check_source
from hf_grow.growth.source_info import SourceInfo
from hf_grow.methods import METHODS
from hf_grow.model.param_count import TOLERANCE, check_larger, count_parameters, extrapolation_warnings, format_count
from hf_grow.options import Options


@dataclass(frozen=True)
class TargetSize:
    total: int
    """Parameters."""
    active: int | None = None
    """Parameters that a token passes through, if they matter too."""

    def __str__(self) -> str:
        return format_count(self.total) + (f", {format_count(self.active)} active" if self.active else "")


@dataclass(frozen=True)
class SizeOption:
    """One method with the options that come nearest to a target size."""

    method: Method
    options: Options
    plan: GrowthPlan
    target: TargetSize

    @property
    def deviation(self) -> float:
        """The relative error of the size: the larger of total and active parameters."""
        size, target = self.plan.sizes[1], self.target
        return max(abs(size.total / target.total - 1), abs(size.active / target.active - 1) if target.active else 0.0)

    @property
    def reaches_target(self) -> bool:
        """Within TOLERANCE of the target, and nearer to it than the source is."""
        old, new = self.plan.sizes
        return self.deviation <= TOLERANCE and abs(new.total - self.target.total) < abs(old.total - self.target.total)

    @cached_property
    def extrapolation(self) -> list[str]:
        """Warnings for a growth beyond what is known to work."""
        return extrapolation_warnings(self.plan.source.architecture, self.plan.architecture)

    @property
    def recommended(self) -> bool:
        return self.reaches_target and not self.extrapolation


def size_options(info: SourceInfo, target: TargetSize) -> list[SizeOption]:
    """An option for each method that grows this source, nearest to the target first. Raises SourceError, and PlanError for a target that is not
    larger than the source."""
    check_source(info)
    check_larger(count_parameters(info.architecture).total, target.total)
    out = []
    for method in METHODS.values():
        options = method.for_size(info.architecture, *((target.total, target.active) if method.kind == "experts" else (target.total,)))
        if options is not None:
            out.append(SizeOption(method, options, plan_for(info, method, options), target))
    return sorted(out, key=lambda option: option.deviation)
