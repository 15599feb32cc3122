"""What a checkpoint of a grown model's training holds besides Trainer's files, and how it is taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_grow.checkpoint.reader import GROWTH
from hf_grow.common.safe_files import read_json
from hf_grow.training.growth_state.optimizer_files import take_up
from hf_grow.training.growth_state.state_files import GROWTH_STATE
from hf_grow.training.trainer.checkpointing import PENALTY, write_json
from hf_grow.training.trainer.data_position import DataPositionTrainer
from hf_grow.training.trainer.weights import check_weights, load_weights

FSDP_WEIGHTS = "pytorch_model_fsdp.bin"
"""accelerate's name for the whole weights beside an FSDP run's checkpoint."""


class CheckpointTrainer(DataPositionTrainer):
    """Trainer whose checkpoints carry growth.json, the penalty, and where in its growth the training stands."""

    @property
    def since(self) -> int:
        """Optimizer steps done since the growth."""
        return int(self.state.global_step) - self.growing.grown_at

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.growing.stored is not None and self.args.should_save:
            state_dict = self.growing.stored(self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
        record = self.growing.record(int(self.state.global_step))
        if record is not None:
            write_json(folder / GROWTH, record)
        self.growing.save_extra(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Before trainer_state.json, which Trainer writes last: a checkpoint that has it is whole.
        super()._save_optimizer_and_scheduler(output_dir)
        if self.growing.penalty is not None:
            self._save_penalty(Path(output_dir))
        self.save_place(Path(output_dir))
        if self.args.should_save:
            write_json(Path(output_dir) / GROWTH_STATE, self.growth_state())

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # a checkpoint that has trainer_state.json, which comes next, has the part of every process

    def _save_penalty(self, folder: Path) -> None:
        import torch

        assert self.growing.penalty is not None
        state = self.growing.penalty.state_dict()  # on every process: sharded state is gathered
        if self.args.should_save:
            torch.save(state, folder / PENALTY)

    def growth_state(self) -> dict[str, Any]:
        g = self.growing
        left = max(0, g.after.consolidate_steps - self.since)
        return {"grown_at": g.grown_at, "consolidate_until": g.grown_at + g.after.consolidate_steps, "consolidation_left": left,
                "start_losses": g.start_losses, "source_losses": g.source_losses, "monitor": g.monitor.state()}  # fmt: skip

    # ---- taken up again ---------------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self._by_trainer(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(model or self.model, folder)
        self.growing.load_extra(folder)

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        if self._by_trainer(folder):
            super()._load_best_model()
        else:
            load_weights(self.model, folder)
        self.growing.load_extra(folder)

    def _by_trainer(self, folder: Path) -> bool:
        """Whether Trainer loads the weights of a checkpoint: DeepSpeed's, an adapter's, FSDP's own. Raises InputError for those of another model."""
        if self.is_deepspeed_enabled:
            return True
        adapter = hasattr(self.model, "peft_config")
        if adapter:
            check_weights(self.model, folder)
        return adapter or (self.is_fsdp_enabled and (folder / FSDP_WEIGHTS).is_file())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, g = Path(checkpoint), self.growing
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            told = take_up(folder, self.model, self.optimizer, self.lr_scheduler, g.given)
            if told:
                g.events.write("settings", int(self.state.global_step), checkpoint=checkpoint, **{k: list(v) for k, v in told.items()})
        path = folder / GROWTH_STATE
        if path.is_file():
            state = read_json(path)
            g.grown_at, g.start_losses = state["grown_at"], state["start_losses"]
            g.source_losses = state.get("source_losses", {})
            g.monitor.load(state["monitor"])
        else:  # a checkpoint that was grown, or of a plain Trainer: the growth is now, and its loss was
            g.grown_at = int(self.state.global_step)
            earlier = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            g.monitor.before = earlier[-1] if earlier else None

    def load_penalty(self, checkpoint: Path) -> None:
        import torch

        if self.growing.penalty is not None and (checkpoint / PENALTY).is_file():
            self.growing.penalty.load_state_dict(torch.load(checkpoint / PENALTY, map_location="cpu", weights_only=True))
