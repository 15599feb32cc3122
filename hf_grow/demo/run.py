"""`hf-grow demo`: pretrain a small model, then inspect, grow, verify, fisher and train, each by its own command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console

from hf_grow.demo.domains import Domains, domains
from hf_grow.demo.report import figure, result, summary, table
from hf_grow.demo.small_model import LlamaShape, build_model, build_tokenizer
from hf_grow.errors import ExecutionError, InputError, OutputError
from hf_grow.options import Options
from hf_grow.training.data import cache

Command = Callable[[list[str]], int]
"""Runs ``hf-grow`` with these arguments and returns the exit status, or raises GrowError."""

MARKER = "demo.json"
"""The result, in the output folder from the first moment on: only a folder that holds it is replaced."""
RECIPES = ("pretrain.yaml", "train.yaml")
PARTS = (
    "text",
    "packed",
    "random",
    "small",
    "grown",
    "grown.partial",
    "trained",
    "trained-ewc",
    "fisher.safetensors",
    "loss.png",
    *RECIPES,
)
EXTRAS = {"accelerate": "train", "datasets": "train", "matplotlib": "plot"}
"""Package -> extra of hf-grow that installs it."""
MAX_THREADS = 4
"""More threads only wait for each other on matrices this small."""


class DemoOptions(Options):
    """Options of `hf-grow demo`."""

    output: Path = Path("demo-out")
    """Folder for the checkpoints, the figure and the numbers; an earlier demo there is replaced."""
    fresh: bool = False
    """Train the small model again, even if an earlier demo left it in the cache."""
    quick: bool = False
    """Everything tiny, in seconds: shows that all works, and nothing about growth."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights and of the order of the text."""


@dataclass(frozen=True)
class Settings:
    """What the recipes do not say."""

    shape: LlamaShape = field(default_factory=LlamaShape)
    layers_to: int = 12
    max_documents: int | None = None
    """Of each text."""
    fisher_tokens: int = 32_768
    seq_length: int = 128
    pretrain_flags: tuple[str, ...] = ()
    train_flags: tuple[str, ...] = ()


FULL = Settings()
QUICK = Settings(
    LlamaShape(vocab=512, layers=4, hidden=48, inter=128), layers_to=6, max_documents=40, fisher_tokens=2048, seq_length=64,
    pretrain_flags=("--data.seq_length", "64", "--max_steps", "60"),
    train_flags=("--data.seq_length", "64", "--max_steps", "20", "--eval_steps", "10", "--warmup_steps", "2"),
)  # fmt: skip


def run(options: DemoOptions, command: Command) -> dict[str, Any]:
    """Runs the demo and returns its numbers, which are also written to demo.json.

    Raises InputError if a package is missing, OutputError for an output folder or cache that cannot be used, and whatever a command raises.
    """
    start = time.perf_counter()
    _check_packages()
    out, settings = options.output, QUICK if options.quick else FULL
    _clear(out)
    # Threads that spin while they wait make training many times slower as soon as another program wants the cores. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    demo = _Demo(out, settings, options.seed, command)
    demo.say("hf-grow demo: pretrain a small model on prose, grow it, and train it on code, with and without EWC. No GPU, no network.")
    cached = demo.pretrain(options.fresh)
    demo.grow()
    demo.train()
    numbers = {**result(out), "cached": cached, "options": options.non_defaults(), "seconds": round(time.perf_counter() - start, 1)}
    figure(numbers, out / "loss.png")
    (out / MARKER).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    demo.console.print()
    demo.console.print(table(numbers))
    demo.console.print(summary(numbers), soft_wrap=False)
    demo.say(f"\nfigure      {out / 'loss.png'}\ncheckpoint  {out / 'trained-ewc'}\nwhole demo  {numbers['seconds']:.0f} s")
    for words in (["card", str(out / "trained-ewc")], ["plan", "mistralai/Mistral-7B-v0.1", "--to", "10.7B"]):
        demo.say("next: " + shlex.join(["hf-grow", *words]))
    return numbers


class _Demo:
    """The steps of the demo, all in the folder ``out``."""

    def __init__(self, out: Path, settings: Settings, seed: int, command: Command) -> None:
        self.out, self.settings, self.seed, self.command = out, settings, seed, command
        self.console = Console(highlight=False, soft_wrap=True)
        self.seeds = ["--seed", str(seed), "--data.seed", str(seed)] if seed else []
        for name in RECIPES:
            text = Path(__file__).with_name(name).read_text(encoding="utf-8")
            (out / name).write_text(text.replace('"demo-out/', f'"{json.dumps(str(out))[1:-1]}/'), encoding="utf-8")

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False)

    def hf_grow(self, *words: str | Path) -> None:
        """Prints a command line as a user would type it, and runs it. Raises ExecutionError where its exit status is not 0."""
        line = [str(word) for word in words]
        self.say(f"\n$ {shlex.join(['hf-grow', *line])}", style="bold green")
        if status := self.command(line):
            raise ExecutionError(f"hf-grow {line[0]} failed with exit status {status}.", hint="Its own output is above.")

    def path(self, name: str) -> Path:
        return self.out / name

    def pretrain(self, fresh: bool) -> bool:
        """Copies the small model from the cache, or trains it and puts it there. Returns whether it was in the cache."""
        texts = domains(self.settings.max_documents)
        self.path("text").mkdir()
        texts.write(self.path("text"))
        counts = {name: len(documents) for name, documents in texts.documents.items()}
        self.say(
            f"text: {counts['old']} documents of prose and {counts['new']} of code, from Python's documentation and standard library; "
            f"held out: {counts['old-heldout']} and {counts['new-heldout']}"
        )
        kept = cache.default_root() / "demo" / self.cache_key(texts)
        if kept.is_dir() and not fresh:
            self.say(f"small model: trained by an earlier demo (--fresh trains it again): {kept}")
            shutil.copytree(kept / "small", self.path("small"))
            return True
        self._random_model(texts)
        self.hf_grow("train", self.path("pretrain.yaml"), *self.settings.pretrain_flags, *self.seeds)
        if kept.is_dir():
            shutil.rmtree(kept)

        def copy(folder: Path) -> None:
            shutil.copytree(self.path("small"), folder / "small")

        cache.get_or_create(kept, copy)
        return False

    def cache_key(self, texts: Domains) -> str:
        """A digest of everything that the weights of the small model depend on."""
        recipe = Path(__file__).with_name("pretrain.yaml").read_text(encoding="utf-8")
        versions = {name: version(name) for name in ("hf-grow", "torch", "transformers", "tokenizers")}
        settings = [asdict(self.settings.shape), self.settings.seq_length, self.settings.pretrain_flags]
        return cache.key({"recipe": recipe, "settings": settings, "seed": self.seed, "text": texts.digest, "versions": versions})

    def _random_model(self, texts: Domains) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        tokenizer = build_tokenizer(texts.for_tokenizer(), self.settings.shape.vocab)
        model = build_model(self.settings.shape, tokenizer, max_positions=4 * self.settings.seq_length, seed=self.seed)
        model.save_pretrained(self.path("random"))
        tokenizer.save_pretrained(self.path("random"))

    def grow(self) -> None:
        small, grown, prose = self.path("small"), self.path("grown"), self.path("text") / "old-heldout.jsonl"
        self.hf_grow("inspect", small)
        self.hf_grow("depth", small, "--method", "identity", "--layers-to", str(self.settings.layers_to), "-o", grown)
        self.hf_grow("verify", small, grown, "--text", prose)

    def train(self) -> None:
        fisher, recipe, s = self.path("fisher.safetensors"), self.path("train.yaml"), self.settings
        size = ["--tokens", str(s.fisher_tokens), "--seq-length", str(s.seq_length), "--batch", "8"]
        self.hf_grow("fisher", self.path("grown"), "--text", self.path("text") / "old.jsonl", *size, "-o", fisher)
        self.hf_grow("train", recipe, *s.train_flags, *self.seeds)
        penalty: list[str | Path] = ["--regularizer.kind", "ewc", "--regularizer.lambda", "10", "--regularizer.fisher", fisher]
        self.hf_grow("train", recipe, *penalty, *s.train_flags, *self.seeds, "-o", self.path("trained-ewc"))


def _check_packages() -> None:
    missing = [package for package in EXTRAS if find_spec(package) is None]
    if missing:
        raise InputError(
            f"The demo needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            hint=f"Run: pip install 'hf-grow[{','.join(dict.fromkeys(EXTRAS[package] for package in missing))}]'",
        )


def _clear(out: Path) -> None:
    """Makes the output folder, without the files of an earlier demo. Raises OutputError for a folder that holds anything else."""
    if out.exists() and not (out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir()))):
        raise OutputError(f"{out} exists and is not the output of an earlier demo.", hint="Give another folder with --output.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text('{"unfinished": true}\n', encoding="utf-8")
        for part in (out / name for name in PARTS):
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.", hint="Give another folder with --output.") from None
