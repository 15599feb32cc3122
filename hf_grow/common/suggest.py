"""'Did you mean' suggestions for commands, flags, methods and recipe keys: synonyms of other programs, and spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SYNONYMS: dict[str, tuple[str, ...]] = {
    word: tuple(names.split())
    for words, names in (
        # commands
        ("solar upscale depth_upscaling", "dus"),
        ("moe upcycle mixture", "experts"),
        ("widen", "width"),
        ("deepen", "depth"),
        ("finetune fine_tune pretrain continue cpt", "train"),
        ("check validate compare evaluate eval test", "verify"),
        ("upload publish", "push"),
        ("info show describe", "inspect"),
        ("readme model_card", "card"),
        ("sample generate", "replay"),
        ("importance", "fisher"),
        ("lora merge_lora", "merge lora"),
        # growth
        ("layers num_layers n_layers num_hidden_layers depth", "layers_to"),
        ("hidden_size d_model width dim", "hidden"),
        ("intermediate_size ffn ffn_dim", "intermediate"),
        ("num_attention_heads num_heads n_heads", "heads"),
        ("num_key_value_heads num_kv_heads n_kv_heads", "kv_heads"),
        ("num_experts num_local_experts n_experts", "experts"),
        ("num_experts_per_tok topk active_experts", "top_k"),
        ("size params parameters target target_size", "to"),
        ("out out_dir output_dir output_path output_folder save_dir", "output"),
        ("force replace", "overwrite"),
        ("base base_model model_name model_name_or_path model_path checkpoint", "model source"),
        # training
        ("lr base_lr max_lr", "learning_rate calibrate_lr"),
        ("batch_size batch bs train_batch_size micro_batch_size mini_batch_size", "per_device_train_batch_size batch_size batch"),
        ("eval_batch_size", "per_device_eval_batch_size"),
        ("epoch epochs num_epochs n_epochs", "num_train_epochs"),
        ("steps max_iters iterations total_steps num_steps train_steps", "max_steps"),
        ("grad_accum gradient_accumulation accumulation accumulate accumulation_steps", "gradient_accumulation_steps"),
        ("wd decay", "weight_decay"),
        ("scheduler lr_scheduler schedule", "lr_scheduler_type"),
        ("optimizer", "optim"),
        ("warmup_ratio", "warmup_steps"),
        ("grad_clip clip gradient_clipping", "max_grad_norm"),
        ("max_length max_len max_seq_length max_seq_len seq_len sequence_length context context_length block_size cutoff_len", "data.seq_length seq_length"),
        ("dataset datasets train_file train_data corpus text texts", "data.train text"),
        ("eval_dataset validation valid", "data.eval"),
        ("penalty ewc l2sp si regularization regulariser", "regularizer"),
        ("ewc_lambda lamda lambd strength", "regularizer.lambda lambda"),
        ("teacher teachers kd distillation", "distill"),
        ("peft adapter qlora", "lora"),
        ("precision torch_dtype", "dtype"),
        ("gpu cuda", "device"),
        ("patience", "early_stopping_patience"),
    )
    for word in words.split()
}  # fmt: skip
"""Term of other programs -> names here, the most likely first."""
MIN_SIMILARITY = 0.6
"""difflib ratio from which a word counts as a misspelling."""
MAX_LENGTH = 100
"""Characters compared per word, since difflib takes quadratic time."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``word`` most likely means, or None. Ignores case, dashes and underscores; the last part of a dotted key matches too."""
    names = {_normalized(k): k for k in reversed(list(known))}
    wanted = _normalized(word)
    for name in (wanted, *SYNONYMS.get(wanted, ()), *SYNONYMS.get(wanted.rpartition(".")[2], ())):
        if name in names:
            return names[name]
    similarity = {n: max(_ratio(wanted, n), _ratio(wanted, n.rpartition(".")[2]) - 0.01 * n.count(".")) for n in names}
    best = max(similarity, key=similarity.__getitem__, default="")
    return names[best] if best and similarity[best] >= MIN_SIMILARITY else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean dus?' to append to a sentence, or an empty string."""
    found = closest(word, known)
    return f" Did you mean {found}?" if found else ""


def _normalized(word: str) -> str:
    return word[:MAX_LENGTH].strip().lstrip("-").replace("-", "_").lower()


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
