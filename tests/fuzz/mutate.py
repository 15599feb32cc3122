"""Mutations of files of unknown origin: JSON, safetensors headers, YAML, journals, plain bytes. Everything follows from the random numbers given."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

DEEP = 3_000
"""Levels of a nested value: more than Python's stack takes."""


def odd_values(draw: random.Random) -> list[Any]:
    """Values that a careful reader expects, and a careless one does not."""
    return [
        None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**70, 10**400, -(2**63), 0.5, 1e308, -1e-320, float("nan"), float("inf"), "", "x", "0", "1e999",
        "\x1b[2J\x1b]0;x\x07", "\u202etxt", "\ud800", "../../etc/passwd", "/dev/zero", "a" * draw.choice((300, 200_000)), [], {}, [None], [[]], [0] * 2_000,
        {"": 0}, {"a": {"a": {}}}, "yes", "2024-13-45", [1, "a", None], {"op": "take"}, ["F32", [2**40, 2**40]], "nan", "<s>" * 99,
    ]  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested data; of long lists and mappings the first places only, so that small parts are met as often."""
    found = [path] if path else []
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    for key, value in items[:60]:
        found += places(value, (*path, key))
    return found


def change(data: Any, draw: random.Random) -> Any:
    """Nested JSON data with one place changed, removed, renamed or doubled."""
    where = places(data)
    if not where:
        return draw.choice(odd_values(draw))
    path = min(draw.choices(where, k=2), key=len)
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    last, how = path[-1], draw.randrange(8)
    if how == 0:
        del inside[last]
    elif how == 1 and isinstance(inside, dict):
        inside[draw.choice(("x", "", "\x1b[31m", str(last) + "_", "a" * 3_000))] = inside.pop(last)
    elif how == 2:
        other = data
        for key in draw.choice(where):
            other = other[key]
        inside[last] = json.loads(json.dumps(other))
    elif how == 3:
        inside[last] = [inside[last]]
    else:
        inside[last] = draw.choice(odd_values(draw))
    return data


def written(data: Any, draw: random.Random) -> bytes:
    text = json.dumps(data)
    if draw.random() < 0.03:
        text = text.replace(":", ":" + "[" * DEEP, 1)
    elif draw.random() < 0.02:
        text = '{"a":' * DEEP + "1" + "}" * DEEP
    elif draw.random() < 0.03 and text.startswith("{"):
        text = text[:-1] + "," + text[1:]  # every key twice
    return text.encode()


def flip(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut, doubled or put in."""
    if not data:
        return bytes(draw.randrange(256) for _ in range(9))
    at = draw.randrange(len(data))
    return draw.choice((
        lambda: data[:at], lambda: data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :], lambda: data[:at] + data[at + draw.randrange(1, 40) :],
        lambda: data[:at] + data[at : at + 50] + data[at:], lambda: b"", lambda: data + data[:at], lambda: data[:at] + b"\xff\xfe\x00" + data[at:],
        lambda: data[:at] + b"9" * draw.choice((3, 30, 5_000)) + data[at:], lambda: b"\xef\xbb\xbf" + data, lambda: data[:at] + b"\x1b[2J" + data[at:],
    ))()  # fmt: skip


def json_file(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return flip(data, draw)
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 2))):
        value = change(value, draw)
    return written(value, draw)


def journal(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines()
    if draw.random() < 0.3 or not lines:
        return flip(data, draw)
    at = draw.randrange(len(lines))
    lines[at] = json.dumps(change(json.loads(lines[at]), draw)).encode()
    return b"\n".join(lines) + b"\n"


def header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header was changed, mostly with the right length before it."""
    (length,) = struct.unpack("<Q", data[:8])
    if draw.random() < 0.2:
        return flip(data[: 8 + length], draw) + data[8 + length :]
    text = written(change(json.loads(data[8 : 8 + length]), draw), draw)
    told = len(text) if draw.random() < 0.85 else draw.choice((0, 2**63, 2**64 - 1, 10**8, len(text) + 9, len(data)))
    return struct.pack("<Q", told) + text + data[8 + length :]


SNIPPETS = (
    "!!bool maybe", "!!int x", "!!timestamp 2024-13-45", "2024-13-45 99:00:00", "!!python/object/apply:os.getcwd []", "&a [*a]", "*nowhere", "yes", "~", "'",
    "[" * DEEP, "{a: " * 99, ".inf", ".nan", "1e999", "9" * 9_000, "-1", "0", "''", "\"\\e[2J\"", "\"\\ud800\"", "[1, [2, {a: b}]]", "{}", "[]", "null",
    "a" * 200_000, "/dev/zero", "../..", "!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "0x1F", "1_000", "1:30", "<<", "| \n    text", "true",
)  # fmt: skip


def yaml_file(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return flip(data, draw)
    lines = data.decode().splitlines()
    at = draw.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    how = draw.randrange(5)
    if how == 0:
        lines.append(lines[at])
    elif how == 1:
        lines.insert(
            at,
            draw.choice(
                ("  odd: 1", "x: &x [y, y]\nz: [*x, *x]", "<<: {a: 1}", "? [a]\n: b", "---", "\tx: 1", "%YAML 9", draw.choice(SNIPPETS))
            ),
        )
    elif how == 2 and colon:
        lines[at] = f"{key}{draw.choice(('_', 's', 'é', ' '))}{lines[at][len(key) :]}"
    elif colon:
        lines[at] = f"{key}: {draw.choice(SNIPPETS)}"
    else:
        del lines[at]
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"


def any_bytes(data: bytes, draw: random.Random) -> bytes:
    return flip(data, draw)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": json_file, ".jsonl": journal, ".safetensors": header, ".yaml": yaml_file, ".md": any_bytes, "": any_bytes,
}  # fmt: skip
