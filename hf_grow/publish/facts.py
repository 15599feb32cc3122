"""The facts of a model card as plain data; the text is in templates/."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hf_grow.checkpoint.provenance import growth_history, recorded_files, training_stages
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import SourceInfo
from hf_grow.growth.tensormap import Expr, Noise
from hf_grow.methods import METHODS, starting_loss
from hf_grow.model.architecture import Architecture
from hf_grow.model.param_count import ModelSize
from hf_grow.publish import eval_section, licenses, reproduce
from hf_grow.publish.inherited import Inherited
from hf_grow.publish.layer_map import DESCRIPTIONS, index_ranges, layer_map, layer_ranges
from hf_grow.publish.lineage import lineage
from hf_grow.publish.names import is_hub_id, public_ref
from hf_grow.publish.size_table import size_rows
from hf_grow.publish.training_section import reproduce_trainings, training_facts

MOST_LISTED = 20


def card_facts(plan: GrowthPlan, record: Mapping[str, Any], inherited: Inherited, name: str) -> dict[str, Any]:
    """Everything that templates/card.md.jinja reads. All strings are as in growth.json; the template escapes them."""
    method = METHODS.get(plan.growth.method)
    verification = record.get("verification")
    made_by = eval_section.mapping(record, "made_by").get("hf_grow")
    before = next((stage.get("verification_before") for stage in training_stages(record)), None)
    return {
        "name": name.rsplit("/", 1)[-1],
        "repo": name,
        "method": plan.growth.method,
        "paper_citation": method.paper if method else "",
        "made_by": made_by if isinstance(made_by, str) else "",
        "lossless": plan.guarantee.lossless,
        "guarantee": plan.guarantee.kind,
        "because": plan.guarantee.because,
        "starting_loss": str(starting_loss.nearest_starting_loss(plan.growth, plan.source.architecture) or ""),
        "files_recorded": bool(recorded_files(record)),
        **_growth(plan, record),
        "training": training_facts(record),
        "verification": eval_section.verification_facts(verification, plan),
        "verified_before": eval_section.verification_facts(before, plan) if isinstance(before, Mapping) else None,
        "reproduce": _reproduce(plan, record, re.sub(r"[^\w.-]", "_", name.rsplit("/", 1)[-1])),
        "license_terms": _license_terms(inherited, name),
    }


def _growth(plan: GrowthPlan, record: Mapping[str, Any]) -> dict[str, Any]:
    described = layer_map(plan)
    layers = plan.growth.layers
    tree = lineage("this model", growth_history(record), plan.source.donors)
    old, new = plan.sizes
    return {
        "source": _source(plan.source),
        "donors": [{"label": label, **_source(info)} for label, info in list(plan.source.donors.items())[:MOST_LISTED]],
        "donor_count": len(plan.source.donors),
        "donors_on_hub": any(info.revision for info in plan.source.donors.values()),
        "old": _model(plan.source.architecture, old),
        "new": _model(plan.architecture, new),
        "size_rows": size_rows(plan),
        "layer_kinds": [DESCRIPTIONS[kind] for kind in described.kinds],
        "layer_ranges": layer_ranges(layers),
        "identity_layers": _shortened_ranges([i for i, origin in enumerate(layers) if origin.identity]),
        "copied_layers": _shortened_ranges([i for i, origin in enumerate(layers) if origin.new and not origin.identity]),
        "tensors": len(plan.targets),
        "copies": len(plan.copies()),
        "dropped": list(Counter(map(str, plan.growth.dropped.values())).items())[:MOST_LISTED],
        "plan_warnings": list(plan.growth.warnings[:MOST_LISTED]),
        "lineage": "\n".join(tree.ascii()) if plan.source.donors or any(parent.parents for parent in tree.parents) else "",
    }


def _source(source: SourceInfo) -> dict[str, Any]:
    on_hub = bool(source.revision) and is_hub_id(source.ref)
    return {"ref": public_ref(source.ref, source.revision), "revision": source.revision, "on_hub": on_hub}


def _model(arch: Architecture, size: ModelSize) -> dict[str, Any]:
    """The shape and the parameters of a model."""
    axes = ("hidden", "inter", "expert_inter", "kv", "head_dim", "experts")
    return {
        "architecture": arch.family.architecture,
        "layers": arch.layers,
        "heads": arch.heads,
        **{axis: arch.size(axis) for axis in axes},
        "is_moe": arch.is_moe,
        "top_k": arch.top_k,
        "parameters": size.total,
        "active": size.active,
    }


def _shortened_ranges(layers: list[int]) -> str:
    """[24, ..., 47] -> '24-47'; at most 40 ranges."""
    runs = index_ranges(layers)
    return ", ".join(runs[:40]) + (f" and {len(runs) - 40} more runs" if len(runs) > 40 else "")


def _reproduce(plan: GrowthPlan, record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Commands and recipes that make the model again."""
    output, trainings = reproduce_trainings(record, name)
    command = reproduce.command(plan, output)
    return {
        "command": command or "",
        "recipe": "" if command else reproduce.recipe(plan) or "",
        "output": output,
        "local_source": not plan.source.revision,
        "seed": plan.growth.seed if any(map(_is_random, plan.growth.tensors.values())) else None,
        "trainings": trainings,
    }


def _is_random(expr: Expr) -> bool:
    """Whether random numbers go into a tensor."""
    return isinstance(expr, Noise) or any(map(_is_random, expr.children()))


def _license_terms(inherited: Inherited, name: str) -> dict[str, Any]:
    known = inherited.known
    return {
        "title": known.title if known else inherited.license_name or inherited.license,
        "link": inherited.license_link,
        "origin": inherited.origin,
        "duties": asdict(known) if known else None,
        "name_fits": not known or not known.name_start or licenses.name_fits(known, name),
    }
