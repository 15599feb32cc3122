"""Moving bytes, digests, and the search for values that are not finite."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from hf_grow.checkpoint import transfer
from hf_grow.errors import ExecutionError
from hf_grow.growth.finite_check import FiniteCheck


def quiet() -> None:
    pass


def refuse(*args: object) -> int:
    raise OSError(errno.EXDEV, "another file system")


@pytest.mark.parametrize("missing", [[], ["copy_file_range"], ["copy_file_range", "sendfile"]], ids=["kernel", "sendfile", "read-write"])
def test_a_range_lands_at_its_offset_by_every_way_of_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]) -> None:
    for name in missing:
        monkeypatch.setattr(os, name, refuse)
    data = os.urandom(3_000_001)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(bytes(4_000_000))
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("r+b") as b:
        transfer.copy_range(a.fileno(), b.fileno(), 12_345, 777, 2_900_000, quiet)
    written = (tmp_path / "b").read_bytes()
    assert written[777 : 777 + 2_900_000] == data[12_345 : 12_345 + 2_900_000]
    assert not any(written[:777]) and not any(written[777 + 2_900_000 :])


def test_a_full_disk_is_not_taken_for_a_missing_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", full)
    (tmp_path / "a").write_bytes(b"x" * 100)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("w+b") as b, pytest.raises(OSError, match="full"):
        transfer.copy_range(a.fileno(), b.fileno(), 0, 0, 100, quiet)


def test_a_source_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("w+b") as b, pytest.raises(ExecutionError, match="ended early"):
        transfer.copy_range(a.fileno(), b.fileno(), 0, 0, 101, quiet)


def test_digest_is_xxh3_of_the_range_and_feeds_other_hashes(tmp_path: Path) -> None:
    data = os.urandom(transfer.READ_SIZE * 2 + 17)
    (tmp_path / "a").write_bytes(data)
    sha = hashlib.sha256()
    with (tmp_path / "a").open("rb") as a:
        found = transfer.hash_range(a.fileno(), 5, len(data) - 3, quiet, sha)
    assert found == xxhash.xxh3_128_hexdigest(data[5:-3])
    assert sha.digest() == hashlib.sha256(data[5:-3]).digest()


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def checked(dtype: str, values: torch.Tensor) -> bool:
    check = FiniteCheck(dtype)
    check.update(memoryview(values.view(torch.uint8).numpy().reshape(-1)))
    return check.finite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -float("nan")], ids=["nan", "inf", "-inf", "-nan"])
def test_one_bad_value_anywhere_is_found(dtype: str, bad: float) -> None:
    for place in (0, 500, 999):
        values = torch.randn(1000).to(DTYPES[dtype])
        assert checked(dtype, values)
        values[place] = bad
        assert not checked(dtype, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_values_pass(dtype: str) -> None:
    info = torch.finfo(DTYPES[dtype])
    assert checked(dtype, torch.tensor([info.max, info.min, info.tiny, 0.0, -0.0], dtype=DTYPES[dtype]))


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_any_bit_pattern_is_judged_as_torch_judges_it(bits: list[int]) -> None:
    values = torch.from_numpy(np.array(bits, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)
    assert checked("BF16", values) == bool(torch.isfinite(values).all())
