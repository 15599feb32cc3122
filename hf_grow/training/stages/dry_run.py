"""The stages of a run before anything is trained: sizes and FLOPs per token, from configs and headers alone."""

from __future__ import annotations

from typing import Any

from hf_grow.model.flops import count_flops
from hf_grow.model.param_count import count_parameters
from hf_grow.training.config.data_options import DataOptions
from hf_grow.training.config.stage_options import read_stages
from hf_grow.training.config.train_config import RecipeData
from hf_grow.training.setup.train_setup import Notify
from hf_grow.training.stages.runner import StagedRun


def dry_run_stages(read: RecipeData, *, output: str | None, notify: Notify) -> dict[str, Any]:
    """As JSON data: for each stage its name, growth, end, parameters and FLOPs per token (forward and backward). Raises InputError."""
    stages = read_stages(read.given)
    run = StagedRun(read, stages, output, notify, lambda line: None)
    models = run.plan_growths()
    rows = []
    for stage, model in zip(stages, models, strict=True):
        length = int(stage.recipe["data"].get("seq_length") or DataOptions.model_fields["seq_length"].default)
        rows.append(
            {
                "stage": stage.index,
                "name": stage.title,
                "grow": stage.keys.grow,
                "until": stage.keys.until.model_dump(mode="json", exclude_none=True, exclude_unset=True)
                if stage.keys.until is not None
                else None,
                "parameters": count_parameters(model.info.architecture).total,
                "layers": model.info.architecture.layers,
                "flops_a_token": count_flops(model.info.config).train.rows(1, length) / length,
            }
        )
    return {"output": str(run.folder), "max_steps": read.given["max_steps"], "stages": rows}
