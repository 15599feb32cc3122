"""Running both models on the same text and comparing what they say.

One model is in memory at a time. KL is summed over the vocabulary and averaged over tokens, in nats: KL(old || new).
"""

from __future__ import annotations

import importlib.resources
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import InputError
from hf_grow.in_memory import untie_config
from hf_grow.methods.sizing import measure
from hf_grow.planning import GrowthPlan
from hf_grow.tensormap import Fill
from hf_grow.untrusted import read_text
from hf_grow.verification.report import Report
from hf_grow.verification.routing import Routing, compare_routing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 256
LOGITS_BYTES = 1 << 30
"""What the first model's logits may take while the second one runs; fewer tokens are compared where the vocabulary is large."""

# Largest logit difference that rounding alone explains, relative to the largest logit, by the dtype of the computation. (In an fp64 model
# transformers computes norms, softmax, routing and rotary angles in fp32 all the same.)
ROUNDING = {"float64": 1e-5, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# Half a unit in the last place of what is stored, relative to a value.
HALF_ULP = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}


def builtin_text() -> str:
    return importlib.resources.files("hf_grow.verification").joinpath("text.txt").read_text(encoding="utf-8")


def compare(
    old: Checkpoint,
    new: Checkpoint,
    report: Report,
    *,
    text: Path | None,
    tokens: int,
    dtype: str,
    notify: Callable[[str], None],
    plan: GrowthPlan | None,
    since: str = "",
) -> None:
    """Fills the report's metrics, and checks what the guarantee promises; nothing is without a plan, or where the weights were trained `since`.

    `dtype` is one of torch.
    """
    import torch

    vocab = min(old.info.architecture.size("vocab"), new.info.architecture.size("vocab"))
    if old.info.architecture.size("vocab") != new.info.architecture.size("vocab"):
        notify("The vocabularies differ in size; only the common part is compared.")
    most = max(WINDOW, LOGITS_BYTES // (4 * vocab))
    windows, what = _token_windows(old, text, min(tokens, most), vocab)
    routers = Routing(old.info.architecture), Routing(new.info.architecture)
    before = _logits(old, windows, dtype, vocab, routing=routers[0])
    after = _logits(new, windows, dtype, vocab, routing=routers[1])
    metrics = {"text": what, "tokens": int(sum(w.numel() for w in windows)), "dtype": dtype, **_measure(windows, before, after)}
    experts = compare_routing(plan, *routers)
    if experts is not None:
        metrics["experts"] = experts
    report.metrics.update(metrics)
    finite = all(bool(torch.isfinite(x).all()) for x in after)
    report.add("logits", finite, "finite on every token" if finite else "NaN or infinite: the grown model is broken")
    if not finite:
        return
    if plan is None or since or not plan.guarantee.lossless:
        why = "no growth.json" if plan is None else f"{since} since the growth" if since else "the method changes the function"
        report.add("lossless", None, f"not promised: {why}")
        return
    floor = ROUNDING[dtype] * max(1.0, metrics["logits_max"])
    why = f"rounding in {dtype} explains"
    if _rounded(plan):
        # Computed weights were rounded once more: allow what as much rounding does to the source itself, here, on this text.
        shaken = _logits(
            old, windows, dtype, vocab, shake=HALF_ULP[min((t.dtype for t in plan.targets.values()), key=lambda d: -HALF_ULP[d])]
        )
        floor += 2 * max(float((a - b).abs().max()) for a, b in zip(before, shaken, strict=True))
        why = "rounding the weights once more does"
        metrics["rounding_floor"] = report.metrics["rounding_floor"] = floor
    found = metrics["logit_difference_max"]
    report.add("lossless", found <= floor, f"largest logit difference {found:.2g}; {why} up to {floor:.2g}")


def _rounded(plan: GrowthPlan) -> bool:
    """Whether some weights are neither copies nor zeros, so that storing them rounds."""
    copies = plan.copies()
    return any(name not in copies and not isinstance(e, Fill) for name, e in plan.growth.tensors.items())


def choose_dtype(old: Checkpoint, new: Checkpoint, asked: str, notify: Callable[[str], None]) -> str:
    """What both models are computed in, as torch names it; `auto` is fp32 where that fits into memory."""
    if asked != "auto":
        return asked
    if any(t.dtype == "F64" for t in old.tensors.values()):
        return "float64"
    need = 4 * max(measure(c.info.architecture).total for c in (old, new))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need < 0.7 * memory:
        return "float32"
    notify(f"fp32 would need {need / 1e9:.1f} GB of memory; comparing in bfloat16, so small differences drown in rounding.")
    return "bfloat16"


def _token_windows(old: Checkpoint, text: Path | None, tokens: int, vocab: int) -> tuple[list[torch.Tensor], str]:
    """The text as windows of token ids; random ids where the checkpoint has no tokenizer."""
    import torch

    if has_tokenizer(old):
        words = builtin_text() if text is None else read_text(text, error=InputError)
        ids = load_tokenizer(old)(words)["input_ids"]
        what = str(text) if text else "built-in text"
        ids = [i for i in ids if i < vocab][:tokens]
    elif text is not None:
        raise InputError(
            f"{old.ref} has no tokenizer, so --text cannot be read.", hint="Leave --text out: random token ids are compared then."
        )
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (min(tokens, 4 * WINDOW),), generator=generator).tolist()
        what = "random token ids (the checkpoint has no tokenizer)"
    if len(ids) < 2:
        raise InputError(f"{what} is too short: {len(ids)} tokens.", hint="At least two are needed to predict one.")
    length = min(WINDOW, old.config.get("max_position_embeddings") or WINDOW)
    windows = [torch.tensor(ids[i : i + length]) for i in range(0, len(ids), length)]
    return [w for w in windows if w.numel() > 1], what


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return checkpoint.folder is not None and any((checkpoint.folder / n).exists() for n in names)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises InputError for one that does not load."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
        tokenizer("a")
    except Exception as error:  # tokenizers fail in many ways; each is a reason, none is ours
        raise InputError(f"The tokenizer of {checkpoint.ref} cannot be used: {str(error).splitlines()[0]}") from None
    return cast("PreTrainedTokenizerBase", tokenizer)


def load_model(checkpoint: Checkpoint, dtype: str) -> PreTrainedModel:
    """The model of a folder in a dtype of torch, for evaluation, on the CPU; nothing is fetched and no code of the folder is run."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar of its own for each of two models tells nobody anything
    # Fused experts multiply in groups, which torch does not do in fp64.
    plain = {"experts_implementation": "eager"} if dtype == "float64" and checkpoint.info.architecture.is_moe else {}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=getattr(torch, dtype), trust_remote_code=False, local_files_only=True, **plain
    )
    untie_config(model)
    return cast("PreTrainedModel", model.eval())


def _logits(
    checkpoint: Checkpoint, windows: list[torch.Tensor], dtype: str, vocab: int, *, shake: float = 0.0, routing: Routing | None = None
) -> list[torch.Tensor]:
    """Logits of every window; with `shake`, after moving every weight by up to that share of itself. `routing` is told of every router."""
    import torch

    model = load_model(checkpoint, dtype)
    if shake:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + shake * (2 * torch.rand(p.shape, generator=generator) - 1).to(p.dtype))
    keep = torch.float64 if dtype == "float64" else torch.float32
    found = []
    with torch.no_grad():
        for window in windows:
            output = model(window[None], use_cache=False, **({"output_router_logits": True} if routing else {}))
            if routing:
                routing.add(output.router_logits)
            found.append(output.logits[0, :, :vocab].to(keep))
    return found


def _measure(windows: list[torch.Tensor], before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, Any]:
    import torch.nn.functional as F

    count = predicted = 0
    kl = loss_old = loss_new = agree = largest = spread = top = 0.0
    for ids, a, b in zip(windows, before, after, strict=True):
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        kl += float((log_a.exp() * (log_a - log_b)).sum().clamp(min=0))
        loss_old += float(F.nll_loss(log_a[:-1], ids[1:], reduction="sum"))
        loss_new += float(F.nll_loss(log_b[:-1], ids[1:], reduction="sum"))
        both = a.isfinite().all(-1) & b.isfinite().all(-1)  # two broken models do not agree
        agree += float(((a.argmax(-1) == b.argmax(-1)) & both).sum())
        largest = max(largest, float((a - b).abs().max()))
        spread += float((a - b).abs().mean(-1).sum())
        top = max(top, float(a.abs().max()))
        count += ids.numel()
        predicted += ids.numel() - 1

    def perplexity(loss: float) -> float:
        return math.exp(min(loss / predicted, 700.0))

    return {
        "logit_difference_max": largest,
        "logit_difference_mean": spread / count,
        "logits_max": top,
        "kl_nats_per_token": kl / count,
        "loss_old": loss_old / predicted,
        "loss_new": loss_new / predicted,
        "perplexity_old": perplexity(loss_old),
        "perplexity_new": perplexity(loss_new),
        "greedy_agreement": agree / count,
    }
