"""BaseGrowTrainer: transformers' Trainer with penalties, freezing, learning rates of new parameters, distillation and a monitor.

The parts of one optimizer step:

    on_step_begin        residual scale of new blocks and phase: the same for all micro-batches
    compute_loss         distillation and router loss, scaled because Trainer sums the losses of micro-batches
    training_step        after the last backward: + d(penalty)/dp (no second backward), gradients of frozen parameters are dropped
    clipping             by Trainer, with the penalty in the norm
    on_pre_optimizer_step, on_optimizer_step    learning rates of new parameters, frozen rows, penalty updates
    on_step_end          the monitor checks loss and gradient norm
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common.safe_files import read_json
from hf_grow.errors import ExecutionError, InputError
from hf_grow.model.flops import Batch
from hf_grow.training.config.schedules import phase_at
from hf_grow.training.data.document_masking import forward_arguments
from hf_grow.training.growth_state.state_files import GROWTH_STATE
from hf_grow.training.param_updates.shards import local
from hf_grow.training.param_updates.updates import LrFactors, unwrapped
from hf_grow.training.trainer.callbacks import GrowthCallback
from hf_grow.training.trainer.checkpointing import last_checkpoint, write_json
from hf_grow.training.trainer.evaluation import EvaluationTrainer
from hf_grow.training.trainer.monitor import Monitor
from hf_grow.training.trainer.state import GrowthSettings, GrowthState, TrainingHooks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class Rollback(Exception):
    """Training goes back to a checkpoint; raised at the end of a step, caught by `BaseGrowTrainer.train`."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint


class BaseGrowTrainer(EvaluationTrainer):
    """Trainer with GrowthSettings. Everything else, arguments and checkpoints included, is Trainer's."""

    def __init__(self, *args: Any, growth: GrowthSettings | None = None, hooks: TrainingHooks | None = None, **options: Any) -> None:
        self.growth = growth or GrowthSettings()
        self.growth_state = GrowthState(Monitor(self.growth.monitor))
        self.hooks = hooks or TrainingHooks()
        super().__init__(*args, **options)
        if self.is_deepspeed_enabled and self.growth.modifies_steps():
            raise InputError(
                "Penalties, freezing of rows, phases and learning rates of new parameters do not work under DeepSpeed, which hides gradients and optimizer steps.",
                hint="Use FSDP2 or DDP, or train without them.",
            )
        if self.growth.updates:
            self.growth.updates.freeze(self.model)
        self._step_loss: Tensor | None = None
        self._grad_norm: float | None = None
        self._scale_before_step = 1.0
        self._routing: dict[str, Tensor] = {}
        self._pending: tuple[float, float | None] | None = None
        """Loss and gradient norm of the last step, until the stop condition was asked about it."""
        self.resumed_from: Any = None
        self.opening_event = ""
        self.last_factors = LrFactors()
        """Multiples of the learning rate in the last step."""
        self._trained, self._evaluated = Batch(), Batch()
        """Batches that the ledger does not have yet."""
        self.add_callback(GrowthCallback(self))

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model)
        g = self.growth
        if g.updates is not None and g.new_parameters_have_own_lr():
            if self.lr_scheduler is not None:
                raise InputError(
                    "A learning rate of new parameters splits the parameter groups, which a scheduler passed to the trainer does not support.",
                    hint="Pass optimizers=(optimizer, None) and set lr_scheduler_type, or remove new_lr and the warm-up of new parameters.",
                )
            g.updates.name_groups(self.model if model is None else model, unwrapped(optimizer))
        return optimizer

    # ---- one step ---------------------------------------------------------------------------------------------------------------------

    def training_step(self, model: Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._trained += self._batch(inputs)  # before context parallelism cuts it
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if self.accelerator.sync_gradients:
            g = self.growth
            if g.penalty is not None:
                g.penalty.add_gradient(self.loss_scale())
            if g.updates is not None:
                g.updates.mask_gradients(self.model, phase_at(g.phases, self.steps_since_growth))
        return loss

    def compute_loss(
        self, model: Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        g = self.growth
        if "attention_mask" not in inputs:
            inputs = {**inputs, **forward_arguments(self.model.config, inputs.get("position_ids"))}
        if g.aux_loss is not None:
            # Only in training: with the router loss, an evaluation loss would be no cross-entropy.
            inputs = {**inputs, "output_router_logits": bool(model.training)}
        if not model.training or (g.aux_loss is None and g.distiller is None and not g.chunked_loss):
            result: Tensor | tuple[Tensor, Any] = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return result
        labels: Any = inputs.get("labels")
        with self._in_chunks(inputs, num_items_in_batch) if g.chunked_loss else nullcontext():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # With a token count the micro-batches are summed and (across processes) their mean is taken of losses scaled by the process count.
        summed = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        processes = self.accelerator.num_processes if summed and self.args.average_tokens_across_devices else 1
        steps = self.current_gradient_accumulation_steps if summed else 1
        if g.aux_loss is not None:
            aux = g.aux_loss * outputs.aux_loss.to(loss.device)
            loss = loss - processes * aux
            self._note_routing(outputs)
        if g.distiller is not None and not g.chunked_loss:
            distill_loss = g.distiller.loss(outputs.logits, inputs["input_ids"], labels, num_items_in_batch, inputs.get("position_ids"))
            loss = (1 - g.distiller.alpha) * loss + g.distiller.alpha * processes * distill_loss
        if g.aux_loss is not None:
            loss = loss + aux / steps
        return (loss, outputs) if return_outputs else loss

    def _in_chunks(self, inputs: Mapping[str, Any], tokens: Any) -> AbstractContextManager[None]:
        """Inside, the model's forward returns the loss of text and teachers together."""
        from hf_grow.training.distillation.chunked_loss import chunked_loss
        from hf_grow.training.distillation.head import Head

        return chunked_loss(
            Head(self.model), inputs["labels"], tokens, distiller=self.growth.distiller, input_ids=inputs["input_ids"],
            position_ids=inputs.get("position_ids"), scale=self.loss_scale(),
        )  # fmt: skip

    def _note_routing(self, outputs: Any) -> None:
        """Expert load of the last micro-batch: router loss (top_k when balanced), largest load (1 when balanced), dead experts."""
        import torch

        if not self.accelerator.sync_gradients:
            return
        with torch.no_grad():
            config = self.model.config
            loads = []
            for logits in outputs.router_logits:
                chosen = logits.float().topk(config.num_experts_per_tok, dim=-1).indices
                loads.append(torch.bincount(chosen.flatten(), minlength=logits.shape[-1]).float() / chosen.numel() * logits.shape[-1])
            load = torch.stack(loads)
            self._routing = {"aux_loss": outputs.aux_loss.detach(), "expert_load_max": load.max(), "experts_idle": (load == 0).sum()}

    def _get_grad_norm(self, model: Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._grad_norm = float(norm)
        return norm

    def loss_scale(self) -> float:
        """What a GradScaler multiplies the loss by, 1 without one. It decreases when a step is skipped."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def note_loss_scale(self) -> None:
        """Called before a step, for `step_skipped` after it."""
        self._scale_before_step = self.loss_scale()

    def step_skipped(self) -> bool:
        """Whether a GradScaler skipped the last step because a gradient overflowed."""
        # Not accelerate's step_was_skipped: a fused optimizer is called even then, and does nothing.
        return self.loss_scale() < self._scale_before_step

    def lr_factors(self) -> LrFactors:
        """Multiples of the schedule's learning rate for the next step."""
        g, m, since = self.growth, self.growth_state.monitor, self.steps_since_growth
        warmup_step = since - m.warmup_from if m.extra_warmup else since
        return LrFactors(g.after_growth.factor(since) * m.lr_factor_at(since), g.warmup.lr_factor(warmup_step, m.extra_warmup))

    # ---- training, monitoring, rollback -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        """As Trainer.train; ``resume_from_checkpoint=True`` takes the newest complete checkpoint, and starts from the beginning if there is none."""
        output_dir = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(output_dir) or "")
            if not resume_from_checkpoint:
                self.growth.events.notify(f"{output_dir} has no complete checkpoint yet; training starts from the beginning.")
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        resumed = checkpoint is not None and Path(checkpoint).resolve().parent == output_dir.resolve()
        self.opening_event = "resume" if resumed else "start"
        self.hooks.before_training(self, resumed)
        if self.growth.distiller is not None:
            self.growth.distiller.prepare(self.accelerator)
        while True:
            try:
                self.resumed_from = checkpoint
                self.set_data_position(Path(checkpoint) if checkpoint else None)
                return super().train(resume_from_checkpoint=checkpoint, **options)
            except Rollback as rollback:
                checkpoint = rollback.checkpoint
                self._step_loss = None
                self.store_flos()
                self.rolled_back = True

    def monitor_step(self) -> None:
        """Gives the monitor the last step's loss and gradient norm, and carries out the reaction."""
        import torch

        step = self.state.global_step
        assert self._step_loss is not None
        mean = self._step_loss
        if self.accelerator.num_processes > 1:  # all processes must take the same decision
            mean = self.accelerator.gather(mean.reshape(1)).mean()
        loss, self._step_loss = float(torch.as_tensor(mean)), None
        norm = None if self.step_skipped() else self._grad_norm  # an overflow that the GradScaler handles is no instability
        for finding in self.growth_state.monitor.step(self.steps_since_growth - 1, loss, norm):
            self.growth.events.write(finding.event, step, **finding.facts)
            if finding.event == "instability":
                self._react()
                if finding.facts["signal"] == "nonfinite" and not self.all_finite():
                    last = last_checkpoint(Path(self.args.output_dir))
                    raise ExecutionError(
                        f"Training diverged: the weights are not finite after step {step}.",
                        hint="Lower learning_rate (or lambda of the regularizer), or use more warmup_steps. "
                        + (f"The last checkpoint before it is {last.name}." if last is not None else "There is no earlier checkpoint."),
                    )
        self._pending = (loss, norm)
        if not self.control.should_evaluate:
            self.after_measurement({})

    def after_measurement(self, evaluation: Mapping[str, float]) -> None:
        # Asks the stop condition about the last step, once; of a step that is evaluated, after its evaluation.
        stop, pending = self.growth.stop, self._pending
        self._pending = None
        if stop is None or pending is None:
            return
        loss, norm = pending
        if stop.uses_flops:
            self.store_flos()
        flops = float(self.state.total_flos)
        if stop.observe(step=int(self.state.global_step), flops=flops, loss=loss, grad_norm=norm, evaluation=evaluation):
            self.control.should_training_stop = self.control.should_save = True

    def all_finite(self) -> bool:
        """Whether all weights, of all processes, are finite."""
        import torch

        shards = [local(getattr(p, "ds_tensor", p).detach()) for p in self.model.parameters()]  # ZeRO-3: ds_tensor is this process's shard
        finite = torch.stack([torch.isfinite(p).all().to(self.args.device) for p in shards])
        return bool(self.accelerator.gather(finite.all().reshape(1)).all())

    def _react(self) -> None:
        monitor, step = self.growth_state.monitor, self.state.global_step
        last = last_checkpoint(Path(self.args.output_dir))
        back = 0 if last is None else step - int(last.name.rpartition("-")[2])
        reaction = monitor.react(self.steps_since_growth - 1, None if last is None else str(last), back)
        self.growth.events.write(reaction.event, step, **reaction.facts)
        if reaction.facts["action"] == "rollback" and last is not None:
            if self.args.should_save:  # so that a run resumed from there knows the reaction
                path = last / GROWTH_STATE
                state = read_json(path)
                state["monitor"] |= monitor.reaction_state()
                write_json(path, state)
            self.save_data_position(last)  # after the batches before the instability
            self.accelerator.wait_for_everyone()
            raise Rollback(str(last))
