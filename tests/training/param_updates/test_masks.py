"""Masks by rows, their parts on every process, and copying and restoring what they select: against bool tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fake_group
import pytest
import torch
from grown import dense_mask, plan_of
from models import BY_NAME, make
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hf_grow.convert.in_memory import grow_model
from hf_grow.training.param_updates.masks import RowMask, both, either, inverse, product_mask, stacked_mask
from hf_grow.training.param_updates.param_provenance import new_masks
from hf_grow.training.param_updates.selection import MOST_BLOCKS, Selection
from hf_grow.training.param_updates.shards import holders, is_first_holder, local


def mask_of(tensor: Tensor) -> Any:
    """The mask of a bool tensor."""
    lines = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
    mask = RowMask(tuple(tensor.shape), torch.arange(len(lines)), lines)
    return both(mask, mask)  # in its smallest form


def random_bools(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def product(*vectors: Tensor) -> Tensor:
    out = vectors[0]
    for vector in vectors[1:]:
        out = out.unsqueeze(-1) & vector
    return out


WIDER = product(torch.arange(8) < 5, torch.arange(6) < 4)
MASKS: dict[str, Tensor] = {
    "rows": product(torch.arange(8) < 3, torch.ones(6, dtype=torch.bool)),
    "columns": product(torch.ones(8, dtype=torch.bool), torch.arange(6) > 3),
    "wider": ~WIDER,
    "scattered rows and columns": product(random_bools(8), random_bools(6, seed=1)),
    "all but a scattered block": ~product(random_bools(8), random_bools(6, seed=1)),
    "random": random_bools(40, 9),
    "experts": product(torch.tensor([True, False, True]), random_bools(4), torch.arange(5) < 2) | product(random_bools(3), *[random_bools(n) for n in (4, 5)]),
    "vector": random_bools(7),
    "everything": torch.ones(3, 4, dtype=torch.bool),
    "nothing": torch.zeros(3, 4, dtype=torch.bool),
}  # fmt: skip


@pytest.fixture
def group() -> Iterator[None]:
    yield
    fake_group.leave()


@pytest.mark.parametrize("kind", MASKS)
def test_masks_hold_every_bool_tensor(kind: str) -> None:
    bools = MASKS[kind]
    mask, inverted = mask_of(bools), mask_of(~bools)
    assert torch.equal(dense_mask(mask, bools.shape), bools) and torch.equal(dense_mask(inverse(mask), bools.shape), ~bools)
    assert either(mask, inverted) is True and both(mask, inverted) is False
    assert either(mask, False) is mask and both(True, mask) is mask and either(mask, True) is True and both(False, mask) is False
    if isinstance(mask, RowMask):
        assert mask.count() == int(bools.sum()) and mask.shape == tuple(bools.shape)
        assert bools.any() and not bools.all()
    else:
        assert kind in ("everything", "nothing")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(9,), (6, 5), (3, 4, 5)])
def test_operations_equal_those_of_bool_tensors(shape: tuple[int, ...], seed: int) -> None:
    vectors = [[random_bools(n, seed=10 * seed + i) for n in shape] for i in (0, 1)]
    (a, b), (x, y) = map(product_mask, vectors), (product(*v) for v in vectors)
    for found, right in ((a, x), (both(a, b), x & y), (either(a, b), x | y), (both(either(a, inverse(b)), b), (x | ~y) & y)):
        assert torch.equal(dense_mask(found, shape), right)
        assert isinstance(found, bool) == (bool(right.all()) or not right.any())


def test_a_tensor_of_runs_of_rows() -> None:
    parts = [MASKS["wider"], torch.zeros(2, 6, dtype=torch.bool), MASKS["columns"], torch.ones(6, 6, dtype=torch.bool)]
    stacked = stacked_mask([(mask_of(p), len(p)) for p in parts], (6, 4, 6))
    assert torch.equal(dense_mask(stacked, ()), torch.cat(parts).view(6, 4, 6))
    assert stacked_mask([(True, 2), (True, 1)], (3, 4)) is True and stacked_mask([(False, 3)], (3,)) is False


@pytest.mark.parametrize(("mesh", "placements"), [
    ((3,), (Shard(0),)), ((3,), (Shard(1),)), ((2, 2), (Shard(0), Shard(1))), ((2, 2), (Replicate(), Shard(0))),
])  # fmt: skip
@pytest.mark.parametrize("kind", [k for k, m in MASKS.items() if m.any() and not m.all() and m.dim() > 1])
def test_the_part_of_every_process(kind: str, mesh: Any, placements: Any, group: None) -> None:
    bools = MASKS[kind]
    mask, world = mask_of(bools), torch.Size(mesh).numel()
    assert isinstance(mask, RowMask)
    for rank in range(world):
        fake_group.join(rank, world)
        like = distribute_tensor(torch.zeros(bools.shape), init_device_mesh("cpu", mesh), placements, src_data_rank=None)
        expected = local(distribute_tensor(bools, like.device_mesh, placements, src_data_rank=None))
        found = mask.local(like)
        assert found.shape == tuple(expected.shape) and torch.equal(found.dense(), expected)
        values = torch.ones(expected.shape)
        Selection(found).fill(values, 0.0)
        assert torch.equal(values == 0, expected)
        replicated = Replicate() in placements
        assert holders(like) == (2 if replicated else 1) and holders(values) == world
        assert is_first_holder(like) is (rank < 2 or not replicated) and is_first_holder(values) is (rank == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
def test_updates_of_selected_entries_are_scaled_or_undone(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit as if the whole tensor was copied and every entry treated on its own."""
    bools = MASKS[kind]
    mask = mask_of(bools)
    if isinstance(mask, bool):
        return
    selection = Selection(mask)
    assert ((selection.whole is None) is (kind != "random") and len(mask.lines) < MOST_BLOCKS) or kind == "random"
    before, update = (torch.randn(bools.shape, dtype=dtype, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    for factor in (0.0, 0.3, 0.5, 1.7):
        values = before.clone()
        taken = selection.take(values)
        assert sum(t.numel() for t in taken) == selection.size
        values += update
        moved = values.clone()
        selection.restore(values, taken, factor)
        assert torch.equal(values, torch.where(bools, before.lerp(moved, factor) if factor else before, moved))
    values = before.clone()
    selection.fill(values, 3.0)
    assert torch.equal(values, before.masked_fill(bools, 3.0))


def test_selections_of_empty_shards() -> None:
    for shape in ((0,), (0, 6), (8, 0)):
        part = RowMask(shape, torch.zeros(shape[0], dtype=torch.uint8), torch.zeros(1, shape[1] if len(shape) > 1 else 1, dtype=torch.bool))
        values = torch.zeros(shape)
        selection = Selection(part)
        selection.restore(values, selection.take(values), 0.5)
        selection.fill(values, 1.0)


def test_masks_of_a_wider_model_are_small() -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=2)
    plan = plan_of(model, "tile", factor=2)
    grown = grow_model(model, plan)
    held, entries = 0, 0
    for name, mask in new_masks(grown, plan).items():
        p = grown.get_parameter(name)
        assert isinstance(mask, RowMask) and len(mask.lines) <= 2
        held += mask.nbytes()
        entries += p.numel()
        assert all(isinstance(i, slice) for block in Selection(mask).blocks for i in (block.rows, block.columns)) or "_proj" in name
    assert held < entries / 10  # a bool tensor has one byte an entry
