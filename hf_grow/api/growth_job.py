"""The growth service: one growth from opening its sources to publishing the result, for Python and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.api.output_options import OutputOptions
from hf_grow.checkpoint.donors import check_same_tokenizer
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.shard_sink import peak_shard_bytes
from hf_grow.checkpoint.source import fetch_companions, prefer_cached, with_weights
from hf_grow.checkpoint.tied_heads import resolve_tied_heads
from hf_grow.checkpoint.writer import WORKERS, Progress, Result, Shard, check_disk_space, layout
from hf_grow.convert.measure import measure
from hf_grow.convert.planning import Notify, ignore, open_sources, plan_for
from hf_grow.errors import InputError
from hf_grow.growth.growth import Method
from hf_grow.growth.plan import GrowthPlan
from hf_grow.model.param_count import format_count
from hf_grow.options import Options
from hf_grow.publish.card import license_warnings
from hf_grow.publish.manifest import Manifest, make_manifest, path_warnings, title_of
from hf_grow.publish.push import PushResult, check_destination, prepare_repo, push
from hf_grow.publish.stream import StreamSink
from hf_grow.training.growth_state.grow_optimizer import check_trainer_checkpoint, grow_checkpoint_state
from hf_grow.training.growth_state.state_files import warn_if_consolidating

if TYPE_CHECKING:
    from hf_grow.checkpoint.tensor_cache import TensorCache


class GrowthJob:
    """One growth, opened and planned; then `check`, `prepare`, `carry_out` and `publish`, in this order. A dry run ends with `check` and `check_room`.

    Each source is opened once, from config and headers. The growth is planned once, and again only where `prepare` learns from the weights what
    headers do not tell (whether a stored tied head is the embedding).
    """

    checkpoint: Checkpoint
    plan: GrowthPlan
    shards: list[Shard]
    cache: TensorCache | None
    """What fetches the source's tensors with `stream_source`; None where every source is on this machine."""

    def __init__(
        self,
        source: str,
        method: Method,
        options: Options,
        output: OutputOptions,
        *,
        out: Path | None = None,
        revision: str | None = None,
        workers: int = 0,
        notify: Notify = ignore,
    ) -> None:
        """Opens the sources and plans; fetches config, index and headers only.

        ``out``: folder to write; default: named after source, method and size, in the current folder. ``workers``: threads that write, 0 for one per
        core, at most 4. Raises SourceError, PlanError.
        """
        self.method = method
        self.options = options
        self.output = output
        self.destination = output.destination
        self.notify = notify
        self._workers = workers or WORKERS
        self._sink: StreamSink | None = None
        self._companions: Path | None = None
        opened = open_sources(source, options, revision=revision, notify=notify)
        self._is_local = all(_was_given_as_folder(c) for c in (opened, *opened.donors.values()))
        self._to_compare = {label for label, other in opened.donors.items() if opened.folder is None or other.folder is None}
        self._make_plan(_each(opened, prefer_cached) if output.stream_source else opened)
        self.out = out or default_output(source, self.plan)

    def _make_plan(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.plan = plan_for(checkpoint.info, self.method, self.options)
        self.shards = layout(self.plan.targets, self.output.shard_size)
        self.cache = None
        if self.output.stream_source and any(c.folder is None for c in (checkpoint, *checkpoint.donors.values())):
            from hf_grow.checkpoint.tensor_cache import TensorCache

            self.cache = TensorCache(self.plan, checkpoint, self.shards, keep=self.output.source_cache)

    def _settle(self, checkpoint: Checkpoint) -> None:
        """Takes the sources as they are known now; plans again if that is more than before, and notes what changed."""
        before = self.plan.growth.warnings
        if checkpoint.info == self.checkpoint.info:
            self.checkpoint = checkpoint
            return
        self._make_plan(checkpoint)
        for warning in self.plan.growth.warnings:
            if warning not in before:
                self.notify(warning)

    def check(self) -> None:
        """Raises GrowError for whatever can be known without fetching weights or writing."""
        output = self.output
        PartialFolder.check(self.out, resume=output.resume, overwrite=output.overwrite)
        if self.destination:
            check_destination(self.destination)
            for warning in license_warnings(self.plan, self.destination.repo):
                self.notify(warning)
        if output.stream_source:
            self._check_stream()
        if output.with_optimizer:
            check_trainer_checkpoint(Path(output.with_optimizer), output.optimizer_policy, self.plan)
            warn_if_consolidating(Path(output.with_optimizer), self.notify)

    def _check_stream(self) -> None:
        if self._is_local:
            raise InputError("The source is a local folder, so --stream-source has nothing to fetch.", hint="Remove it.")
        if self.cache is None:
            self.notify("The source is already in the cache; --stream-source has nothing to fetch.")
        elif self.plan.growth.measurements:
            what = " and ".join(wanted.kind for wanted in self.plan.growth.measurements)
            raise InputError(
                f"--stream-source does not work with {what} that are measured on the source's weights.",
                hint="Remove --stream-source, or use --router normal.",
            )

    def check_room(self) -> None:
        """Raises OutputError if the disk of the output has no room for what will be on it at a time."""
        written = peak_shard_bytes(self.shards, StreamSink.window if self.output.stream_push else None)
        check_disk_space(self.out, written + (self.cache.peak_bytes(self._workers) if self.cache else 0))

    def prepare(self) -> None:
        """Fetches what the growth needs of its sources, measures what it needs of their weights, and creates the repository."""
        if self.cache:
            self._settle(resolve_tied_heads(self.checkpoint))
            complete = _each(self.checkpoint, _with_companions)
            self._companions = complete.folder
        else:
            complete = _each(self.checkpoint, lambda checkpoint: with_weights(checkpoint, self.notify))
            self._settle(complete)
        for label in self._to_compare:
            check_same_tokenizer(complete, complete.donors[label], self.notify)
        self.plan = measure(self.plan, self.checkpoint, notify=self.notify)
        if self.destination:
            self.destination = prepare_repo(self.destination)  # before the long part: a token without write access is an error now
        if self.destination and self.output.stream_push:
            self._sink = StreamSink(self.destination, title_of(self.plan.growth.method, self.plan.source.ref), self.notify)
            for doubt in path_warnings(self.plan.source.ref, change="a shorter one, or a Hub id, as the source changes that"):
                self.notify(doubt)

    def carry_out(self, progress: Progress = lambda nbytes: None) -> Result:
        """Writes the model, and with `stream_push` sends it. ``progress`` gets the bytes written and checked since its last call.

        Raises OutputError before a byte is written, SourceError for weights that are not finite, ExecutionError if writing fails; see `execute`.
        """
        from hf_grow.convert.execute import execute

        if not self.output.resume:
            self.check_room()
        return execute(
            self.plan,
            self.checkpoint,
            self.out,
            self.shards,
            companions=self._companions,
            resume=self.output.resume,
            overwrite=self.output.overwrite,
            memory_budget=self.output.memory_budget,
            workers=self._workers,
            allow_nonfinite=self.output.allow_nonfinite,
            progress=progress,
            also=self._optimizer_state(),
            sink=self._sink,
            cache=self.cache,
        )

    def _optimizer_state(self) -> Callable[[Path], set[str]]:
        if not self.output.with_optimizer:
            return lambda folder: set()
        folder = Path(self.output.with_optimizer)
        return grow_checkpoint_state(folder, self.plan, self.output.optimizer_policy, exact_steps=self.output.exact_steps)

    @cached_property
    def manifest(self) -> Manifest:
        """What `publish` sends; after `carry_out`."""
        return make_manifest(self.out)

    def publish(self, progress: Progress = lambda nbytes: None) -> PushResult | None:
        """Sends the finished folder to its destination, unless `carry_out` has sent it already; None without a destination.

        ``progress`` gets the bytes of weights read for their digests.
        """
        if self._sink or self.destination is None:
            return self._sink.pushed if self._sink else None
        return push(self.manifest, self.destination, progress=progress, notify=self.notify)


def default_output(source: str, plan: GrowthPlan) -> Path:
    name = Path(source).resolve().name if Path(source).exists() else source.rsplit("/", 1)[-1]
    return Path(f"{name}-{plan.growth.method}-{format_count(plan.sizes[1].total)}")


def _each(checkpoint: Checkpoint, change: Callable[[Checkpoint], Checkpoint]) -> Checkpoint:
    return replace(change(checkpoint), donors={label: change(other) for label, other in checkpoint.donors.items()})


def _was_given_as_folder(checkpoint: Checkpoint) -> bool:
    """One from the Hub has a revision, wherever it is."""
    return checkpoint.folder is not None and not checkpoint.revision


def _with_companions(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint if checkpoint.folder else replace(checkpoint, folder=fetch_companions(checkpoint))
