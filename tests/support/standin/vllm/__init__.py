"""A small stand-in for vLLM: the few calls that hf-grow makes of it, for tests where it is not installed; transformers computes the logits.

`test_vllm_engine.py` runs one test through vLLM itself where that is installed.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

__version__ = "0.0-standin"
ENGINES = []  # every LLM that was made


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    detokenize: bool = True


class LLM:
    def __init__(
        self, model, *, skip_tokenizer_init=False, dtype="auto", seed=0, load_format="auto", generation_config="auto", max_model_len=None
    ):
        from transformers import AutoModelForCausalLM

        if dtype == "float64":
            raise ValueError("Unknown dtype: float64\nand more")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.max_model_len, self.running, self.given = max_model_len, True, []
        self.arguments = {"skip_tokenizer_init": skip_tokenizer_init, "load_format": load_format, "generation_config": generation_config}
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shutdown))
        ENGINES.append(self)

    def _shutdown(self):
        self.running = False

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert self.running and not use_tqdm and len(prompts) == len(sampling_params)
        self.given += sampling_params
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(self._sample(prompt["prompt_token_ids"], params)))])
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    @torch.inference_mode()
    def _sample(self, prompt, params):
        assert params.max_tokens >= 1 and len(prompt) + params.max_tokens <= self.max_model_len
        ids, random = list(prompt), torch.Generator().manual_seed(params.seed)
        for _ in range(params.max_tokens):
            logits = self.model(torch.tensor([ids])).logits[0, -1].double() / params.temperature
            if params.top_k > 0:
                logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=random)))
            if ids[-1] in (params.stop_token_ids or ()):
                break
        return ids[len(prompt) :]
