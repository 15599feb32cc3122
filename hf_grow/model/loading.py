"""Where transformers loads what lies in a folder: whatever it raises there becomes one message.

Configs and tokenizers fail in many ways (KeyError for an unknown activation, TypeError for a word where a number belongs, and so on), and each of them
says something about the file. The message names the library's error, so that a bug of ours would be found by it too; the error itself is its cause.
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
    """Raises SourceError for whatever is raised inside, except errors of ours, a lack of memory and an interruption."""
    try:
        yield
    except (GrowError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # torch's, of the accelerator and the CPU
            raise
        import transformers

        raise SourceError(f"transformers {transformers.__version__} cannot {does} {what}: {one_line_error(error)}.", hint=hint) from error


def reset_output_flags(config: PreTrainedConfig) -> None:
    """Has a model return an object with logits or a loss, and nothing else, whatever its config.json says."""
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False


def output_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """The output flags of a config.json, to restore after `reset_output_flags`."""
    return {k: config[k] for k in OUTPUT_FLAGS if k in config}


def one_line_error(error: Exception) -> str:
    """An error of a library in one line: its type, and what it says."""
    said = " ".join(str(error).split())[:400].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def load_tokenizer(place: str | Path, ref: str = "", revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a Hub id, tried once; code of the repository is never run. Raises SourceError for one that cannot be used."""
    from transformers import AutoTokenizer

    local = Path(place).is_dir()
    with transformers_errors(f"the tokenizer of {ref or place}", TOKENIZER_HINT):
        tokenizer = AutoTokenizer.from_pretrained(str(place), revision=revision, trust_remote_code=False, local_files_only=local)
        tokenizer("a")
    return cast("PreTrainedTokenizerBase", tokenizer)
