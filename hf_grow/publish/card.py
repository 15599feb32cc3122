"""The model card of a grown checkpoint, from growth.json alone: metadata, the text of templates/ filled with facts, and the layer map.

The metadata follow https://huggingface.co/docs/hub/model-cards. None of the Hub's relations to a base model (adapter, merge, quantized, finetune)
is growth: `finetune` is what the Hub itself assumes for a full model made from one other, and `merge` for one made of several.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.reader import GROWTH
from hf_grow.common.safe_files import read_json, read_text
from hf_grow.common.units import format_bytes
from hf_grow.errors import InputError, OutputError, SourceError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.model.param_count import format_count
from hf_grow.options import Options
from hf_grow.publish import licenses, markdown
from hf_grow.publish.eval_section import only, tasks
from hf_grow.publish.facts import card_facts
from hf_grow.publish.inherited import Inherited, inherit
from hf_grow.publish.layer_map import layer_map
from hf_grow.publish.names import is_hub_id, public_ref
from hf_grow.publish.picture import draw, to_svg

README, PICTURE, NOTICE = "README.md", "layer-map.svg", "NOTICE"
TEMPLATES = ("training", "verification", "card")
"""Files in templates/; the first two hold macros for the third."""
FUNCTIONS: dict[str, Any] = {
    **{f.__name__: f for f in (markdown.plain, markdown.code, markdown.block, markdown.link, markdown.hub_link, markdown.paper)},
    **{f.__name__: f for f in (markdown.quoted, markdown.formatted, only, format_bytes, format_count)},
    "shell": lambda *words: shlex.join(words),
    "picture": PICTURE,
}
"""What the templates use extra the facts."""
_CHECKSUM = re.compile(r"<!-- written by hf-grow, sha256 ([0-9a-f]{64}) -->\n\Z")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


class CardOptions(Options):
    """What a card needs beyond growth.json."""

    name: str | None = None
    """Name of the model, such as OWNER/NAME. Default: the folder's name."""
    license: str | None = None
    """License, as the Hub calls it (apache-2.0). Default: that of the source's card; left out where that says none."""
    base_model: str | None = None
    """Hub id of the source, where it was grown from a local folder; its card is read there too."""
    offline: bool = False
    """Do not ask the Hub: the source's card is read from its folder or the cache, or counts as unknown."""


@dataclass(frozen=True)
class Card:
    """A rendered card; `write_card` writes it."""

    text: str
    """README.md, metadata included."""
    files: Mapping[str, str]
    """Name -> text of the files that go with it: the layer map, and NOTICE if the license requires it."""
    metadata: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())
    """Notes for the publisher, such as unmet terms of the license."""


def render_card(folder: Path, options: CardOptions | None = None) -> str:
    """The card of a grown folder as text. Raises InputError if the folder was not grown, or growth.json is damaged."""
    return make_card(folder, options).text


def make_card(folder: Path, options: CardOptions | None = None) -> Card:
    """The card, its files and the notes for its publisher; writes nothing. Raises InputError, as `render_card`."""
    from huggingface_hub import ModelCard

    options = options or CardOptions()
    if not (folder / GROWTH).exists():
        raise InputError(
            f"{folder} was not grown by hf-grow: it has no {GROWTH}.",
            hint=f"Give the folder of a grown checkpoint. For other models write {README} yourself; hf-grow push sends it.",
        )
    record = read_json(folder / GROWTH)
    plan = GrowthPlan.from_json(record)
    name = options.name or folder.resolve().name.removesuffix(".partial")
    _check_options(options, name)
    inherited = inherit(plan, license=options.license, base_model=options.base_model, offline=options.offline)
    picture = to_svg(draw(layer_map(plan), public_ref(plan.source.ref, plan.source.revision), name.rsplit("/", 1)[-1]))
    metadata = _metadata(plan, record, inherited, name)
    notice = _notice(inherited, folder)
    card = Card(
        text=_with_checksum(
            str(ModelCard.from_template(metadata, template_str=template(), **FUNCTIONS, **card_facts(plan, record, inherited, name)))
        ),
        files={PICTURE: _with_checksum(picture)} | ({NOTICE: notice} if notice else {}),
        metadata=metadata.to_dict(),
        notes=tuple(_notes(inherited, folder, name)),
    )
    _refuse_tokens(card)
    return card


def license_warnings(plan: GrowthPlan, name: str) -> list[str]:
    """Warnings, before the growth, about a model name that the license does not allow. Raises InputError for an invalid name."""
    _check_options(CardOptions(name=name), name)
    return _name_notes(inherit(plan, license=None, base_model=None, offline=False), name)


def write_card(folder: Path, card: Card, *, output: Path | None = None, overwrite: bool = False) -> list[Path]:
    """Writes README.md (or `output`) and the files that go with it; returns their paths.

    An existing card is replaced if hf-grow wrote it and nobody edited it; any other raises OutputError unless `overwrite`.
    """
    target = output or folder / README
    extra = {
        name: text for name, text in card.files.items() if name != NOTICE or target.name == NOTICE or not _has_file(target.parent, "notice")
    }
    texts = {target: card.text, **{target.parent / name: text for name, text in extra.items()}}
    if target.is_dir():
        raise OutputError(f"{target} is a folder.", hint="Give the name of a file, such as README.md in it.")
    if len(texts) != 1 + len(extra):
        raise OutputError(f"{target} is the name of a file that goes with the card.", hint="Use another name, such as README.md.")
    edited = [p for p in texts if not overwrite and p.exists() and not _is_unedited(p)]
    if edited:
        raise OutputError(
            f"{' and '.join(map(str, edited))} {'were' if len(edited) > 1 else 'was'} edited, or not written by hf-grow.",
            hint="Use --overwrite to replace it, or -o FILE to write elsewhere.",
        )
    for path, text in texts.items():
        temporary = path.with_name(path.name + ".new")
        try:
            try:
                temporary.write_text(text, encoding="utf-8", newline="\n")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot write {path}: {error.strerror}.") from None
    return list(texts)


def template() -> str:
    """The template of the whole card."""
    return "".join((Path(__file__).parent / "templates" / f"{name}.md.jinja").read_text("utf-8") for name in TEMPLATES)


def _check_options(options: CardOptions, name: str) -> None:
    if options.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", options.license):
        raise InputError(f"{options.license!r} is not a license identifier.", hint="Use one of the Hub's, such as apache-2.0 or llama3.1.")
    if options.license == "other":
        raise InputError("--license other names no license.", hint="Remove it, and name the license in the card by hand.")
    if options.base_model is not None and not is_hub_id(options.base_model):
        raise InputError(f"{options.base_model!r} is not a Hub id.", hint="A Hub id reads OWNER/NAME.")
    if options.name is not None and not is_hub_id(name if "/" in name else f"owner/{name}"):
        raise InputError(f"{name!r} is not a valid model name.", hint="Use letters, digits, '-', '_' and '.': NAME or OWNER/NAME.")


def _metadata(plan: GrowthPlan, record: Mapping[str, Any], inherited: Inherited, name: str) -> Any:
    """huggingface_hub's ModelCardData."""
    from huggingface_hub import EvalResult, ModelCardData

    growth, target = plan.growth, plan.architecture
    tags = ["hf-grow", "model-growth", *(m for m in growth.method.split("+") if re.fullmatch(r"[a-z0-9_-]{1,40}", m))]
    tags += ["moe"] if target.is_moe else []
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=s["task"], dataset_name=s["task"], metric_type=s["metric"], metric_value=s["new"][0]
        )
        for s in tasks(record.get("verification"))
        if s["new"][0] is not None
    ]
    bases = inherited.base_models
    relation = {"base_model_relation": "merge" if len(bases) > 1 else "finetune"} if bases else {}
    return ModelCardData(
        base_model=list(bases) if len(bases) > 1 else bases[0] if bases else None,
        language=list(inherited.language) or None,
        license=inherited.license or None,
        license_name=inherited.license_name or None,
        license_link=inherited.license_link or None,
        datasets=list(inherited.datasets) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        eval_results=results or None,
        model_name=name if results else None,
        **relation,  # type: ignore[arg-type]
    )


def _notice(inherited: Inherited, folder: Path) -> str:
    """Text of the NOTICE file that the license requires, if the folder has none."""
    notice = inherited.known.notice if inherited.known else ""
    return f"{notice}\n" if notice and not _has_file(folder, "notice") else ""


def _has_file(folder: Path, start: str) -> bool:
    try:
        return any(n.lower().startswith(start) for n in os.listdir(folder))
    except OSError:
        return False


def _name_notes(inherited: Inherited, name: str) -> list[str]:
    known = inherited.known
    if not known or not known.name_start or licenses.name_fits(known, name):
        return []
    return [f'The {known.title} requires the name of a published model to begin with "{known.name_start}"; {name} does not.']


def _notes(inherited: Inherited, folder: Path, name: str) -> list[str]:
    known, notes = inherited.known, [*inherited.notes, *_name_notes(inherited, name)]
    if known and known.copy and not (_has_file(folder, "licen")):
        notes.append(f"The {known.title} requires a copy of itself with the weights; {folder} has no LICENSE file.")
    if not inherited.base_models:
        notes.append(
            "The source is a local folder, so the card names no base model; if it is on the Hub, add it with `hf-grow card --base-model OWNER/NAME`."
        )
    return notes


def _with_checksum(text: str) -> str:
    """`text` with a last line that shows later whether it was edited."""
    text = text.rstrip("\n") + "\n"
    return f"{text}<!-- written by hf-grow, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _is_unedited(path: Path) -> bool:
    try:
        text = read_text(path)
    except SourceError:
        return False
    match = _CHECKSUM.search(text)
    return match is not None and _with_checksum(text[: match.start()]) == text


def _refuse_tokens(card: Card) -> None:
    """Raises InputError if the card or a file of it holds an access token."""
    from huggingface_hub import get_token

    token = get_token()
    for name, text in {README: card.text, **card.files}.items():
        bare = text.replace("\\", "")  # without the escapes of Markdown
        if _TOKEN.search(bare) or (token and (token in bare or token in text)):
            raise InputError(f"{name} would hold an access token.", hint="Remove it from the names, options or results in growth.json.")
