"""Regularizers for `GrowTrainer(regularizer=...)`: each gives the options of a kind; docs/regularizers.md says what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_grow.options import parse
from hf_grow.training.config.regularizer_options import PenaltyOptions


def _options(name: str, kind: str, strength: float, fisher: Any, options: dict[str, Any]) -> PenaltyOptions:
    files = [] if fisher is None else fisher if isinstance(fisher, list | tuple) else [fisher]
    data = {"kind": kind, "lambda": strength, "fisher": [Path(f) for f in files], **options}
    return parse(PenaltyOptions, data, where=name, strict=False)


def EWC(fisher: str | Path, *, strength: float = 10.0, **options: Any) -> PenaltyOptions:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796): 1/2 strength sum F (w - w*)^2.

    ``fisher``: the file that `hf-grow fisher` wrote; ``options``: form, storage, over, collapsed. Raises InputError for what does not fit.
    """
    return _options("EWC", "ewc", strength, fisher, options)


def OnlineEWC(fisher: Sequence[str | Path], *, strength: float = 10.0, decay: float = 1.0, **options: Any) -> PenaltyOptions:
    """EWC over several tasks (Schwarz et al. 2018, arXiv 1805.06370). ``fisher``: files, oldest task first; ``decay``: gamma per later task."""
    return _options("OnlineEWC", "online-ewc", strength, list(fisher), {"decay": decay, **options})


def SI(importance: str | Path | None = None, *, strength: float = 10.0, **options: Any) -> PenaltyOptions:
    """Synaptic intelligence (Zenke et al. 2017, arXiv 1703.04200). ``importance``: file of an earlier training; ``options``: also xi, consolidate_every."""
    return _options("SI", "si", strength, importance, options)


def L2SP(fisher: str | Path | None = None, *, strength: float = 10.0, **options: Any) -> PenaltyOptions:
    """L2 to the starting point (Li et al. 2018, arXiv 1802.01483): one F for all weights, the mean of ``fisher``, else 1."""
    return _options("L2SP", "l2sp", strength, fisher, options)
