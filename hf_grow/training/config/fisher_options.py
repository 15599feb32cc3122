"""Options of `hf-grow fisher`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hf_grow.options import Count, Excludes, Options, Requires


class FisherOptions(Options):
    """How the Fisher is estimated."""

    kind: Annotated[Literal["true", "empirical"], Excludes("from_growth"), Excludes("from_optimizer")] = "true"
    """Labels: sampled from the model (true), or those of the text (empirical; one sequence at a time, as with --exact)."""
    exact: Annotated[bool, Excludes("from_growth"), Excludes("from_optimizer")] = False
    """Square the gradient of every single sequence, not of a batch: less noise for the same tokens, more time."""
    tokens: Annotated[Count, Field(ge=1), Excludes("from_growth"), Excludes("from_optimizer")] = 131_072
    """Tokens of text to use. 64 batches of 2048 are plenty; 16 are enough; 4 are noisy."""
    batch: Annotated[int, Field(ge=1), Excludes("from_growth"), Excludes("from_optimizer")] = 4
    """Sequences per batch, of all processes together."""
    seq_length: Annotated[int, Field(ge=2), Excludes("from_growth"), Excludes("from_optimizer")] = 512
    """Tokens per sequence; at most max_position_embeddings of the model."""
    intra_document_masking: Annotated[bool, Excludes("from_growth"), Excludes("from_optimizer")] = False
    """Attention within documents only, for a training with data.intra_document_masking."""
    activation_checkpointing: Annotated[bool, Excludes("from_growth"), Excludes("from_optimizer")] = False
    """Keep only the inputs of the blocks, and compute each block again for its gradients: less memory, a third more time."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float64"], Excludes("from_growth"), Excludes("from_optimizer")] = "auto"
    """Dtype to compute in. Default: bfloat16 on a GPU, float32 on a CPU. Not float16: gradients underflow and their squares overflow."""
    storage: Literal["fp32", "bf16"] = "fp32"
    """Dtype in the file."""
    seed: Annotated[int, Field(ge=0, lt=2**63), Excludes("from_growth"), Excludes("from_optimizer")] = 0
    """Seed of the sampled labels and of the choice of text."""


class FisherFileOptions(Options):
    """What `hf-grow fisher` reads and writes."""

    output: str
    """File to write (also -o), such as fisher.safetensors."""
    text: str | None = None
    """Text of the old domain: a folder, a file (txt, jsonl, json, parquet), a glob, or the id of a data set on the Hub."""
    from_growth: Path | None = None
    """Instead of text: the Fisher of the source, mapped through MODEL's growth.json so that the penalty of any move stays the same."""
    from_optimizer: Annotated[Path | None, Excludes("from_growth")] = None
    """Instead of text: AdamW's exp_avg_sq in this checkpoint folder of an earlier training of MODEL, an empirical Fisher that costs nothing."""
    tokens_per_step: Annotated[Annotated[float, Field(gt=0)] | None, Requires("from_optimizer")] = None
    """Tokens per optimizer step of that training. Default: what the checkpoint records."""
    merge: Path | None = None
    """Fisher of earlier tasks, for the same tensors; the file holds decay * merge + this one (online EWC)."""
    decay: Annotated[float, Field(ge=0, le=1), Requires("merge")] = 1.0
    """Weight of --merge (gamma)."""
    utility: Path | None = None
    """Also write the sum of squared gradients of every expert of a mixture to this JSON file, for hf-grow experts --utility."""
    calibrate: Annotated[float, Field(gt=0)] | None = None
    """Find the lambda with which short trainings on --on raise the old loss by at most this many nats per token."""
    on: str | None = None
    """New text for --calibrate; like --text."""
    calibrate_steps: Annotated[int, Field(ge=1), Requires("calibrate")] = 60
    """Steps of each training."""
    calibrate_lr: Annotated[Annotated[float, Field(gt=0)] | None, Requires("calibrate"), Excludes("recipe")] = None
    """Learning rate of each training without --recipe. Default: 1e-4."""
    recipe: Annotated[str | None, Requires("calibrate")] = None
    """For --calibrate: the training recipe that lambda is for. Its learning rate, decay, schedule, batch, sequence length and penalty are used."""
    device: Annotated[str | None, Excludes("from_growth"), Excludes("from_optimizer")] = None
    """Where the model runs: cpu, cuda, cuda:1. Default: the first GPU, else the CPU."""
    overwrite: bool = False
    """Replace an existing file."""
    dry_run: bool = False
    """Print the size, memory and compute that are needed, and stop."""
