"""Terms for redistribution in the licenses of well-known checkpoints. Data, not legal advice.

The quoted words are prescribed by the license itself; the docstrings name its sections.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class License:
    """Terms that the publisher of a derived model has to meet."""

    title: str
    built_with: str = ""
    """Words that must be displayed prominently."""
    name_start: str = ""
    """What the name of a published model must begin with."""
    notice: str = ""
    """The line that a text file NOTICE must hold."""
    copy: bool = False
    """Whether a copy of the license goes with the weights."""
    limits: str = ""
    """What it does not allow, in a few words."""


def _llama(version: str, *, product: str = "Llama", title: str = "", built_with: str = "", name_start: str = "") -> License:
    """Section 1.b of the community licenses: (i) copy, display and name, (iii) notice; section 2: 700 million monthly users."""
    title = title or f"{product} {version} Community License"
    return License(
        title=title,
        built_with=built_with,
        name_start=name_start,
        notice=f"{product} {version} is licensed under the {title}, Copyright © Meta Platforms, Inc. All Rights Reserved.",
        copy=True,
        limits="acceptable use policy; a license of its own above 700 million monthly users",
    )


def _alibaba(name: str, agreement: str, *, built_with: str = "", limits: str) -> License:
    """Section 3 (copy, notice of changes, notice file) and section 4 (display)."""
    return License(
        title=f"{name} {agreement}",
        built_with=built_with,
        notice=f"{name} is licensed under the {name} {agreement}, Copyright (c) Alibaba Cloud. All Rights Reserved.",
        copy=True,
        limits=limits,
    )


def _mistral(name: str) -> License:
    """Section 2.2: copy and notice file."""
    return License(
        f"Mistral AI {name}",
        notice=f"Licensed by Mistral AI under the Mistral AI {name}",
        copy=True,
        limits="research or testing only; no commercial use",
    )


_100_MILLION_USERS = "a license of its own above 100 million monthly users"

# By the identifier in a card's `license`, or its `license_name` where that says `other`.
LICENSES: dict[str, License] = {
    "apache-2.0": License("Apache License 2.0", copy=True),
    "mit": License("MIT License", copy=True),
    "llama2": _llama("2", title="LLAMA 2 Community License"),
    "llama3": _llama("3", product="Meta Llama", built_with="Built with Meta Llama 3", name_start="Llama 3"),
    "llama3.1": _llama("3.1", built_with="Built with Llama", name_start="Llama"),
    "llama3.2": _llama("3.2", built_with="Built with Llama", name_start="Llama"),
    "llama3.3": _llama("3.3", built_with="Built with Llama", name_start="Llama"),
    "llama4": _llama("4", built_with="Built with Llama", name_start="Llama"),
    "qwen": _alibaba("Qwen", "LICENSE AGREEMENT", built_with="Built with Qwen", limits=_100_MILLION_USERS),
    "qwen-research": _alibaba("Qwen", "RESEARCH LICENSE AGREEMENT", built_with="Built with Qwen", limits="no commercial use"),
    "tongyi-qianwen": _alibaba("Tongyi Qianwen", "LICENSE AGREEMENT", limits=_100_MILLION_USERS),
    "mrl": _mistral("Research License"),
    "mnpl": _mistral("Non-Production License"),
    "cc-by-nc-4.0": License("Creative Commons Attribution Non Commercial 4.0", limits="no commercial use"),
    "cc-by-sa-4.0": License("Creative Commons Attribution Share Alike 4.0", limits="derived works under the same license only"),
    "cc-by-nd-4.0": License("Creative Commons Attribution No Derivatives 4.0", limits="derived works may not be shared"),
}


def find(license: str, license_name: str) -> License | None:
    """The entry for a card's `license` and `license_name`, if there is one."""
    key = license_name if license in ("", "other") else license
    return LICENSES.get(key.lower().removesuffix("-license"))


def name_fits(terms: License, name: str) -> bool:
    """Whether a model's name begins as the license requires: Llama-3-Small does for 'Llama 3'."""

    def letters(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    return letters(name.rsplit("/", 1)[-1]).startswith(letters(terms.name_start))
