"""Every number of the demo, in one place: they go into the key of the cache, so a changed number never meets an old model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The small model: a Llama with grouped-query attention and tied embeddings."""

    vocab: int = 1024
    layers: int = 8
    hidden: int = 96
    inter: int = 256
    heads: int = 4
    kv_heads: int = 2
    init: float = 0.06
    """Standard deviation of the initial weights; at this width the usual 0.02 loses the first hundred steps."""


@dataclass(frozen=True)
class Pretraining:
    """What the small model is and how it is trained: whatever decides its weights, and nothing else."""

    shape: Shape = Shape()
    seed: int = 0
    block: int = 128
    """Tokens in one training sequence."""
    batch: int = 8
    steps: int = 600
    learning_rate: float = 3e-3
    warmup: int = 20
    characters: int = 3_000_000
    """How much text to read: enough for every step of every training to see new text."""
    heldout_blocks: int = 96


@dataclass(frozen=True)
class Settings:
    pretraining: Pretraining
    layers_to: int = 12
    steps: int = 160
    """Steps of continued pretraining, the same for the grown model and for the small model going on."""
    learning_rate: float = 2e-3
    warmup: int = 24
    """Adam's moments start from nothing: with fewer steps both models first lose ground."""
    threads: int = 4
    """At most; more of them only wait for each other on matrices this small."""


def full(seed: int) -> Settings:
    return Settings(Pretraining(seed=seed))


def quick(seed: int) -> Settings:
    """Everything tiny: seconds instead of minutes, and the same path through the code."""
    small = Pretraining(
        shape=Shape(vocab=512, layers=4, hidden=48, inter=128, heads=4, kv_heads=2),
        seed=seed,
        block=64,
        steps=60,
        characters=300_000,
        heldout_blocks=16,
    )
    return Settings(small, layers_to=6, steps=30, warmup=4, threads=1)
