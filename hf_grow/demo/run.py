"""The story: real text, a small model, growth by the real command, verification, and continued pretraining of both models."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from rich.console import Console

from hf_grow.demo import cache as caching
from hf_grow.demo import show
from hf_grow.demo import text as texts
from hf_grow.demo.settings import Settings, full, quick
from hf_grow.errors import InputError, OutputError
from hf_grow.options import Options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hf_grow.demo.pretrain import Blocks
    from hf_grow.demo.report import Run

MARKER = "demo.json"  # in the result folder from the first moment on: what the next demo may replace
_PARTS = ("small", "grown", "grown-trained", "small-trained", "heldout.txt", "loss.png")
_NEEDED = {"accelerate": "train", "matplotlib": "plot"}  # module -> extra of this package that brings it


class DemoOptions(Options):
    """What `hf-grow demo` takes."""

    output: Path = Path("demo-out")
    """Folder for the checkpoints, the figure and the numbers; an earlier demo there is replaced."""
    fresh: bool = False
    """Train the small model anew, even where an earlier demo left it in the cache."""
    quick: bool = False
    """Everything tiny, in seconds: shows that all works, and nothing about growth."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initial weights and of the order of the text."""


def run(options: DemoOptions, *, cache: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """The whole demo; the numbers, as written to demo.json. `cache` is where the small model is kept (default: the user's cache)."""
    start = time.perf_counter()
    console = console or Console(highlight=False, soft_wrap=True)
    _check_extras()
    out = options.output
    _clear(out)
    settings = quick(options.seed) if options.quick else full(options.seed)
    console.print("[bold]hf-grow demo[/]: train a small Llama on the text that comes with Python, grow it, train on. CPU only, no network.")
    with _environment(settings.threads):
        numbers = _story(settings, out, cache or caching.default_root(), options.fresh, console)
    numbers |= {"options": options.non_defaults(), "seconds": round(time.perf_counter() - start, 1)}
    _write_marker(out, numbers)
    _close(console, out, numbers["seconds"])
    return numbers


def _story(settings: Settings, out: Path, cache: Path, fresh: bool, console: Console) -> dict[str, Any]:
    from hf_grow.demo import report

    with show.stage(console, 1, "Text and tokenizer"):
        corpus, tokenizer, blocks = _text(settings, console)
        # What verify reads: the start of several held-out documents.
        (out / "heldout.txt").write_text("\n\n".join(document[:2000] for document in corpus.heldout), encoding="utf-8")

    with show.stage(console, 2, "The small model"):
        name = caching.key(settings.pretraining, corpus.digest)
        small = _small(settings, tokenizer, blocks, out / "small", cache, name, fresh, console)

    with show.stage(console, 3, f"Growth: {small.layers} to {settings.layers_to} layers") as growth:
        show.command(console, "dus", str(out / "small"), "--layers-to", str(settings.layers_to), "-o", str(out / "grown"))

    with show.stage(console, 4, "Verification"):
        show.command(console, "verify", str(out / "small"), str(out / "grown"), "--text", str(out / "heldout.txt"))

    with show.stage(console, 5, "Continued pretraining of the grown model"):
        grown = _continue(settings, tokenizer, blocks, out / "grown", out / "grown-trained", console)

    with show.stage(console, 6, "For comparison: the small model going on, same text and steps"):
        going_on = _continue(settings, tokenizer, blocks, out / "small", out / "small-trained", console)

    story = report.Story(small=small, grown=grown, going_on=going_on, growth_seconds=growth.seconds)
    console.print()
    console.print(report.table(story))
    console.print("\n" + report.verdict(story), soft_wrap=False)
    report.figure(story, out / "loss.png")
    return report.as_json(story)


def _text(settings: Settings, console: Console) -> tuple[texts.Corpus, PreTrainedTokenizerFast, Blocks]:
    from hf_grow.demo.pretrain import build_tokenizer, prepare

    pretraining = settings.pretraining
    corpus = texts.corpus(pretraining.characters)
    show.say(console, f"{len(corpus.train)} documents of Python's documentation and sources, {len(corpus.heldout)} more held out")
    tokenizer = build_tokenizer(corpus.train, pretraining.shape.vocab)
    blocks = prepare(tokenizer, corpus, pretraining)
    show.say(
        console,
        f"byte-level BPE of {len(tokenizer):,} tokens; {blocks.train.numel():,} tokens of text, {blocks.heldout.numel():,} held out",
    )
    return corpus, tokenizer, blocks


def _small(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, blocks: Blocks, to: Path, cache: Path, name: str, fresh: bool, console: Console
) -> Run:
    from hf_grow.demo.pretrain import Point, Schedule, build_model, train
    from hf_grow.demo.report import Run

    p = settings.pretraining

    def make(folder: Path) -> None:
        model = build_model(p, tokenizer)
        schedule = Schedule(p.steps, p.batch, p.learning_rate, p.warmup, "constant_with_warmup", p.seed, _evenly(p.steps))
        begin = time.perf_counter()
        with show.training(console, p.steps) as progress:
            points = train(model, blocks.train, blocks.heldout, schedule, progress)
        seconds = time.perf_counter() - begin
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        facts = {"layers": p.shape.layers, "parameters": model.num_parameters(), "seconds": seconds}
        (folder / "training.json").write_text(json.dumps({**facts, "points": [[q.tokens, q.loss] for q in points]}))

    folder, cached = caching.fetch(cache, name, make, fresh=fresh)
    shutil.copytree(folder / "model", to)
    facts = json.loads((folder / "training.json").read_text())
    run = Run(facts["layers"], facts["parameters"], tuple(Point(*q) for q in facts["points"]), facts["seconds"], cached)
    if cached:
        show.say(console, f"trained by an earlier demo, in {run.seconds:.0f} s (--fresh trains it again): {folder}")
    show.say(
        console,
        f"{run.layers} layers, {run.parameters:,} parameters, {run.tokens:,} tokens: held-out loss {run.first:.3f} -> {run.last:.3f}",
    )
    return run


def _continue(settings: Settings, tokenizer: PreTrainedTokenizerFast, blocks: Blocks, source: Path, to: Path, console: Console) -> Run:
    """Trains the checkpoint `source` on text it has not seen; the same for both models but for the weights they start from."""
    from transformers import AutoModelForCausalLM

    from hf_grow.demo.pretrain import Schedule, train
    from hf_grow.demo.report import Run

    p = settings.pretraining
    model = AutoModelForCausalLM.from_pretrained(source)
    schedule = Schedule(settings.steps, p.batch, settings.learning_rate, settings.warmup, "linear", p.seed, _early(settings.steps))
    begin = time.perf_counter()
    with show.training(console, settings.steps) as progress:
        points = train(model, blocks.train[p.steps * p.batch :], blocks.heldout, schedule, progress)
    run = Run(model.config.num_hidden_layers, model.num_parameters(), tuple(points), time.perf_counter() - begin)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    show.say(console, f"{run.layers} layers, {run.tokens:,} tokens: held-out loss {run.first:.3f} -> {run.last:.3f}")
    return run


def _evenly(steps: int) -> frozenset[int]:
    return frozenset(steps * k // 12 for k in range(1, 13))


def _early(steps: int) -> frozenset[int]:
    """Denser at the start, where a grown model recovers; every quarter is among them."""
    return frozenset(max(1, steps * k // 48) for k in (1, 2, 4, 8, 12, 18, 24, 30, 36, 42, 48))


def _check_extras() -> None:
    missing = [module for module in _NEEDED if find_spec(module) is None]
    if missing:
        raise InputError(
            f"The demo needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            hint=f"Run: pip install 'hf-grow[{','.join(_NEEDED[module] for module in missing)}]'",
        )


def _clear(out: Path) -> None:
    """Makes the result folder, without what an earlier demo left there. Raises OutputError for a folder that holds anything else."""
    if out.exists() and not (out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir()))):
        raise OutputError(f"{out} exists and is no result of an earlier demo.", hint="Give another folder with --output.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_marker(out, {"unfinished": True})
        for part in (out / name for name in _PARTS):
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink(missing_ok=True)
        for partial in out.glob("*.partial"):  # of a growth that was interrupted
            shutil.rmtree(partial)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.", hint="Give another folder with --output.") from None


def _write_marker(out: Path, numbers: dict[str, Any]) -> None:
    (out / MARKER).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _environment(most_threads: int) -> Iterator[None]:
    """Advice of transformers that means nothing here stays away, errors do not; few threads, and none that burns a core by waiting."""
    # Threads that spin while they wait make training ten times slower as soon as another program wants the cores.
    # Read when torch is loaded, and by the commands that the demo starts.
    policy = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from transformers.utils import logging

    verbosity, bars, threads = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(min(threads, most_threads))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        torch.set_num_threads(threads)
        if policy is None:
            del os.environ["OMP_WAIT_POLICY"]


def _close(console: Console, out: Path, seconds: float) -> None:
    console.print(f"\nfigure       {out / 'loss.png'}", markup=False)
    console.print(f"checkpoint   {out / 'grown-trained'}   (AutoModelForCausalLM.from_pretrained loads it)", markup=False)
    console.print(f"whole demo   {seconds:.0f} s", markup=False)
    for words in (("inspect", str(out / "grown")), ("plan", "mistralai/Mistral-7B-v0.1", "--to", "10.7B")):
        console.print(f"next: [bold]{shlex.join(['hf-grow', *words])}[/]")
