"""`hf-grow fisher MODEL --text OLD_DATA -o FILE`: what each weight matters for the old data; the penalty of a training reads it."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.source import open_source
from hf_grow.checkpoint.writer import check_disk_space
from hf_grow.cli import flags, render
from hf_grow.cli.commands import add_json, add_source, enough_memory, print_json
from hf_grow.cli.fisher_options import RunOptions
from hf_grow.cli.trials import MEASURED, Trials, calibrated, trials_for
from hf_grow.common.extras import require_packages
from hf_grow.common.safe_files import replace_nonfinite, to_json
from hf_grow.common.units import format_bytes
from hf_grow.errors import InputError, OutputError
from hf_grow.growth.plan import GrowthPlan, check_source
from hf_grow.model.param_count import count_parameters, format_count
from hf_grow.options import parse, unmet_requirements
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.config.fisher_options import FisherOptions
from hf_grow.training.regularizers.fisher import estimation_memory
from hf_grow.training.regularizers.importance_file import open_importance
from hf_grow.training.setup.warnings import RECOVER, damaged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    files = parser.add_argument_group("input and output")
    flags.add_flags(files, [RunOptions], short={"output": "-o"})
    for action in parser._actions:
        if action.dest in ("output", "from_growth", "merge"):
            action.metavar = "FILE"
    flags.add_flags(parser.add_argument_group("estimation"), [FisherOptions])
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    how = parse(RunOptions, flags.given(arguments, RunOptions), where="The command line", strict=False, check_requirements=False)
    options = parse(FisherOptions, flags.given(arguments, FisherOptions), where="The command line", strict=False, check_requirements=False)
    out = Path(how.output).expanduser()
    _check(how, options, out)
    trials = trials_for(how, options, out) if how.calibrate is not None else None
    if trials is not None and how.recipe is not None:
        if "seq_length" in flags.given(arguments, FisherOptions):
            raise InputError("--seq-length: the recipe says it (data.seq_length).", hint="Leave one of both out.")
        options = options.model_copy(update={"seq_length": trials.seq_length})
    checkpoint = open_source(arguments.source, revision=arguments.revision, weights=not how.dry_run, notify=render.note)
    check_source(checkpoint.info)
    if how.utility is not None and not checkpoint.info.architecture.is_moe:
        raise InputError(f"{checkpoint.ref} has no experts; --utility means nothing here.")
    if how.from_growth is None and checkpoint.growth is not None:
        method = damaged(GrowthPlan.from_json(checkpoint.growth), checkpoint.growth)
        if method is not None:
            render.note(
                f"{checkpoint.ref} was grown by {method}, which changes the function, and was not trained since: a penalty with this "
                f"Fisher holds the damage. {RECOVER}"
            )
    _room(checkpoint, options, out)
    if how.dry_run:
        facts = _dry(checkpoint, options, mapped=how.from_growth is not None)
    else:
        start = time.perf_counter()
        with enough_memory("Take a smaller --batch or --seq-length, or --device cpu. --dry-run counts what comes beside activations."):
            facts = (
                _mapped(checkpoint, how, options, out)
                if how.from_growth
                else _estimated(checkpoint, how, options, out, trials, quiet=arguments.json)
            )
        facts = {"output": str(out), **facts, "seconds": round(time.perf_counter() - start, 1)}
    print_json(replace_nonfinite(facts, nonfinite=str)) if arguments.json else _show(facts)
    return 0


def _check(how: RunOptions, options: FisherOptions, out: Path) -> None:
    """Raises InputError with everything that does not go together, is not there, or is there already; before any model is loaded."""
    wrong: list[str] = []
    if (how.text is None) == (how.from_growth is None):
        wrong.append("give one of --text (old data) and --from-growth (the source's Fisher)")
    if how.from_growth is not None:
        wrong += [f"--{n} needs --text" for n in ("merge", "utility", "calibrate") if getattr(how, n) is not None]
    if (how.calibrate is None) != (how.on is None):
        wrong.append("--calibrate NATS and --on NEW_DATA go together")
    from hf_grow.training.config.train_config import collect_mistakes, raise_mistakes
    from hf_grow.training.data.sources import find_text

    wrong = [*(f"{w}." for w in wrong), *unmet_requirements(how, options)]
    for key, path in (("output", out), ("utility", how.utility)):
        if path is not None:
            collect_mistakes(wrong, f"--{key}", partial(_writable, path, how))
    for key, text in (("text", how.text), ("on", how.on)):
        if text is not None:
            collect_mistakes(wrong, f"--{key}", partial(find_text, TextOptions(path=[text]), notify=render.note))
    for key, file in (("merge", how.merge), ("from-growth", how.from_growth)):
        if file is not None:
            collect_mistakes(wrong, f"--{key}", partial(open_importance, file))
    raise_mistakes("The command line", wrong)


def _room(checkpoint: Checkpoint, options: FisherOptions, out: Path) -> None:
    check_disk_space(out, count_parameters(checkpoint.info.architecture).total * (4 if options.storage == "fp32" else 2))


def _writable(path: Path, how: RunOptions) -> None:
    """Raises OutputError for a file that cannot be made, or must not be replaced."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", hint="Name a file.")
    if path.exists() and not how.overwrite and not how.dry_run:
        raise OutputError(f"{path} exists.", hint="Give another name, or --overwrite.")
    if not path.parent.is_dir():
        raise OutputError(f"There is no folder {path.parent}.")


def _dry(checkpoint: Checkpoint, options: FisherOptions, *, mapped: bool) -> dict[str, Any]:
    total = count_parameters(checkpoint.info.architecture).total
    stored = total * (4 if options.storage == "fp32" else 2)
    if mapped:
        return {"dry_run": True, "parameters": total, "file_bytes": stored, "note": "mapped tensor by tensor; no model is loaded"}
    from hf_grow.model import flops
    from hf_grow.model.meta_model import meta_model

    length = min(options.seq_length, checkpoint.config.get("max_position_embeddings") or options.seq_length)
    needs = estimation_memory(total, {"bfloat16": 2, "float64": 8}.get(options.dtype, 4))
    return {
        "dry_run": True, "parameters": total, "tokens": options.tokens, "file_bytes": stored,
        "memory_bytes": {**needs, "total": sum(needs.values())}, "flops": flops.training_flops(meta_model(checkpoint.info.config), length) * options.tokens,
        "note": "activations of one batch come on top",
    }  # fmt: skip


def _mapped(checkpoint: Checkpoint, how: RunOptions, options: FisherOptions, out: Path) -> dict[str, Any]:
    from hf_grow.training.param_updates.param_provenance import check_fits
    from hf_grow.training.regularizers.importance_file import checkpoint_fingerprint, write_importance
    from hf_grow.training.regularizers.importance_growth import check_importance_of_source, grow_importance

    assert how.from_growth is not None
    if checkpoint.growth is None:
        raise InputError(f"{checkpoint.ref} has no growth.json.", hint="--from-growth needs a model that hf-grow made.")
    plan = GrowthPlan.from_json(checkpoint.growth)
    check_fits(plan, checkpoint)
    source = open_importance(how.from_growth)
    check_importance_of_source(source, plan, checkpoint)
    shapes = {n: t.shape for n, t in plan.targets.items()}
    facts = {
        **{k: v for k, v in source.metadata.items() if k not in ("format", "made_by", "sample", "model", "revision")},
        "model": checkpoint.ref, "revision": checkpoint.revision, "sample": checkpoint_fingerprint(checkpoint),
        "mapped_from": source.metadata.get("model", ""), "mapped_by": plan.growth.method,
    }  # fmt: skip
    write_importance(out, shapes, grow_importance(plan, source.read), facts, storage=options.storage)
    return {"kind": facts.get("kind", ""), "mapped_from": facts["mapped_from"], "mapped_by": plan.growth.method}


def _estimated(
    checkpoint: Checkpoint, how: RunOptions, options: FisherOptions, out: Path, trials: Trials | None, *, quiet: bool
) -> dict[str, Any]:
    require_packages("datasets")
    from hf_grow.training.data.source_model import load_with_tokenizer
    from hf_grow.training.regularizers.fisher import by_names_on_disk, estimate_fisher, expert_utility, merge_online, sample_sequences
    from hf_grow.training.regularizers.importance_file import ImportanceFile, check_same_model, model_fingerprint, write_importance

    old: ImportanceFile | None = None
    shapes = {n: t.shape for n, t in checkpoint.info.tensors.items() if n in checkpoint.info.architecture.tensors}
    if how.merge is not None:
        old = open_importance(how.merge)
        check_same_model(old, shapes, None)
    model, tokenizer = load_with_tokenizer(checkpoint, _dtype(options, how.device), how.device)
    length = min(options.seq_length, model.config.max_position_embeddings)
    wanted = -(-options.tokens // length)
    assert how.text is not None
    apart = MEASURED if how.calibrate is not None else 0
    rows = sample_sequences([how.text], model, tokenizer, length=length, count=wanted + apart, seed=options.seed)
    new = None
    if how.on is not None and trials is not None:
        count = how.calibrate_steps * trials.batch + MEASURED
        new = sample_sequences([how.on], model, tokenizer, length=length, count=count, seed=options.seed)
        for label, some in ((how.text, rows), (how.on, new)):
            if len(some) < 8:
                raise InputError(
                    f"{label} fills {len(some)} sequences of {length} tokens; calibration needs 8.", hint="Use a smaller --seq-length."
                )
    rows, heldout = (rows[: -min(apart, len(rows) // 2)], rows[-min(apart, len(rows) // 2) :]) if apart else (rows, rows[:0])
    if len(rows) < wanted:
        render.note(f"{how.text} gives {rows.numel():,} tokens, not the {options.tokens:,} asked for.")
    with render.tokens_bar("Fisher", rows.numel(), quiet=quiet) as progress:
        found, tokens = estimate_fisher(model, rows, options, progress=progress)
    facts = {
        "kind": options.kind, "exact": options.exact or options.kind == "empirical", "tokens": tokens, "seq_length": length,
        "batch": options.batch, "seed": options.seed, "dtype": str(model.dtype).removeprefix("torch."),
        "model": checkpoint.ref, "revision": checkpoint.revision, "sample": model_fingerprint(model),
    }  # fmt: skip
    if old is not None:
        facts |= {"merged": old.metadata.get("model", ""), "decay": how.decay}
    tensors = by_names_on_disk(model, found)
    write_importance(out, shapes, tensors if old is None else merge_online(tensors, old.read, how.decay), facts, storage=options.storage)
    told: dict[str, Any] = {k: v for k, v in facts.items() if k != "sample"}
    count = sum(t.numel() for t in found.values())
    told["mean"] = sum(float(t.sum(dtype=t.dtype).double()) for t in found.values()) / count
    told["bytes"] = out.stat().st_size
    if how.utility is not None:
        arch = checkpoint.info.architecture
        table = expert_utility(arch.layers, arch.size("experts"), by_names_on_disk(model, found), arch.tensors)
        how.utility.write_text(to_json({"utility": table}, indent=None), encoding="utf-8")
        told["utility"] = str(how.utility)
    if new is not None and trials is not None:
        del found
        render.note(f"The Fisher is in {out}; now lambda is looked for.")
        told["calibration"] = calibrated(model.float(), checkpoint, how, trials, out, heldout, new, quiet=quiet)
    return told


def _dtype(options: FisherOptions, device: str | None) -> str:
    if options.dtype != "auto":
        return options.dtype
    import torch

    return "bfloat16" if (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda") else "float32"


def _show(facts: dict[str, Any]) -> None:
    say = render.console.print
    if "dry_run" in facts:
        say(f"parameters {format_count(facts['parameters'])}; the file takes {format_bytes(facts['file_bytes'])}")
        if "memory_bytes" in facts:
            parts = ", ".join(f"{k} {format_bytes(v)}" for k, v in facts["memory_bytes"].items() if k != "total")
            say(f"memory     {format_bytes(facts['memory_bytes']['total'])}: {parts}")
            say(f"compute    {format_count(facts['flops'])} FLOPs for {facts['tokens']:,} tokens")
        say(f"{facts['note']} (nothing done: --dry-run)")
        return
    if "mapped_by" in facts:
        say(f"wrote      {facts['output']}: mapped through {facts['mapped_by']}, {facts['seconds']} s", markup=False)
    else:
        how = "a sequence at a time" if facts["exact"] else f"batches of {facts['batch']}"
        say(f"wrote      {facts['output']} ({format_bytes(facts['bytes'])}): {facts['kind']} Fisher, {facts['tokens']:,} tokens, {how}, "
            f"mean {facts['mean']:.3g}, {facts['seconds']} s", markup=False)  # fmt: skip
    if "utility" in facts:
        say(f"wrote      {facts['utility']}: squared gradients of the experts (hf-grow experts --add N --utility FILE)", markup=False)
    if "calibration" in facts:
        c = facts["calibration"]
        say(
            f"before     old {c['before']['old']:.4f}, new {c['before']['new']:.4f} nats a token; {c['steps']} steps at {c['lr']:g} "
            f"({c['schedule']}, decay {c['weight_decay']:g}, {c['batch']} sequences a step):"
        )
        for t in c["trials"]:
            mark = "   <-" * (t["lambda"] == c["lambda"])
            say(
                f"lambda {t['lambda']:<10.4g} old {t['old']:.4f} ({t['rise']:+.4f}; 1/2 F d^2 says {t['forecast']:.4f})   new {t['new']:.4f}{mark}"
            )
    strength = facts.get("calibration", {}).get("lambda", 10.0)
    say(
        f"use it     regularizer: {{kind: ewc, fisher: {facts['output']}, lambda: {strength:.4g}}} in the recipe of hf-grow train",
        markup=False,
    )
