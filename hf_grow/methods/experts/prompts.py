"""Prompts that describe the purpose of each expert: a YAML file, checked before a model runs.

experts:
  - positive: ["def main():", "import os"]
    negative: ["Once upon a time"]
  - positive: ["Once upon a time"]
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from hf_grow.options import Options, load_yaml, parse

Item = TypeVar("Item")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _not_empty(items: list[Item]) -> list[Item]:
    if not items:
        raise ValueError("is empty; at least one is needed")
    return items


Prompt = Annotated[str, AfterValidator(_not_blank)]


class ExpertPrompts(Options):
    """The prompts of one expert."""

    positive: Annotated[list[Prompt], AfterValidator(_not_empty)]
    """Texts that should be routed to this expert."""
    negative: list[Prompt] = Field(default_factory=list)
    """Texts that should not."""


def _distinct(experts: list[ExpertPrompts]) -> list[ExpertPrompts]:
    """Raises ValueError for experts whose prompts are identical."""
    texts = [(sorted(e.positive), sorted(e.negative)) for e in experts]
    wrong = [f"{i} has the same positive and negative prompts" for i, (positive, negative) in enumerate(texts) if positive == negative]
    wrong += [f"{i} and {j} have the same prompts" for (i, a), (j, b) in combinations(enumerate(texts), 2) if a == b]
    if wrong:
        raise ValueError("; ".join(wrong))
    return experts


class PromptsFile(Options):
    """One entry per expert, in order."""

    experts: Annotated[list[ExpertPrompts], AfterValidator(_not_empty), AfterValidator(_distinct)]
    """The experts; with fine-grained experts, their virtual groups."""


def load_prompts(path: Path) -> PromptsFile:
    """Reads a YAML file of prompts. Raises InputError that lists all errors."""
    return parse(PromptsFile, load_yaml(path), where=str(path))
