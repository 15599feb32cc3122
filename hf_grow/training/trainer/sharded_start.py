"""Trainer whose model is sharded before it has weights (FSDP2): every process reads the rows that it holds."""

from __future__ import annotations

from typing import Any

from hf_grow.training.param_updates.parameter_map import parameter_map
from hf_grow.training.param_updates.updates import unwrapped
from hf_grow.training.sharding.sharded_model import fill_model, shard_device
from hf_grow.training.trainer.data_position import DataPositionTrainer
from hf_grow.training.trainer.state import TrainingHooks


class ShardedStartTrainer(DataPositionTrainer):
    """With `GrowthSettings.weights`, the model is on the meta device until its first use."""

    hooks: TrainingHooks
    _groups: list[list[Any]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if getattr(self.accelerator, "is_fsdp2", False):
            # Otherwise a process holds all gradients of its micro-batches, unsharded, until the last one.
            self.accelerator.gradient_state.plugin_kwargs.setdefault("sync_each_batch", True)

    def shard_model(self) -> None:
        """Shards a model on the meta device as accelerate does, and fills this process's shards. Does nothing the second time."""
        source = self.growth.weights
        if source is None or not any(p.is_meta for p in self.model.parameters()):
            return
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        places = parameter_map(self.model)
        fsdp2_prepare_model(self.accelerator, self.model)  # in place
        fill_model(self.model, places, source, shard_device(self.accelerator))
        if self.growth.penalty is not None:
            self.growth.penalty.take_anchors(self.model)  # before a checkpoint replaces the weights
        self.hooks.weights_loaded(self)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        result = super().evaluation_loop(*args, **options)
        if self.is_fsdp_enabled:
            # FSDP2 shows the parameters of the last units gathered, and freed, until a backward pass; penalties and checkpoints need the shards.
            for module in self.model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
        return result

    def _prepare_for_training(self, *args: Any, **options: Any) -> Any:
        self.shard_model()  # before the optimizer is made
        prepared = super()._prepare_for_training(*args, **options)
        if self.growth.weights is not None:
            # accelerate finds a parameter again by its address, and empty shards have none.
            for group, members in zip(unwrapped(self.optimizer).param_groups, self._groups, strict=True):
                group["params"] = members
        return prepared

    def _wrap_model(self, model: Any, *args: Any, **options: Any) -> Any:
        self.shard_model()
        if self.optimizer is not None:
            self._groups = [list(group["params"]) for group in unwrapped(self.optimizer).param_groups]
        return super()._wrap_model(model, *args, **options)
