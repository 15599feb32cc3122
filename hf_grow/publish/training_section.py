"""What was trained since a growth, as a card tells it: the `training` section of growth.json in Markdown, and the recipe to do it again.

The section is read as somebody else's: what has not the right form is left out. Paths of a machine are shown by their last part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_grow.checkpoint.provenance import positive_int, training_stages, training_totals
from hf_grow.common import yaml_io as yaml_text
from hf_grow.publish.eval_section import number
from hf_grow.publish.markdown import code, plain, table
from hf_grow.publish.names import folder_name, is_hub_id, public_path

MOST_LISTED = 20
MOST_RECIPE = 20_000  # characters
MOST_DEPTH = 12
USES: Mapping[str, str] = {"train": "new text", "replay": "old text, mixed in"}
LEFT_OUT = ("model", "revision", "output", "hub_token")


@dataclass(frozen=True)
class Loss:
    """Loss of one named set in nats a token; None where it was not measured."""

    name: str
    start: float | None
    end: float | None
    source: float | None = None
    """Of what was grown, where the training measured it."""

    @property
    def rise(self) -> float | None:
        """Over the source, else over the start."""
        before = self.start if self.source is None else self.source
        return None if before is None or self.end is None else self.end - before


@dataclass(frozen=True)
class Stage:
    """One training, or an adapter that was merged (then without steps)."""

    facts: Mapping[str, Any]

    @property
    def steps(self) -> int:
        return positive_int(self.facts.get("steps"))

    @property
    def tokens(self) -> int:
        return positive_int(self.facts.get("tokens"))

    @property
    def recipe(self) -> Mapping[str, Any]:
        return _mapping(self.facts, "recipe")

    @property
    def size(self) -> str:
        if not self.steps:
            return "an adapter that was merged in"
        return (f"{self.tokens:,} tokens in " if self.tokens else "") + f"{self.steps:,} steps"

    @property
    def losses(self) -> list[Loss]:
        start, end, source = (_mapping(_mapping(self.facts, "losses"), k) for k in ("start", "end", "source"))
        names = list(dict.fromkeys([*start, *end]))[:MOST_LISTED]
        found = [Loss(n, number(start.get(n)), number(end.get(n)), number(source.get(n))) for n in names]
        return [x for x in found if x.start is not None or x.end is not None]

    @property
    def old(self) -> Loss | None:
        """The set that forgetting is measured on."""
        name = self.recipe.get("old_set", "old")
        return next((x for x in self.losses if x.name == name and x.rise is not None), None)


def stages(record: Mapping[str, Any]) -> list[Stage]:
    """All training_stages since the growth, oldest first; empty for weights as they were grown."""
    return [Stage(s) for s in training_stages(record)]


def _mapping(facts: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = facts.get(key)
    return found if isinstance(found, Mapping) else {}


def headline(found: Sequence[Stage], *, lossless: bool) -> str:
    """'Trained after it was grown: 384 tokens in 12 steps.' and the losses of the last training. `lossless`: the growth."""
    sums = training_totals(tuple(s.facts for s in found))
    if not sums["steps"]:
        return "**An adapter was merged into it after it was grown.** What that taught it is not recorded."
    size = (f"{sums['tokens']:,} tokens in " if sums["tokens"] else "") + f"{sums['steps']:,} steps"
    several = f" of {sum(bool(s.steps) for s in found)} training_stages" if sum(bool(s.steps) for s in found) > 1 else ""
    parts = [f"**Trained after it was grown: {size}{several}.**"]
    last = [s for s in found if s.steps][-1]
    moved = [x for x in last.losses if x.rise is not None]
    if not moved:
        return f"{parts[0]} No loss was measured meanwhile, so nothing here tells what it learned and what it forgot."
    told = ", ".join(_told(x) for x in moved)
    parts.append(f"Loss in nats a token{' in the last of them' if several else ''}: {told}.")
    if last.old is not None:
        parts.append(_forgot(last.old, lossless))
    else:
        parts.append("No old text was measured, so what it forgot is not known.")
    return " ".join(parts)


def _told(loss: Loss) -> str:
    source = "" if loss.source is None else f" (source {loss.source:.4g})"
    began = "" if loss.start is None else f"{loss.start:.4g} to "
    return f"{began}{loss.end:.4g}{source} on {code(loss.name, 40)}"


def _forgot(old: Loss, lossless: bool) -> str:
    """What became of the old text, against what knew it: the source, or a grown model that is the same function."""
    rise = old.rise or 0.0
    if old.source is None and not lossless:
        moved = "rose" if rise > 0 else "fell"
        return (
            f"On old text its loss {moved} by {abs(rise):.3g} nats a token since the grown model's start, which growing had changed already: "
            "what it forgot of its source was not measured."
        )
    beside = "" if old.source is None else " that its source knew" if rise > 0 else ", beside its source"
    if rise > 0:
        return f"So it forgot {rise:.3g} nats a token of old text{beside}."
    return f"On the old text it was measured on it forgot nothing{beside}."


def section(found: Sequence[Stage], *, lossless: bool) -> Iterator[str]:
    """The training_stages one by one: what was trained how, on what, and the losses."""
    for i, stage in enumerate(found):
        if len(found) > 1:
            yield f"**{i + 1} of {len(found)}**: {stage.size}."
        rows = [[title, told] for title, told in _facts(stage) if told]
        if rows:
            yield "\n".join(["| | |", "| --- | --- |", *("| " + " | ".join(r) + " |" for r in rows)])
        texts = _texts(stage)
        if texts:
            yield texts
        if stage.losses:
            yield "Loss on text that was kept for measuring, in nats a token:"
            beside = any(x.source is not None for x in stage.losses)
            titles = ["", "source", "before", "after", "over the source"] if beside else ["", "before", "after", "change"]
            yield table(titles, [_row(x, stage, beside, lossless) for x in stage.losses])


def _row(loss: Loss, stage: Stage, beside: bool, lossless: bool) -> list[str]:
    forgotten = beside or lossless  # after a growth that changed the function the change alone does not tell
    old = (" (old text" + (": the last column is what was forgotten)" if forgotten else ")")) if loss == stage.old else ""
    numbers = ["-" if x is None else f"{x:.4f}" for x in ((loss.source,) if beside else ()) + (loss.start, loss.end)]
    return [plain(loss.name, 60) + old, *numbers, "-" if loss.rise is None else f"{loss.rise:+.4f}"]


def _facts(stage: Stage) -> Iterator[tuple[str, str]]:
    recipe, flops = stage.recipe, number(stage.facts.get("flops"))
    yield "steps", f"{stage.steps:,}" if stage.steps else ""
    yield "tokens", f"{stage.tokens:,}" if stage.tokens else ""
    yield "FLOPs", f"{flops:.3g}" if flops else ""
    if not stage.steps:
        yield "adapter", _settings(_mapping(stage.facts, "adapter"))
        return
    yield "trained parts", _listed(recipe.get("train", "everything"))
    yield "frozen parts", _listed(recipe.get("freeze"))
    yield "regularizer", _kind(recipe.get("regularizer"))
    distill = recipe.get("distill")
    if isinstance(distill, Mapping):
        teachers = distill.get("teachers")
        models = [t.get("model", "source") if isinstance(t, Mapping) else t for t in teachers] if isinstance(teachers, list) else ["source"]
        yield "distilled from", _listed([public_path(m) for m in models if isinstance(m, str)])
    yield "LoRA", (_settings(recipe["lora"]) or "yes") if isinstance(recipe.get("lora"), Mapping) else ""
    for key in ("learning_rate", "lr_scheduler_type", "seed"):
        yield key.replace("_", " ").replace(" type", ""), plain(recipe[key], 40) if isinstance(recipe.get(key), str | int | float) else ""


def _kind(regularizer: Any) -> str:
    if not isinstance(regularizer, Mapping) or regularizer.get("kind") in (None, "none"):
        return ""
    settings = _settings({k: v for k, v in regularizer.items() if k != "kind"})
    return plain(regularizer["kind"], 40) + (f", {settings}" if settings else "")


def _settings(options: Mapping[str, Any]) -> str:
    """The plain values of a section."""
    shown = [(k, v) for k, v in options.items() if isinstance(v, str | int | float) and not isinstance(v, bool)]
    return ", ".join(f"{plain(k, 40)} {plain(public_path(v) if isinstance(v, str) else v, 60)}" for k, v in shown[:MOST_LISTED])


def _listed(value: Any) -> str:
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return ", ".join(plain(v, 60) for v in values[:MOST_LISTED] if isinstance(v, str))


def _texts(stage: Stage) -> str:
    """A table of the texts as the training found them: share, tokens, and how often it went through them."""
    parts = stage.facts.get("data")
    parts = [p for p in parts if isinstance(p, Mapping) and isinstance(p.get("label"), str)] if isinstance(parts, list) else []
    order = list(USES)
    parts.sort(key=lambda p: order.index(str(p["use"])) if str(p.get("use")) in order else len(order))
    rows = []
    for part in parts[:MOST_LISTED]:
        share, tokens, passes = (number(part.get(k)) for k in ("share", "tokens", "passes"))
        use = USES.get(str(part.get("use"))) or f"measured as {plain(str(part.get('use', '')).removeprefix('eval '), 40)}"
        rows.append([
            use, code(", ".join(map(public_path, part["label"].split(", "))), 80), "-" if share is None else f"{share:.1%}", "-" if tokens is None else f"{tokens:,.0f}",
            "-" if passes is None else f"{passes:.3g}",
        ])  # fmt: skip
    return table(["", "text", "share", "tokens", "passes"], rows) if rows else ""


def commands(found: Sequence[Stage], name: str) -> tuple[str, list[tuple[str, str | None, str]]]:
    """How to do the training_stages again: the folder that the growth is to write, and (file, recipe, folder to write) of each.

    `name`: the folder of the last. A recipe is None where none was recorded that could be printed.
    """
    names: list[str] = []
    for stage in found:
        model = stage.facts.get("model") or stage.facts.get("merged_into")
        short = re.sub(r"[^\w.-]", "_", folder_name(model)) if isinstance(model, str) else "grown"
        names.append(short if short not in (name, *names) else f"{name}-{len(names)}")
    outputs = [*names[1:], name]
    made = []
    for i, stage in enumerate(found):
        file = "train.yaml" if len(found) == 1 else f"train-{i + 1}.yaml"
        made.append((file, _recipe(stage, names[i]) if stage.steps else None, outputs[i]))
    return names[0], made


def _recipe(stage: Stage, model: str) -> str | None:
    given, revision = stage.facts.get("model"), stage.facts.get("revision")
    on_the_hub = is_hub_id(given) and isinstance(revision, str) and bool(re.fullmatch(r"[0-9a-f]{7,64}", revision))
    head = {"model": given, "revision": revision} if on_the_hub else {"model": f"./{model}"}
    try:
        rest = {
            k: _shared(v, {given: f"./{model}"} if isinstance(given, str) and not on_the_hub else {})
            for k, v in stage.recipe.items()
            if k not in LEFT_OUT
        }
    except RecursionError:
        return None
    text = yaml_text.dumps({**head, **rest})
    return text if stage.recipe and len(text) <= MOST_RECIPE else None


def _shared(value: Any, renamed: Mapping[str, str], depth: int = 0) -> Any:
    """A value of the recipe without the paths of a machine. Raises RecursionError for one that goes too deep."""
    if depth > MOST_DEPTH:
        raise RecursionError
    if isinstance(value, Mapping):
        return {k: _shared(v, renamed, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_shared(v, renamed, depth + 1) for v in value]
    return renamed.get(value) or public_path(value) if isinstance(value, str) else value
