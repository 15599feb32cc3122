"""What is no mistake in a recipe, but will disappoint whoever does not know it; told before anything is loaded."""

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


def advise(checked: TrainSetup, notify: Callable[[str], None]) -> None:
    for found in (_instruct(checked), _held_damage(checked), _decay(checked)):
        if found:
            notify(found)


def damaged(plan: GrowthPlan | None, growth: Mapping[str, Any] | None) -> str | None:
    """The method that changed the function of a model which was not trained since, or None."""
    return None if plan is None or plan.guarantee.lossless or training_stages(growth) else plan.growth.method


def _held_damage(checked: TrainSetup) -> str | None:
    options = checked.recipe.regularizer
    method = damaged(checked.plan, checked.checkpoint.growth)
    if method is None or options.kind == "none":
        return None
    if options.fisher and all("mapped_by" in open_importance(f).metadata for f in options.fisher):
        return None
    return (
        f"{checked.recipe.model} was grown by {method}, which changes the function, and was not trained since: "
        f"the penalty holds the damage as it holds the rest. {RECOVER}"
    )


def _decay(checked: TrainSetup) -> str | None:
    decay = float(checked.arguments.weight_decay or 0)
    if checked.recipe.regularizer.kind == "none" or not decay:
        return None
    return f"weight_decay {decay:g} pulls to zero what the penalty holds where it is. Leave it out: beside a penalty its default is 0."


def instruct(tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> bool:
    """Whether a checkpoint was trained on conversations, as far as its tokenizer and generation_config.json tell."""
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


def _instruct(checked: TrainSetup) -> str | None:
    if _converses(checked.recipe.data.replay) or not instruct(checked.tokenizer, checked.checkpoint.folder):
        return None
    return (
        f"{checked.recipe.model} is an instruct model, and training on plain text unlearns to chat. "
        "Mix in conversations of its own (replay: {share: 0.25, self: {}}), or train the base model and fine-tune afterwards."
    )


def _converses(replay: ReplaySource | None) -> bool:
    """Whether sampled conversations are mixed in."""
    if replay is None:
        return False
    if replay.self is not None:
        return replay.self.chat_share != 0
    records = [read_record(p if p.is_dir() else p.parent) for p in (Path(path).expanduser() for path in replay.path) if p.exists()]
    return any(r is not None and r["settings"].get("chat_share") for r in records)
