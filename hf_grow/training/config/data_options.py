"""Options of the `data` section of a training recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from hf_grow.options import Count, Options, Requires
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.config.schedules import as_list


def _as_source(value: Any) -> Any:
    """A bare path is a source with defaults."""
    return {"path": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    values = [value] if isinstance(value, (str, dict)) else value
    return [_as_source(v) for v in values] if isinstance(values, list) else values


Paths = Annotated[list[str], BeforeValidator(as_list)]


class TextOptions(Options):
    """A source of text."""

    path: Paths
    """A folder, a file, a glob (corpus/**/*.md), a list of these, or the id of a Hub dataset (OWNER/NAME)."""
    name: str | None = None
    """Configuration of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    files: str | None = None
    """Glob of the files to read in the repository of a Hub dataset. Default: all of the split."""
    text_field: str | None = None
    """Column that contains the text. Default: text, else content, else the only column of strings."""
    limit: Count | None = Field(default=None, gt=0)
    """Maximum number of documents to read, from the start; a Hub dataset is then streamed instead of downloaded."""


class TrainSource(TextOptions):
    """One source of new text."""

    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Its share of the new text, relative to the other weights. Default: its size (streamed: all equal)."""


class EvalSource(TextOptions):
    """One named evaluation set."""

    sequences: int | None = Field(default=256, gt=0)
    """Maximum number of sequences, at even distances in the text; null takes all."""


class SelfReplay(ReplayOptions):
    """Text sampled from the source model, where its training data is not available."""

    model: str | None = None
    """Checkpoint to sample from, a folder or Hub id. Default: the source model that growth.json names."""
    revision: Annotated[str | None, Requires("model")] = None
    """Branch, tag or commit of that model on the Hub."""


class ReplaySource(TextOptions):
    """Old text that is mixed in, against forgetting."""

    path: Paths = Field(default_factory=list)
    """Old text: a folder, a file, a glob, a list of these, or the id of a Hub dataset. Either this or `self`."""
    share: float = Field(default=0.05, gt=0, lt=1)
    """Fraction of all training tokens that is old text."""
    self: SelfReplay | None = None
    """Sample the old text from the source model; {} uses the defaults."""

    @model_validator(mode="after")
    def _path_or_self(self_) -> Self:  # self_: `self` is a field
        if bool(self_.path) == (self_.self is not None):
            raise ValueError("give either path (old text) or self (text sampled from the source model)")
        if self_.self is not None and (unused := self_.model_fields_set & TextOptions.model_fields.keys() - {"path"}):
            raise ValueError(f"{', '.join(sorted(unused))} would have no effect: these options read text, and self samples it")
        return self_


class DataOptions(Options):
    """The texts of a training, and how they are packed into sequences."""

    train: Annotated[list[TrainSource], BeforeValidator(_as_sources), Field(min_length=1)]
    """New text: a source or a list of sources; each a mapping or a path."""
    replay: Annotated[ReplaySource | None, BeforeValidator(_as_source)] = None
    """Old text to mix in: path (or self) and share."""
    eval: dict[str, Annotated[EvalSource, BeforeValidator(_as_source)]] = Field(default_factory=dict)
    """Named evaluation sets, such as old and new."""
    seq_length: int = Field(default=1024, ge=2)
    """Tokens per training sequence."""
    bos: Literal["tokenizer", "always", "never"] = "tokenizer"
    """BOS before each document: as the tokenizer adds it, always or never. EOS always follows a document."""
    remainder: Literal["drop", "keep"] = "drop"
    """The last, partial sequence of a source: dropped, or kept and padded (padding is not trained on)."""
    shuffle: bool = True
    """Random order of the sequences, a new one for each pass over a source. Streamed text keeps its own order, unless shuffle_buffer is set."""
    shuffle_buffer: int | None = Field(default=None, gt=1)
    """With streaming: sequences of each source that are read ahead and shuffled. Default: none, the text's own order."""
    streaming: bool = False
    """Read and tokenise during training: nothing is cached, and max_steps must be set."""
    seed: int = Field(default=0, ge=0)
    """Random seed of the order."""
    intra_document_masking: bool = False
    """Attention within documents only, positions counted from the start of each, and no label at its first token."""
    num_proc: int | None = Field(default=None, gt=0)
    """Number of processes that tokenise. Default: 1; a fast tokenizer uses several threads."""
    cache: str | None = None
    """Cache folder for tokenised text. Default: hf-grow/data in HF_HOME, else in ~/.cache."""

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> Self:
        if len({s.weight is None for s in self.train}) > 1:
            raise ValueError("train: give a weight to every source or to none")
        return self

    @model_validator(mode="after")
    def _buffer_of_a_stream(self) -> Self:
        if self.shuffle_buffer is not None and not (self.streaming and self.shuffle):
            raise ValueError("shuffle_buffer: shuffles streamed text; set streaming: true (and not shuffle: false), or remove it")
        return self
