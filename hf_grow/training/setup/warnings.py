"""Warnings about valid but probably unintended settings, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.provenance import training_stages
from hf_grow.common.safe_files import read_json
from hf_grow.errors import InputError
from hf_grow.training.data.chat_template import parse_chat_template
from hf_grow.training.data.replay_files import read_record
from hf_grow.training.regularizers.importance_file import open_importance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_grow.growth.plan import GrowthPlan
    from hf_grow.training.config.data_options import ReplaySource
    from hf_grow.training.setup.train_setup import TrainSetup

RECOVER = "Train it without a penalty first, until its loss is back, and take the Fisher then; or map the source's: hf-grow fisher MODEL --from-growth SOURCE_FISHER."


def warn(setup: TrainSetup, notify: Callable[[str], None]) -> None:
    """Warnings about options that a recipe and GrowTrainer share."""
    for message in (_penalty_after_lossy_growth(setup), _weight_decay_with_penalty(setup)):
        if message:
            notify(message)


def warn_recipe(setup: TrainSetup, notify: Callable[[str], None]) -> None:
    if message := _instruct_without_replay(setup):
        notify(message)
    warn(setup, notify)


def lossy_method(plan: GrowthPlan | None, growth: Mapping[str, Any] | None) -> str | None:
    """The method of a growth that changed the function, if the model was not trained since; else None."""
    return None if plan is None or plan.guarantee.lossless or training_stages(growth) else plan.growth.method


def _penalty_after_lossy_growth(setup: TrainSetup) -> str | None:
    options = setup.options.regularizer
    method = lossy_method(setup.plan, setup.checkpoint.growth)
    if method is None or options.kind == "none":
        return None
    if options.fisher and all("mapped_by" in open_importance(f).metadata for f in options.fisher):
        return None
    return (
        f"{setup.checkpoint.ref} was grown by {method}, which changes the function, and was not trained further: "
        f"the penalty would keep the weights near damaged ones. {RECOVER}"
    )


def _weight_decay_with_penalty(setup: TrainSetup) -> str | None:
    decay = float(setup.arguments.weight_decay or 0)
    if setup.options.regularizer.kind == "none" or not decay:
        return None
    return f"weight_decay {decay:g} pulls weights to zero, and the penalty pulls them to their initial values. Remove weight_decay: with a penalty its default is 0."


def instruct(tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> bool:
    """Whether a checkpoint is an instruct model, as far as its tokenizer and generation_config.json tell."""
    ends: set[Any] = {tokenizer.eos_token_id}
    file = None if folder is None else folder / "generation_config.json"
    if file is not None and file.is_file():
        own = read_json(file).get("eos_token_id")
        ends |= {i for i in (own if isinstance(own, list) else [own]) if isinstance(i, int)}
    try:
        template = parse_chat_template(tokenizer)
    except InputError:
        return False
    return template is not None and template.is_chat_model(ends - {None}, tokenizer.bos_token_id)


def _instruct_without_replay(setup: TrainSetup) -> str | None:
    if _replays_conversations(setup.recipe.data.replay) or not instruct(setup.tokenizer, setup.checkpoint.folder):
        return None
    return (
        f"{setup.recipe.model} is an instruct model, and training on plain text makes it forget how to chat. "
        "Mix in its own conversations (replay: {share: 0.25, self: {}}), or train the base model and fine-tune afterwards."
    )


def _replays_conversations(replay: ReplaySource | None) -> bool:
    """Whether the replay contains conversations."""
    if replay is None:
        return False
    if replay.self is not None:
        return replay.self.chat_share != 0
    records = [read_record(p if p.is_dir() else p.parent) for p in (Path(path).expanduser() for path in replay.path) if p.exists()]
    return any(r is not None and r["settings"].get("chat_share") for r in records)
