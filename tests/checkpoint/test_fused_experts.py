"""Experts fused on disk, as transformers 5 has them in memory: read apart by their bytes, and grown as if every expert stood by itself."""

from __future__ import annotations

import json
from pathlib import Path

import hub_server
import pytest
import torch
from hub_server import HubServer
from models import BY_NAME, make, on_disk, save
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_grow import api
from hf_grow.checkpoint.reader import open_folder
from hf_grow.cli import main
from hf_grow.errors import SourceError

hub = hub_server.hub
MOE = ["mixtral", "mixtral-tied", "qwen2_moe", "qwen2_moe-mixed", "qwen3_moe", "qwen3_moe-mixed"]


def save_fused(model: PreTrainedModel, folder: Path) -> Path:
    """The names that the model has in memory, without transformers' way back to those on disk."""
    save(model, folder)
    state = {n: t.clone() for n, t in model.state_dict().items() if not (n == "lm_head.weight" and model.config.tie_word_embeddings)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MOE)
def test_every_expert_has_the_bytes_it_has_when_it_stands_by_itself(name: str, tmp_path: Path) -> None:
    model = make(BY_NAME[name], dtype=torch.bfloat16)
    fused = open_folder(save_fused(model, tmp_path / "fused"))
    assert any(n.endswith("mlp.experts.gate_up_proj") for n in load_file(tmp_path / "fused" / "model.safetensors"))
    wanted = on_disk(model)
    assert fused.tensors.keys() == wanted.keys()
    data = (tmp_path / "fused" / "model.safetensors").read_bytes()
    for tensor, stored in fused.tensors.items():
        assert stored.shape == wanted[tensor].shape
        assert data[stored.start : stored.stop] == wanted[tensor].contiguous().view(torch.uint8).numpy().tobytes(), tensor


@pytest.mark.parametrize(("method", "options"), [("identity", {"layers_to": 6}), ("tile", {"factor": 2}), ("experts", {"add": 2})])
def test_a_fused_source_grows_into_the_same_file_and_verifies(method: str, options: dict[str, int], tmp_path: Path) -> None:
    model = make(BY_NAME["mixtral"], dtype=torch.float32)
    for layout, write in (("plain", save), ("fused", save_fused)):
        write(model, tmp_path / layout)
        api.grow(tmp_path / layout, tmp_path / f"{layout}-grown", method, **options)
    plain, fused = ((tmp_path / f"{layout}-grown" / "model.safetensors").read_bytes() for layout in ("plain", "fused"))
    assert plain == fused
    assert api.verify(tmp_path / "fused", tmp_path / "fused-grown", tokens=64).ok


def test_a_fused_source_is_streamed_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    model = make(BY_NAME["mixtral"], dtype=torch.float32)
    hub.add("someone/fused", save_fused(model, tmp_path / "fused"))
    api.grow(tmp_path / "fused", tmp_path / "local", "identity", layers_to=6)
    command = ["depth", "someone/fused", "--method", "identity", "--layers-to", "6", "--stream-source", "-o", str(tmp_path / "streamed")]
    assert main(command) == 0
    assert (tmp_path / "streamed" / "model.safetensors").read_bytes() == (tmp_path / "local" / "model.safetensors").read_bytes()


def test_fused_experts_of_another_shape_and_two_layouts_in_one_file_are_refused(tmp_path: Path) -> None:
    folder = save_fused(make(BY_NAME["mixtral"], num_hidden_layers=1), tmp_path / "fused")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({**state, name: state[name][:, 1:].contiguous()}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"gate_up_proj has shape .*\[experts, 2 \* rows, columns\]"):
        open_folder(folder)
    one = state["model.layers.0.mlp.experts.down_proj"][0].clone()
    save_file({**state, "model.layers.0.block_sparse_moe.experts.0.w2.weight": one}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"experts\.0\.w2\.weight twice"):
        open_folder(folder)


def test_fused_experts_in_a_dense_model_are_no_tensors_of_it(tmp_path: Path) -> None:
    folder = save_fused(make(BY_NAME["mixtral"], num_hidden_layers=1), tmp_path / "fused")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}))
    with pytest.raises(SourceError, match="do not match its config"):
        api.plan(folder, "identity", layers_to=2)
