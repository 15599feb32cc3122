"""Metadata that a grown model inherits from its sources: base models, license, languages, datasets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import SourceInfo
from hf_grow.publish import licenses
from hf_grow.publish.licenses import License
from hf_grow.publish.lineage import hub_ancestors
from hf_grow.publish.names import is_hub_id, public_ref
from hf_grow.publish.source_card import SourceCard, latest_card, read_card


@dataclass(frozen=True)
class Inherited:
    """See `inherit`."""

    base_models: tuple[str, ...] = ()
    """Hub id of each source, or of its nearest ancestor on the Hub."""
    license: str = ""
    """Empty if unknown, or if the sources differ."""
    license_name: str = ""
    license_link: str = ""
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    known: License | None = None
    """Terms of the license, if it is in the table."""
    origin: str = ""
    """Where the license comes from, as a phrase for the card."""
    notes: tuple[str, ...] = ()


def inherit(plan: GrowthPlan, *, license: str | None, base_model: str | None, offline: bool) -> Inherited:
    """Reads the cards of the sources (see source_card).

    license, base_model: given by the publisher, take precedence. offline: read the folder and the cache only.
    Raises InputError for a `base_model` that contradicts growth.json.
    """
    if base_model and plan.source.revision and base_model != plan.source.ref:
        raise InputError(f"growth.json says that the source is {plan.source.ref}, not {base_model}.", hint="Remove --base-model.")
    cards = [_card(plan.source, base_model, offline), *(_card(o, None, offline) for o in plan.source.donors.values())]
    bases = [_base(plan.source, cards[0], base_model)] + [
        _base(o, c, None) for o, c in zip(plan.source.donors.values(), cards[1:], strict=True)
    ]
    inherited = Inherited(
        base_models=tuple(dict.fromkeys(b for b in bases if b)),
        language=tuple(dict.fromkeys(x for c in cards for x in c.language)),
        datasets=tuple(dict.fromkeys(x for c in cards for x in c.datasets)),
    )
    names = [public_ref(s.ref, s.revision) for s in (plan.source, *plan.source.donors.values())]
    return _with_license(inherited, license, list(zip(names, cards, strict=True)))


def _with_license(inherited: Inherited, chosen: str | None, cards: list[tuple[str, SourceCard]]) -> Inherited:
    named = {f"{c.license}\0{c.license_name}": c for _, c in cards if c.license_label}
    unknown = [f"{name}: {c.problem or 'its card names no license'}" for name, c in cards if not c.license_label]
    identifier, name, link, origin = "", "", "", ""
    notes: list[str] = []
    if chosen:
        identifier, origin = chosen, "as the publisher says"
        others = sorted({c.license_label for c in named.values()} - {chosen})
        if others:
            origin += f"; the card of the source says {', '.join(others)}"
            notes.append(f"--license {chosen} is not what the card of the source says: {', '.join(others)}.")
    elif len(named) == 1 and not unknown:
        card = next(iter(named.values()))
        identifier, name, link = card.license, card.license_name, card.license_link
        origin = "as on the card of " + ", ".join(dict.fromkeys(c.ref if is_hub_id(c.ref) else source for source, c in cards))
    elif len(named) > 1:
        listed = "; ".join(f"{source}: {c.license_label}" for source, c in cards if c.license_label)
        origin = f"the sources have different licenses ({listed}); ask their owners which applies to a model made of them"
        notes.append("The sources have different licenses, so the card names none: " + listed + ". Set it with `hf-grow card --license`.")
    else:
        origin = f"unknown: ask the owner of the source ({'; '.join(unknown)})"
        notes.append(f"The license is unknown, so the card names none ({'; '.join(unknown)}). Set it with `hf-grow card --license`.")
    known = licenses.find(identifier, name)
    return replace(inherited, license=identifier, license_name=name, license_link=link, known=known, origin=origin, notes=tuple(notes))


def _card(source: SourceInfo, base_model: str | None, offline: bool) -> SourceCard:
    """The card of a source; where it names no license, that of the nearest ancestor on the Hub."""
    first = read_card(source.ref, source.revision, source.config, offline=offline)
    if first.license_label:
        return first
    if base_model and not source.revision:
        other = latest_card(base_model, offline=offline)
        return other if other.license_label else first
    for ref, revision in hub_ancestors(source.history):
        older = read_card(ref, revision, None, offline=offline)
        if older.license_label:
            return older
    return first


def _base(source: SourceInfo, card: SourceCard, given: str | None) -> str:
    """A Hub id, or nothing."""
    ancestors = [ref for ref, _ in hub_ancestors(source.history)]
    candidates = [given, source.ref if source.revision else None, *ancestors[:1], card.base_model]
    return next((c for c in candidates if is_hub_id(c)), "") or ""
