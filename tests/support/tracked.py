"""The peak memory of a training step as torch's tracker counts it, on fake tensors: nothing is allocated. One process of any number.

A process reads cases (JSON, one a line) and prints the bytes of each. BaseGrowTrainer prepares the model as in a training, under accelerate's DDP or
FSDP2 with a process group that sends nothing, and takes an optimizer step with all its parts, whose parts' own state is there already.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def peaks(cases: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Bytes at the peak of each case, by what the tracker calls their purpose; "Total" is their sum.

    A case: "config" (config.json), "length", "recipe" (keys of a training recipe), "grow" (a method and its options; config is then the source's),
    "launch" (processes and how they share the model).
    """
    # A process that was one of several cannot be one alone again.
    order = sorted(range(len(cases)), key=lambda i: cases[i]["launch"])
    lines = "".join(json.dumps(cases[i]) + "\n" for i in order)
    done = subprocess.run([sys.executable, __file__], input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    found = dict(zip(order, (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')), strict=True))
    return [found[i] for i in range(len(cases))]


def read_case(case: dict[str, Any], folder: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Recipe, TrainingArguments, growth plan (None: not grown) and the config of the model that trains."""
    from hf_grow import api
    from hf_grow.training.config.train_config import read_recipe
    from hf_grow.training.setup.recipe_checks import arguments_for

    read = read_recipe({"model": "x", "data": {"train": "y"}, "max_steps": 2, "use_cpu": True, **case["recipe"]})
    assert read.recipe is not None, read.mistakes
    arguments = arguments_for(read.recipe, read.arguments, folder)
    if "grow" not in case:
        return read.recipe, arguments, None, case["config"]
    source = header_only(folder / "source", case["config"])
    grown = api.plan(source, case["grow"][0], **case["grow"][1])
    return read.recipe, arguments, grown, dict(grown.growth.config)


def header_only(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint in bf16 whose weights are holes of a file: of any size, on no disk."""
    from hf_grow.checkpoint.writer import layout
    from hf_grow.growth.source_info import TensorInfo
    from hf_grow.model.architecture import Architecture

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (shard,) = layout({e.name: TensorInfo("BF16", e.shape) for e in Architecture(config).tensors.values()}, 1 << 50)
    with (folder / shard.file).open("wb") as file:
        file.write(shard.header)
        file.truncate(shard.size)
    return folder


def start_process(processes: int, sharing: str) -> None:
    """The environment of `accelerate launch`, an accelerator that is the processor, and a process group that sends nothing."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from launched import environment
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import training_args

    AcceleratorState._reset_state(reset_partial_state=True)
    for key in [k for k in os.environ if k.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[key]
    if dist.is_initialized():
        dist.destroy_process_group()
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(key, None)
    training_args.is_torch_bf16_gpu_available = lambda: True
    if processes > 1:
        os.environ |= environment(sharing, processes) | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        kind = DistributedType.MULTI_CPU if sharing == "ddp" else DistributedType.MULTI_GPU
        PartialState._prepare_backend = lambda self, cpu, sagemaker, backend=None: ("fake", kind)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        mesh = init_device_mesh("cpu", (processes,))  # outside of fake tensors, whose values nobody knows
        sys.modules["torch.distributed.fsdp._fully_shard._fully_shard"]._init_default_mesh = lambda mesh_dim_names=(): mesh
        distributed._verify_param_shape_across_processes = distributed._sync_module_states = lambda *args, **more: None
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


class Importances:
    """Of any parameter, made when they are read."""

    shapes: dict[str, Any]
    metadata = {"sample": ""}  # noqa: RUF012

    def __init__(self, shapes: dict[str, Any]) -> None:
        self.shapes = shapes

    def names(self) -> Any:
        return self.shapes.keys()

    def shape(self, name: str) -> Any:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Any:
        return torch.empty(stop - start, *self.shapes[name][1:])

    def read(self, name: str) -> Any:
        return torch.empty(self.shapes[name])


def settings(case: dict[str, Any], recipe: Any, model: Any, plan: Any, config: dict[str, Any], planned: Any) -> tuple[Any, Any]:
    """The model that trains (with adapters, if any) and GrowthSettings, as `setup.build` makes them."""
    from hf_grow.model.architecture import Architecture
    from hf_grow.training.distillation.distill import Distiller, ModelTeacher
    from hf_grow.training.regularizers import build
    from hf_grow.training.setup.model_setup import with_lora
    from hf_grow.training.trainer.state import GrowthSettings

    held_by = case["config"] if recipe.regularizer.collapsed else config
    shapes = {e.name: tuple(e.shape) for e in Architecture(held_by).tensors.values()}
    build.open_importance = lambda path: Importances(shapes)
    build.check_same_model = lambda *args, **more: None
    build.model_fingerprint = build.encode_samples = lambda *args: ""
    build.sample_values = lambda *args: None
    penalty = build.make_penalty(recipe.regularizer, model, plan)
    updates = planned.updates
    if recipe.lora is not None:
        model, updates = with_lora(model, planned.new, recipe.lora)
    distiller = None
    if recipe.distill is not None:
        distiller = Distiller(recipe.distill, [ModelTeacher(make_model(case["config"], "bfloat16")) for _ in recipe.distill.teachers])
    aux = float(model.config.router_aux_loss_coef) if recipe.moe.aux_loss and hasattr(model.config, "router_aux_loss_coef") else None
    made = GrowthSettings(updates=updates, warmup=recipe.warmup, penalty=penalty, distiller=distiller, aux_loss=aux)
    return model, made


def make_model(config: dict[str, Any], dtype: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "torch_dtype", "dtype")}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values), dtype=getattr(torch, dtype))


def unreduced(held: dict[int, Any], bucket: Any) -> Any:
    """Of DDP: leaves the gradients as they are."""
    held[bucket.index()] = bucket.buffer()
    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def track(case: dict[str, Any], folder: Path) -> dict[str, int]:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import PreTrainedModel, masking_utils

    from hf_grow.model.meta_model import meta_model
    from hf_grow.training.param_updates.parameter_map import parameter_map
    from hf_grow.training.regularizers import build
    from hf_grow.training.regularizers import penalty as penalties
    from hf_grow.training.setup.model_setup import plan_updates
    from hf_grow.training.trainer.trainer import BaseGrowTrainer

    penalties.CHUNK = 1 << 62  # as on an accelerator
    processes, sharing = case.get("launch", (1, "one"))
    start_process(processes, sharing)
    case["recipe"] = {"ddp_find_unused_parameters": False, "report_to": "none", "disable_tqdm": True, **case["recipe"]}
    if sharing == "fsdp2":
        case["recipe"]["use_cpu"] = False
    recipe, args, plan, config = read_case(case, folder)
    batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    BaseGrowTrainer._note_routing = lambda self, outputs: None  # counts by values
    masking_utils.find_packed_sequence_indices = lambda *args: None  # it reads positions; attention would get a mask
    PreTrainedModel.to = lambda self, *args, **more: self  # a fake tensor cannot be exchanged for another
    # What reads values of the model is computed on another, beforehand.
    shapes = meta_model(config)
    planned, places = plan_updates(shapes, plan, recipe), parameter_map(shapes)
    build.parameter_map = lambda model: places
    with contextlib.nullcontext() if case.get("real") else FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(config, "float32" if recipe.dtype == "auto" else recipe.dtype)
        model, growth = settings(case, recipe, model, plan, config, planned)
        trainer = BaseGrowTrainer(model=model, args=args, train_dataset=[0], data_collator=list, growth=growth)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
        names = {id(p): n for n, p in model.named_parameters()}
        groups: list[list[str]] = []
        create = trainer.create_optimizer

        def created(*args: Any) -> Any:
            made = create(*args)
            groups[:] = [[names[id(p)] for p in group["params"]] for group in made.param_groups]
            return made

        trainer.create_optimizer = created
        for kind in (MemTracker, FSDPMemTracker):
            track_module = kind._track_module_params_and_buffers

            def without_frozen(self: Any, module: Any, install_grad_hooks: bool = True, of: Any = track_module) -> Any:
                return of(self, module, install_grad_hooks and all(p.requires_grad for p in module.parameters()))

            if "_track_module_params_and_buffers" in vars(kind) and track_module.__name__ != "without_frozen":
                kind._track_module_params_and_buffers = without_frozen
        tracker: Any = MemTracker()
        if sharing != "fsdp2":
            tracker.track_external(model, *tensors_of(growth))
        with contextlib.nullcontext() if sharing == "fsdp2" else tracker:
            wrapped = trainer._prepare_for_training(2, None, None)[0]
            if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
                wrapped.register_comm_hook({}, lambda held, bucket: unreduced(held, bucket))
            optimizer, held = trainer.optimizer, {n.removeprefix("module."): p for n, p in wrapped.named_parameters()}
            for group, members in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [held[n] for n in members]  # accelerate finds them by addresses, and fake tensors have none
            if growth.penalty is not None:
                growth.penalty.attach(trainer.model)

            def step() -> None:
                for i in range(steps):
                    trainer.accelerator.gradient_state._set_sync_gradients(i == steps - 1)
                    ids = torch.randint(0, config["vocab_size"], (batch, case["length"]))
                    each = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
                    with contextlib.nullcontext() if each or i == steps - 1 else trainer.accelerator.no_sync(wrapped):
                        trainer.training_step(wrapped, {"input_ids": ids, "labels": ids}, batch * case["length"] * steps)
                    tracker.reset_mod_stats()
                trainer._clip_grad_norm(wrapped)
                callback.on_pre_optimizer_step(*hear)
                optimizer.step()
                callback.on_optimizer_step(*hear)
                wrapped.zero_grad()

            trainer.current_gradient_accumulation_steps = steps
            callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "GrowthCallback")
            hear = (args, trainer.state, trainer.control)
            if sharing == "fsdp2":
                tracker = FSDPMemTracker(wrapped, optimizer.optimizer)
                step()  # DTensor works out once, on whole tensors, how each operation is sharded
                tracker.track_inputs(tuple(tensors_of(growth)))
            else:  # a backward pass of DDP would make its buckets anew, for real
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = torch.empty_like(p)
                optimizer.step()
                optimizer.zero_grad()
        with tracker:
            step()
        found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(getattr(k, "value", k)): int(v) for k, v in found.items()}


def tensors_of(growth: Any) -> list[Any]:
    """What the penalty and the teachers hold."""
    found: list[Any] = []
    penalty = growth.penalty
    for held in getattr(penalty, "held", {}).values():
        found += [t for t in (held.anchor, held.importance) if isinstance(t, torch.Tensor)]
    for values in getattr(penalty, "path", {}).values():
        found += values.values()
    for name in ("anchors", "importance"):
        values = getattr(penalty, name, {})
        found += values.values() if isinstance(values, dict) else []
    for _, teacher in growth.distiller.teachers if growth.distiller is not None else ():
        found += teacher.model.parameters()
    return [t.to_local() if hasattr(t, "to_local") else t for t in found]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(track(json.loads(line), Path(folder))), flush=True)
