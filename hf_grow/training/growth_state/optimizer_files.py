"""Names of the files of a training state in a checkpoint folder, and the error where there is none that can be read."""

from __future__ import annotations

from pathlib import Path

from hf_grow.errors import SourceError

POSITIONS, NAMES, SHARDS = "optimizer.pt", "optimizer.bin", "optimizer.json"
SCHEDULER, SCALER, TRAINER_STATE = "scheduler.pt", "scaler.pt", "trainer_state.json"


def optimizer_file(folder: Path) -> Path | None:
    """Path of the optimizer state; None if there is none that can be read."""
    return next((folder / name for name in (POSITIONS, SHARDS, NAMES) if (folder / name).is_file()), None)


def missing_optimizer_error(folder: Path) -> SourceError:
    """The error for a folder without a readable optimizer state."""
    reset = "the schedule and the data position continue, the moments start from zero"
    steps = next(folder.glob("global_step*"), None)
    if steps is not None:
        return SourceError(
            f"{folder} holds DeepSpeed's optimizer state: pickles, which are never loaded.",
            hint=f"Convert it: python -m deepspeed.checkpoint.ds_to_universal --input_folder {steps} --output_folder {steps}_universal "
            f"(DeepSpeed loads the pickles), or grow with --optimizer-policy reset: {reset}. If {folder} holds no weights either, convert them first, "
            f"copy its config.json and tokenizer into the same folder, and grow that folder: "
            f"python {folder}/zero_to_fp32.py {folder} WEIGHTS --safe_serialization",
        )
    if any(folder.glob("optimizer_*")) or any(folder.glob("pytorch_model_fsdp*")):
        return SourceError(
            f"{folder} holds a sharded FSDP optimizer state without .metadata: one file a process, in the order of that process.",
            hint=f"Save with torch.distributed.checkpoint (use_dcp), or grow with --optimizer-policy reset: {reset}.",
        )
    return SourceError(
        f"{folder} has no {POSITIONS}, no {NAMES} and no {SHARDS}.",
        hint="Give a folder that Trainer or hf-grow train saved, such as checkpoint-500.",
    )
