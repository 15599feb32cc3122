"""What a training costs, logs and measures: the ledger, log lines, evaluations of the named sets, contributions of new blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_grow.model.flops import Batch
from hf_grow.training.param_updates.updates import LrFactors
from hf_grow.training.trainer.ledger import sum_over_processes
from hf_grow.training.trainer.saving import CheckpointTrainer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class EvaluationTrainer(CheckpointTrainer):
    """Trainer with a ledger, an event log, and measurements between steps."""

    last_factors: LrFactors
    _routing: dict[str, Tensor]
    _trained: Batch
    _evaluated: Batch

    def after_measurement(self, evaluation: Mapping[str, float]) -> None:
        """Called with the losses of all named sets, forgetting and kl, once they are logged."""

    # ---- what it costs ------------------------------------------------------------------------------------------------------------------

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        flops = self.growth.flops
        return int(super().floating_point_ops(inputs) if flops is None else flops.training(flops.batch(inputs)))

    def prediction_step(self, model: Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        self.count_evaluation(inputs)
        return super().prediction_step(model, inputs, *args, **options)

    def count_evaluation(self, inputs: Mapping[str, Any]) -> None:
        """Notes a forward pass over these inputs that measures something."""
        self._evaluated += self._batch(inputs)

    def _batch(self, inputs: Mapping[str, Any]) -> Batch:
        """What the ledger counts of a batch in this process: nothing in all but one of those that share its sequences."""
        flops = self.growth.flops
        return Batch() if flops is None or self.args.process_index % self.get_cp_size() else flops.batch(inputs)

    def store_flos(self) -> None:
        """Called by Trainer before logs and checkpoints, in all processes."""
        g = self.growth
        if g.flops is None:
            super().store_flos()
            return
        g.flops.spend(g.ledger, self._trained, self._evaluated)
        self._trained, self._evaluated = Batch(), Batch()
        g.ledger.collect(lambda counts: sum_over_processes(self.accelerator, counts))
        self.state.total_flos, self.current_flos = g.ledger.training, 0

    def ledger_facts(self) -> dict[str, Any]:
        """FLOPs by purpose, for events and results; nothing without a count."""
        return {} if self.growth.flops is None else {"flops_by_purpose": self.growth.ledger.by_purpose()}

    # ---- logs and evaluations -----------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        g = self.growth
        if "loss" in logs:
            factors = self.last_factors
            if g.penalty is not None:
                logs["penalty"] = float(g.penalty.value())
            if factors.all != 1.0:
                logs["lr_factor"] = factors.all
            if factors.new != 1.0:
                logs["lr_factor_new"] = factors.new
            if g.residual_scale is not None and g.residual_scale.alpha != 1.0:
                logs["alpha"] = g.residual_scale.alpha
            logs |= {name: float(value) for name, value in self._routing.items()}
        super().log(logs, start_time)
        if "loss" in logs:
            g.events.write("log", self.state.global_step, **logs, flops=self.state.total_flos, **self.ledger_facts())

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None and metric_key_prefix == "eval":
            self._record_evaluation(metrics)
        return metrics

    def _record_evaluation(self, metrics: dict[str, float]) -> None:
        g, growth_state, step = self.growth, self.growth_state, int(self.state.global_step)
        losses = set_losses(metrics)
        for name, loss in losses.items():
            growth_state.start_losses.setdefault(name, loss)
        growth_state.last_losses, growth_state.evaluated_at = dict(losses), step
        facts: dict[str, Any] = {"losses": losses}
        if g.old_set in losses:
            facts["forgetting"] = losses[g.old_set] - growth_state.baseline(g.old_set)
        if (kl := self.hooks.source_kl(self.model)) is not None:
            facts["kl"] = kl
            for inputs in self.hooks.kl_inputs():
                self.count_evaluation(inputs)
        extra_metrics = {f"eval_{k}": v for k, v in facts.items() if k != "losses"}
        metrics |= extra_metrics
        if extra_metrics:
            self.log(dict(extra_metrics))  # for trackers and log_history, like Trainer's own metrics
        if self.args.metric_for_best_model in extra_metrics:  # Trainer calls on_evaluate once per set, without these
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, extra_metrics)
        g.events.write("evaluation", step, **facts)
        self.after_measurement({**losses, **{k: v for k, v in facts.items() if k != "losses"}})
        self.hooks.after_evaluation(self.state, metrics)
        for name, loss in losses.items():
            if loss > growth_state.baseline(name) + g.monitor.regression:
                g.events.write("regression", step, set=name, loss=loss, baseline=growth_state.baseline(name))
        every = g.monitor.contribution_steps
        due = every and self.steps_since_growth % every < max(1, round(self.state.eval_steps or 1))
        if due and step and growth_state.contributed_at != step:
            self.contributions()

    def contributions(self) -> dict[str, dict[int, float]]:
        """For each named set (its first rows), the loss without each new block minus the loss with all of them."""
        scale = self.growth.residual_scale
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        deltas: dict[str, dict[int, float]] = {}
        if scale is None or not self.eval_dataset:
            return deltas
        self.growth_state.contributed_at = int(self.state.global_step)
        for name, rows in sets.items():
            subset = rows.select(range(min(len(rows), self.growth.monitor.rows))) if hasattr(rows, "select") else rows
            full_loss = self._loss_on(subset)
            deltas[name] = {}
            for block in scale.layers:
                with scale.without(block):
                    deltas[name][block] = self._loss_on(subset) - full_loss
            self.growth.events.write("contribution", self.state.global_step, set=name, loss=full_loss, blocks=deltas[name])
        return deltas

    def _loss_on(self, rows: Any) -> float:
        """Mean loss, without callbacks or logs of an evaluation."""
        output = self.evaluation_loop(self.get_eval_dataloader(rows), "", prediction_loss_only=True, metric_key_prefix="part")
        return float(output.metrics["part_loss"])


def set_losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """{'eval_old_loss': 3.5} -> {'old': 3.5}; a single set is called eval."""
    losses = {k.removeprefix("eval_").removesuffix("_loss"): v for k, v in metrics.items() if k.startswith("eval_") and k.endswith("_loss")}
    return {("eval" if k == "loss" else k): v for k, v in losses.items()} if "eval_loss" not in metrics else {"eval": metrics["eval_loss"]}
