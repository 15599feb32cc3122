"""The arms of `forgetting.py`: what each changes in the common recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stage import Stage

Change = Callable[[Stage, str], Mapping[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One way to continue training. Each of ``changes`` gives keys of the recipe for a stage and a growth."""

    name: str
    family: str
    """Colour in the plot."""
    changes: tuple[Change, ...] = ()
    growth: str = ""
    steps: float = 1.0
    """Factor for the number of steps."""
    rate: float = 1.0
    """Factor for the learning rate."""
    old_data: bool = False
    """It needs text of the old domain."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, stage: Stage) -> dict[str, Any]:
        s = stage.settings
        steps = round(s.steps * self.steps)
        every = max(1, steps // s.evaluations)
        data: dict[str, Any] = {
            "train": stage.text("new"), "seq_length": s.length, "seed": stage.seed, "bos": "always",
            "eval": {n: {"path": stage.text(f"{n}-heldout"), "sequences": s.rows} for n in ("old", "new")},
            "cache": str(stage.folder / "packed"),
        }  # fmt: skip
        recipe: dict[str, Any] = {
            "model": stage.model(self.growth), "data": data, "max_steps": steps, "per_device_train_batch_size": s.batch,
            "per_device_eval_batch_size": 32, "learning_rate": s.rate * self.rate, "lr_scheduler_type": "cosine", "warmup_steps": max(1, steps // 12),
            "eval_steps": every, "logging_steps": every, "save_strategy": "no", "seed": stage.seed, "use_cpu": True,
        }  # fmt: skip
        for change in self.changes:
            for key, value in change(stage, self.growth).items():
                recipe[key] = {**recipe[key], **value} if isinstance(recipe.get(key), dict) else value
        return {**recipe, **self.extra}


def ewc(strength: float, kind: str = "old", **options: Any) -> Change:
    return lambda stage, growth: {"regularizer": {"kind": "ewc", "lambda": strength, "fisher": stage.fisher(kind, growth), **options}}


def collapsed(strength: float, kind: str = "old") -> Change:
    return lambda stage, growth: {"regularizer": {"kind": "ewc", "lambda": strength, "fisher": stage.fisher(kind, ""), "collapsed": True}}


def si(strength: float) -> Change:
    return lambda stage, growth: {"regularizer": {"kind": "si", "lambda": strength, "fisher": stage.fisher("si", growth)}}


def l2sp(strength: float) -> Change:
    """Weighted by the mean of the Fisher, so that lambda is comparable with EWC's."""
    return lambda stage, growth: {"regularizer": {"kind": "l2sp", "lambda": strength, "fisher": stage.fisher("old", growth)}}


def replay(share: float) -> Change:
    return lambda stage, growth: {"data": {"replay": {"path": stage.text("old"), "share": share}}}


def self_replay(share: float) -> Change:
    return lambda stage, growth: {"data": {"replay": {"path": stage.sampled, "share": share}}}


def distill(alpha: float, temperature: float = 1.0) -> Change:
    return lambda stage, growth: {"distill": {"teachers": [{"model": stage.model("")}], "alpha": alpha, "temperature": temperature}}


def only(*parts: str) -> Change:
    return lambda stage, growth: {"train": list(parts)}


def lora(rank: int) -> Change:
    return lambda stage, growth: {"lora": {"r": rank, "alpha": 2 * rank}}


SOURCE = [
    Arm("fine-tuning", "plain"),
    Arm("fine-tuning, LR / 3", "plain", rate=1 / 3),
    Arm("fine-tuning, LR / 10", "plain", rate=0.1),
    Arm("fine-tuning, LR x 2", "plain", rate=2),
    Arm("fine-tuning, half the steps", "plain", steps=0.5),
    Arm("EWC 1", "ewc", (ewc(1),), old_data=True),
    Arm("EWC 10", "ewc", (ewc(10),), old_data=True),
    Arm("EWC 100", "ewc", (ewc(100),), old_data=True),
    Arm("EWC 10000, proximal", "ewc", (ewc(10_000, form="proximal"),), old_data=True),
    Arm("EWC 10, Fisher on sampled text", "ewc", (ewc(10, "self"),)),
    Arm("SI 1", "si", (si(1),), old_data=True),
    Arm("SI 10", "si", (si(10),), old_data=True),
    Arm("L2-SP 1", "l2sp", (l2sp(1),), old_data=True),
    Arm("L2-SP 10", "l2sp", (l2sp(10),), old_data=True),
    Arm("replay 1 %", "replay", (replay(0.01),), old_data=True),
    Arm("replay 5 %", "replay", (replay(0.05),), old_data=True),
    Arm("self-replay 5 %", "self-replay", (self_replay(0.05),)),
    Arm("self-replay 25 %", "self-replay", (self_replay(0.25),)),
    Arm("EWC 10 + replay 5 %", "ewc + replay", (ewc(10), replay(0.05)), old_data=True),
    Arm("EWC 10 + self-replay 5 %", "ewc + self-replay", (ewc(10, "self"), self_replay(0.05))),
    Arm("EWC 10 + self-replay 25 %", "ewc + self-replay", (ewc(10, "self"), self_replay(0.25))),
    Arm("self-replay 50 %, 2 x steps", "self-replay", (self_replay(0.5),), steps=2),
    Arm("EWC 10 + self-replay 25 %, 1.35 x steps", "ewc + self-replay", (ewc(10, "self"), self_replay(0.25)), steps=1.35),
    Arm("EWC 10 + self-replay 50 %, 2 x steps, LR x 2", "ewc + self-replay", (ewc(10, "self"), self_replay(0.5)), steps=2, rate=2),
    Arm(
        "EWC 10 + self-replay 25 % + distillation 0.3, 2 x steps, LR x 2",
        "ewc + self-replay",
        (ewc(10, "self"), self_replay(0.25), distill(0.3)),
        steps=2,
        rate=2,
    ),
    Arm("distillation 0.5", "distillation", (distill(0.5),)),
    Arm("LoRA r16, LR x 3", "lora", (lora(16),), rate=3),
]
GROWN = [
    Arm("depth: fine-tuning", "plain", growth="depth"),
    Arm("depth: only new blocks", "frozen", (only("new"),), growth="depth"),
    Arm("depth: EWC 10", "ewc", (ewc(10),), growth="depth", old_data=True),
    Arm("depth: EWC 10, inherited only", "ewc", (ewc(10, over="inherited"),), growth="depth", old_data=True),
    Arm("depth: replay 5 %", "replay", (replay(0.05),), growth="depth", old_data=True),
    Arm("depth: self-replay 25 %", "self-replay", (self_replay(0.25),), growth="depth"),
    Arm("depth: EWC 10 + self-replay 25 %", "ewc + self-replay", (ewc(10, "self"), self_replay(0.25)), growth="depth"),
    Arm(
        "depth: EWC 10 + self-replay 25 %, 1.35 x steps",
        "ewc + self-replay",
        (ewc(10, "self"), self_replay(0.25)),
        growth="depth",
        steps=1.35,
    ),
    Arm("depth: LoRA r16, new in full, LR x 3", "lora", (lora(16),), growth="depth", rate=3),
    Arm("width: fine-tuning", "plain", growth="width"),
    Arm("width: EWC 10, mapped", "ewc", (ewc(10, "mapped"),), growth="width", old_data=True),
    Arm("width: EWC 10, collapsed", "ewc", (collapsed(10),), growth="width", old_data=True),
    Arm("width: EWC 10, collapsed + self-replay 25 %", "ewc + self-replay", (collapsed(10, "self"), self_replay(0.25)), growth="width"),
    Arm("FFN: only new units", "frozen", (only("new"),), growth="ffn"),
]
ARMS = {arm.name: arm for arm in (*SOURCE, *GROWN)}
