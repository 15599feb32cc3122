"""Real text without the network: the topics of pydoc."""

from __future__ import annotations

from pydoc_data.topics import topics


def pydoc_texts(characters: int) -> tuple[str, ...]:
    """Topics in the order of their names, until there are so many characters."""
    texts: list[str] = []
    for name in sorted(topics):
        if sum(map(len, texts)) >= characters:
            break
        texts.append(topics[name].strip())
    return tuple(texts)
