"""Everything about a grown checkpoint that can be proved without running it.

`check_tables`: config, headers and provenance agree. `rederive`: every tensor is computed again from the source, by the map in growth.json,
and compared bit for bit with what is stored; the same pass over the bytes gives the SHA-256 of each shard. Memory stays small at any size.

Weights that were trained since are not those of the map, and need not be: what is checked is that growth.json says so, that names, shapes and
config are the growth's, and that the files are those that the training recorded. How many tensors are still the growth's is counted.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.provenance import recorded_files, told, total, trainings
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.safetensors_header import Stored
from hf_grow.checkpoint.transfer import pieces
from hf_grow.common.safe_files import open_regular
from hf_grow.errors import GrowError, SourceError
from hf_grow.growth.plan import DTYPE_NAMES, HEAD, GrowthPlan, check_source
from hf_grow.model.architecture import Architecture
from hf_grow.model.loading import one_line_error
from hf_grow.verification.report import Report

if TYPE_CHECKING:
    from hf_grow.growth.evaluate import Evaluator

MEMORY = 256 << 20
FREE = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
        "output_router_logits", "router_aux_loss_coef"}  # fmt: skip
"""Keys of config.json that no logit depends on, and that a trainer may write anew."""


def check_tables(new: Checkpoint, report: Report) -> GrowthPlan | None:
    """Names, shapes, dtypes, config and provenance. Returns the plan of growth.json, where there is one to trust."""
    try:
        arch = new.info.architecture
        check_source(new.info)
        report.add(
            "names and shapes", True, f"{len(new.tensors)} tensors, as {arch.family.architecture} with {arch.layers} layers has them"
        )
    except SourceError as error:
        report.add("names and shapes", False, error.message)
    if new.growth is None:
        report.add("provenance", None, "no growth.json: how the weights were made cannot be checked")
        return None
    try:
        plan = GrowthPlan.from_json(new.growth)
    except SourceError as error:
        report.add("provenance", False, error.message)
        return None
    since = trained_since(new)
    stored = {name: t.info.shape if since else t.info for name, t in new.tensors.items()}  # training may have its own dtype
    wanted = {name: t.shape if since else t for name, t in plan.targets.items()}
    if stored != wanted:
        differ = sorted(stored.keys() ^ wanted.keys()) or [n for n in stored if stored[n] != wanted[n]]
        report.add("provenance", False, f"growth.json describes other tensors: {differ[0]} and {len(differ) - 1} more")
        return None
    planned, found = (_as_read(c) if since else c for c in (plan.growth.config, new.config))
    changed = sorted(k for k in {**planned, **found} if planned.get(k) != found.get(k))
    report.add("config.json", not changed, f"differs from the plan in {', '.join(changed)}" if changed else "as planned")
    report.add("provenance", True, f"{plan.growth.method} from {plan.source.refs}: {plan.guarantee.kind}{since and f'; then {since}'}")
    return plan


def trained_since(new: Checkpoint) -> str:
    """What was done to the weights since the growth, in words; empty for those that growth wrote."""
    return told(total(trainings(new.growth)))


def _as_read(config: Mapping[str, Any]) -> dict[str, Any]:
    """As the installed transformers understands it, with its defaults: save_pretrained writes it anew, not as it stood."""
    from transformers import CONFIG_MAPPING

    try:
        read = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    except Exception:  # whatever it raises; `check_builds` says so
        read = dict(config)
    return {k: v for k, v in read.items() if k not in FREE}


def check_builds(new: Checkpoint, report: Report) -> None:
    """The installed transformers builds the model from config.json and wants exactly the tensors that are there."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_grow.convert.in_memory import disk_tensors

    name = f"builds in transformers {transformers.__version__}"
    try:
        config = AutoConfig.from_pretrained(new.folder, trust_remote_code=False)
        with torch.device("meta"):
            wanted = {n: tuple(t.shape) for n, t in disk_tensors(AutoModelForCausalLM.from_config(config)).items()}
    except Exception as error:  # whatever it raises: it does not build
        report.add(name, False, one_line_error(error))
        return
    stored = {n: t.shape for n, t in new.tensors.items()}
    differ = sorted(n for n in wanted.keys() | stored.keys() if wanted.get(n) != stored.get(n))
    report.add(
        name,
        not differ,
        f"wants another {differ[0]} ({len(differ)} differ)" if differ else f"{len(wanted)} tensors, none missing, none unexpected",
    )


def check_same_source(old: Checkpoint, plan: GrowthPlan, report: Report) -> bool:
    """Whether `old` is the checkpoint that the plan was made for."""
    same = (
        dict(old.info.by_key) == dict(plan.source.by_key)
        and Architecture(old.config).tensors.keys() == plan.source.architecture.tensors.keys()
    )
    detail = (
        f"{old.info.refs} has the tensors the plan was made for" if same else f"{old.ref} is not the checkpoint that {plan.source.ref} was"
    )
    if old.head == "own" and plan.source.architecture.tied:
        detail = f"{old.ref} stores a {HEAD} that differs from the embedding; this growth took it for tied and lost it: grow again"
    report.add("source", same, detail)
    return same


def rederive(old: Checkpoint, new: Checkpoint, plan: GrowthPlan, report: Report, progress: Callable[[int], None]) -> None:
    """Computes every tensor again from the source and compares bit for bit; checks the SHA-256 of each shard."""
    assert new.growth is not None
    work = _Rederivation(old, new, plan, progress)
    by_file: dict[str, list[tuple[str, Stored]]] = {file: [] for file in new.files}
    for name, stored in sorted(new.tensors.items(), key=lambda item: item[1].start):
        by_file[stored.file].append((name, stored))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            hashes = dict(zip(by_file, pool.map(work.shard, by_file, by_file.values()), strict=True))
        except BaseException:
            work.halt.set()
            raise
    count, copies, since = len(plan.targets), len(plan.copies()), trained_since(new)
    if since:
        kept = count - len(work.wrong)
        report.add("tensors", None, f"{since} since, so they need not be the growth's; {kept} of {count} still are, bit for bit")
    elif work.wrong:
        report.add("tensors", False, f"{len(work.wrong)} of {count} differ from the source's map: {', '.join(sorted(work.wrong)[:3])}")
    else:
        report.add(
            "tensors", True, f"{count} derived again from the source, bit for bit equal ({copies} copies, {count - copies} computed)"
        )
    recorded = {f: facts.get("sha256") for f, facts in recorded_files(new.growth).items()}
    if since and not recorded:
        report.add("SHA-256", None, "not known: growth.json does not say what the training wrote")
        return
    broken = sorted(f for f in hashes.keys() | recorded.keys() if hashes.get(f) != recorded.get(f))
    report.add(
        "SHA-256",
        not broken,
        f"{broken[0]} is not the file that was written" if broken else f"{len(hashes)} weight file{'s' * (len(hashes) > 1)} as recorded",
    )


class _Rederivation:
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

    def shard(self, file: str, tensors: list[tuple[str, Stored]]) -> str:
        sha = hashlib.sha256()
        with open_regular(self.new.path(file)) as handle:
            header = min((t.start for _, t in tensors), default=self.new.files[file]["size"])
            for piece in pieces(handle.fileno(), 0, header, self.stop):
                sha.update(piece)
            for name, stored in tensors:
                same = self._copied if name in self.copies and stored.info == self.plan.targets[name] else self._computed
                if not same(name, stored, handle.fileno(), sha):
                    self.wrong.add(name)
                self.progress(stored.stop - stored.start)
        return sha.hexdigest()

    def _copied(self, name: str, stored: Stored, handle: int, sha: Any) -> bool:
        path, origin = self.old.find(self.copies[name])
        equal = True
        with open_regular(path) as source:
            theirs = pieces(source.fileno(), origin.start, origin.stop, self.stop)
            for ours in pieces(handle, stored.start, stored.stop, self.stop):
                sha.update(ours)
                equal = equal and ours == next(theirs)
        return equal

    def _computed(self, name: str, stored: Stored, handle: int, sha: Any) -> bool:
        import torch

        from hf_grow.checkpoint.stored_tensors import StoredTensors
        from hf_grow.growth.evaluate import Evaluator
        from hf_grow.growth.tensors import raw_bytes

        with self.lock:
            if self.evaluator is None:
                self.evaluator = Evaluator(self.plan, StoredTensors(self.old))
            equal, at = True, stored.start
            for block in self.evaluator.blocks(self.plan.growth.tensors[name], self.plan.targets[name], MEMORY, allow_nonfinite=True):
                meant = raw_bytes(block.to(getattr(torch, DTYPE_NAMES[stored.dtype])))
                done = 0
                for piece in pieces(handle, at, at + len(meant), self.stop):
                    sha.update(piece)
                    equal = equal and piece == meant[done : done + len(piece)]
                    done += len(piece)
                at += len(meant)
        return equal
