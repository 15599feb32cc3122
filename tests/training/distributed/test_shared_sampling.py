"""Self-replay under a launcher: all processes sample, and the texts are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from trained import recipe
from two_processes import model, together

from hf_grow.cli import main


def texts(cache: Path) -> bytes:
    (folder,) = (p for p in (cache / "replay").iterdir() if p.is_dir())
    assert sorted(p.name for p in folder.iterdir()) == ["replay.json", "texts.jsonl"]
    return (folder / "texts.jsonl").read_bytes()


@pytest.mark.slow
def test_texts_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    grown, found = model(tmp_path), []
    sampling = {"tokens": 2000, "max_length": 16, "batch_size": 4, "min_tokens": 1, "max_compression": 50.0, "max_repetition": 1.0}
    for processes in (1, 2, 3):
        cache, out = tmp_path / f"cache-{processes}", tmp_path / f"out-{processes}"
        path = recipe(tmp_path, grown, data={"cache": str(cache), "replay": {"self": sampling, "share": 0.2}}, max_steps=2)
        if processes == 1:
            assert main(["train", str(path), "-o", str(out)]) == 0
        else:
            together("ddp", path, out, folders=[tmp_path / f"at-{processes}-{i}" for i in range(processes)])
        found.append(texts(cache))
    assert found[0] == found[1] == found[2]
