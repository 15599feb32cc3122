"""Training data: text sources are opened, tokenised, packed (cached) and mixed in exact shares."""

from hf_grow.training.config.data_options import DataOptions, EvalSource, ReplaySource, SelfReplay, TextOptions, TrainSource
from hf_grow.training.data.assemble import Collator, DataPart, TrainData, build, survey

__all__ = [
    "Collator", "DataOptions", "DataPart", "EvalSource", "ReplaySource", "SelfReplay", "TextOptions", "TrainData", "TrainSource", "build", "survey",
]  # fmt: skip
