"""One case from its number: which file is mutated and how, and which command is run; or a command line of odd words."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from corpus import TARGETS
from mutate import MUTATIONS, SNIPPETS, flip

from hf_grow.cli import COMMANDS

WORDS = (
    "", "0", "-1", "1", "2", "4", "0.5", "nan", "1e999", "x", "source", "grown", "mixture", "nowhere", "out", "recipe.yaml", "train.yaml", "/dev/zero", "/dev/null",
    "/dev/full", "text.jsonl", "fisher.safetensors", ".", "..", "~", "/", "70K", "10B", "1MB", "0-3,1", "0-99999", "auto", "float32", "cpu", "cuda:9", "--", "-", "--json",
    "\x1b[31m", "é" * 99, "a" * 5_000, "\udcff", "you/model", "a/b/c", "http://x", "tile", "identity", "noise", "drop", "null", "[]", "{a: 1}", "9" * 400,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    number: int
    words: tuple[str, ...]
    target: str = ""
    """File that is mutated; empty for a command line of odd words."""

    @property
    def told(self) -> str:
        return (
            f"case {self.number}: {self.target or 'words'}: hf-grow {' '.join(w if len(w) < 80 else w[:60] + '...' for w in self.words)!r}"
        )


def case(seed: int, number: int, only: str = "") -> Case:
    draw = drawn(seed, number)
    names = [n for n in (*TARGETS, "words") if only in n]
    target = draw.choices(names, [TARGETS[n][0] if n in TARGETS else 14 for n in names])[0]
    if target == "words":
        return Case(number, _line(draw))
    commands = TARGETS[target][1]
    return Case(number, tuple(draw.choices([c for c, _ in commands], [n for _, n in commands])[0].split()), target)


def mutated(made: Case, seed: int, folder: Path) -> None:
    """Changes the case's file in `folder`."""
    if made.target:
        draw = drawn(seed, made.number)
        draw.random()
        path = folder / made.target
        data = path.read_bytes()
        if draw.random() < 0.02:
            path.unlink()
            if draw.random() < 0.5:
                path.mkdir()
            return
        path.write_bytes(MUTATIONS.get(path.suffix, flip)(data, draw))


def drawn(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed}/{number}")


def _line(draw: random.Random) -> tuple[str, ...]:
    """A command with a source, and some of its flags with odd values. The demo takes a minute, so it is left out."""
    command = draw.choice([c for c in COMMANDS if c != "demo"])
    first = {
        "grow": ["recipe.yaml"],
        "train": ["train.yaml"],
        "verify": ["source", "grown"],
        "merge": ["adapter"],
        "push": ["grown", "you/model"],
        "card": ["grown"],
    }
    words = [w if draw.random() < 0.9 else draw.choice(WORDS) for w in first.get(command, ["source"])]
    for flag, takes in draw.sample(flags(command), min(len(flags(command)), draw.randrange(5))):
        words.append(flag)
        if takes and draw.random() < 0.95:
            words.append(draw.choice(WORDS) if draw.random() < 0.9 else draw.choice(SNIPPETS))
    if command in ("replay", "fisher") and "--tokens" not in words:
        words += ["--tokens", "64"]  # the defaults take their time
    if command == "train":
        words += ["--dry-run"] * (draw.random() < 0.9)
    return (command, *words)


@cache
def flags(command: str) -> list[tuple[str, bool]]:
    """The flags of a command, and whether each takes a value."""
    import argparse

    from hf_grow import cli

    parser = argparse.ArgumentParser(add_help=False)
    cli._add_arguments(command, parser)
    found = [(a.option_strings[-1], a.nargs != 0) for a in parser._actions if a.option_strings]
    keys = (
        ["data.seq_length", "learning_rate", "regularizer.kind", "monitor.window", "max_steps", "nothing", "data", "lora"]
        if command == "train"
        else []
    )
    return found + [(f"--{k}", True) for k in keys]
