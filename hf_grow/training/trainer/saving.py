"""Saving and resuming: what a checkpoint of a grown model holds besides Trainer's files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hf_grow.checkpoint.reader import GROWTH, SHARDED_WEIGHTS
from hf_grow.common.safe_files import read_json
from hf_grow.training.growth_state.grow_optimizer import SOURCE_KEYS, grown_optimizer_state
from hf_grow.training.growth_state.optimizer_files import SCHEDULER, SHARDS, TRAINER_STATE
from hf_grow.training.growth_state.resume import load_optimizer_and_scheduler
from hf_grow.training.growth_state.sharded_state import sharded_state
from hf_grow.training.growth_state.state_files import GROWTH_STATE, damaged_state, read_torch_state
from hf_grow.training.param_updates.updates import unwrapped
from hf_grow.training.sharding.collective import on_every_process
from hf_grow.training.sharding.local_rows import fill_tensors, whole_parameters
from hf_grow.training.sharding.plain_files import write_plain
from hf_grow.training.sharding.shard_files import ShardRows, write_shards
from hf_grow.training.sharding.sharded_model import held_tensors
from hf_grow.training.trainer.checkpointing import PENALTY, PENALTY_SHARDS, write_json
from hf_grow.training.trainer.sharded_start import ShardedStartTrainer
from hf_grow.training.trainer.state import GrowthState, TrainingHooks
from hf_grow.training.trainer.weights import cast_state_dict, check_adapter, check_same_tensors, load_weights


class CheckpointTrainer(ShardedStartTrainer):
    """Trainer whose checkpoints hold growth.json, the state of the penalty, and the state of the growth."""

    growth_state: GrowthState
    hooks: TrainingHooks
    rolled_back = False
    """Whether the checkpoint that is loaded next is one that training goes back to."""
    _saved_dtypes: Mapping[str, Any] = MappingProxyType({})

    @property
    def steps_since_growth(self) -> int:
        return int(self.state.global_step) - self.growth_state.grown_at

    @property
    def saves_shards(self) -> bool:
        """FSDP2: every process writes what it holds."""
        return bool(self.is_fsdp_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The result: in the dtypes that the hooks name, with the digests of its files in growth.json. (Checkpoints are an internal call.)"""
        dtypes = {} if _internal_call else self.hooks.result_dtypes(self)
        folder = Path(output_dir or self.args.output_dir)
        if self.saves_shards:
            if _internal_call:
                write_shards(folder / SHARDED_WEIGHTS[0], held_tensors(self.model))
            else:
                write_plain(self.model, folder, dtypes)
            if self.args.should_save:
                self._save_config(folder)
                self._save_growth(folder)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            self._saved_dtypes = dtypes
            try:
                super().save_model(output_dir, _internal_call)
            finally:
                self._saved_dtypes = {}
        if self.args.should_save and not _internal_call:
            self.hooks.finish_result(folder)

    def _save_config(self, folder: Path) -> None:
        """What `save_pretrained` of the model and Trainer write besides weights."""
        config = self.model.config
        config.dtype = str(self.model.dtype).removeprefix("torch.")
        config.architectures = [type(self.model).__name__.removeprefix("FSDP")]
        config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._saved_dtypes and self.args.should_save:
            full = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
            state_dict = cast_state_dict(full, self._saved_dtypes)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._save_growth(Path(output_dir or self.args.output_dir))

    def _save_growth(self, folder: Path) -> None:
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that hf-grow never reads
        record = self.hooks.growth_record(self)
        if record is not None:
            write_json(folder / GROWTH, record)
        self.hooks.save_files(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # A checkpoint of the same step, by other processes perhaps, must not remain in part.
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with on_every_process(folder):
            if self.args.should_save and folder.exists():
                (folder / TRAINER_STATE).unlink(missing_ok=True)
                shutil.rmtree(folder)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # All of this before trainer_state.json, which Trainer writes last: a checkpoint that has it is complete.
        updates = self.growth.updates
        with nullcontext() if updates is None else updates.unsplit_groups(unwrapped(self.optimizer), unwrapped(self.lr_scheduler)):
            if self.saves_shards:
                self._save_optimizer_shards(Path(output_dir))
            else:
                super()._save_optimizer_and_scheduler(output_dir)
        if self.growth.penalty is not None:
            self._save_penalty(Path(output_dir))
        self.save_data_position(Path(output_dir))
        self.store_flos()
        if self.args.should_save:
            state = self.growth_state.to_json(int(self.state.global_step), self.growth.after_growth.consolidate_steps)
            state |= {"stop": self.growth.stop.state()} if self.growth.stop is not None else {}
            write_json(Path(output_dir) / GROWTH_STATE, {**state, "ledger": self.growth.ledger.to_json()})

    def _save_optimizer_shards(self, folder: Path) -> None:
        import torch

        tensors, record = sharded_state(self.model, unwrapped(self.optimizer))
        if tensors:  # SGD without momentum keeps none
            write_shards((folder / SHARDS).with_suffix(""), tensors)
        if self.args.should_save:
            write_json(folder / SHARDS, record)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json comes next: a checkpoint that has it has the files of every process

    def _save_penalty(self, folder: Path) -> None:
        import torch

        penalty = self.growth.penalty
        assert penalty is not None
        if not self.saves_shards:
            if self.args.should_save:
                torch.save(penalty.whole_state(), folder / PENALTY)
            return
        state, tensors = penalty.state_dict(), penalty.tensors()  # on every process
        if tensors:
            write_shards((folder / PENALTY_SHARDS).with_suffix(""), tensors)
        if self.args.should_save:
            write_json(folder / PENALTY_SHARDS, state)

    # ---- resuming ---------------------------------------------------------------------------------------------------------------

    def _grows_from(self, folder: Path) -> bool:
        """Whether this is the checkpoint of the smaller model: its weights are grown already."""
        growth = self.growth.growth_at_resume
        return growth is not None and growth.checkpoint.resolve() == folder.resolve()

    def _begins_stage(self, folder: Path) -> bool:
        """Whether training goes on here from the checkpoint of a smaller model, or of the stage before."""
        own = folder.resolve().parent == Path(self.args.output_dir).resolve()
        return self._grows_from(folder) or (self.growth.stop is not None and not own)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self._grows_from(folder):
            return
        if self._loaded_by_trainer(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(model or self.model, folder)
        self.hooks.load_files(folder)

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        if self._loaded_by_trainer(folder):
            super()._load_best_model()
        else:
            load_weights(self.model, folder)
        self.hooks.load_files(folder)

    def _loaded_by_trainer(self, folder: Path) -> bool:
        """Whether Trainer loads the weights itself: DeepSpeed's, an adapter's. Raises InputError for another model's adapter."""
        adapter = hasattr(self.model, "peft_config")
        if adapter and not self.is_deepspeed_enabled:
            check_adapter(self.model, folder)
        return adapter or self.is_deepspeed_enabled

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            given, growth = self.growth.given_arguments, self.growth.growth_at_resume
            grown = None
            if growth is not None and self._grows_from(folder):
                grown = grown_optimizer_state(folder, growth.plan, growth.policy)
            differing = load_optimizer_and_scheduler(folder, self.model, self.optimizer, self.lr_scheduler, given, grown)
            if differing:
                facts = {k: list(v) for k, v in differing.items()}
                self.growth.events.write("settings", int(self.state.global_step), checkpoint=checkpoint, **facts)
        with damaged_state(folder / GROWTH_STATE):
            self._load_growth_state(folder)

    def _load_growth_state(self, folder: Path) -> None:
        saved = read_json(folder / GROWTH_STATE) if (folder / GROWTH_STATE).is_file() else None
        if saved is not None and not self._grows_from(folder):
            self.growth_state.load(saved)
            if self.growth.stop is not None and "stop" in saved and not self._begins_stage(folder):
                self.growth.stop.load(saved["stop"])
        else:
            self.growth_state.begin(int(self.state.global_step), self.state.log_history)
        if self._begins_stage(folder):
            for key in SOURCE_KEYS:  # the best checkpoint so far is another training's
                setattr(self.state, key, None)
        if self._grows_from(folder) and saved is not None:  # forgetting is counted from the beginning of the run, through its growths
            self.growth_state.start_losses = dict(saved["start_losses"])
        self._load_ledger((saved or {}).get("ledger"))

    def _load_ledger(self, saved: Any) -> None:
        ledger = self.growth.ledger
        spent = saved or {"flops": {"train": int(self.state.total_flos)}}  # a checkpoint of a plain Trainer
        (ledger.roll_back if self.rolled_back else ledger.load)(spent)
        self.rolled_back = False

    def load_penalty(self, checkpoint: Path) -> None:
        penalty = self.growth.penalty
        if penalty is None or self._begins_stage(checkpoint):  # its state is of another model, or has been consolidated
            return
        if (checkpoint / PENALTY_SHARDS).is_file():
            penalty.load_state_dict(read_json(checkpoint / PENALTY_SHARDS))
            if own := penalty.tensors():
                rows = ShardRows((checkpoint / PENALTY_SHARDS).with_suffix(""))
                check_same_tensors(own, rows, checkpoint)
                fill_tensors(own, whole_parameters({n: t.shape for n, t in own.items()}), rows)
        elif (checkpoint / PENALTY).is_file():  # mapped: a sharded run reads its own rows
            penalty.load_whole_state(read_torch_state(checkpoint / PENALTY, mmap=True))
