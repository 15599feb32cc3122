"""Checks of a recipe beyond its keys, before anything is loaded or written: files, tokenizer, Fisher, teachers, output.

All mistakes are reported in one message.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.convert.metadata import unwritten_checkpoint
from hf_grow.errors import InputError, OutputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.options import raise_errors
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.config.train_config import DEFAULTS, RecipeData, TrainRecipe, collect_mistakes
from hf_grow.training.config.train_options import default_best_metric
from hf_grow.training.data.document_masking import check_attention
from hf_grow.training.data.sources import find_text
from hf_grow.training.distributed import launch
from hf_grow.training.regularizers.origin import PenaltyOrigin
from hf_grow.training.setup.activation_checkpointing import checkpointed_layers
from hf_grow.training.setup.growth_at_load import WRITE_FIRST, plan_growth
from hf_grow.training.setup.launch_checks import launch_mistakes, parallelism_mistakes
from hf_grow.training.setup.option_checks import TOKENIZER_FILES, check_options, load_tokenizer, plan_of
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.setup.warnings import warn_recipe
from hf_grow.training.sharding.sharded_checkpoint import open_checkpoint
from hf_grow.training.trainer.events import EVENTS_FILE

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_recipe(
    recipe_data: RecipeData,
    *,
    output: str | None,
    resume: bool,
    overwrite: bool,
    notify: Notify,
    started: launch.Launch | None = None,
    texts: bool = True,
    origin: PenaltyOrigin | None = None,
) -> TrainSetup:
    """Raises InputError that lists every mistake, one line each.

    ``started``: the processes; default: those of the launcher. ``texts``: whether the text files are checked. ``origin``: where a penalty
    comes from, if the model was grown since.
    """
    errors = list(recipe_data.mistakes)
    started = started or launch.current_launch()
    recipe, name = recipe_data.recipe, recipe_data.given.get("model")
    checkpoint: Checkpoint | None = None
    plan: GrowthPlan | None = None
    tokenizer = None
    if isinstance(name, str):
        revision = recipe.revision if recipe else None
        checkpoint = collect_mistakes(errors, "model", lambda: open_checkpoint(name, revision=revision, weights=False, notify=notify))
    source: Checkpoint | None = None
    if checkpoint is not None and recipe is not None and recipe.grow is not None:
        source, asked = checkpoint, recipe.grow
        plan = collect_mistakes(errors, "grow", lambda: plan_growth(source, asked, notify))
        checkpoint = None if plan is None else unwritten_checkpoint(plan, source)
    elif checkpoint is not None:
        opened = checkpoint
        if collect_mistakes(errors, "model", lambda: opened.info.architecture.layers) is None:
            checkpoint = None
        plan = collect_mistakes(errors, "model", lambda: plan_of(opened)) if checkpoint is not None else None
    if recipe is not None:
        if checkpoint is not None:
            tokenizer = _check_tokenizer(recipe, checkpoint, errors)
            _check_positions(recipe, checkpoint, errors)
        if texts:
            check_data(recipe, errors, notify)
        if recipe.data.intra_document_masking:
            collect_mistakes(errors, "attn_implementation", partial(check_attention, recipe.attn_implementation))
        check_options(recipe, checkpoint, plan, tokenizer, errors, notify, origin)
    out = Path(output or (recipe.output if recipe else None) or default_output(str(name)))
    collect_mistakes(errors, "output", lambda: check_output(out, resume=resume, overwrite=overwrite))
    arguments = None
    if recipe is not None:
        usable = recipe
        arguments = collect_mistakes(errors, "arguments", lambda: arguments_for(usable, recipe_data.arguments, out))
        if arguments is not None:
            if checkpoint is not None:
                given, layers = arguments, checkpoint.info.architecture.layers
                collect_mistakes(errors, "activation_checkpointing", lambda: checkpointed_layers(usable, given, plan, layers))
            errors += launch_mistakes(
                started, recipe, arguments, resume=resume or bool(recipe_data.arguments.get("resume_from_checkpoint"))
            )
            if checkpoint is not None:
                errors += parallelism_mistakes(
                    started, recipe, arguments, checkpoint, seq_length=recipe.data.seq_length,
                    intra_document_masking=recipe.data.intra_document_masking, streaming=recipe.data.streaming,
                )  # fmt: skip
        if recipe.grow is not None and started.deepspeed:
            errors.append(f"grow: {started} loads whole models only. {WRITE_FIRST}")
        _check_resume(recipe_data.arguments.get("resume_from_checkpoint"), errors)
    raise_errors(recipe_data.where, errors)
    assert recipe is not None and checkpoint is not None and arguments is not None
    setup = TrainSetup(
        recipe, arguments, checkpoint, plan, tokenizer, out, recipe.data.seq_length, recipe_data.given, recipe_data.arguments,
        source=source, save_tokenizer=checkpoint.folder is None or recipe.tokenizer is not None,
    )  # fmt: skip
    warn_recipe(setup, notify)
    return setup


def _check_positions(recipe: TrainRecipe, checkpoint: Checkpoint, errors: list[str]) -> None:
    max_positions = checkpoint.config.get("max_position_embeddings")
    if isinstance(max_positions, int) and recipe.data.seq_length > max_positions and not any(line.startswith("data") for line in errors):
        errors.append(
            f"data.seq_length: {recipe.data.seq_length} is more than the {max_positions} positions of the model (max_position_embeddings)."
        )


def _check_resume(folder: Any, errors: list[str]) -> None:
    """Checks the Trainer checkpoint (grown or not) that this run resumes from."""
    if isinstance(folder, str) and not (Path(folder) / "trainer_state.json").is_file():
        errors.append(f"resume_from_checkpoint: {folder} is not a Trainer checkpoint (it has no trainer_state.json).")


def default_output(model: str) -> str:
    name = Path(model).resolve().name if Path(model).exists() else model.rsplit("/", 1)[-1]
    return f"{name}-trained"


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises OutputError if a training must not write to `out`. A folder that was not made by a training is never overwritten."""
    if resume and overwrite:
        raise InputError(
            "--resume and --overwrite cannot be combined: one continues the training in the output folder, the other deletes it."
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} exists and is not a folder.", hint="Choose another folder with -o.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / EVENTS_FILE).is_file():
        raise OutputError(f"{out} exists, is not empty, and was not written by hf-grow train.", hint="Choose another folder with -o.")
    if not (resume or overwrite):
        raise OutputError(
            f"{out} contains an earlier training.",
            hint="Continue it with --resume, replace it with --overwrite, or choose another folder with -o.",
        )


def clear_output(out: Path) -> None:
    """Removes an earlier training; `check_output` verified that it is one."""
    if out.is_dir():
        shutil.rmtree(out)


def _check_tokenizer(recipe: TrainRecipe, checkpoint: Checkpoint, errors: list[str]) -> Any:
    vocabulary = checkpoint.info.architecture.size("vocab")
    has_tokenizer = checkpoint.folder is None or any((checkpoint.folder / n).is_file() for n in TOKENIZER_FILES)
    own = None
    if recipe.tokenizer is None or has_tokenizer:
        place = str(checkpoint.folder or checkpoint.ref)
        own = collect_mistakes(
            errors if recipe.tokenizer is None else [],
            "tokenizer",
            lambda: load_tokenizer(place, recipe.revision if checkpoint.folder is None else None),
        )
    tokenizer = own
    if recipe.tokenizer is not None:
        named = recipe.tokenizer
        tokenizer = collect_mistakes(errors, "tokenizer", lambda: load_tokenizer(named, None))
    if tokenizer is None:
        return None
    if len(tokenizer) > vocabulary:
        errors.append(
            f"tokenizer: has {len(tokenizer)} tokens, but the model's vocabulary has {vocabulary}. "
            "Use the model's own tokenizer, or resize the embeddings first (model.resize_token_embeddings)."
        )
    if own is not None and own is not tokenizer and own.get_vocab() != tokenizer.get_vocab():
        errors.append(f"tokenizer: {recipe.tokenizer} has other token ids than the tokenizer of {recipe.model}.")
    return tokenizer


def check_data(recipe: TrainRecipe, errors: list[str], notify: Notify) -> None:
    data = recipe.data
    sources: list[tuple[str, TextOptions]] = [(f"data.train.{i}", s) for i, s in enumerate(data.train)]
    sources += [(f"data.eval.{n}", s) for n, s in data.eval.items()]
    if data.replay is not None and data.replay.self is None:
        sources.append(("data.replay", data.replay))
    for key, source in sources:
        collect_mistakes(errors, key, partial(find_text, source, notify=notify))


def arguments_for(recipe: TrainRecipe, given: Mapping[str, Any], out: Path) -> TrainingArguments:
    """TrainingArguments of a recipe. Raises InputError for values that transformers rejects."""
    from transformers import Trainer, TrainingArguments
    from transformers.integrations import get_available_reporting_integrations
    from transformers.utils import is_liger_kernel_available

    # Weight decay pulls weights to zero while a penalty holds them in place; a penalty also limits their growth, as decay does.
    penalty_defaults = {"weight_decay": 0.0} if recipe.regularizer.kind != "none" else {}
    settings = {
        **DEFAULTS,
        **penalty_defaults,
        **given,
        "output_dir": str(out),
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
    }
    settings.setdefault("prediction_loss_only", True)
    settings.setdefault("disable_tqdm", True)
    settings.setdefault("ddp_find_unused_parameters", False)  # there are none: frozen parameters have requires_grad=False
    if recipe.data.eval:
        settings.setdefault("eval_strategy", "steps")
        settings.setdefault("eval_on_start", True)
        settings.setdefault("per_device_eval_batch_size", settings["per_device_train_batch_size"])
    if recipe.early_stopping_patience:
        settings.setdefault("load_best_model_at_end", True)
    if recipe.data.eval and (settings.get("load_best_model_at_end") or settings.get("save_strategy") == "best"):
        settings.setdefault("metric_for_best_model", default_best_metric(recipe.data.eval))
        settings.setdefault("greater_is_better", False)
    try:
        arguments = TrainingArguments(**settings)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(" ".join(str(error).split())) from None
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, ImportError) as error:  # only missing packages count; other errors ask for the model, which is loaded later
        if "install" in str(error):
            raise InputError(f"optim {settings.get('optim', 'default')}: {' '.join(str(error).split())}") from None
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise InputError(
            "use_liger_kernel: liger-kernel is not installed.", hint="Run pip install liger-kernel, or remove use_liger_kernel."
        )
    if "dataloader_pin_memory" not in given and arguments.device.type in ("cpu", "mps"):
        arguments.dataloader_pin_memory = False  # unsupported there: torch would warn at every evaluation
    missing = sorted(set(arguments.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise InputError(
            f"report_to names {', '.join(missing)}, which is not installed or unknown.", hint="Install it, or set report_to: none."
        )
    return arguments
