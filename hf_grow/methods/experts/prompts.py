"""Prompts that say what an expert is for: one YAML file, checked before a model runs.

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


def _some(items: list[Item]) -> list[Item]:
    if not items:
        raise ValueError("is empty; at least one is needed")
    return items


Prompt = Annotated[str, AfterValidator(_not_blank)]


class ExpertPrompts(Options):
    """What one expert is for."""

    positive: Annotated[list[Prompt], AfterValidator(_some)]
    """Texts of the kind that should reach this expert."""
    negative: list[Prompt] = Field(default_factory=list)
    """Texts of the kind that should not."""


def _told_apart(experts: list[ExpertPrompts]) -> list[ExpertPrompts]:
    """What no model could tell apart is refused before one runs."""
    texts = [(sorted(e.positive), sorted(e.negative)) for e in experts]
    wrong = [f"{i} has the same positive and negative prompts" for i, (positive, negative) in enumerate(texts) if positive == negative]
    wrong += [f"{i} and {j} have the same prompts" for (i, a), (j, b) in combinations(enumerate(texts), 2) if a == b]
    if wrong:
        raise ValueError("; ".join(wrong))
    return experts


class PromptsFile(Options):
    """One entry an expert, in their order."""

    experts: Annotated[list[ExpertPrompts], AfterValidator(_some), AfterValidator(_told_apart)]
    """The experts; with fine-grained experts, their virtual groups."""


def load_prompts(path: Path) -> PromptsFile:
    """A YAML file of prompts. Raises InputError that names every mistake in it."""
    return parse(PromptsFile, load_yaml(path), where=str(path))
