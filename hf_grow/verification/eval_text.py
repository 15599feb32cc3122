"""Token windows of the evaluation text; random token ids if the checkpoint has no tokenizer."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.common.safe_files import read_text
from hf_grow.errors import InputError
from hf_grow.model.loading import TOKENIZER_HINT, load_tokenizer, transformers_errors

if TYPE_CHECKING:
    import torch

WINDOW = 256
RANDOM = "random token ids (the checkpoint has no tokenizer)"
BUILTIN = "built-in text"


def builtin_text() -> str:
    """Prose, dialogue, mathematics, code, markup, tables and eight languages: about 10 kB, 3200 tokens with SmolLM2's tokenizer."""
    return importlib.resources.files("hf_grow.verification").joinpath("text.txt").read_text(encoding="utf-8")


def token_windows(old: Checkpoint, text: Path | None, tokens: int, vocab: int) -> tuple[list[torch.Tensor], str]:
    """Windows of at most `WINDOW` token ids below `vocab`, at most `tokens` ids in all, and a description of the text. Raises InputError."""
    import torch

    if has_tokenizer(old):
        assert old.folder is not None
        content = builtin_text() if text is None else read_text(text, error=InputError)
        tokenizer = load_tokenizer(old.folder, old.ref)
        with transformers_errors(f"the tokenizer of {old.ref}", TOKENIZER_HINT):
            ids = tokenizer(content)["input_ids"]
        what = str(text) if text else BUILTIN
        ids = [i for i in ids if i < vocab][:tokens]
    elif text is not None:
        raise InputError(f"{old.ref} has no tokenizer, which --text needs.", hint="Without --text, random token ids are used.")
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (min(tokens, 4 * WINDOW),), generator=generator).tolist()
        what = RANDOM
    if len(ids) < 2:
        raise InputError(f"{what} is too short: {len(ids)} tokens.", hint="At least two tokens are needed.")
    length = min(WINDOW, old.config.get("max_position_embeddings") or WINDOW)
    windows = [torch.tensor(ids[i : i + length]) for i in range(0, len(ids), length)]
    return [w for w in windows if w.numel() > 1], what


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return checkpoint.folder is not None and any((checkpoint.folder / n).exists() for n in names)
