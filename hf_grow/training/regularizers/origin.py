"""Where the anchors and importances of a penalty come from, if the model was grown since: they go through the same maps as the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from hf_grow.growth.plan import GrowthPlan
from hf_grow.training.regularizers.importance_file import ImportanceFile, check_same_model, rows_fingerprint
from hf_grow.training.regularizers.importance_growth import GrownImportances, is_of_source
from hf_grow.training.sharding.row_source import GrownRows, RowSource


@dataclass(frozen=True)
class PenaltyOrigin:
    """
    Attributes:
        weights: that the run started from, by names on disk.
        plans: the growths since then, oldest first.
        anchored: whether the penalty holds the model at `weights`, grown; else where the training starts.
    """

    weights: RowSource
    plans: Sequence[GrowthPlan]
    anchored: bool = False

    def then(self, plan: GrowthPlan) -> PenaltyOrigin:
        """After one more growth."""
        return PenaltyOrigin(self.weights, (*self.plans, plan), self.anchored)

    def holds(self, file: ImportanceFile) -> bool:
        """Whether a file is of the model before one of the growths, by names and shapes."""
        return any(is_of_source(file, plan) for plan in self.plans)

    def grown_importances(self, file: ImportanceFile, newest: bool) -> RowSource:
        """Such a file, grown. ``newest``: raises InputError if it is of the first model, with other weights."""
        first = next(i for i, plan in enumerate(self.plans) if is_of_source(file, plan))
        check_same_model(file, file.shapes, rows_fingerprint(self.weights, file.shapes) if newest and first == 0 else None)
        grown: RowSource = file
        for plan in self.plans[first:]:
            grown = GrownImportances(plan, grown)
        return grown

    def anchors(self) -> RowSource | None:
        """w*, grown; None where the penalty holds the model at the weights that the training starts from."""

        def grow(rows: RowSource, plan: GrowthPlan) -> RowSource:
            return GrownRows(plan, rows)

        return reduce(grow, self.plans, self.weights) if self.anchored else None
