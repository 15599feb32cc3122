"""The options of `hf-grow fisher` besides those of the estimation itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from hf_grow.options import Excludes, Options, Requires


class RunOptions(Options):
    """What the command reads and writes."""

    output: str
    """File to write (also -o), such as fisher.safetensors."""
    text: str | None = None
    """Text of the old domain: a folder, a file (txt, jsonl, json, parquet), a glob, or the id of a data set on the Hub."""
    from_growth: Path | None = None
    """Instead of text: the Fisher of the source, mapped through MODEL's growth.json so that it punishes as much as before."""
    merge: Path | None = None
    """Fisher of earlier tasks, for the same tensors; the file holds decay * merge + this one (online EWC)."""
    decay: Annotated[float, Field(ge=0, le=1), Requires("merge")] = 1.0
    """What --merge counts (gamma)."""
    utility: Path | None = None
    """Write the squared gradients of every expert of a mixture into this JSON file, for hf-grow experts --utility."""
    calibrate: Annotated[float, Field(gt=0)] | None = None
    """Find the lambda with which short trainings on --on raise the old loss by no more than this many nats a token."""
    on: str | None = None
    """New text for --calibrate; like --text."""
    calibrate_steps: Annotated[int, Field(ge=1), Requires("calibrate")] = 60
    """Steps of each training."""
    calibrate_lr: Annotated[Annotated[float, Field(gt=0)] | None, Requires("calibrate"), Excludes("recipe")] = None
    """Learning rate of each training, where no recipe is given. Default: 1e-4."""
    recipe: Annotated[str | None, Requires("calibrate")] = None
    """For --calibrate: the training recipe that lambda is for. Its learning rate, decay, schedule, batch, sequence length and penalty are taken."""
    device: Annotated[str | None, Excludes("from_growth")] = None
    """Where the model runs: cpu, cuda, cuda:1. Default: the first GPU, else the CPU."""
    overwrite: bool = False
    """Replace a file that is there."""
    dry_run: bool = False
    """Say what it would take, and stop."""
