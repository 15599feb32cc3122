"""`hf-grow fisher`: writes a file of per-parameter importance (Fisher) on old data.

It is estimated on text, mapped from the source's file through a growth, or taken from the optimizer of an earlier training; on request lambda is calibrated on new text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.source import open_source
from hf_grow.checkpoint.writer import check_disk_space
from hf_grow.common.extras import require_packages
from hf_grow.common.safe_files import to_json
from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan, check_source
from hf_grow.model.meta_model import meta_model
from hf_grow.training.calibrate import MAX_EVAL_ROWS, MIN_ROWS, TrialSettings, calibrate, plan_trials
from hf_grow.training.config.fisher_options import FisherFileOptions, FisherOptions
from hf_grow.training.data.source_model import load_tokenizer_of, load_with_tokenizer
from hf_grow.training.distributed.launch import Launch, current_launch
from hf_grow.training.distributed.processes import ALONE, Processes
from hf_grow.training.fisher_checks import check_fisher_options, compute_dtype, fisher_dry_run, fisher_file_bytes, fisher_flops
from hf_grow.training.growth_state.optimizer_sources import open_optimizer, optimizer_path
from hf_grow.training.growth_state.second_moments import importance_from_moments, recorded_tokens_per_step
from hf_grow.training.param_updates.param_provenance import check_plan_matches
from hf_grow.training.param_updates.parameter_map import parameter_map
from hf_grow.training.regularizers.build import make_penalty
from hf_grow.training.regularizers.fisher import (
    Part,
    estimate_fisher,
    expert_utility,
    held_on_disk,
    merge_online,
    sample_sequences,
)
from hf_grow.training.regularizers.importance_file import (
    check_same_model,
    checkpoint_fingerprint,
    model_fingerprint,
    open_importance,
    write_importance,
    write_importance_rows,
)
from hf_grow.training.regularizers.importance_growth import check_importance_of_source, grow_importance
from hf_grow.training.regularizers.penalty import QuadraticPenalty
from hf_grow.training.setup.train_setup import Notify
from hf_grow.training.setup.warnings import RECOVER, lossy_method
from hf_grow.training.sharding.local_rows import Places
from hf_grow.training.sharding.row_source import StoredRows
from hf_grow.training.sharding.sharded_model import empty_model, fill_model
from hf_grow.verification.models import expert_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(label, total tokens) -> a context whose value is called with tokens done."""


def write_fisher(
    source: str, revision: str | None, files: FisherFileOptions, options: FisherOptions, *, notify: Notify, progress_bar: ProgressBar
) -> dict[str, Any]:
    """Writes the file that ``files`` and ``options`` ask for, of the checkpoint ``source``; returns what was done, as JSON data.

    Raises InputError with every mistake before a model is loaded.
    """
    out = Path(files.output).expanduser()
    check_fisher_options(files, options, out, notify)
    trials = plan_trials(files, options, out, notify) if files.calibrate is not None else None
    if trials is not None and files.recipe is not None:
        if "seq_length" in options.model_fields_set:
            raise InputError("--seq-length: the recipe sets it (data.seq_length).", hint="Remove one of them.")
        options = options.model_copy(update={"seq_length": trials.seq_length})
    checkpoint = open_source(source, revision=revision, weights=not files.dry_run, notify=notify)
    check_source(checkpoint.info)
    if files.utility is not None and not checkpoint.info.architecture.is_moe:
        raise InputError(f"--utility: {checkpoint.ref} has no experts.")
    if files.from_growth is None and checkpoint.growth is not None:
        method = lossy_method(GrowthPlan.from_json(checkpoint.growth), checkpoint.growth)
        if method is not None:
            notify(
                f"{checkpoint.ref} was grown by {method}, which changes the function, and was not trained further: a penalty with this "
                f"Fisher would keep the weights near damaged ones. {RECOVER}"
            )
    check_disk_space(out, fisher_file_bytes(checkpoint, options))
    if files.dry_run:
        return fisher_dry_run(checkpoint, options, files.device, mapped=files.text is None)
    start = time.perf_counter()
    if files.from_growth is not None:
        facts = _map_fisher(checkpoint, files.from_growth, options, out)
    elif files.from_optimizer is not None:
        facts = _from_optimizer(checkpoint, files.from_optimizer, files, options, out)
    else:
        facts = _estimate(checkpoint, files, options, out, trials, notify, progress_bar)
    return {"output": str(out), **facts, "seconds": round(time.perf_counter() - start, 1)}


def _map_fisher(checkpoint: Checkpoint, source_file: Path, options: FisherOptions, out: Path) -> dict[str, Any]:
    if checkpoint.growth is None:
        raise InputError(f"{checkpoint.ref} has no growth.json.", hint="--from-growth needs a model grown by hf-grow.")
    plan = GrowthPlan.from_json(checkpoint.growth)
    check_plan_matches(plan, checkpoint)
    source = open_importance(source_file)
    check_importance_of_source(source, plan, checkpoint)
    metadata = {
        **{k: v for k, v in source.metadata.items() if k not in ("format", "made_by", "sample", "model", "revision")},
        "model": checkpoint.ref, "revision": checkpoint.revision, "sample": checkpoint_fingerprint(checkpoint),
        "mapped_from": source.metadata.get("model", ""), "mapped_by": plan.growth.method,
    }  # fmt: skip
    shapes = {n: t.shape for n, t in plan.targets.items()}
    write_importance(out, shapes, grow_importance(plan, source.read), metadata, storage=options.storage)
    return {"kind": metadata.get("kind", ""), "mapped_from": metadata["mapped_from"], "mapped_by": plan.growth.method}


def _from_optimizer(checkpoint: Checkpoint, folder: Path, files: FisherFileOptions, options: FisherOptions, out: Path) -> dict[str, Any]:
    path = optimizer_path(folder)
    if path is None:
        raise InputError(
            f"{folder} holds no optimizer state that can be read.",
            hint="Give a checkpoint folder of Trainer, with optimizer.pt, optimizer.bin or optimizer_0/ (DeepSpeed's are pickles, which are never loaded).",
        )
    tokens = files.tokens_per_step or recorded_tokens_per_step(folder)
    if tokens is None:
        raise InputError(f"{folder} does not record how many tokens a step has.", hint="Say it: --tokens-per-step N.")
    model = meta_model(checkpoint.info.config)
    state, places, shapes = open_optimizer(path, model), parameter_map(model), _shapes(checkpoint)
    parts: Iterator[Part] = importance_from_moments(state, places, shapes, tokens)
    metadata = {
        "kind": "exp_avg_sq", "optimizer": str(folder), "tokens_per_step": tokens, "steps": max(state.number(n) for n in state.state),
        "model": checkpoint.ref, "revision": checkpoint.revision,
    }  # fmt: skip
    if files.merge is not None:
        earlier = open_importance(files.merge)
        check_same_model(earlier, shapes, None)
        parts = merge_online(parts, earlier.rows, files.decay)
        metadata |= {"merged": earlier.metadata.get("model", ""), "decay": files.decay}
    write_importance_rows(out, shapes, parts, {**metadata, "sample": checkpoint_fingerprint(checkpoint)}, storage=options.storage)
    return {**metadata, "bytes": out.stat().st_size}


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of the model's tensors, by names on disk."""
    return {n: t.shape for n, t in checkpoint.info.tensors.items() if n in checkpoint.info.architecture.tensors}


@dataclass(frozen=True)
class _Loaded:
    """The model of an estimation, as this process holds it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    places: Places
    """`parameter_map`, from before it was sharded."""
    sharded: bool
    processes: Processes
    activation_checkpointing: bool = False
    """Whether the launcher's file asks for it."""


def _load(checkpoint: Checkpoint, options: FisherOptions, device: str | None) -> _Loaded:
    """The whole model, in every process; under FSDP2, shards that were filled from the rows that each process holds."""
    launch = current_launch()
    if launch == Launch():
        model, tokenizer = load_with_tokenizer(checkpoint, compute_dtype(options, device), device)
        return _Loaded(model, tokenizer, parameter_map(model), False, ALONE)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    if accelerator.num_processes != launch.processes:
        raise InputError(
            f"{launch.processes} processes were started, but this machine has no GPU: each would work on its own.", hint="Add --device cpu."
        )
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    dtype = compute_dtype(options, accelerator.device.type)
    if launch.sharing != "fsdp2":
        model, tokenizer = load_with_tokenizer(checkpoint, dtype, str(accelerator.device))
        return _Loaded(model, tokenizer, parameter_map(model), False, processes)
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # every process reads its own rows, which needs less memory still
    if plugin.mixed_precision_policy is None and dtype == "bfloat16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    tokenizer = load_tokenizer_of(checkpoint)
    model = empty_model(checkpoint.config, getattr(torch, dtype), checkpoint.folder, **expert_options(dtype, checkpoint.info.architecture))
    places = parameter_map(model)
    fsdp2_prepare_model(accelerator, model)  # in place
    assert all(hasattr(p, "placements") for p in model.parameters()), "accelerate did not shard the model"
    fill_model(model, places, StoredRows(checkpoint), "cpu" if plugin.cpu_offload else accelerator.device)
    return _Loaded(model, tokenizer, places, True, processes, plugin.activation_checkpointing)


def _estimate(
    checkpoint: Checkpoint,
    files: FisherFileOptions,
    options: FisherOptions,
    out: Path,
    trials: TrialSettings | None,
    notify: Notify,
    progress_bar: ProgressBar,
) -> dict[str, Any]:
    require_packages("datasets", *(["accelerate"] if current_launch() != Launch() else []))
    arch = checkpoint.info.architecture
    shapes = _shapes(checkpoint)
    earlier = None
    if files.merge is not None:
        earlier = open_importance(files.merge)
        check_same_model(earlier, shapes, None)
    loaded = _load(checkpoint, options, files.device)
    model, processes = loaded.model, loaded.processes
    if loaded.activation_checkpointing:
        options = options.model_copy(update={"activation_checkpointing": True})
    length = min(options.seq_length, model.config.max_position_embeddings)
    assert files.text is not None
    sample = partial(
        sample_sequences, model=model, tokenizer=loaded.tokenizer, length=length, seed=options.seed,
        intra_document_masking=options.intra_document_masking,
    )  # fmt: skip
    rows_needed = -(-options.tokens // length)
    rows, positions = sample([files.text], count=rows_needed + (MAX_EVAL_ROWS if trials is not None else 0))
    heldout = new = None
    if trials is not None and files.on is not None:
        new, _ = sample([files.on], count=files.calibrate_steps * trials.batch + MAX_EVAL_ROWS)
        for label, sequences in ((files.text, rows), (files.on, new)):
            if len(sequences) < MIN_ROWS:
                raise InputError(
                    f"{label} has {len(sequences)} sequences of {length} tokens; --calibrate needs {MIN_ROWS}.",
                    hint="Use a smaller --seq-length.",
                )
        split = len(rows) - min(MAX_EVAL_ROWS, len(rows) // 2)
        rows, heldout = rows[:split], rows[split:]
    if len(rows) < rows_needed:
        notify(f"{files.text} has {rows.numel():,} tokens, fewer than the {options.tokens:,} of --tokens.")
    shared = 1 if loaded.sharded else processes.count
    with progress_bar("Fisher", rows.numel() // shared) as progress:
        fisher, tokens = estimate_fisher(model, rows, options, positions=positions, processes=processes, progress=progress)
    metadata = {
        "kind": options.kind, "exact": options.exact or options.kind == "empirical", "tokens": tokens, "seq_length": length,
        "batch": options.batch, "seed": options.seed, "dtype": str(model.dtype).removeprefix("torch."),
        "model": checkpoint.ref, "revision": checkpoint.revision,
        **({"intra_document_masking": True} if options.intra_document_masking else {}),
    }  # fmt: skip
    spent = fisher_flops(checkpoint, model, options, len(rows), length)
    if earlier is not None:
        metadata |= {"merged": earlier.metadata.get("model", ""), "decay": files.decay}

    def parts() -> Iterator[Part]:
        """What this process has to write and to count: its shards; the first process all of a model that each holds."""
        return iter(()) if processes.index and not loaded.sharded else held_on_disk(model, fisher, loaded.places)

    written = parts() if earlier is None else merge_online(parts(), earlier.rows, files.decay)
    fingerprint = model_fingerprint(model)
    write_importance_rows(out, shapes, written, {**metadata, "sample": fingerprint}, storage=options.storage, processes=processes)
    facts: dict[str, Any] = dict(metadata)
    facts["flops"] = spent
    facts["mean"] = sum(processes.gather(sum(float(t.sum().double()) for _, _, t in parts()))) / sum(map(math.prod, shapes.values()))
    facts["bytes"] = out.stat().st_size
    if files.utility is not None:
        tables = processes.gather(expert_utility(arch.layers, arch.size("experts"), parts(), arch.tensors))
        if processes.index == 0:
            table = np.sum(tables, axis=0).tolist()
            files.utility.write_text(to_json({"utility": table}, indent=None), encoding="utf-8")
        facts["utility"] = str(files.utility)
    if trials is not None and new is not None and heldout is not None and files.calibrate is not None:
        del fisher, written
        notify(f"Wrote the Fisher to {out}; calibrating lambda.")
        plan = None if checkpoint.growth is None else GrowthPlan.from_json(checkpoint.growth)
        penalty = make_penalty(trials.penalty, model.float(), plan)
        assert isinstance(penalty, QuadraticPenalty)
        split = len(new) - min(MAX_EVAL_ROWS, len(new) // 2)
        with progress_bar("calibrating", 6 * files.calibrate_steps * trials.batch * length) as progress:
            calibration = calibrate(
                model, penalty, old=heldout, train=new[:split], new=new[split:], tolerated=files.calibrate,
                arguments=trials.arguments, progress=progress,
            )  # fmt: skip
        facts["calibration"] = {**calibration.to_json(), **trials.to_json(), "tolerated": files.calibrate}
    return facts
