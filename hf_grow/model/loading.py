"""Loading configs, models and tokenizers with transformers, whose many exceptions become one SourceError.

The message quotes transformers' error, which is also the cause, so that a bug of hf-grow can be told from a damaged file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hf_grow.errors import GrowError, SourceError
from hf_grow.model.architecture import OUTPUT_FLAGS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CONFIG_HINT = "Compare its config.json with the one of a model of the same family that works."
TOKENIZER_HINT = "Copy the files of the tokenizer, and config.json, from the original model again."


@contextmanager
def transformers_errors(what: str, hint: str = CONFIG_HINT, *, does: str = "load") -> Iterator[None]:
    """Converts any exception inside into a SourceError "transformers X cannot load `what`", except GrowError and out-of-memory errors."""
    try:
        yield
    except (GrowError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # of accelerator and CPU
            raise
        import transformers

        raise SourceError(f"transformers {transformers.__version__} cannot {does} {what}: {one_line_error(error)}.", hint=hint) from error


def reset_output_flags(config: PreTrainedConfig) -> None:
    """Makes a model return an object with logits or loss only, whatever its config.json says."""
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False


def output_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """The output flags that a config.json has, to restore after `reset_output_flags`."""
    return {k: config[k] for k in OUTPUT_FLAGS if k in config}


def one_line_error(error: Exception) -> str:
    """An exception as one line: type and message."""
    message = " ".join(str(error).split())[:400].rstrip(".")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def load_tokenizer(place: str | Path, ref: str = "", revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads and tries the tokenizer of a folder or Hub id, without remote code. ``ref``: its name in messages. Raises SourceError."""
    from transformers import AutoTokenizer

    local = Path(place).is_dir()
    with transformers_errors(f"the tokenizer of {ref or place}", TOKENIZER_HINT):
        tokenizer = AutoTokenizer.from_pretrained(str(place), revision=revision, trust_remote_code=False, local_files_only=local)
        tokenizer("a")
    return cast("PreTrainedTokenizerBase", tokenizer)
