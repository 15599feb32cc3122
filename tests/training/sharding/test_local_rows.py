"""Every shard of every way to cut a parameter, filled by rows, equals that part of the whole parameter."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import fake_group
import pytest
import torch
from models import BY_NAME, make
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from hf_grow import api
from hf_grow.checkpoint.reader import open_folder
from hf_grow.errors import SourceError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.training.param_updates.parameter_map import ParameterRows, parameter_map
from hf_grow.training.param_updates.shards import local_window
from hf_grow.training.sharding.local_rows import local_tensor, read_local
from hf_grow.training.sharding.row_source import GrownRows, StoredRows, ZeroedRows
from hf_grow.training.sharding.sharded_model import empty_model, fill_model


class Tensors:
    """A RowSource of tensors in memory."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def names(self) -> Any:
        return self.tensors.keys()

    def shape(self, name: str) -> Any:
        return self.tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop].clone()


@pytest.fixture
def as_rank() -> Any:
    yield fake_group.join
    fake_group.leave()


PLACEMENTS = [
    ((3,), (Shard(0),)),
    ((3,), (Shard(1),)),
    ((2, 2), (Shard(0), Shard(1))),
    ((2, 2), (Replicate(), Shard(0))),
    ((2, 2), (Shard(0), Shard(0))),
]


@pytest.mark.parametrize(("mesh", "placements"), PLACEMENTS)
@pytest.mark.parametrize("shape", [(7, 5), (3, 3), (5, 4, 3)])
def test_shards_of_fused_tensors(mesh: Any, placements: Any, shape: Any, as_rank: Any) -> None:
    """A parameter that holds three tensors of the disk; some shards are empty, some begin inside a tensor."""
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    rows = whole.view(-1, shape[-1])
    cuts = [0, 1, len(rows) - 1, len(rows)]
    places = {f"t{i}": ParameterRows("p", a, b) for i, (a, b) in enumerate(pairwise(cuts))}
    source = Tensors(**{n: rows[r.start : r.stop] for n, r in places.items()})
    world = torch.Size(mesh).numel()
    for rank in range(world):
        as_rank(rank, world)
        like = distribute_tensor(torch.zeros(shape), init_device_mesh("cpu", mesh), placements, src_data_rank=None)
        expected = distribute_tensor(whole, like.device_mesh, placements, src_data_rank=None)
        found: Any = local_tensor(like, places, source, torch.float32, "cpu")
        assert found.placements == like.placements and found.shape == like.shape
        torch.testing.assert_close(found.to_local(), expected.to_local(), rtol=0, atol=0)


def test_vectors_and_plain_tensors() -> None:
    whole = torch.arange(9.0)
    source = Tensors(a=whole[:4], b=whole[4:])
    places = {"a": ParameterRows("p", 0, 4), "b": ParameterRows("p", 4, 9)}
    torch.testing.assert_close(read_local(torch.empty(5), [9], (range(2, 7),), places, source), whole[2:7], rtol=0, atol=0)
    assert local_window(whole) == (range(9),)


def test_missing_tensors_and_other_shapes() -> None:
    places = {"a": ParameterRows("p", 0, 4)}
    with pytest.raises(SourceError, match="lack a"):
        read_local(torch.empty(4, 2), [4, 2], (range(4), range(2)), places, Tensors())
    for other in ((3, 2), (5, 2), (4, 3), (2, 4)):
        with pytest.raises(SourceError, match="not that of the model"):
            read_local(torch.empty(4, 2), [4, 2], (range(4), range(2)), places, Tensors(a=torch.zeros(other)))


@pytest.mark.parametrize("case", ["llama", "llama-tied", "mixtral"])
def test_a_stored_model(case: str, tmp_path: Path) -> None:
    made = make(BY_NAME[case])
    made.save_pretrained(tmp_path)
    checkpoint = open_folder(tmp_path)
    model = empty_model(dict(checkpoint.config), torch.float32, tmp_path)
    assert all(p.is_meta for p in model.parameters())
    fill_model(model, parameter_map(model), StoredRows(checkpoint), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits, rtol=0, atol=0)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is loaded.config.tie_word_embeddings


@pytest.mark.parametrize(("case", "method", "options"), [
    ("llama", "fpi", {"intermediate": 61}), ("llama", "identity", {"layers_to": 5}), ("llama", "experts", {"experts": 3, "router": "normal"}),
])  # fmt: skip
def test_a_growth_that_was_never_written(case: str, method: str, options: Any, tmp_path: Path) -> None:
    made = make(BY_NAME[case]).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "old")
    api.grow(tmp_path / "old", tmp_path / "new", method, **options)
    written = open_folder(tmp_path / "new")
    plan = GrowthPlan.from_json(written.growth)
    source, stored = GrownRows(plan, open_folder(tmp_path / "old")), StoredRows(written)
    assert set(source.names()) == set(stored.names())
    for name in source.names():
        rows = source.shape(name)[0]
        assert torch.equal(source.rows(name, 0, rows), stored.rows(name, 0, rows)), name
        assert torch.equal(source.rows(name, rows // 2, rows), stored.rows(name, rows // 2, rows)), name
    last = sorted(source.names())[-1]
    assert not ZeroedRows(source, [last]).rows(last, 0, 1).any()
