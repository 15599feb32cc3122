"""Small files of unknown origin: read without a hang, a flood of memory, or a value that JSON does not have.

Links are followed, since the Hub's cache is made of them; whatever they lead to must be a regular file.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from hf_grow.errors import GrowError, SourceError

MAX_FILE_BYTES = 64_000_000
"""Bytes of a configuration, an index, a tokenizer or a record."""
MAX_DEPTH = 400
"""Lists and objects inside each other: few in a config, but growth.json gets two deeper with every training since the growth."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a character, unless its other half stands beside it


def open_regular(path: Path, *, missing: str = "", error: type[GrowError] = SourceError) -> FileIO:
    """The open file, unbuffered. Raises `error` where it cannot be read, or is a folder, a pipe, a device or a socket; never waits for a writer.

    ``missing``: what to say where there is no such file.
    """
    try:
        # First by name: opening some devices does something. Then the open file itself: what bears the name may have changed meanwhile.
        _check_regular(path, os.stat(path), error)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            _check_regular(path, os.fstat(handle), error)
            return FileIO(handle, "rb")
        except BaseException:
            os.close(handle)
            raise
    except FileNotFoundError:
        raise error(missing or f"{path} is missing.") from None
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise error(f"Cannot read {path}: {error_text(problem)}.") from None


def _check_regular(path: Path, found: os.stat_result, error: type[GrowError]) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise error(f"Cannot read {path}: it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, not a regular file.")


def check_no_special_files(folder: Path, inner: str) -> None:
    """Raises SourceError if a folder, or its folder `inner`, holds a pipe, a device, a socket or a loop of links: some library would open it, and
    wait. Links that lead nowhere hold nobody up. Raises OSError where the folder itself cannot be read."""
    for path in (*folder.iterdir(), *folder.glob(f"{inner}/*")):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        except OSError as problem:
            raise SourceError(f"Cannot read {path}: {error_text(problem)}.") from None
        if not stat.S_ISDIR(found.st_mode):
            _check_regular(path, found, SourceError)


def error_text(problem: OSError | ValueError) -> str:
    """What the operating system says, without its number and the name of the file."""
    return (isinstance(problem, OSError) and problem.strerror) or str(problem)


def read_bytes(path: Path, *, missing: str = "", most: int = MAX_FILE_BYTES, error: type[GrowError] = SourceError) -> bytes:
    """All of a regular file of at most `most` bytes. Raises `error`."""
    with open_regular(path, missing=missing, error=error) as file:
        try:
            data = bytearray()
            # Not by its size alone: a file that grows, or one of /proc, tells another.
            while os.fstat(file.fileno()).st_size <= most and (piece := file.read(min(1 << 20, most + 1 - len(data)))):
                data += piece
            too_large = max(len(data), os.fstat(file.fileno()).st_size) > most
        except OSError as problem:
            raise error(f"Cannot read {path}: {error_text(problem)}.") from None
    if too_large:
        raise error(f"{path} is larger than {most} bytes; that is no plausible file of its kind.")
    return bytes(data)


def read_text(path: Path, *, missing: str = "", most: int = MAX_FILE_BYTES, error: type[GrowError] = SourceError) -> str:
    """The same as text. Raises `error`, also for what is not UTF-8."""
    data = read_bytes(path, missing=missing, most=most, error=error)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text (byte {problem.start}).") from None


def read_json(path: Path, missing: str = "", *, most: int = MAX_FILE_BYTES, error: type[GrowError] = SourceError) -> dict[str, Any]:
    """A JSON object. Raises `error` for any other value, and as `parse_json` does."""
    data = parse_json(read_bytes(path, missing=missing, most=most, error=error), str(path), error=error)
    if not isinstance(data, dict):
        raise error(f"{path} must hold a JSON object.")
    return data


def parse_json(data: bytes, where: str, *, error: type[GrowError] = SourceError) -> Any:
    """JSON as its standard has it: UTF-8, no NaN, no infinity (nor a number that becomes one), no half characters, and of bounded depth."""
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_no_number, parse_float=_finite)
        _check_depth(value)
        if _HALF.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{where} is not valid JSON: it holds half of a character (a lone surrogate).") from None
    except (ValueError, RecursionError) as problem:
        text = "it is nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        raise error(f"{where} is not valid JSON: {text}.") from None
    return value


def to_json(data: Any, *, indent: int | None = 2) -> str:
    """JSON that every reader takes, ending in a line break; compact where `indent` is None. Raises ValueError for NaN and infinity."""
    separators = (",", ":") if indent is None else None
    return json.dumps(data, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False) + "\n"


def replace_nonfinite(value: Any, nonfinite: Callable[[float], Any] = lambda number: None) -> Any:
    """JSON data at any depth, with `nonfinite` of NaN and infinities, which JSON does not have: None, or `str` for 'nan' and 'inf'."""
    if isinstance(value, Mapping):
        return {str(k): replace_nonfinite(v, nonfinite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(v, nonfinite) for v in value]
    return nonfinite(value) if isinstance(value, float) and not math.isfinite(value) else value


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for v in level
            if isinstance(v, dict | list)
            for inner in (v.values() if isinstance(v, dict) else v)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RecursionError
