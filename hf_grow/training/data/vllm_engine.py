"""vLLM in the place of transformers' `generate`: token ids in, token ids out, each sequence with a seed of its own."""

from __future__ import annotations

import gc
import os
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import ExecutionError, InputError
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.distributed.launch import current_launch

_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""Unless the environment says otherwise: nothing is reported to its makers, its warnings are not shown, and standard output stays ours."""


def with_engine(options: ReplayOptions) -> ReplayOptions:
    """Chooses for `auto`: vLLM where it is installed and this is the only process of a launch, else transformers."""
    if options.engine != "auto":
        return options
    alone = current_launch().processes == 1
    return options.model_copy(update={"engine": "vllm" if alone and find_spec("vllm") is not None else "transformers"})


def check_engine(options: ReplayOptions, ref: str) -> None:
    """Raises InputError if the engine cannot be used here. ``ref``: the model's name."""
    if options.engine != "vllm":
        return
    if find_spec("vllm") is None:
        raise InputError(
            "The engine vllm needs vLLM, which is not installed.",
            hint="Install it (pip install vllm), or sample with the engine transformers.",
        )
    if current_launch().processes > 1:
        raise InputError(
            "vLLM samples in one process, and this is a launch of several.",
            hint=f"Sample first: hf-grow replay {ref} -o DIR --engine vllm; then train with replay: {{path: DIR}}.",
        )


def engine_of(options: ReplayOptions, checkpoint: Checkpoint) -> VllmEngine | None:
    """The engine that the options name; None for transformers. ``checkpoint``: with its weights."""
    if options.engine != "vllm":
        return None
    assert checkpoint.folder is not None
    return VllmEngine(checkpoint.folder, checkpoint.ref)


class VllmEngine:
    """One model in vLLM, which is started when it is first needed, and takes its device until the end of the `with` statement."""

    def __init__(self, folder: Path, ref: str) -> None:
        self.folder, self.ref = folder, ref
        self._llm: Any = None

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        new: int,
        *,
        options: ReplayOptions,
        ends: Collection[int],
        seeds: Sequence[int],
        dtype: str,
    ) -> list[list[int]]:
        """The new tokens after each prefix: up to an end token (included), ``new`` of them, or ``options.max_length`` with the prefix.

        ``seeds``: one for each prefix. Raises ExecutionError if vLLM cannot run the model.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM, SamplingParams

            assert options.max_length is not None
            if self._llm is None:
                self._llm = LLM(
                    model=str(self.folder),
                    skip_tokenizer_init=True,  # token ids come from our own
                    load_format="safetensors",  # never a pickle
                    generation_config="vllm",  # not the checkpoint's repetition penalty and the like
                    dtype=dtype,
                    max_model_len=options.max_length,
                    seed=options.seed % 2**32,
                )
            params = [
                SamplingParams(
                    temperature=options.temperature,
                    top_p=options.top_p,
                    top_k=options.top_k or -1,
                    max_tokens=min(new, options.max_length - len(prefix)),
                    seed=seed,
                    stop_token_ids=sorted(ends),
                    ignore_eos=True,  # `ends` has all
                    detokenize=False,
                )
                for prefix, seed in zip(prefixes, seeds, strict=True)
            ]
            found = self._llm.generate([{"prompt_token_ids": list(prefix)} for prefix in prefixes], params, use_tqdm=False)
        except Exception as error:  # of many kinds, from the engine's own process too
            raise ExecutionError(
                f"vLLM cannot sample from {self.ref}: {(str(error) or type(error).__name__).splitlines()[0]}",
                hint="Its messages may be above (VLLM_LOGGING_LEVEL=INFO tells more). The engine transformers samples from every model.",
            ) from None
        return [list(output.outputs[0].token_ids) for output in found]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends vLLM's own process, so that the training has the device. It starts again when it is needed."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
