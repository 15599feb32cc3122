"""What a training recipe says of its data."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from hf_grow.options import Options, ParameterCount, Requires
from hf_grow.training.config.replay_options import ReplayOptions


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _source(value: Any) -> Any:
    """A bare path stands for a source with nothing else to say."""
    return {"path": value} if isinstance(value, str) else value


def _sources(value: Any) -> Any:
    values = [value] if isinstance(value, (str, dict)) else value
    return [_source(v) for v in values] if isinstance(values, list) else values


Paths = Annotated[list[str], BeforeValidator(_listed)]


class TextOptions(Options):
    """Where text comes from."""

    path: Paths
    """A folder, a file, a glob (corpus/**/*.md), a list of these, or the id of a data set on the Hub (OWNER/NAME)."""
    name: str | None = None
    """Configuration of a data set on the Hub."""
    split: str = "train"
    """Split of a data set on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub."""
    files: str | None = None
    """Only these files of a data set on the Hub, as a glob inside it."""
    text_field: str | None = None
    """Column that holds the text. Default: text, else content, else the only column of strings."""
    limit: ParameterCount | None = Field(default=None, gt=0)
    """Documents to read at most, from the start; a data set on the Hub is then streamed, not downloaded whole."""


class TrainSource(TextOptions):
    """One source of new text."""

    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Its part of the new text, in relation to the other weights. Default: by its size (streamed: all equal)."""


class EvalSource(TextOptions):
    """One named set that the model is measured on."""

    sequences: int | None = Field(default=256, gt=0)
    """Sequences to measure on at most, spread evenly over the text; null takes all."""


class SelfReplay(ReplayOptions):
    """Text sampled from the source model, for owners who have none of its training data."""

    model: str | None = None
    """Checkpoint to sample from, folder or Hub id. Default: what the model was grown from, as its growth.json says."""
    revision: Annotated[str | None, Requires("model")] = None
    """Branch, tag or commit of that model on the Hub."""


class ReplaySource(TextOptions):
    """Old text that is mixed in, so that the model keeps what it knows."""

    path: Paths = Field(default_factory=list)
    """Old text: a folder, a file, a glob, a list of these, or the id of a data set on the Hub. Either this or `self`."""
    share: float = Field(default=0.05, gt=0, lt=1)
    """Part of all training tokens that is old text."""
    self: SelfReplay | None = None
    """Sample the old text from the source model; {} takes the defaults."""

    @model_validator(mode="after")
    def _one_of_both(self_) -> Self:  # the key of the recipe has the usual name
        if bool(self_.path) == (self_.self is not None):
            raise ValueError("give either path (old text) or self (text sampled from the source model)")
        if self_.self is not None and (idle := self_.model_fields_set & TextOptions.model_fields.keys() - {"path"}):
            raise ValueError(f"{', '.join(sorted(idle))} would do nothing: self samples text, and these say how text is read")
        return self_


class DataOptions(Options):
    """The texts of a training, and how they become sequences."""

    train: Annotated[list[TrainSource], BeforeValidator(_sources), Field(min_length=1)]
    """New text: one source or a list; a bare path will do."""
    replay: Annotated[ReplaySource | None, BeforeValidator(_source)] = None
    """Old text to mix in: path (or self) and share."""
    eval: dict[str, Annotated[EvalSource, BeforeValidator(_source)]] = Field(default_factory=dict)
    """Named sets to measure on, such as old and new."""
    seq_length: int = Field(default=1024, ge=2)
    """Tokens in one training sequence."""
    bos: Literal["tokenizer", "always", "never"] = "tokenizer"
    """Whether a document begins with BOS: as the tokenizer does it by itself, always or never. EOS always ends it."""
    remainder: Literal["drop", "keep"] = "drop"
    """Tokens at the end of a source that fill no sequence: left out, or kept in a last sequence whose rest is not trained on."""
    shuffle: bool = True
    """Sequences in random order, a new one each time a source is used up; streamed text is read in its own order."""
    streaming: bool = False
    """Read and tokenise while training; nothing is cached, and the length of the training must be given in steps."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of the sequences."""
    num_proc: int | None = Field(default=None, gt=0)
    """Processes that tokenise. Default: one, in which a fast tokenizer has threads of its own."""
    cache: str | None = None
    """Folder for tokenised text. Default: hf-grow/data beside the Hub's cache."""

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> Self:
        if len({s.weight is None for s in self.train}) > 1:
            raise ValueError("train: give a weight to every source or to none")
        return self
