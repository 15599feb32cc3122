"""What a recipe says of the penalty."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from hf_grow.options import Options, Requires


def _paths(value: Any) -> Any:
    """One file, or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(Path(v) if isinstance(v, str) else v for v in values)


_SOME = Requires("kind", ("ewc", "online-ewc", "si", "l2sp"))


class PenaltyOptions(Options):
    """The penalty 1/2 lambda sum F (w - w*)^2, where w* are the weights that training starts from."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    kind: Literal["none", "ewc", "online-ewc", "si", "l2sp"] = "none"
    """What F is: the Fisher diagonal (ewc), several of them (online-ewc), the path's importance (si), one number for all weights (l2sp)."""
    lambda_: Annotated[float, Field(ge=0, alias="lambda"), _SOME] = 10.0
    """Strength. F counts per token, so one lambda serves every batch size; 1, 10 and 100 are worth trying."""
    fisher: Annotated[tuple[Path, ...], BeforeValidator(_paths), _SOME] = ()
    """File made by `hf-grow fisher`; for online-ewc several, oldest task first; for si a file of importances; for l2sp its mean is F."""
    form: Annotated[Literal["loss", "proximal"], _SOME] = "loss"
    """As a term of the loss, or decoupled: an exact proximal step after the optimizer's, which no momentum and no Adam scaling touches.
    It wants another lambda: about a thousand times that of `loss` did as much when it was measured."""
    storage: Annotated[Literal["fp32", "bf16"], _SOME] = "fp32"
    """Dtype in which F and w* are held. A checkpoint in bf16 loses nothing of w* in bf16."""
    over: Annotated[Literal["all", "inherited"], _SOME] = "all"
    """Weights that are held: all, or those that growth took from the source (holding these alone forgot more when it was measured)."""
    collapsed: bool = False
    """After width growth: the penalty on B_out^T W A_in, the source's own coordinates, with the source's Fisher; F and w* then have its size."""
    decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    """online-ewc: what an older task's Fisher counts for each task that came after it (gamma)."""
    xi: Annotated[float, Field(gt=0), Requires("kind", ("si",))] = 1e-3
    """si: damping in omega / (distance^2 + xi)."""
    consolidate_every: Annotated[int, Field(ge=1)] | None = None
    """si: steps after which the path so far becomes importance, and w* the weights reached. Default: only when the run is over."""

    @model_validator(mode="after")
    def _fit(self) -> Self:
        wrong = []
        if self.kind == "ewc" and len(self.fisher) != 1:
            wrong.append(f"kind ewc needs one file as fisher, got {len(self.fisher)} (hf-grow fisher MODEL --text OLD_DATA -o FILE)")
        if self.kind == "online-ewc" and not self.fisher:
            wrong.append("kind online-ewc needs files as fisher, oldest task first")
        if self.kind in ("si", "l2sp") and len(self.fisher) > 1:
            wrong.append(f"kind {self.kind} takes one file as fisher, got {len(self.fisher)}")
        if self.collapsed and self.kind != "ewc":
            wrong.append(f"collapsed belongs to kind ewc, not {self.kind}")
        if self.collapsed and (self.form != "loss" or self.over != "all"):
            wrong.append("collapsed has form loss and holds all inherited coordinates; leave form and over out")
        if self.decay != 1.0 and self.kind != "online-ewc":
            wrong.append(f"decay belongs to kind online-ewc, not {self.kind}")
        if self.consolidate_every is not None and self.kind != "si":
            wrong.append(f"consolidate_every belongs to kind si, not {self.kind}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def non_defaults(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_defaults=True, by_alias=True)
