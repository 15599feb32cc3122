"""Reads small untrusted files and JSON: only regular files, bounded in size and depth, strict JSON.

Symbolic links are followed, since the Hub cache consists of them; the target must be a regular file.
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
"""Limit for configs, indexes, tokenizers and records."""
MAX_DEPTH = 400
"""Nesting of JSON values: low in a config, but growth.json nests two levels deeper with every training after the growth."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # a surrogate escape, which may lack its other half


def open_regular(path: Path, *, missing: str = "", error: type[GrowError] = SourceError) -> FileIO:
    """Opens a regular file, unbuffered. Never blocks on a pipe.

    ``missing``: message if the file does not exist. Raises `error` if it cannot be read or is a folder, pipe, device or socket.
    """
    try:
        # By name first, since opening a device can have side effects; then the open file, since the name may point elsewhere by now.
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
        raise error(f"Cannot read {path}: it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'a special file')}, not a regular file.")


def check_no_special_files(folder: Path, inner: str) -> None:
    """Raises SourceError if `folder`, or its subfolder `inner`, contains a pipe, device, socket or link loop, which a library might open and block on.

    Dangling links are allowed. Raises OSError if the folder itself cannot be read.
    """
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
    """The operating system's message, without error number and file name."""
    return (isinstance(problem, OSError) and problem.strerror) or str(problem)


def read_bytes(path: Path, *, missing: str = "", max_bytes: int = MAX_FILE_BYTES, error: type[GrowError] = SourceError) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes. Raises `error`."""
    with open_regular(path, missing=missing, error=error) as file:
        try:
            data = bytearray()
            # The reported size alone is not enough: files may grow, and those in /proc report 0.
            while os.fstat(file.fileno()).st_size <= max_bytes and (piece := file.read(min(1 << 20, max_bytes + 1 - len(data)))):
                data += piece
            too_large = max(len(data), os.fstat(file.fileno()).st_size) > max_bytes
        except OSError as problem:
            raise error(f"Cannot read {path}: {error_text(problem)}.") from None
    if too_large:
        raise error(f"{path} is larger than {max_bytes} bytes, more than a file of this kind can have.")
    return bytes(data)


def read_text(path: Path, *, missing: str = "", max_bytes: int = MAX_FILE_BYTES, error: type[GrowError] = SourceError) -> str:
    """`read_bytes` as UTF-8 text. Raises `error`."""
    data = read_bytes(path, missing=missing, max_bytes=max_bytes, error=error)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text (byte {problem.start}).") from None


def read_json(path: Path, missing: str = "", *, max_bytes: int = MAX_FILE_BYTES, error: type[GrowError] = SourceError) -> dict[str, Any]:
    """The JSON object in a file. Raises `error` for any other value, and as `read_bytes` and `parse_json` do."""
    data = parse_json(read_bytes(path, missing=missing, max_bytes=max_bytes, error=error), str(path), error=error)
    if not isinstance(data, dict):
        raise error(f"{path} must hold a JSON object.")
    return data


def parse_json(data: bytes, where: str, *, error: type[GrowError] = SourceError) -> Any:
    """Parses strict JSON (RFC 8259): UTF-8, no NaN or infinity (nor numbers that overflow to it), no lone surrogates, at most MAX_DEPTH levels.

    ``where``: name of the source in error messages. Raises `error`.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_reject_constant, parse_float=_finite)
        _check_depth(value)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{where} is not valid JSON: it contains a lone surrogate.") from None
    except (ValueError, RecursionError) as problem:
        text = "it is nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        raise error(f"{where} is not valid JSON: {text}.") from None
    return value


def to_json(data: Any, *, indent: int | None = 2) -> str:
    """Strict JSON text with a final newline; compact if `indent` is None. Raises ValueError for NaN and infinity."""
    separators = (",", ":") if indent is None else None
    return json.dumps(data, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False) + "\n"


def replace_nonfinite(value: Any, nonfinite: Callable[[float], Any] = lambda number: None) -> Any:
    """JSON data at any depth, with `nonfinite` of NaN and infinities, which JSON does not have: None, or `str` for 'nan' and 'inf'."""
    if isinstance(value, Mapping):
        return {str(k): replace_nonfinite(v, nonfinite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(v, nonfinite) for v in value]
    return nonfinite(value) if isinstance(value, float) and not math.isfinite(value) else value


def _reject_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


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
