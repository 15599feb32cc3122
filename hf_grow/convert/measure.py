"""Numbers that a growth needs from the source's weights (`Growth.measurements`), measured and added to the plan."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import replace

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.convert.router_init import router_rows
from hf_grow.errors import PlanError
from hf_grow.growth.growth import Measurement
from hf_grow.growth.plan import GrowthPlan

Notify = Callable[[str], None]
MAX_DATA = 48 << 20
"""Characters of base64 in growth.json, which must stay readable."""


def measure(plan: GrowthPlan, checkpoint: Checkpoint, *, notify: Notify = lambda message: None) -> GrowthPlan:
    """The plan with everything measured that its growth asks for; most plans ask for nothing.

    Raises what the measuring functions raise (see `router_rows`), and PlanError where the results are too large for growth.json.
    """
    if not plan.growth.measurements:
        return plan
    data = dict(plan.growth.data)
    for wanted in plan.growth.measurements:
        source = checkpoint.donors[wanted.source] if wanted.source else checkpoint
        data |= MEASUREMENTS[wanted.kind](source, wanted, notify)
    if sum(map(len, data.values())) > MAX_DATA:
        kinds = " and ".join(wanted.kind for wanted in plan.growth.measurements)
        raise PlanError(f"The {kinds} are too large for growth.json.", hint="Use --router cheap-embed or --router normal.")
    return replace(plan, growth=replace(plan.growth, data=data, measurements=()))


def _router_rows(checkpoint: Checkpoint, wanted: Measurement, notify: Notify) -> dict[str, str]:
    rows = router_rows(checkpoint, **wanted.parameters, notify=notify)
    # 16 bits are precise enough to initialize a router, and hide that the last bits depend on the number of threads.
    packed = {layer: base64.b64encode(r.numpy().astype("<f2").tobytes()).decode() for layer, r in rows.items()}
    return {key: packed[layer] for key, layer in wanted.layers.items()}


MEASUREMENTS: Mapping[str, Callable[[Checkpoint, Measurement, Notify], dict[str, str]]] = {"router rows": _router_rows}
