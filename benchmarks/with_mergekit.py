"""The same growth by mergekit, in a virtual environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_grow.growth.growth import LayerOrigin

# torch first, on its own: a CPU-only wheel is then kept, where resolving both together would install gigabytes of CUDA libraries.
PACKAGES = ("torch==2.13.0", "mergekit==0.1.5")
ZERO = ("o_proj", "down_proj")


def install(folder: Path | None = None) -> Path:
    """Returns `mergekit-yaml` of a virtual environment with mergekit, which is made the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = folder or cache / "hf-grow" / PACKAGES[-1].replace("==", "-")
    binary = folder / "bin" / "mergekit-yaml"
    if not binary.exists():
        print(f"installing {PACKAGES[-1]} into {folder} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in PACKAGES:
            subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", package], check=True)
    return binary


def version(binary: Path) -> str:
    code = "import importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in ('mergekit', 'torch', 'transformers')), sep=', ')"
    return subprocess.run([str(binary.parent / "python"), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def add_tokenizer(source: Path) -> None:
    """A tokenizer of one word: mergekit-moe requires one even for a random router."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "x"}))


def moe_recipe(source: Path, experts: int) -> str:
    """mergekit-moe's config for equal experts with a random router, as JSON (which is YAML)."""
    expert = {"source_model": str(source), "positive_prompts": ["x"]}
    return json.dumps({"base_model": str(source), "gate_mode": "random", "dtype": "bfloat16", "experts": [expert] * experts}, indent=2)


def recipe(source: Path, layers: Sequence[LayerOrigin]) -> str | None:
    """A passthrough merge of these layers, as JSON (which is YAML); None if one is an average of layers, which passthrough cannot express."""
    if any(len(layer.sources) > 1 for layer in layers):
        return None
    slices, start = [], 0
    for at in range(1, len(layers) + 1):
        layer, before = layers[at] if at < len(layers) else None, layers[at - 1]
        if layer and layer.sources[0] == before.sources[0] + 1 and not (layer.identity or before.identity):
            continue
        part: dict[str, object] = {"model": str(source), "layer_range": [layers[start].sources[0], before.sources[0] + 1]}
        if before.identity:
            part["parameters"] = {"scale": [*({"filter": name, "value": 0.0} for name in ZERO), {"value": 1.0}]}
        slices.append({"sources": [part]})
        start = at
    return json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}, indent=2)
