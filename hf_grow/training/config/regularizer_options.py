"""Options of the penalty (`regularizer`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from hf_grow.options import Options, Requires


def _paths(value: Any) -> Any:
    """One file, or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(Path(v) if isinstance(v, str) else v for v in values)


PenaltyKind = Literal["ewc", "online-ewc", "si", "l2sp"]
_ANY_PENALTY = Requires("kind", get_args(PenaltyKind))


class PenaltyOptions(Options):
    """The penalty 1/2 lambda sum F (w - w*)^2, where w* are the initial weights of the training."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    kind: Literal["none", PenaltyKind] = "none"
    """F: the Fisher diagonal (ewc), that of several tasks (online-ewc), importance from the training path (si), one number for all weights (l2sp)."""
    lambda_: Annotated[float, Field(ge=0, alias="lambda"), _ANY_PENALTY] = 10.0
    """Strength. F is per token, so lambda does not depend on the batch size; try 1, 10 and 100, or hf-grow fisher --calibrate."""
    fisher: Annotated[tuple[Path, ...], BeforeValidator(_paths), _ANY_PENALTY] = ()
    """File written by `hf-grow fisher`; for online-ewc several, oldest task first; for si an importance file; for l2sp its mean is F."""
    form: Annotated[Literal["loss", "proximal"], _ANY_PENALTY] = "loss"
    """A term of the loss, or decoupled: an exact proximal step after the optimizer's, outside momentum and Adam's scaling.
    Its lambda is another: in our measurement about a thousand times that of `loss` had the same effect."""
    storage: Annotated[Literal["fp32", "bf16"], _ANY_PENALTY] = "fp32"
    """Dtype of F and w* in memory. For a checkpoint in bf16, w* in bf16 is exact."""
    over: Annotated[Literal["all", "inherited"], _ANY_PENALTY] = "all"
    """Weights with a penalty: all, or those inherited from the source (which forgot more in our measurement)."""
    collapsed: bool = False
    """After width growth: the penalty on B_out^T W A_in, the source's coordinates, with the source's Fisher; F and w* then have the source's size."""
    decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    """online-ewc: factor on an older task's Fisher for each later task (gamma)."""
    xi: Annotated[float, Field(gt=0), Requires("kind", ("si",))] = 1e-3
    """si: damping in omega / (distance^2 + xi)."""
    consolidate_every: Annotated[int, Field(ge=1)] | None = None
    """si: steps between consolidations, which turn the path into importance and move w* to the current weights. Default: once, at the end."""

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        mistakes = []
        if self.kind == "ewc" and len(self.fisher) != 1:
            mistakes.append(f"kind ewc needs one file as fisher, got {len(self.fisher)} (hf-grow fisher MODEL --text OLD_DATA -o FILE)")
        if self.kind == "online-ewc" and not self.fisher:
            mistakes.append("kind online-ewc needs files as fisher, oldest task first")
        if self.kind in ("si", "l2sp") and len(self.fisher) > 1:
            mistakes.append(f"kind {self.kind} takes one file as fisher, got {len(self.fisher)}")
        if self.collapsed and self.kind != "ewc":
            mistakes.append(f"collapsed belongs to kind ewc, not {self.kind}")
        if self.collapsed and (self.form != "loss" or self.over != "all"):
            mistakes.append("collapsed works only with form loss and over all; remove form and over")
        if self.decay != 1.0 and self.kind != "online-ewc":
            mistakes.append(f"decay belongs to kind online-ewc, not {self.kind}")
        if self.consolidate_every is not None and self.kind != "si":
            mistakes.append(f"consolidate_every belongs to kind si, not {self.kind}")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def non_defaults(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_defaults=True, by_alias=True)
