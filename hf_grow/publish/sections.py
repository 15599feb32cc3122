"""The text of a card, section by section. Everything that comes from a file goes through markdown.plain or markdown.code."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from hf_grow.checkpoint.provenance import growth_history, recorded_files
from hf_grow.common.units import format_bytes
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import SourceInfo
from hf_grow.methods import METHODS
from hf_grow.methods import starting_loss as starting
from hf_grow.model.architecture import Architecture
from hf_grow.model.param_count import format_count
from hf_grow.publish import eval_section as measured
from hf_grow.publish import licenses as licences
from hf_grow.publish.inherited import Inherited
from hf_grow.publish.layer_map import MEANING, layer_map, layer_ranges
from hf_grow.publish.lineage import lineage
from hf_grow.publish.markdown import block, code, hub_link, line, plain, table
from hf_grow.publish.names import is_hub_id, public_ref
from hf_grow.publish.reproduce import command, draws_numbers, ranges, recipe
from hf_grow.publish.training_section import Stage, commands, headline, section, stages

MOST_LISTED = 20


def body(plan: GrowthPlan, record: Mapping[str, Any], heritage: Inherited, name: str, picture: str) -> str:
    """The card below its metadata."""
    since = stages(record)
    parts = [f"# {plain(name.rsplit('/', 1)[-1], 100)}", *_head(plan, record, heritage, name, since)]
    parts += ["## What was done", *_done(plan, record, picture)]
    if since:
        parts += ["## Training after it was grown", *section(since, lossless=plan.guarantee.lossless)]
    parts += ["## Guarantee and verification", *_verified(plan, record, since)]
    evaluated = measured.tasks_table(record.get("verification"), _called(since))
    if evaluated:
        parts += ["## Evaluation", evaluated]
    parts += ["## Continue training", *_training(plan, name, since)]
    parts += ["## Reproduce", *_reproduce(plan, record, name, since)]
    parts += ["## Licence", *_licence(heritage, name)]
    parts += ["## Limits", *_limits(plan, since)]
    return "\n\n".join(parts) + "\n"


def _called(since: list[Stage]) -> str:
    """The model of the card, beside its source."""
    return "trained" if since else "grown"


def _head(plan: GrowthPlan, record: Mapping[str, Any], heritage: Inherited, name: str, since: list[Stage]) -> Iterator[str]:
    if heritage.known and heritage.known.built_with:
        yield f"**{heritage.known.built_with}**"
    verification = record.get("verification")
    if measured.state(verification) == "failed":
        yield "> **The verification of this checkpoint failed** (below). Its weights are not what they should be: do not use it."
    because, start = plain(plan.guarantee.because), starting.nearest_starting_loss(plan.growth, plan.source.architecture)
    if since:
        began = "It began as the same function as its source" if plan.guarantee.lossless else "Growing changed the function of the source"
        yield f"> {headline(since, lossless=plan.guarantee.lossless)} {began}: {because}. {measured.beside_source(verification)} Evaluate it for what you want of it before you use it."
    elif plan.guarantee.lossless:
        yield (
            "> **A start for training.** As it stands, this model computes the same function as its source, at a higher cost; "
            f"it is no better until it has been trained further. Why the same: {because}."
        )
    else:
        yield (
            "> **Not ready for use: continue pretraining first.** Growing changed the function of the source, so this model is expected to be "
            f"worse than it until it has been trained further. What changed: {because}.{f' For orientation, another model: {start}.' if start else ''}"
        )
    old, new = plan.sizes
    source = _sources(plan)
    method = METHODS.get(plan.growth.method)
    paper = f" ({_paper(method.paper)})" if method and method.paper else ""
    active = f", {format_count(new.active)} of them active for a token," if plan.architecture.is_moe else ""
    made_by = record.get("made_by")
    version = made_by.get("hf_grow") if isinstance(made_by, Mapping) else None
    yield (
        f"{plain(name.rsplit('/', 1)[-1], 100)} has {format_count(new.total)} parameters{active} in {plan.architecture.layers} layers. It was grown from "
        f"{source} ({'each ' if plan.source.donors else ''}{format_count(old.total)}, {plan.source.architecture.layers} layers) by {code(plan.growth.method, 60)}{paper}"
        f"{f' with hf-grow {plain(version, 30)}' if version else ''}. {_weights(record, since)}"
    )


def _weights(record: Mapping[str, Any], since: list[Stage]) -> str:
    """Which weights the card speaks of."""
    if not since:
        return "This card speaks of the weights as they were grown, whose SHA-256 stand in `growth.json`, and of no training after that."
    known = ", whose SHA-256 stand in `growth.json`" if recorded_files(record) else ""
    return f"This card speaks of the weights as that training left them{known}."


def _sources(plan: GrowthPlan) -> str:
    others = [f"{_source(o)} (called {code(label, 60)})" for label, o in list(plan.source.donors.items())[:MOST_LISTED]]
    return _source(plan.source) + (" and " + ", ".join(others) if others else "")


def _source(source: SourceInfo) -> str:
    if source.revision and is_hub_id(source.ref):
        return f"{hub_link(source.ref)} at commit {code(source.revision, 40)}"
    return f"the local checkpoint {code(public_ref(source.ref, source.revision), 100)}"


def _paper(paper: str) -> str:
    """With the arXiv number as a link, from which the Hub takes its tag."""
    return re.sub(r"arXiv (\d{4}\.\d{5}|\d{4}\.\d{4})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def _done(plan: GrowthPlan, record: Mapping[str, Any], picture: str) -> Iterator[str]:
    yield plan_table(plan)
    described = layer_map(plan)
    kinds = ", ".join(MEANING[k] for k in described.kinds)
    yield f"![Layer map, from {described.source.layers} to {described.target.layers} layers: {kinds}]({picture})"
    copies = len(plan.copies())
    yield (
        f"Layers of the source, in the order of this model: {plain(layer_ranges(plan.growth.layers), 2000)} "
        "(`+` adds nothing until it is trained, `~` is an average). "
        f"Of {len(plan.targets)} tensors, {copies} are byte copies and {len(plan.targets) - copies} were computed."
    )
    reasons: dict[str, int] = {}
    for reason in plan.growth.dropped.values():
        reasons[str(reason)] = reasons.get(str(reason), 0) + 1
    if reasons:
        yield "\n".join(
            f"- {count} tensors of the source are not in it: {plain(why)}" for why, count in list(reasons.items())[:MOST_LISTED]
        )
    if plan.growth.warnings:
        yield "\n".join(f"- Warning of the plan: {plain(w)}" for w in plan.growth.warnings[:MOST_LISTED])
    tree = lineage("this model", growth_history(record), plan.source.donors)
    if any(parent.parents for parent in tree.parents) or plan.source.donors:
        yield "Lineage, back to the first ancestor:"
        yield block("\n".join(tree.ascii()), "text")


def plan_table(plan: GrowthPlan) -> str:
    old, new = plan.sizes
    a, b = plan.source.architecture, plan.architecture

    def row(title: str, value: Any) -> list[str]:
        return [title, str(value(a)), str(value(b))]

    def experts(arch: Architecture) -> str:
        return f"{arch.size('experts')}, {arch.top_k} a token" if arch.is_moe else "-"

    rows = [row("architecture", lambda m: m.family.architecture)] if a.family != b.family else []
    rows += [row("layers", lambda m: m.layers), row("hidden size", lambda m: m.size("hidden"))]
    for title, axis in (("FFN size", "inter"), ("FFN size of an expert", "expert_inter")):
        if a.size(axis) or b.size(axis):
            rows.append(row(title, lambda m, axis=axis: m.size(axis) or "-"))
    rows += [row("heads / key-value heads", lambda m: f"{m.heads} / {m.size('kv')}"), row("size of a head", lambda m: m.size("head_dim"))]
    rows += [row("experts", experts)] if a.is_moe or b.is_moe else []
    rows.append(["parameters", f"{format_count(old.total)} ({old.total:,})", f"{format_count(new.total)} ({new.total:,})"])
    if a.is_moe or b.is_moe:
        rows.append(["active parameters", format_count(old.active), format_count(new.active)])
    rows.append(["weights on disk", format_bytes(plan.source.nbytes), format_bytes(plan.nbytes)])
    if more := len(plan.source.donors):
        rows.append([f"weights of {more} further source{'s' * (more > 1)}", format_bytes(plan.source_nbytes - plan.source.nbytes), ""])
    rows.append(["forward FLOPs a token", format_count(old.flops), format_count(new.flops)])
    rows.append(["KV cache a token (16 bit)", *(f"{2 * s.kv_values / 1024:.4g} KiB" for s in (old, new))])
    return table(["", "source", "grown"], rows)


def _verified(plan: GrowthPlan, record: Mapping[str, Any], since: list[Stage]) -> Iterator[str]:
    lossless = (
        "source and grown model compute the same function in real arithmetic; rounding is what is left, so in 16 bit the last digits of logits "
        "depend on the engine"
    )
    changes = "the grown model computes another function than its source"
    ends = " It speaks of the weights as they were grown, and of the trained ones no longer." if since else ""
    yield f"Guarantee: **{plan.guarantee.kind}** ({lossless if plan.guarantee.lossless else changes}).{ends}"
    verification = record.get("verification")
    before = since[0].facts.get("verification_before") if since else None
    if isinstance(before, Mapping):
        yield f"The growth itself, before it was trained: {measured.state(before)}."
        yield measured.checks_table(before, plan, ("tensors", "SHA-256", "lossless"))
    state = measured.state(verification)
    if state == "not verified" or not isinstance(verification, Mapping):
        yield (
            "**Not verified.** `hf-grow verify SOURCE THIS` derives every tensor again from the source, compares both models on a text, and "
            "records the result; nobody has run it, so the guarantee is what the method promises, not what was measured."
            if not since
            else "**The trained model was not verified.** `hf-grow verify SOURCE THIS` checks its shapes, its config and its files, and compares it "
            "with the source on a text; nobody has run it."
        )
        return
    told = {"failed": "**Failed.**", "structure only": "**Verified in structure only:** no model was run.", "verified": "**Verified.**"}
    yield f"{told[state]} What `hf-grow verify` found{' of the trained model' if since else ''}:"
    yield measured.checks_table(verification, plan)
    tables = measured.function_table(verification, _called(since)), measured.routing_table(verification, _called(since))
    yield from filter(None, (measured.warned(verification), *tables))


def _training(plan: GrowthPlan, name: str, since: list[Stage]) -> Iterator[str]:
    yield (
        "The folder is a plain transformers checkpoint: any trainer that takes the source takes it. The text should be like that of the source's "
        "pretraining, or hold some of it, or what it knew is forgotten."
    )
    identity = [i for i, o in enumerate(plan.growth.layers) if o.identity]
    new = [i for i, o in enumerate(plan.growth.layers) if o.new and not o.identity]
    advice = []
    if since:
        advice.append("`hf-grow train` takes this folder, or its id, as `model`, and adds to the record what it does.")
    elif identity:
        advice.append(
            f"Layers {plain(_listed(identity))} add nothing yet. Train them alone first (LLaMA-Pro), or train everything; the rest of the model "
            "keeps what it knows either way at the start."
        )
    elif new:
        advice.append(
            f"Layers {plain(_listed(new))} are further copies. Train all parameters, with a warm-up and a learning rate between the one at "
            "which the source ended and its peak."
        )
    if plan.architecture.is_moe:
        advice.append("Keep the load-balancing loss on (`output_router_logits=True`), and watch that no expert runs empty.")
    advice.append("`growth.json` lists under `growth.training` which layers and experts are new, so that a trainer can treat them apart.")
    yield "\n".join(f"- {a}" for a in advice)
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({_quoted(name)})",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})",
        *(["model.config.output_router_logits = True"] if plan.architecture.is_moe else []),
    ]
    yield block("\n".join(lines), "python")


def _listed(layers: list[int]) -> str:
    """'24-47': both ends count."""
    runs = ranges(layers).split(",")
    return ", ".join(runs[:40]) + (f" and {len(runs) - 40} more runs" if len(runs) > 40 else "")


def _quoted(name: str) -> str:
    return json.dumps(line(name, 200), ensure_ascii=False)


def _reproduce(plan: GrowthPlan, record: Mapping[str, Any], name: str, since: list[Stage]) -> Iterator[str]:
    final = re.sub(r"[^\w.-]", "_", name.rsplit("/", 1)[-1])
    out, trainings = commands(since, final) if since else (final, [])
    made = command(plan, out)
    written = None if made else recipe(plan)
    if written:
        yield "With this as `recipe.yaml`:"
        yield block(written, "yaml")
        made = shlex.join(["hf-grow", "grow", "recipe.yaml", "-o", out])
    if made is None:
        yield "No command makes this growth: it was put together in Python. `growth.json` holds its whole plan, tensor by tensor."
    else:
        yield block(made)
        local = not plan.source.revision
        random = any(map(draws_numbers, plan.growth.tensors.values()))
        drawn = f", and its random numbers come from seed {plan.growth.seed}" if random else ""
        yield (
            ("The source is a local checkpoint of that name. " if local else "")
            + ("The further sources must be at the commits named above. " if any(o.revision for o in plan.source.donors.values()) else "")
            + f"The same plan gives the same bytes{drawn}. Where the weights were split into files by `--max-shard-size`, the files differ "
            "without it, the tensors do not."
        )
    for file, training, folder in trainings:
        if training is None:
            yield "What came then cannot be done again from `growth.json` alone: an adapter that was merged, or a recipe that it does not hold."
            break
        yield f"Then, with this as `{file}`, and its texts where it looks for them:"
        yield block(training, "yaml")
        yield block(shlex.join(["hf-grow", "train", file, "-o", folder]))
    if trainings:
        yield "Training gives the same weights only with the same versions on the same kind of machine."
    made_by = record.get("made_by")
    if isinstance(made_by, Mapping) and isinstance(made_by.get("hf_grow"), str):
        yield f"Made with hf-grow {plain(made_by['hf_grow'], 30)}; `growth.json` names the other versions, the source's files and every tensor."


def _licence(heritage: Inherited, name: str) -> Iterator[str]:
    known = heritage.known
    said = known.title if known else heritage.license_name or heritage.license
    if heritage.license_link and said:
        said = f"[{plain(said, 100)}]({heritage.license_link})"
    elif said:
        said = plain(said, 100)
    yield f"{said}, {plain(heritage.origin)}." if said else f"{plain(heritage.origin[:1].upper() + heritage.origin[1:])}."
    if known:
        duties = [f'displays "{known.built_with}"'] if known.built_with else []
        duties += [f'has a name that begins with "{known.name_start}"'] if known.name_start else []
        duties += ["comes with a copy of the licence"] if known.copy else []
        duties += ["keeps this line in a file NOTICE: " + known.notice] if known.notice else []
        if duties:
            yield "Whoever passes this model on sees to it that it\n\n" + "\n".join(f"- {d}" for d in duties)
        if known.limits:
            yield f"Its limits: {known.limits}. This is a summary; the licence itself holds."
        if known.name_start and not licences.name_fits(known, name):
            yield f'**The name of this model does not begin with "{known.name_start}" yet.**'


def _limits(plan: GrowthPlan, since: list[Stage]) -> Iterator[str]:
    limits = []
    if since:
        limits.append("What it knows beyond its source comes from the texts of its training; their mistakes, bias and gaps are its own.")
        limits.append("Nothing but the figures above was measured. What the source was tuned or aligned to do may be lost.")
    elif plan.guarantee.lossless:
        limits.append(
            "It is as good and as bad as its source: the same knowledge, the same bias, the same risks, for more memory and time a token."
        )
    else:
        limits.append("It was not trained after it was grown. Its output is worse than the source's until it is; do not deploy it.")
        limits.append("What the source was tuned or aligned to do may be lost. Evaluate it anew after training.")
    if plan.architecture.is_moe:
        limits.append(
            "transformers 5 holds the experts of a layer as fused tensors, not as linear layers: bitsandbytes and torchao leave them unquantized, "
            "and mergekit stores them fused when it merges this model."
        )
    limits.append("Nothing here says that growing beats training a model of this size from scratch: that depends on data and budget.")
    limits.append("Limits and intended uses of the source, as on its own card, hold for this model too.")
    yield "\n".join(f"- {x}" for x in limits)
