"""Every trigger against a plain loop."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from pydantic import ValidationError

from hf_grow.errors import InputError
from hf_grow.training.config.trigger_options import Until
from hf_grow.training.stages.forecast import Curve, GrowthForecast, StageGrowth, fit
from hf_grow.training.stages.triggers import Observation, StageEnd


def run(losses: list[float], tokens: int = 100, **evaluations: dict[int, float]) -> list[Observation]:
    return [
        Observation(
            i, i * tokens, i * tokens * 6.0, i * 0.5, share=i / len(losses), loss=loss, grad_norm=loss / 2,
            evaluation={n: at[i] for n, at in evaluations.items() if i in at},
        )
        for i, loss in enumerate(losses, 1)
    ]  # fmt: skip


def first(options: dict[str, Any], seen: list[Observation], resumed_at: int = -1, **more: Any) -> int | None:
    """The step at which a stage ends; ``resumed_at``: with its state through JSON there."""
    end = StageEnd(Until.model_validate(options, strict=True), **more)
    for i, observation in enumerate(seen, 1):
        if i == resumed_at:
            saved = json.loads(json.dumps(end.state(), allow_nan=False))
            end = StageEnd(Until.model_validate(options), **more)
            end.load(saved)
        if end.observe(observation):
            assert end.reason
            return i
    return None


WAVE = [4.0 - 0.3 * min(i, 9) + 0.1 * math.sin(i) for i in range(40)]


@pytest.mark.parametrize(("options", "step"), [
    ({"steps": 5}, 5), ({"tokens": 450}, 5), ({"tokens": "0.5K"}, 5), ({"flops": "2700"}, 5), ({"flops": 2701.0}, 5), ({"time": 2.4}, 5),
    ({"time": "3s"}, 6), ({"share": 0.25}, 10), ({"steps": 100}, None),
])  # fmt: skip
def test_amounts(options: dict[str, Any], step: int | None) -> None:
    assert first(options, run(WAVE)) == step


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("patience", [1, 4])
@pytest.mark.parametrize("min_delta", [0.0, 0.05])
def test_plateau_of_the_training_loss(every: int, patience: int, min_delta: float) -> None:
    best, waited, expected = math.inf, 0, None
    for i in range(every, len(WAVE) + 1, every):
        value = sum(WAVE[i - every : i]) / every
        if value < best * (1 - 0.01) - min_delta:
            best, waited = value, 0
        else:
            waited += 1
            if waited == patience:
                expected = i
                break
    options = {"plateau": {"every": every, "patience": patience, "threshold": 0.01, "min_delta": min_delta}}
    assert first(options, run(WAVE)) == expected
    assert all(first(options, run(WAVE), resumed_at=at) == expected for at in (2, 8, 11, 20))


def test_plateau_of_a_named_set_ignores_other_evaluations() -> None:
    old = {5: 3.0, 10: 2.0, 15: 2.0, 20: 1.99, 25: 1.0}
    seen = run(WAVE, old=old, new=dict.fromkeys(range(1, 40), 1.0))
    assert first({"plateau": {"on": "old", "patience": 2, "threshold": 0.01}}, seen) == 20
    assert first({"plateau": {"on": "old", "patience": 1, "threshold": 0.0, "min_delta": 0.0}}, seen) == 15


def test_metrics() -> None:
    seen = run(WAVE, old={4: 2.0, 8: 1.5, 12: 1.6, 16: 1.4}, forgetting={4: 0.0, 8: 0.2})
    assert first({"metric": {"name": "old", "below": 1.5}}, seen) == 8
    assert first({"metric": {"name": "old", "below": 1.6, "patience": 3}}, seen) == 16
    assert first({"metric": {"name": "forgetting", "above": 0.1}}, seen) == 8
    assert first({"metric": {"name": "loss", "below": 2.0}}, seen) == next(i for i, x in enumerate(WAVE, 1) if x <= 2.0)
    assert first({"metric": {"name": "grad_norm", "below": 1.0}}, seen) == next(i for i, x in enumerate(WAVE, 1) if x / 2 <= 1.0)


def test_joined() -> None:
    seen = run(WAVE, old={4: 2.0, 8: 1.5})
    assert first({"any": [{"steps": 9}, {"metric": {"name": "old", "below": 1.5}}]}, seen) == 8
    assert first({"all": [{"steps": 9}, {"metric": {"name": "old", "below": 1.5}}]}, seen) == 9
    assert first({"all": [{"steps": 3}, {"any": [{"tokens": 700}, {"time": "1m"}]}]}, seen) == 7


def test_floor_and_ceiling() -> None:
    seen = run(WAVE)
    assert first({"steps": 3, "not_before": {"steps": 6}}, seen) == 6
    assert first({"steps": 3, "not_before": {"steps": 2, "tokens": 800}}, seen) == 8
    assert first({"steps": 30, "at_latest": {"tokens": 1100}}, seen) == 11
    assert first({"metric": {"name": "old", "below": 0}, "at_latest": {"steps": 4}}, seen) == 4


@pytest.mark.parametrize("options", [
    {"steps": 3, "tokens": 5}, {}, {"plateau": {}, "steps": 2}, {"any": []}, {"metric": {"name": "loss"}}, {"metric": {"name": "x", "below": 1.0, "above": 2.0}},
    {"time": "3 weeks"}, {"steps": 0}, {"not_before": {}, "steps": 4}, {"share": 2.0},
])  # fmt: skip
def test_what_is_no_trigger(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Until.model_validate(options, strict=True)


@pytest.mark.parametrize("law", [(1.7, 20.0, 0.28), (0.5, 900.0, 0.5), (0.0, 3.0, 0.1)])
def test_fit_finds_a_power_law(law: tuple[float, float, float]) -> None:
    offset, factor, exponent = law
    tokens = [1e4 * i for i in range(1, 60)]
    found = fit(Curve(tokens, [offset + factor * t**-exponent for t in tokens]))
    assert found.exponent == pytest.approx(exponent, abs=0.011)
    for t in (2e5, 6e5, 5e6):
        assert found(t) == pytest.approx(offset + factor * t**-exponent, abs=0.01)


def test_fit_of_a_curve_that_does_not_fall() -> None:
    draw = random.Random(0)
    tokens = [float(t) for t in range(1, 30)]
    assert fit(Curve(tokens, [2.0] * 29))(1e9) == pytest.approx(2.0)
    rising = fit(Curve(tokens, [2.0 + 0.01 * t + 0.001 * draw.random() for t in tokens]))
    assert rising.factor == 0.0


def test_forecast_agrees_with_a_known_surface() -> None:
    """On Chinchilla's own surface the forecast agrees with it: growing pays for a saturated model, not for a young one, nor without budget."""

    def surface(n: float, d: float) -> float:
        return 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28

    small, large = 10_000_000, 80_000_000

    def same_loss(loss: float, low: float, high: float) -> float:
        """Tokens at which the large model has this loss."""
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if surface(large, middle) > loss else (low, middle)
        return low

    answers = []
    for unit, share in ((1e5, 1.0), (1e7, 1.0), (1e7, 300.0), (1e7, 0.0)):
        tokens = [unit * i for i in range(1, 80)]
        spent = 6 * small * tokens[-1]
        left = share * spent
        forecast = GrowthForecast((small, large), (6.0 * small, 6.0 * large), spent + left)
        without, with_growth = forecast.compare(Curve(tokens, [surface(small, t) for t in tokens]), tokens[-1], spent)
        end = surface(small, tokens[-1] + left / (6 * small))
        assert without == pytest.approx(end, abs=0.02)
        grown = surface(large, same_loss(surface(small, tokens[-1]), 1.0, tokens[-1]) + left / (6 * large))
        answers.append(grown < end - 1e-6)
        assert (with_growth < without - 1e-6) is answers[-1]
    assert answers == [False, True, True, False]
    known = GrowthForecast((small, large), (1.0, 1.0), 1.0, {2_000_000: 1.69 + 406.4 * 2e6**-0.34})
    assert known.gain(1.69 + 406.4 * small**-0.34) == pytest.approx(406.4 * (small**-0.34 - large**-0.34), rel=1e-9)


def test_forecast_as_a_trigger() -> None:
    falling = [3.0 + 40.0 / (i + 10) for i in range(200)]
    growth = StageGrowth((1_000_000, 8_000_000), (6e6, 4.8e7), spent=2e15)
    forecast = GrowthForecast((1_000_000, 8_000_000), (6e6, 4.8e7), 1e16)
    options = {"forecast": {"budget": "1.2e16", "every": 5, "min_points": 6, "skip": 0.0}}
    seen = [Observation(i, i * 1000, i * 6e9, i, loss=x) for i, x in enumerate(falling, 1)]
    expected, curve = None, Curve([], [])
    for i in range(5, 201, 5):
        curve.add(i * 1000, math.fsum(falling[i - 5 : i]) / 5)
        if len(curve) >= 6 and (pair := forecast.compare(curve, i * 1000, i * 6e9)) and pair[1] < pair[0]:
            expected = i
            break
    assert expected is not None and first(options, seen, growth=growth) == expected
    assert first(options, seen, resumed_at=expected - 3, growth=growth) == expected
    with pytest.raises(InputError, match="does not grow"):
        first(options, seen)
