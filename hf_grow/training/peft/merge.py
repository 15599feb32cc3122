"""Merges a LoRA adapter into a plain checkpoint.

An adapter that peft trained with `layer_replication` becomes a checkpoint with these layers: a growth by that list of layers, then the merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from hf_grow.growth.plan import GrowthPlan, check_source, make_plan
from hf_grow.growth.tensors import overflow_error
from hf_grow.methods import METHODS
from hf_grow.model.config_compat import portable_config
from hf_grow.model.loading import output_flags, reset_output_flags, transformers_errors
from hf_grow.options import parse
from hf_grow.training.peft.adapter_files import Adapter, read_adapter
from hf_grow.training.peft.lora import load_fully_trained_if_present, silence_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MergeResult:
    base: str
    """The checkpoint that the adapter was merged into."""
    layers: int
    plan: GrowthPlan | None
    """The growth, if layers were replicated."""


def merge_adapter(
    adapter: Path, out: Path, *, base: str | None = None, revision: str | None = None, overwrite: bool = False,
    dtype: str = "auto", notify: Callable[[str], None] = lambda message: None,
) -> MergeResult:  # fmt: skip
    """Writes to ``out`` the plain checkpoint that computes what peft computes from the base and the adapter.

    ``base``: the checkpoint that the adapter was made for, by default the one that its config names. With `layer_replication` the plan of that
    growth goes into growth.json. Raises InputError, SourceError or OutputError.
    """
    require_packages("peft")
    opened = read_adapter(adapter)
    PartialFolder.check(out, resume=False, overwrite=overwrite, resumable=False)
    ref = base or opened.config.base_model_name_or_path
    if not ref:
        raise InputError(f"{adapter} does not name its base model.", hint="Add --base MODEL.")
    source = open_source(ref, revision=revision, weights=True, notify=notify)
    check_source(source.info)
    arch = source.info.architecture
    if opened.layers and max(opened.layers) >= arch.layers:
        raise SourceError(f"layer_replication uses layer {max(opened.layers)}, but {ref} has {arch.layers} layers.")
    plan = None
    if opened.layers is not None:
        method = METHODS["layers"]
        options = parse(method.options, {"layers": list(opened.layers)}, where=str(adapter), strict=False)
        plan = make_plan(source.info, method.build(arch, options))
    check_disk_space(out, plan.nbytes if plan else sum(t.info.nbytes for t in source.tensors.values()))
    assert source.folder is not None
    merged = _merged_model(source.folder, plan, opened, dtype)
    with (
        PartialFolder(out, f"merge {adapter}", resume=False, overwrite=overwrite, resumable=False) as folder,
        translate_os_errors(folder),
    ):
        merged.save_pretrained(folder.path)
        folder.write_json("config.json", portable_config(read_json(folder.path / "config.json") | output_flags(source.config)))
        for relative in companions(source.folder):
            folder.copy_companion(source.folder, relative)
        if growth := plan.to_json() if plan else source.growth:
            stage = {"adapter": opened.to_json(), "merged_into": ref, "files": hash_weight_files(folder.path), "made_by": versions()}
            folder.write_file(GROWTH, format_growth_json(add_training_stage(growth, stage)).encode())
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
    try:
        with silence_warnings():
            wrapped = PeftModel.from_pretrained(model, adapter.folder, config=LoraConfig(**adapter.lora_config_arguments()))
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise SourceError(f"The adapter {adapter.folder} does not match {base}: {' '.join(str(error).split())[:200]}") from None
    load_fully_trained_if_present(wrapped, adapter.folder)
    merged: PreTrainedModel = wrapped.merge_and_unload()
    overflown = next((n for n, p in merged.named_parameters() if dtype != "auto" and not bool(p.isfinite().all())), None)
    if overflown is not None:
        raise overflow_error(overflown, merged.get_parameter(overflown).dtype)
    return merged
