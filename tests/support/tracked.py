"""LAYERS LENGTH: the peak bytes of one of eight FSDP2 processes, blocks of SOLAR's size, as torch's tracker counts. Nothing is allocated.

Forward and backward in bf16 with checkpointed blocks, twice, so that gradients of an earlier micro-batch are there; no optimizer.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, MistralConfig

layers, length = map(int, sys.argv[1:])
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
config = MistralConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000
)
half = torch.bfloat16
how: dict[str, Any] = {"mesh": init_device_mesh("cpu", (8,)), "mp_policy": MixedPrecisionPolicy(half, half, half)}
with FakeTensorMode():
    model = AutoModelForCausalLM.from_config(config).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    # The units that accelerate makes.
    for part in (*model.model.layers, model.model.embed_tokens):
        fully_shard(part, **how)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **how)
    fully_shard(model, **how)
    tracker = FSDPMemTracker(model)
    tracker.track_inputs(())
    ids = torch.randint(0, 32000, (1, length))
    with tracker:
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    print(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
