"""Loads the checkpoints of write.py with transformers 4 and compares logits, and a tokenizer, with those of transformers 5. Run by `make test-compat`.

    python tests/compat/check.py FOLDER

Needs torch, transformers 4 and safetensors; nothing of hf-grow. Exits with 1 if any checkpoint loads or computes otherwise than expected.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4  # largest difference, as a share of the largest logit
BLIND = 1e-2  # what a reader must be off by, as such a share, that ignores the rotary settings

EXPECTED: dict[str, str] = {}
"""CASE/GROWTH that transformers 4 cannot load alike -> why, in a few words."""


@torch.no_grad()
def run(folder: Path, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, list[str]]:
    """Logits as a user of transformers 4 gets them, and what is wrong with the loading."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    return model.float().eval()(ids).logits, [f"{kind}: {sorted(keys)[:3]}" for kind, keys in loading.items() if keys]


def compare(folder: Path, ids: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float, list[str]]:
    """How far the logits are off, how far they would be without the rotary settings (a control), and every fault."""
    config = AutoConfig.from_pretrained(folder)
    logits, faults = run(folder, ids)
    dtype = vars(config).get("torch_dtype", getattr(config, "dtype", None))  # dtype since 4.56
    if dtype != torch.bfloat16:
        faults.append(f"the config says {dtype}")
    off = share(logits, wanted)
    if not off < TOLERANCE:
        faults.append("other logits")
    config.rope_theta, config.rope_scaling = 1e4, None
    control = share(run(folder, ids, config=config)[0], wanted)
    if not control > BLIND:
        faults.append("the control sees nothing")
    return off, control, faults


def share(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((logits - wanted).abs().max() / wanted.abs().max()).item()


def main() -> int:
    folder = Path(sys.argv[1])
    assert transformers.__version__.startswith("4."), "this is for transformers 4"
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    stored = load_file(folder / "logits.safetensors")
    ids = stored.pop("tokens")
    failed = 0
    worst = 0.0
    print(f"transformers {transformers.__version__}\n{'checkpoint':40} {'off by':>8} {'control':>8}")
    for name, wanted in sorted(stored.items()):
        try:
            off, control, faults = compare(folder / name, ids, wanted)
        except Exception as error:  # what a version cannot load, in whatever way it says so
            off, control, faults = float("nan"), float("nan"), [f"{type(error).__name__}: {str(error)[:200]}"]
        ok = bool(faults) == (name in EXPECTED)
        failed += not ok
        worst = max(worst, off if ok and not faults else 0.0)
        said = f"ok, as expected: {EXPECTED[name]}" if ok and faults else "ok" if ok else "; ".join(faults) or "EXPECTED to fail"
        print(f"{name:40} {off:8.1e} {control:8.1e}  {'' if ok else 'FAIL '}{said}")
    print(
        f"{len(stored) - failed} of {len(stored)} as expected; the largest difference of those that agree is {worst:.1e} of the largest logit"
    )
    return 1 if failed + tokenizers_that_differ(folder) or not stored else 0


def tokenizers_that_differ(folder: Path) -> int:
    """How many of the tokenizers that came along read the text otherwise than in transformers 5."""
    wanted = json.loads((folder / "tokenizer.json").read_text())
    found = sorted(path.parent for path in folder.glob("*/*/tokenizer_config.json") if path.parent.parent.name != "sources")
    wrong = [path for path in found if AutoTokenizer.from_pretrained(path)(wanted["text"])["input_ids"] != wanted["ids"]]
    print(f"{len(found) - len(wrong)} of {len(found)} tokenizers read alike")
    return len(wrong) if found else 1


if __name__ == "__main__":
    sys.exit(main())
