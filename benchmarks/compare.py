"""Compares the tensors of two checkpoints bit for bit: `python benchmarks/compare.py A B`. Exit status 1 if they differ.

Zeros of either sign count as equal, but are reported: mergekit makes identity blocks by 0 * weight, which is -0 where the weight is negative.
Both are read by safetensors, not by the programs under test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open


def tensor_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    return files


def compare(a: Path, b: Path) -> tuple[list[str], int, int]:
    """Names of tensors that differ, number of tensors, and number of tensors that differ only in the sign of zeros."""
    left, right = tensor_files(a), tensor_files(b)
    differ = sorted(left.keys() ^ right.keys())
    signs = 0
    for name in sorted(left.keys() & right.keys()):
        with safe_open(left[name], "pt") as one, safe_open(right[name], "pt") as other:
            x, y = one.get_tensor(name), other.get_tensor(name)
        if x.dtype != y.dtype or x.shape != y.shape or not torch.equal(x, y):
            differ.append(name)
        elif not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            signs += 1
    return differ, len(left), signs


def main() -> int:
    differ, count, signs = compare(Path(sys.argv[1]), Path(sys.argv[2]))
    if differ or not count:
        print(f"{len(differ)} of {count} tensors differ: {', '.join(differ[:5])}", file=sys.stderr)
        return 1
    note = f", {signs} of them up to the sign of zeros" if signs else ""
    print(f"all {count} tensors are equal{' bit for bit' if not signs else note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
