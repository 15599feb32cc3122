"""The parts of a chat template around one exchange, so that a model can be made to write both sides of a conversation.

Given what precedes the user's message, an instruct model generates a message, and then its answer (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_grow.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEXT_HINT = "--chat-share 0 samples plain text only (start it with --prompts, or --start random)."
DOCUMENT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>")
"""Tokens that separate documents in pretraining, for tokenizers whose BOS and EOS are tokens of the chat template."""
_USER, _ANSWER = "QUESTION7351", "ANSWER7351"


@dataclass(frozen=True)
class ChatTemplateParts:
    """An exchange is before + user message + between + answer + after."""

    before: str
    between: str
    after: str
    turn_tokens: frozenset[int]
    """Special tokens that start or end a turn."""
    user_end: int | None
    """Token that ends the user's message; None if plain text does."""
    answer_end: int | None
    """Token that ends the answer; None if plain text does."""

    def is_chat_model(self, ends: Collection[int], bos: int | None) -> bool:
        """Whether the model was trained on conversations: its texts end (``ends``) with `answer_end`, or BOS starts turns.

        Having a template is not enough: base models have one too.
        """
        return self.answer_end in ends or bos in self.turn_tokens


def parse_chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplateParts | None:
    """The parts of the tokenizer's chat template; None if it has none. Raises InputError if the template cannot be split into these parts."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program, and may raise anything
        raise InputError(f"The chat template cannot be used: {' '.join(str(error).split())[:200]}", hint=PLAIN_TEXT_HINT) from None
    if text.count(_USER) != 1 or text.count(_ANSWER) != 1 or text.index(_USER) > text.index(_ANSWER):
        raise InputError("The chat template does not contain one message and one answer unchanged.", hint=PLAIN_TEXT_HINT)
    before, rest = text.split(_USER)
    between, after = rest.split(_ANSWER)
    special = special_ids(tokenizer)

    def ids_of(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def first_if_special(part: str) -> int | None:
        ids = ids_of(part.lstrip())
        return ids[0] if ids and ids[0] in special else None

    turn_tokens = frozenset(i for i in ids_of(between) + ids_of(after) if i in special)
    return ChatTemplateParts(before, between, after, turn_tokens, first_if_special(between), first_if_special(after))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens, added ones included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def document_start_token(tokenizer: PreTrainedTokenizerBase, template: ChatTemplateParts | None) -> int | None:
    """The token that precedes a document: BOS, else EOS, else one of DOCUMENT_TOKENS; never a token of the chat template. None if there is none."""
    excluded: Collection[int] = template.turn_tokens if template is not None else ()
    vocab = tokenizer.get_vocab() if excluded else {}
    named = [vocab[t] for t in DOCUMENT_TOKENS if t in vocab]
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, *named) if i is not None and i not in excluded), None)
