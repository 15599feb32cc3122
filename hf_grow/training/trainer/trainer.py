"""BaseGrowTrainer: Trainer that knows what is new in a grown model, and keeps what is old.

Where things happen in one optimizer step, and why there:

    on_step_begin        alpha of new blocks and the phase are set: one value for all micro-batches
    compute_loss         distillation, and the router loss: Trainer sums micro-batches, so that one would count once for each
    training_step        after the last backward: + d(penalty)/dp (no second pass through a graph), frozen gradients go
    clipping             by Trainer, with the penalty in the norm
    on_pre_optimizer_step, on_optimizer_step    rates of new parts, frozen rows, whatever the penalty does around a step
    on_step_end          the monitor looks at loss and gradient norm
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common.safe_files import read_json
from hf_grow.errors import ExecutionError, InputError
from hf_grow.training.config.schedules import phase_at
from hf_grow.training.growth_state.state_files import GROWTH_STATE
from hf_grow.training.param_updates.masks import local
from hf_grow.training.param_updates.updates import LrFactors
from hf_grow.training.trainer.callbacks import GrowthCallback
from hf_grow.training.trainer.checkpointing import last_checkpoint, write_json
from hf_grow.training.trainer.saving import CheckpointTrainer
from hf_grow.training.trainer.state import Growing

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["BaseGrowTrainer", "Growing", "Rollback", "losses_of"]


class Rollback(Exception):
    """Training goes back to a checkpoint; raised in the middle of a step's end, caught by `BaseGrowTrainer.train`."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint


class BaseGrowTrainer(CheckpointTrainer):
    """Trainer with a `Growing`. Everything else, arguments and checkpoints included, is Trainer's."""

    def __init__(self, *args: Any, growing: Growing | None = None, **options: Any) -> None:
        self.growing = growing or Growing()
        super().__init__(*args, **options)
        if self.is_deepspeed_enabled and self.growing.acts_inside_a_step():
            raise InputError(
                "DeepSpeed keeps gradients and steps to itself: penalties, freezing of rows, phases and rates of new parameters do not work there.",
                hint="Use FSDP2 or DDP, or train without them.",
            )
        if self.growing.updates:
            self.growing.updates.freeze(self.model)
        self._step_loss: Tensor | None = None
        self._norm: float | None = None
        self._scale_before = 1.0
        self._routing: dict[str, Tensor] = {}
        self.resumed_from: Any = None
        self.used = LrFactors()
        """What learning rates were multiplied by in the last step."""
        self.add_callback(GrowthCallback(self))

    # ---- one step ---------------------------------------------------------------------------------------------------------------------

    def training_step(self, model: Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if self.accelerator.sync_gradients:
            g = self.growing
            if g.penalty is not None:
                g.penalty.add_gradient(self.loss_scale())
            if g.updates is not None:
                g.updates.gradients(self.model, phase_at(g.phases, self.since))
        return loss

    def compute_loss(
        self, model: Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        g = self.growing
        if g.aux_loss is not None:
            # Only in training: an evaluation loss with the router loss in it would be no cross-entropy.
            inputs = {**inputs, "output_router_logits": bool(model.training)}
        if not model.training or (g.aux_loss is None and g.distiller is None):
            found: Tensor | tuple[Tensor, Any] = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return found
        labels: Any = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # With a token count the micro-batches are summed and (across processes) their mean is taken of losses scaled by the process count.
        summed = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        processes = self.accelerator.num_processes if summed and self.args.average_tokens_across_devices else 1
        steps = self.current_gradient_accumulation_steps if summed else 1
        if g.aux_loss is not None:
            aux = g.aux_loss * outputs.aux_loss.to(loss.device)
            loss = loss - processes * aux
            self._note_routing(outputs)
        if g.distiller is not None:
            taught = g.distiller.loss(outputs.logits, inputs["input_ids"], labels, num_items_in_batch)
            loss = (1 - g.distiller.alpha) * loss + g.distiller.alpha * processes * taught
        if g.aux_loss is not None:
            loss = loss + aux / steps
        return (loss, outputs) if return_outputs else loss

    def _note_routing(self, outputs: Any) -> None:
        """How evenly the last micro-batch was spread: router loss (top_k when even), busiest expert (1 when even), idle experts."""
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
        self._norm = float(norm)
        return norm

    def loss_scale(self) -> float:
        """What a GradScaler multiplies the loss by; 1 without one. It falls when a step is left out."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def note_scale(self) -> None:
        """Before a step, for `skipped` after it."""
        self._scale_before = self.loss_scale()

    def skipped(self) -> bool:
        """Whether a GradScaler left the last step out, because a gradient overflowed: it does so until its scale fits."""
        # Not accelerate's step_was_skipped: a fused optimizer is called all the same, and does nothing.
        return self.loss_scale() < self._scale_before

    def rates(self) -> LrFactors:
        g, m = self.growing, self.growing.monitor
        own = self.since - m.warmup_from if m.extra_warmup else self.since
        return LrFactors(g.after.factor(self.since) * m.rate(self.since), g.warmup.lr_factor(own, m.extra_warmup))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        if self.growing.flops_per_token is None:
            return int(super().floating_point_ops(inputs))
        return int(self.growing.flops_per_token * inputs["input_ids"].numel())

    # ---- logs and evaluations -----------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        g = self.growing
        if "loss" in logs:
            rates = self.used
            if g.penalty is not None:
                logs["penalty"] = float(g.penalty.value())
            if rates.every != 1.0:
                logs["lr_factor"] = rates.every
            if rates.new != 1.0:
                logs["lr_factor_new"] = rates.new
            if g.blend is not None and g.blend.alpha != 1.0:
                logs["alpha"] = g.blend.alpha
            logs |= {name: float(value) for name, value in self._routing.items()}
        super().log(logs, start_time)
        if "loss" in logs:
            g.events.write("log", self.state.global_step, **logs, flops=self.state.total_flos)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None and metric_key_prefix == "eval":
            self._evaluated(metrics)
        return metrics

    def _evaluated(self, metrics: dict[str, float]) -> None:
        g, step = self.growing, self.state.global_step
        losses = losses_of(metrics)
        for name, loss in losses.items():
            g.start_losses.setdefault(name, loss)
        g.last_losses, g.evaluated_at = dict(losses), int(step)
        facts: dict[str, Any] = {"losses": losses}
        if g.old_set in losses:
            facts["forgetting"] = losses[g.old_set] - g.baseline(g.old_set)
        if g.kl is not None:
            facts["kl"] = g.kl(self.model)
        more = {f"eval_{k}": v for k, v in facts.items() if k != "losses"}
        metrics |= more
        if more:
            self.log(dict(more))  # for trackers and log_history, as Trainer's own metrics
        if self.args.metric_for_best_model in more:  # early stopping hears of one set at a time, and of these in none
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, more)
        g.events.write("evaluation", step, **facts)
        g.told(self.state, metrics)
        for name, loss in losses.items():
            if loss > g.baseline(name) + g.monitor.options.regression:
                g.events.write("regression", step, set=name, loss=loss, baseline=g.baseline(name))
        every = g.monitor.options.contribution_steps
        if (
            every
            and g.blend is not None
            and step
            and g.contributed_at != step
            and self.since % every < max(1, round(self.state.eval_steps or 1))
        ):
            self.contributions()

    def contributions(self) -> dict[str, dict[int, float]]:
        """For each named set (its first rows), the loss without each new block minus the loss with all of them."""
        g = self.growing
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        out: dict[str, dict[int, float]] = {}
        if g.blend is None or not self.eval_dataset:
            return out
        g.contributed_at = int(self.state.global_step)
        for name, rows in sets.items():
            few = rows.select(range(min(len(rows), g.monitor.options.rows))) if hasattr(rows, "select") else rows
            whole = self._loss_on(few)
            out[name] = {}
            for block in g.blend.layers:
                with g.blend.without(block):
                    out[name][block] = self._loss_on(few) - whole
            g.events.write("contribution", self.state.global_step, set=name, loss=whole, blocks=out[name])
        return out

    def _loss_on(self, rows: Any) -> float:
        """Mean loss, without telling callbacks or logs of an evaluation."""
        found = self.evaluation_loop(self.get_eval_dataloader(rows), "", prediction_loss_only=True, metric_key_prefix="part")
        return float(found.metrics["part_loss"])

    # ---- looking at what was done, going back --------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        while True:
            try:
                if resume_from_checkpoint is True:
                    resume_from_checkpoint = str(last_checkpoint(Path(self.args.output_dir)) or "") or None
                self.resumed_from = resume_from_checkpoint or None
                self.take_place(Path(self.resumed_from) if self.resumed_from else None)
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)
            except Rollback as back:
                resume_from_checkpoint = back.checkpoint
                self._step_loss = None

    def watch(self) -> None:
        """The monitor's look at the step that was just done, and its reaction."""
        import torch

        g, step = self.growing, self.state.global_step
        assert self._step_loss is not None
        mean = self._step_loss
        if self.accelerator.num_processes > 1:  # every process must come to the same decision
            mean = self.accelerator.gather(mean.reshape(1)).mean()
        loss, self._step_loss = float(torch.as_tensor(mean)), None
        norm = None if self.skipped() else self._norm  # an overflow that the scaler took care of is no instability
        for finding in g.monitor.step(self.since - 1, loss, norm):
            g.events.write(finding.event, step, **finding.facts)
            if finding.event == "instability":
                self._react()
                if finding.facts["signal"] == "nonfinite" and not self.sound():
                    last = last_checkpoint(Path(self.args.output_dir))
                    raise ExecutionError(
                        f"Training diverged: after step {step} weights are not finite.",
                        hint="Lower learning_rate (or lambda of the regularizer), or let warmup_steps be longer. "
                        + (f"{last.name} is from before." if last is not None else "There is no checkpoint from before."),
                    )

    def sound(self) -> bool:
        """Whether all weights, of all processes, are finite."""
        import torch

        own = [local(getattr(p, "ds_tensor", p).detach()) for p in self.model.parameters()]  # ZeRO-3 keeps its piece beside an empty one
        fine = torch.stack([torch.isfinite(p).all().to(self.args.device) for p in own])
        return bool(self.accelerator.gather(fine.all().reshape(1)).all())

    def _react(self) -> None:
        g, step = self.growing, self.state.global_step
        last = last_checkpoint(Path(self.args.output_dir))
        back = 0 if last is None else step - int(last.name.rpartition("-")[2])
        reaction = g.monitor.react(self.since - 1, None if last is None else str(last), back)
        g.events.write(reaction.event, step, **reaction.facts)
        if reaction.facts["action"] == "rollback" and last is not None:
            if self.args.should_save:  # a run that is resumed from there must know of the reaction too
                path = last / GROWTH_STATE
                state = read_json(path)
                state["monitor"] |= g.monitor.reacted()
                write_json(path, state)
            self.save_place(last)  # on behind the batches that led here
            self.accelerator.wait_for_everyone()
            raise Rollback(str(last))


def losses_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """{'eval_old_loss': 3.5} -> {'old': 3.5}; a single set is called eval."""
    found = {k.removeprefix("eval_").removesuffix("_loss"): v for k, v in metrics.items() if k.startswith("eval_") and k.endswith("_loss")}
    return {("eval" if k == "loss" else k): v for k, v in found.items()} if "eval_loss" not in metrics else {"eval": metrics["eval_loss"]}
