"""Checks of `hf-grow fisher` before anything is loaded, and its dry run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import OutputError
from hf_grow.model.flops import Training, count_flops
from hf_grow.model.meta_model import meta_model
from hf_grow.model.param_count import count_parameters
from hf_grow.options import raise_errors, unmet_requirements
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.config.fisher_options import FisherFileOptions, FisherOptions
from hf_grow.training.config.train_config import collect_mistakes
from hf_grow.training.data.sources import find_text
from hf_grow.training.distributed.launch import Launch, current_launch
from hf_grow.training.dry_run.memory import gathered_bytes
from hf_grow.training.regularizers.importance_file import open_importance
from hf_grow.training.setup.train_setup import Notify

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_fisher_options(files: FisherFileOptions, options: FisherOptions, out: Path, notify: Notify) -> None:
    """Raises InputError with all options that exclude each other, missing inputs and existing outputs."""
    mistakes = []
    if (files.text is not None) + (files.from_growth is not None) + (files.from_optimizer is not None) != 1:
        mistakes.append(
            "give either --text (old data), --from-growth (the source's Fisher), or --from-optimizer (a checkpoint of Trainer)."
        )
    if files.text is None:
        needs_text = ("utility", "calibrate", *(["merge"] if files.from_optimizer is None else []))
        mistakes += [f"--{n} needs --text." for n in needs_text if getattr(files, n) is not None]
    if (files.calibrate is None) != (files.on is None):
        mistakes.append("--calibrate NATS and --on NEW_DATA require each other.")
    if files.calibrate is not None and files.device not in (None, "cpu", "cuda", "cuda:0"):
        mistakes.append(
            f"--calibrate trains on the first GPU, as hf-grow train does, not on {files.device}. Choose the GPU with CUDA_VISIBLE_DEVICES."
        )
    if files.calibrate is not None and options.intra_document_masking:
        mistakes.append("--intra-document-masking: cannot be combined with --calibrate, whose trainings do not mask. Remove one of them.")
    mistakes += unmet_requirements(files, options)
    mistakes += fisher_launch_mistakes(current_launch(), files)
    for key, path in (("output", out), ("utility", files.utility)):
        if path is not None:
            collect_mistakes(mistakes, f"--{key}", partial(check_writable, path, files))
    for key, text in (("text", files.text), ("on", files.on)):
        if text is not None:
            collect_mistakes(mistakes, f"--{key}", partial(find_text, TextOptions(path=[text]), notify=notify))
    for key, file in (("merge", files.merge), ("from-growth", files.from_growth)):
        if file is not None:
            collect_mistakes(mistakes, f"--{key}", partial(open_importance, file))
    raise_errors("The command line", mistakes)


def fisher_launch_mistakes(launch: Launch, files: FisherFileOptions) -> list[str]:
    """One line per option that does not work with these processes."""
    mistakes = []
    if launch.deepspeed or launch.sharing == "fsdp1":
        mistakes.append(f"launch: {launch} gives no access to single gradients. Use FSDP2 (fsdp_version: 2) or DDP.")
    if launch.processes > 1:
        if files.from_growth is not None:
            mistakes.append("--from-growth: maps a file and runs no model; start it without a launcher.")
        if files.from_optimizer is not None:
            mistakes.append("--from-optimizer: maps files and runs no model; start it without a launcher.")
        if files.calibrate is not None:
            mistakes.append(
                "--calibrate: trains in one process. Write the Fisher first, and calibrate on one GPU, or choose lambda by trainings."
            )
    if launch.parallelism:
        mistakes.append(
            "launch: with a parallelism_config processes share sequences, which the Fisher needs whole. Use recipes/accelerate/fsdp2.yaml."
        )
    if launch != Launch() and files.device not in (None, "cpu"):
        mistakes.append("--device: the launcher gives every process its device.")
    if launch.sharing == "fsdp2" and files.device == "cpu":
        mistakes.append("--device cpu: accelerate shards on accelerators only. Use DDP (accelerate launch --multi_cpu), or one process.")
    return mistakes


def check_writable(path: Path, files: FisherFileOptions) -> None:
    """Raises OutputError if ``path`` is a folder, exists and must not be replaced, or has no parent folder."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", hint="Give a file name.")
    if path.exists() and not files.overwrite and not files.dry_run:
        raise OutputError(f"{path} exists.", hint="Give another name, or --overwrite.")
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist.")


def fisher_file_bytes(checkpoint: Checkpoint, options: FisherOptions) -> int:
    return count_parameters(checkpoint.info.architecture).total * (4 if options.storage == "fp32" else 2)


def fisher_dry_run(checkpoint: Checkpoint, options: FisherOptions, device: str | None, *, mapped: bool) -> dict[str, Any]:
    parameters = count_parameters(checkpoint.info.architecture).total
    facts = {"dry_run": True, "parameters": parameters, "file_bytes": fisher_file_bytes(checkpoint, options)}
    if mapped:
        return {**facts, "note": "mapped tensor by tensor; no model is loaded"}
    length = min(options.seq_length, checkpoint.config.get("max_position_embeddings") or options.seq_length)
    model = meta_model(checkpoint.info.config)
    memory = fisher_memory(checkpoint, model, getattr(torch, compute_dtype(options, device)).itemsize)
    return {
        **facts, "tokens": options.tokens, "memory_bytes": {**memory, "total": sum(memory.values())},
        "flops": fisher_flops(checkpoint, model, options, -(-options.tokens // length), length),
        "note": "activations of one batch are not included",
    }  # fmt: skip


def compute_dtype(options: FisherOptions, device: str | None) -> str:
    """The name of the dtype that the model computes in; ``device``: None for the first GPU, where there is one."""
    if options.dtype != "auto":
        return options.dtype
    return "bfloat16" if (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda") else "float32"


def fisher_flops(checkpoint: Checkpoint, model: PreTrainedModel, options: FisherOptions, rows: int, length: int) -> int:
    """FLOPs of an estimation, with what the backward pass computes again. ``model``: may be without weights."""
    arch, attention = checkpoint.info.architecture, model.config._attn_implementation
    flops = count_flops(arch, Training(attention=attention, checkpointed=range(arch.layers if options.activation_checkpointing else 0)))
    return (flops.train + flops.recompute).rows(rows, length, attention)


def fisher_memory(checkpoint: Checkpoint, model: PreTrainedModel, width: int) -> dict[str, int]:
    """Bytes of one process without activations: weights, squares, and the gradients that exist at a time; under FSDP2 also what is gathered.

    Squares: in fp32, of a model in fp64 in fp64. Gradients: of the two largest parameters, because a tied embedding's is complete at the end only.
    """
    launch, sizes = current_launch(), sorted(p.numel() for p in model.parameters())
    shards = launch.shards("weights")
    memory = {"weights": sum(sizes) * width // shards, "gradients": 0, "squares": sum(sizes) * max(4, width) // shards}
    if launch.sharing == "fsdp2":
        return {**memory, "gathered": gathered_bytes(checkpoint.info.architecture, launch, width)}
    return {**memory, "gradients": sum(sizes[-2:]) * width}
