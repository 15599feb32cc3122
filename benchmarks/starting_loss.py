"""Loss of a model right after each growth, and KL(source || grown), in nats per token, on prose and on code.

    python benchmarks/starting_loss.py ./SmolLM2-135M

Everything is computed in fp32, so that the method is measured and not the rounding of stored weights. Every measurement is stored in
results/starting-loss.jsonl as soon as it is done, so an interrupted run continues; the table is results/starting-loss.md. The text is that of
hf_grow/demo/domains.py: documents in order until there are enough tokens, in sequences of --length.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from results_file import RESULTS, append_record, markdown_table, read_records
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_grow import plan
from hf_grow.convert.in_memory import grow_model
from hf_grow.demo.domains import domains

DOMAINS = {"prose": "old", "code": "new"}


@dataclass(frozen=True)
class Case:
    """One growth, with sizes relative to the source, so that it fits any checkpoint."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: float = 0.0
    """Factor for the number of layers, rounded to an even number; 0: the method's default."""
    ffn: float = 0.0
    """Factor for intermediate_size alone; 0: unchanged."""
    uneven: bool = False
    """hidden_size and heads times 4/3, or as near to it as the heads allow."""

    def arguments(self, config: Any) -> dict[str, Any]:
        found = dict(self.options)
        if self.layers:
            found["layers_to"] = 2 * round(config.num_hidden_layers * self.layers / 2)
        if self.ffn:
            found["intermediate"] = round(config.intermediate_size * self.ffn)
        if self.uneven:
            third = config.num_attention_heads // 3
            found |= {
                "hidden": config.hidden_size // 3 * 4,
                "heads": config.num_attention_heads + third,
                "kv_heads": config.num_key_value_heads,
            }
        return found


CASES = (
    *(Case("dus", layers=times) for times in (1.1, 1.25, 1.5)),
    Case("dus", {"seam_average": 4}, layers=1.5),
    *(Case("interleave", layers=times) for times in (1.1, 1.25, 1.5, 2)),
    Case("stack"),
    Case("identity"),
    Case("tile", {"factor": 2}),
    Case("tile", uneven=True),
    Case("hypercloning", {"factor": 2, "noise_db": 10}),
    Case("fpi", {"factor": 2}),
    Case("fpi", uneven=True),
    Case("net2net", ffn=4 / 3),
    Case("net2net", uneven=True),
    Case("aki", {"factor": 2}),
    Case("aki", {"factor": 2, "fixed_kv": True}),
    Case("aki", uneven=True),
    Case("aki", ffn=2),
    Case("aki", {"factor": 2, "lossless": True}),
    Case("experts", {"experts": 8}),
    *(Case("experts", {"experts": 8, "init": "noise", "noise": noise}) for noise in (0.01, 0.1, 0.3)),
    *(Case("experts", {"experts": 8, "init": "drop", "drop": share}) for share in (0.1, 0.25, 0.5, 1.0)),
    Case("experts", {"experts": 8, "init": "fine-grained", "shards": 2, "top_k": 4}),
)


def sequences(tokenizer: Any, tokens: int, length: int) -> dict[str, Tensor]:
    """Token ids of each domain, of shape (sequences, length)."""
    found = domains()
    out = {}
    for name, part in DOMAINS.items():
        ids: list[int] = []
        for text in found.documents[part]:
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= tokens:
                break
        count = min(tokens, len(ids)) // length
        out[name] = torch.tensor(ids[: count * length]).view(count, length)
    return out


@torch.no_grad()
def measure(source: PreTrainedModel, grown: PreTrainedModel, text: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """For each domain: the loss of both in nats per token, KL(source || grown), and how often both have the same most likely token."""
    out = {}
    for name, rows in text.items():
        sums, count = torch.zeros(4, dtype=torch.float64), 0
        for ids in rows:
            old, new = (model(ids[None]).logits[0, :-1].log_softmax(-1) for model in (source, grown))
            labels = ids[1:, None]
            kl = (old.exp() * (old - new)).sum()
            same = (old.argmax(-1) == new.argmax(-1)).sum()
            sums += torch.stack([-old.gather(1, labels).sum(), -new.gather(1, labels).sum(), kl, same]).double()
            count += len(labels)
        out[name] = dict(zip(("source", "grown", "kl", "agreement"), (sums / count).tolist(), strict=True))
    return out


def key(case: Case, arguments: dict[str, Any], model: str, tokens: int, length: int) -> str:
    return json.dumps([model, case.method, arguments, tokens, length], sort_keys=True)


def run(folder: str, out: Path, tokens: int, length: int, only: list[str]) -> Iterator[dict[str, Any]]:
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = sequences(AutoTokenizer.from_pretrained(folder), tokens, length)
    log = out / "starting-loss.jsonl"
    done = {row["key"]: row for row in read_records(log)}
    model = Path(folder).resolve().name
    for case in CASES:
        if only and case.method not in only:
            continue
        arguments = case.arguments(source.config)
        name = key(case, arguments, model, tokens, length)
        if name not in done:
            planned = plan(source, case.method, **arguments)
            grown = grow_model(source, planned).eval()
            old, new = planned.sizes
            row = {
                "key": name,
                "model": model,
                "method": case.method,
                "options": arguments,
                "guarantee": planned.guarantee.kind,
                "layers": [planned.source.architecture.layers, planned.architecture.layers],
                "parameters": [old.total, new.total],
                "vocab": source.config.vocab_size,
                "tokens": {domain: rows.numel() for domain, rows in text.items()},
                "measured": measure(source, grown, text),
            }
            del grown, planned
            gc.collect()
            append_record(log, row)
            done[name] = row
            print(" | ".join(cells(row)), flush=True)
        yield done[name]


def cells(row: dict[str, Any]) -> list[str]:
    flags = " ".join(f"--{k.replace('_', '-')} {v}" if v is not True else f"--{k.replace('_', '-')}" for k, v in row["options"].items())
    out = [f"`{row['method']}{' ' + flags if flags else ''}`", f"{row['parameters'][1] / 1e6:.0f}M", row["guarantee"]]
    for found in row["measured"].values():  # + 0.0: no -0.00
        rise, kl = (round(x, 2) + 0.0 for x in (found["grown"] - found["source"], found["kl"]))
        out += [f"{rise:+.2f}", f"{kl:.2f}", f"{found['agreement']:.0%}"]
    return out


def table(rows: list[dict[str, Any]], command: str) -> str:
    first = rows[0]
    tokens = " and ".join(f"{n:,} tokens of {d}" for d, n in first["tokens"].items())
    losses = " and ".join(f"{m['source']:.3f} on {d}" for d, m in first["measured"].items())
    uniform = torch.tensor(float(first["vocab"])).log().item()
    head = ["growth", "size", "guarantee", *(f"{d}: {w}" for d in first["measured"] for w in ("rise", "KL", "same token"))]
    return "\n".join(
        [
            f"# The loss right after growing {first['model']}",
            "",
            f"Rise of the loss over the source's and KL(source || grown), in nats per token, and how often both have the same most likely token; fp32, {tokens}.",
            f"The source's loss is {losses}; uniform probabilities have {uniform:.2f}. One model: guidance only.",
            "",
            *markdown_table(head, map(cells, rows), left=3),
            "",
            "```",
            command,
            "```",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a dense checkpoint with its tokenizer")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each domain; default: 1024")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence; default: 512")
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD", help="only these methods; the table then holds only them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    rows = list(run(arguments.checkpoint, arguments.results, arguments.tokens, arguments.length, arguments.only))
    name = Path(arguments.checkpoint).name
    flags = [w for w in sys.argv[1:] if w != arguments.checkpoint and "--results" not in w and w != str(arguments.results)]
    text = table(rows, " ".join(["python benchmarks/starting_loss.py", name, *flags]))
    (arguments.results / "starting-loss.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
