"""A run that starts from random weights: the model of a config, written as the checkpoint that the first stage starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.safetensors_header import TensorLocation
from hf_grow.checkpoint.source import open_source
from hf_grow.common.safe_files import read_json
from hf_grow.convert.in_memory import describe_model
from hf_grow.errors import InputError
from hf_grow.model.loading import transformers_errors
from hf_grow.model.meta_model import meta_model
from hf_grow.options import load_yaml
from hf_grow.training.config.stage_options import FreshModel
from hf_grow.training.setup.option_checks import load_tokenizer


def read_config(options: FreshModel) -> dict[str, Any]:
    """The config of the model. Raises InputError where there is none, or none of a model."""
    path = Path(options.config)
    if path.is_dir() or not path.exists():
        config = dict(open_source(options.config, weights=False).config)
    else:
        config = dict(load_yaml(path) if path.suffix in (".yaml", ".yml") else read_json(path))
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{options.config} names no model_type.", hint="Write model_type: llama, and the keys of its config.json.")
    return config


def describe_fresh(options: FreshModel) -> Checkpoint:
    """The checkpoint that `write_fresh` makes, without its weights, to plan growths. Raises InputError."""
    config = read_config(options)
    tokenizer = load_tokenizer(options.tokenizer, None)
    if len(tokenizer) > int(config.get("vocab_size", 0)):
        raise InputError(f"{options.tokenizer} has {len(tokenizer)} tokens, but vocab_size is {config.get('vocab_size')}.")
    info = describe_model(meta_model(config))
    tensors = {n: TensorLocation("", t.dtype, t.shape, 0, 0) for n, t in info.tensors.items()}
    return Checkpoint(options.config, "", info.config, tensors, {})


def write_fresh(options: FreshModel, folder: Path, seed: int) -> None:
    """Writes a model of random weights, as transformers initializes them with this seed, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    config = read_config(options)
    tokenizer = load_tokenizer(options.tokenizer, None)
    with transformers_errors(f"a model of {options.config}"):
        made = AutoConfig.for_model(**_without_dtype(config))
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(made)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype", "architectures", "transformers_version")}
