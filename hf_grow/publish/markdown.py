"""Escaping of untrusted text for Markdown: names, reasons and licenses come from files that anyone may have written.

These are the functions that the card's templates call. Whatever the text holds, it stays one line of text: no heading, link, image, HTML or formula.
"""

from __future__ import annotations

import json
import re
from typing import Any

from hf_grow.publish.names import is_hub_id

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#$!])")
_TARGET = re.compile(r"https://[\w.-]+(?:/[\w.~%+/-]*)?|[\w-][\w.-]{0,80}", re.ASCII)


def line(value: Any, limit: int = 600) -> str:
    """One printable line, cut at `limit` characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)[: 4 * limit]).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


def plain(value: Any, limit: int = 600) -> str:
    """As running text, also in a table. URLs and e-mail addresses are broken up, so that no renderer makes them links."""
    text = _escaped(line(value, limit)).replace("&", "&amp;")
    return re.sub(r"(?i)(://|www\.|@)", lambda m: m[0].replace(":", "&#58;").replace(".", "&#46;").replace("@", "&#64;"), text)


def code(value: Any, limit: int = 200) -> str:
    """As a code span, also in a table."""
    text = line(value, limit).replace("`", "'").replace("$$", "$ $")
    return "`" + (text or " ").replace("|", r"\|") + "`"


def block(text: str, language: str = "") -> str:
    """As a fenced code block, which nothing in `text` ends."""
    inside = text.rstrip("\n").replace("```", "'''").replace("$$", "$ $")
    return f"```{language}\n{inside}\n```"


def quoted(value: Any, limit: int = 200) -> str:
    """As a string literal of Python, for use inside `block`."""
    return json.dumps(line(value, limit), ensure_ascii=False)


def link(text: Any, target: str, limit: int = 100) -> str:
    """As a link to an https URL or a file beside the card; as plain text if `target` is neither."""
    return f"[{plain(text, limit)}]({target})" if _TARGET.fullmatch(target) else plain(text, limit)


def hub_link(ref: str) -> str:
    """A Hub repository as a link; as a code span if `ref` is no Hub id."""
    return f"[{_escaped(ref)}](https://huggingface.co/{ref})" if is_hub_id(ref) else code(ref, 100)


def paper(citation: str) -> str:
    """A citation with its arXiv numbers as links, from which the Hub makes tags."""
    return re.sub(r"arXiv (\d{4}\.\d{5}|\d{4}\.\d{4})", r"[arXiv \1](https://arxiv.org/abs/\1)", plain(citation))


def formatted(value: float | None, spec: str) -> str:
    """A number by a format specification; '-' for None."""
    return "-" if value is None else format(value, spec)
