"""Checks of a grown checkpoint that need not run the model.

`check_tables`: config, headers and provenance agree. `recompute_tensors`: every tensor is recomputed from the source with the map in growth.json
and compared bit for bit with the stored one; the same pass computes the SHA-256 of each shard. Memory use is bounded at any model size.

Weights trained after the growth differ from the map. For them, growth.json must record the training; names, shapes and config must be those of
the growth, and the files those the training recorded. Tensors that are still those of the growth are counted.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.provenance import describe_training, recorded_files, training_stages, training_totals
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.safetensors_header import TensorLocation
from hf_grow.checkpoint.transfer import read_chunks
from hf_grow.common.safe_files import open_regular
from hf_grow.errors import GrowError, SourceError
from hf_grow.growth.plan import HEAD, GrowthPlan, check_source
from hf_grow.growth.source_info import DTYPE_NAMES
from hf_grow.model.architecture import Architecture
from hf_grow.model.loading import one_line_error
from hf_grow.verification.report import Report

if TYPE_CHECKING:
    from hf_grow.growth.evaluate import Evaluator

MEMORY = 256 << 20
IGNORED_CONFIG_KEYS = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
        "output_router_logits", "router_aux_loss_coef"}  # fmt: skip
"""Keys of config.json that do not affect the logits, and that a trainer may rewrite."""


def check_tables(new: Checkpoint, report: Report) -> GrowthPlan | None:
    """Checks names, shapes, dtypes, config and provenance. Returns the plan of growth.json if it is valid."""
    try:
        arch = new.info.architecture
        check_source(new.info)
        report.add(
            "names and shapes", True, f"{len(new.tensors)} tensors, as expected for {arch.family.architecture} with {arch.layers} layers"
        )
    except SourceError as error:
        report.add("names and shapes", False, error.message)
    if new.growth is None:
        report.add("provenance", None, "no growth.json: the origin of the weights cannot be checked")
        return None
    try:
        plan = GrowthPlan.from_json(new.growth)
    except SourceError as error:
        report.add("provenance", False, error.message)
        return None
    since = training_since(new)
    stored = {name: t.info.shape if since else t.info for name, t in new.tensors.items()}  # training may change the dtype
    wanted = {name: t.shape if since else t for name, t in plan.targets.items()}
    if stored != wanted:
        differ = sorted(stored.keys() ^ wanted.keys()) or [n for n in stored if stored[n] != wanted[n]]
        report.add("provenance", False, f"growth.json describes different tensors: {differ[0]} and {len(differ) - 1} more")
        return None
    planned, actual = (_normalized_config(c) if since else c for c in (plan.growth.config, new.config))
    changed = sorted(k for k in {**planned, **actual} if planned.get(k) != actual.get(k))
    report.add("config.json", not changed, f"differs from the plan in {', '.join(changed)}" if changed else "as planned")
    report.add("provenance", True, f"{plan.growth.method} from {plan.source.refs}: {plan.guarantee.kind}{since and f'; then {since}'}")
    return plan


def training_since(new: Checkpoint) -> str:
    """Describes the training of the weights after the growth; empty if there was none."""
    return describe_training(training_totals(training_stages(new.growth)))


def _normalized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as the installed transformers reads it, with its defaults, since save_pretrained rewrites it."""
    from transformers import CONFIG_MAPPING

    try:
        read = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    except Exception:  # reported by `check_builds`
        read = dict(config)
    return {k: v for k, v in read.items() if k not in IGNORED_CONFIG_KEYS}


def check_builds(new: Checkpoint, report: Report) -> None:
    """Checks that the installed transformers builds the model from config.json, with exactly the stored tensors."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_grow.convert.in_memory import disk_tensors

    name = f"builds in transformers {transformers.__version__}"
    try:
        config = AutoConfig.from_pretrained(new.folder, trust_remote_code=False)
        with torch.device("meta"):
            expected = {n: tuple(t.shape) for n, t in disk_tensors(AutoModelForCausalLM.from_config(config)).items()}
    except Exception as error:
        report.add(name, False, one_line_error(error))
        return
    stored = {n: t.shape for n, t in new.tensors.items()}
    differ = sorted(n for n in expected.keys() | stored.keys() if expected.get(n) != stored.get(n))
    report.add(
        name,
        not differ,
        f"expects a different {differ[0]} ({len(differ)} differ)" if differ else f"{len(expected)} tensors, none missing, none unexpected",
    )


def check_same_source(old: Checkpoint, plan: GrowthPlan, report: Report) -> bool:
    """Whether `old` has the tensors of the plan's source."""
    same = (
        dict(old.info.by_key) == dict(plan.source.by_key)
        and Architecture(old.config).tensors.keys() == plan.source.architecture.tensors.keys()
    )
    detail = f"{old.info.refs} has the tensors of the plan's source" if same else f"{old.ref} is not the plan's source ({plan.source.ref})"
    if old.head == "own" and plan.source.architecture.tied:
        detail = f"{old.ref} stores a {HEAD} that differs from the embedding; this growth treated it as tied and dropped it: grow again"
    report.add("source", same, detail)
    return same


def recompute_tensors(old: Checkpoint, new: Checkpoint, plan: GrowthPlan, report: Report, progress: Callable[[int], None]) -> None:
    """Recomputes every tensor from the source, compares bit for bit, and checks the SHA-256 of each shard. Calls `progress` with bytes checked."""
    assert new.growth is not None
    work = _Recomputation(old, new, plan, progress)
    by_file: dict[str, list[tuple[str, TensorLocation]]] = {file: [] for file in new.files}
    for name, stored in sorted(new.tensors.items(), key=lambda item: item[1].start):
        by_file[stored.file].append((name, stored))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            hashes = dict(zip(by_file, pool.map(work.shard, by_file, by_file.values()), strict=True))
        except BaseException:
            work.halt.set()
            raise
    count, copies, since = len(plan.targets), len(plan.copies()), training_since(new)
    if since:
        kept = count - len(work.wrong)
        report.add("tensors", None, f"{since} since the growth; {kept} of {count} are unchanged")
    elif work.wrong:
        report.add("tensors", False, f"{len(work.wrong)} of {count} differ from the map: {', '.join(sorted(work.wrong)[:3])}")
    else:
        report.add("tensors", True, f"{count} recomputed from the source, bit-identical ({copies} copies, {count - copies} computed)")
    recorded = {f: facts.get("sha256") for f, facts in recorded_files(new.growth).items()}
    if since and not recorded:
        report.add("SHA-256", None, "unknown: growth.json does not list the files of the training")
        return
    broken = sorted(f for f in hashes.keys() | recorded.keys() if hashes.get(f) != recorded.get(f))
    report.add(
        "SHA-256",
        not broken,
        f"{broken[0]} is not the recorded file" if broken else f"{len(hashes)} weight file{'s' * (len(hashes) > 1)} as recorded",
    )


class _Recomputation:
    def __init__(self, old: Checkpoint, new: Checkpoint, plan: GrowthPlan, progress: Callable[[int], None]) -> None:
        self.old, self.new, self.plan, self.progress = old, new, plan, progress
        self.copies = plan.copies()
        self.wrong: set[str] = set()
        self.halt = threading.Event()
        self.lock = threading.Lock()
        self.evaluator: Evaluator | None = None

    def stop(self) -> None:
        if self.halt.is_set():
            raise GrowError("Interrupted.")

    def shard(self, file: str, tensors: list[tuple[str, TensorLocation]]) -> str:
        """Checks one shard's tensors in file order; returns its SHA-256."""
        sha = hashlib.sha256()
        with open_regular(self.new.path(file)) as handle:
            header = min((t.start for _, t in tensors), default=self.new.files[file]["size"])
            for piece in read_chunks(handle.fileno(), 0, header, self.stop):
                sha.update(piece)
            for name, stored in tensors:
                is_copy = name in self.copies and stored.info == self.plan.targets[name]
                if not (self._matches_copy if is_copy else self._matches_computed)(name, stored, handle.fileno(), sha):
                    self.wrong.add(name)
                self.progress(stored.stop - stored.start)
        return sha.hexdigest()

    def _matches_copy(self, name: str, stored: TensorLocation, handle: int, sha: Any) -> bool:
        path, origin = self.old.find(self.copies[name])
        equal = True
        with open_regular(path) as source:
            theirs = read_chunks(source.fileno(), origin.start, origin.stop, self.stop)
            for ours in read_chunks(handle, stored.start, stored.stop, self.stop):
                sha.update(ours)
                equal = equal and ours == next(theirs)
        return equal

    def _matches_computed(self, name: str, stored: TensorLocation, handle: int, sha: Any) -> bool:
        import torch

        from hf_grow.checkpoint.stored_tensors import StoredTensors
        from hf_grow.growth.evaluate import Evaluator
        from hf_grow.growth.tensors import raw_bytes

        with self.lock:
            if self.evaluator is None:
                self.evaluator = Evaluator(self.plan, StoredTensors(self.old))
            equal, at = True, stored.start
            for block in self.evaluator.blocks(self.plan.growth.tensors[name], self.plan.targets[name], MEMORY, allow_nonfinite=True):
                expected = raw_bytes(block.to(getattr(torch, DTYPE_NAMES[stored.dtype])))
                done = 0
                for piece in read_chunks(handle, at, at + len(expected), self.stop):
                    sha.update(piece)
                    equal = equal and piece == expected[done : done + len(piece)]
                    done += len(piece)
                at += len(expected)
        return equal
