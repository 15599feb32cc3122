"""A chat template as what it writes around one exchange, so that a model can be made to write both sides of a conversation.

Given what stands before the user's message, an instruct model writes a message as users do, and then its answer (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_grow.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "--chat-share 0 samples plain text only (begin it with --prompts, or --start random)."
DOCUMENT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>")
"""Tokens that stand between documents in pretraining, for tokenizers whose BOS and EOS belong to the turns of a conversation."""
_USER, _ANSWER = "QUESTION7351", "ANSWER7351"


@dataclass(frozen=True)
class Turns:
    """One exchange is before + message + between + answer + after."""

    before: str
    between: str
    after: str
    marks: frozenset[int]
    """Special tokens that open or close a turn."""
    closes_user: int | None
    """Token that ends the user's message; None where plain text does."""
    closes_answer: int | None

    def chats(self, ends: Collection[int], bos: int | None) -> bool:
        """Whether the model was trained on conversations: it ends its texts as the template ends an answer, or BOS opens turns.

        A template alone says little; base models have one too.
        """
        return self.closes_answer in ends or bos in self.marks


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """None where there is no template. Raises InputError for one that cannot be taken apart."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program, and raises what it likes
        raise InputError(f"The chat template cannot be used: {' '.join(str(error).split())[:200]}", hint=PLAIN) from None
    if text.count(_USER) != 1 or text.count(_ANSWER) != 1 or text.index(_USER) > text.index(_ANSWER):
        raise InputError("The chat template does not write one message and one answer as they are.", hint=PLAIN)
    before, rest = text.split(_USER)
    between, after = rest.split(_ANSWER)
    special = special_ids(tokenizer)

    def marks(part: str) -> list[int]:
        return [i for i in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] if i in special]

    def first(part: str) -> int | None:
        ids = tokenizer(part.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
        return ids[0] if ids and ids[0] in special else None

    return Turns(before, between, after, frozenset(marks(between) + marks(after)), first(between), first(after))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def begins_document(tokenizer: PreTrainedTokenizerBase, turns: Turns | None) -> int | None:
    """The token after which a document begins: BOS, else EOS, unless they belong to the turns of a conversation."""
    taken: Collection[int] = turns.marks if turns is not None else ()
    known = tokenizer.get_vocab() if taken else {}
    named = [known[t] for t in DOCUMENT_TOKENS if t in known]
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, *named) if i is not None and i not in taken), None)
