"""Text of unknown origin inside Markdown: names, reasons and licences come from files that anyone may have written.

Whatever such a text holds, it stays one line of text: no heading, link, picture, HTML or formula of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from hf_grow.publish.names import is_hub_id

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#$!])")


def line(value: Any, limit: int = 600) -> str:
    """One printable line, cut at `limit` characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)[: 4 * limit]).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


def plain(value: Any, limit: int = 600) -> str:
    """As running text. An address is taken apart, so that no renderer makes a link of it."""
    text = _escaped(line(value, limit)).replace("&", "&amp;")
    return re.sub(r"(?i)(://|www\.|@)", lambda m: m[0].replace(":", "&#58;").replace(".", "&#46;").replace("@", "&#64;"), text)


def code(value: Any, limit: int = 200) -> str:
    """As a code span that is safe in a table too."""
    text = line(value, limit).replace("`", "'").replace("$$", "$ $")
    return "`" + (text or " ").replace("|", r"\|") + "`"


def block(text: str, language: str = "") -> str:
    """As a block of code, which nothing in it ends. Every line of `text` must be printable already."""
    inside = text.replace("```", "'''").replace("$$", "$ $")
    return f"```{language}\n{inside}\n```"


def hub_link(ref: str) -> str:
    """A Hub repository as a link."""
    assert is_hub_id(ref)
    return f"[{_escaped(ref)}](https://huggingface.co/{ref})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is left, the others right; cells are Markdown already."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
