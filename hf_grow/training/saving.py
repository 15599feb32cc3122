"""What a checkpoint of a grown model's training holds besides Trainer's files, and how it is taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_grow.checkpoint.reader import GROWTH
from hf_grow.training.checkpoints import PENALTY, write_json
from hf_grow.training.growing import Growing
from hf_grow.training.settled import STATE
from hf_grow.untrusted import read_json


class Saving(Trainer):  # type: ignore[misc]
    """Trainer whose checkpoints carry growth.json, the penalty, and where in its growth the training stands."""

    growing: Growing

    @property
    def since(self) -> int:
        """Optimizer steps done since the growth."""
        return int(self.state.global_step) - self.growing.grown_at

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
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
        if self.args.should_save:
            write_json(Path(output_dir) / STATE, self.growth_state())

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
                "start_losses": g.start_losses, "monitor": g.monitor.state()}  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.growing.load_extra(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.growing.load_extra(Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        if path.is_file():
            state = read_json(path)
            self.growing.grown_at, self.growing.start_losses = state["grown_at"], state["start_losses"]
            self.growing.monitor.load(state["monitor"])
        else:  # a checkpoint that was grown, or of a plain Trainer: the growth is now, and its loss was
            self.growing.grown_at = int(self.state.global_step)
            earlier = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            self.growing.monitor.before = earlier[-1] if earlier else None

    def load_penalty(self, checkpoint: Path) -> None:
        import torch

        if self.growing.penalty is not None and (checkpoint / PENALTY).is_file():
            self.growing.penalty.load_state_dict(torch.load(checkpoint / PENALTY, map_location="cpu", weights_only=True))
