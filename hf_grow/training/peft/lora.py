"""LoRA on a grown model: what is wholly new trains in full, the rest by low-rank updates (Hu et al. 2021, arXiv 2106.09685); saved as a plain model.

peft saves adapters only, so the new blocks' own weights go into a file of ours beside them; a run resumes from both. Adapters that peft trained
with `layer_replication` become real checkpoints: the growth by that list of layers, written by hf-grow, then merged layer by layer.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.provenance import add_training_stage, format_growth_json
from hf_grow.checkpoint.reader import GROWTH, hash_weight_files
from hf_grow.checkpoint.source import companions, open_source
from hf_grow.checkpoint.writer import check_disk_space
from hf_grow.common.extras import require_packages
from hf_grow.common.safe_files import read_json
from hf_grow.convert.execute import translate_os_errors
from hf_grow.convert.metadata import versions
from hf_grow.errors import InputError, SourceError
from hf_grow.growth.growth import Growth
from hf_grow.growth.plan import GrowthPlan, check_source, make_plan
from hf_grow.methods import METHODS
from hf_grow.model.config_compat import portable_config
from hf_grow.model.loading import output_flags, reset_output_flags, transformers_errors
from hf_grow.options import parse
from hf_grow.training.config.lora_options import LoraOptions
from hf_grow.training.param_updates.masks import Mask
from hf_grow.training.peft.adapter_files import Adapter, read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULLY_TRAINED_FILE = "trained_in_full.safetensors"


def add_lora(model: PreTrainedModel, options: LoraOptions, new: Mapping[str, Mask]) -> Any:
    """The peft model. Raises InputError if no module gets an update."""
    require_packages("peft")
    from peft import LoraConfig, get_peft_model
    from torch.nn import Linear

    full = {n for n, mask in new.items() if mask is True} if options.new_in_full else set()
    wanted = options.target_modules
    old = [
        n
        for n, module in model.named_modules()
        if isinstance(module, Linear)
        and ".layers." in f".{n}"
        and f"{n}.weight" not in full
        and (wanted is None or n.rpartition(".")[2] in wanted)
    ]
    if not old:
        named = "" if wanted is None else f" named {', '.join(wanted)}"
        raise InputError(f"No linear layer{named} of this model is old, so LoRA has nothing to do.", hint="Leave `lora` out.")
    config = LoraConfig(
        r=options.r, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules="|".join(map(re.escape, old)),
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    with silence_warnings():
        wrapped = get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if name.removeprefix("base_model.model.") in full:
            p.requires_grad_(True)
    return wrapped


@contextmanager
def silence_warnings() -> Iterator[None]:
    """peft calls what transformers wants called by another name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def fully_trained_parameters(model: Any) -> dict[str, Any]:
    """The parameters that train and are none of peft's, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}


def save_fully_trained(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {n: p.detach().cpu().contiguous() for n, p in fully_trained_parameters(model).items()}
    if tensors:
        save_file(tensors, folder / FULLY_TRAINED_FILE)


def load_fully_trained(model: Any, folder: Path) -> None:
    """Raises SourceError where the file is not of this model."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    own = fully_trained_parameters(model)
    if not own:
        return
    try:
        held = load_file(folder / FULLY_TRAINED_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise SourceError(f"{folder / FULLY_TRAINED_FILE} cannot be read: {error}.") from None
    if held.keys() != own.keys():
        raise SourceError(f"{folder / FULLY_TRAINED_FILE} holds other parameters than those that train in full here.")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(held[name])


# ---- merging ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeResult:
    """What was merged: into which base, and by which growth, if layers were replicated."""

    base: str
    layers: int
    plan: GrowthPlan | None


def merge_adapter(
    adapter: Path, out: Path, *, base: str | None = None, revision: str | None = None, overwrite: bool = False,
    dtype: str = "auto", notify: Callable[[str], None] = lambda message: None,
) -> MergeResult:  # fmt: skip
    """Writes the plain checkpoint that computes what peft's model of `base` and the adapter computes.

    `base` is the checkpoint the adapter was made for; by default the one that its config names. With `layer_replication` the layers are
    real afterwards: the plan of that growth goes into growth.json. Raises InputError (SourceError, OutputError).
    """
    require_packages("peft")
    found = read_adapter(adapter)
    PartialFolder.check(out, resume=False, overwrite=overwrite, resumable=False)
    ref = base or found.config.base_model_name_or_path
    if not ref:
        raise InputError(f"{adapter} does not say which model it belongs to.", hint="Name it with --base.")
    layers = found.layers
    source = open_source(ref, revision=revision, weights=True, notify=notify)
    check_source(source.info)
    if layers and max(layers) >= source.info.architecture.layers:
        raise SourceError(f"layer_replication names layer {max(layers)}; {ref} has {source.info.architecture.layers} layers.")
    plan = None
    if layers is not None:
        options = parse(METHODS["layers"].options, {"layers": list(layers)}, where=str(adapter), strict=False)
        growth: Growth = METHODS["layers"].build(source.info.architecture, options)
        plan = make_plan(source.info, growth)
    check_disk_space(out, plan.nbytes if plan else sum(t.info.nbytes for t in source.tensors.values()))
    assert source.folder is not None
    merged = _merged_model(source.folder, plan, found, dtype)
    with (
        PartialFolder(out, f"merge {adapter}", resume=False, overwrite=overwrite, resumable=False) as folder,
        translate_os_errors(folder),
    ):
        merged.save_pretrained(folder.path)
        folder.write_json("config.json", portable_config(read_json(folder.path / "config.json") | output_flags(source.config)))
        for relative in companions(source.folder):
            folder.copy_companion(source.folder, relative)
        facts = {"adapter": found.told(), "merged_into": ref}
        record = plan.to_json() if plan else source.growth
        if record:
            folder.write_file(
                GROWTH,
                format_growth_json(
                    add_training_stage(record, {**facts, "files": hash_weight_files(folder.path), "made_by": versions()})
                ).encode(),
            )
        folder.finish({p.name for p in folder.path.iterdir() if not p.name.startswith(".")})
    return MergeResult(ref, merged.config.num_hidden_layers, plan)


def _merged_model(base: Path, plan: GrowthPlan | None, adapter: Adapter, dtype: str) -> PreTrainedModel:
    from peft import LoraConfig, PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from hf_grow.convert.in_memory import grow_model

    with transformers_errors(f"the model of {base}"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False)
    if plan is not None:
        model = grow_model(model, plan)
    reset_output_flags(model.config)
    config = LoraConfig(**adapter.for_peft())
    try:
        with silence_warnings():
            wrapped = PeftModel.from_pretrained(model, adapter.folder, config=config)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise SourceError(f"The adapter {adapter.folder} does not fit {base}: {' '.join(str(error).split())[:200]}") from None
    load_fully_trained_if_present(wrapped, adapter.folder)
    merged: PreTrainedModel = wrapped.merge_and_unload()
    return merged


def load_fully_trained_if_present(model: Any, adapter: Path) -> None:
    """Weights that were trained in full beside the adapter, where a training of ours left some."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapter / FULLY_TRAINED_FILE
    if not path.is_file():
        return
    own = dict(model.named_parameters())
    try:
        held = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise SourceError(f"{path} cannot be read: {error}.") from None
    with torch.no_grad():
        for name, value in held.items():
            if name not in own or own[name].shape != value.shape:
                raise SourceError(f"{path} holds {name}, which the model has not.")
            own[name].copy_(value)
