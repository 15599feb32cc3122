"""Files of unknown origin: whatever they are, one message, no hang, and nothing that is no JSON."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_grow.common.safe_files import MAX_DEPTH, open_regular, parse_json, read_bytes, read_json, read_text, to_json
from hf_grow.errors import InputError, SourceError


def _socket(path: Path) -> None:
    made = socket.socket(socket.AF_UNIX)
    made.bind(os.path.relpath(path))  # relative: the name of a socket may have 107 bytes only
    made.close()


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (lambda p: p.mkdir(), "it is a folder"),
    "pipe": (lambda p: os.mkfifo(p), "it is a named pipe"),
    "socket": (_socket, "it is a socket"),
    "link to a device": (lambda p: p.symlink_to("/dev/zero"), "it is a device"),
    "link to a terminal": (lambda p: p.symlink_to("/dev/tty"), "it is a device"),
    "link to itself": (lambda p: p.symlink_to(p), "symbolic links"),
    "link to a pipe": (lambda p: (os.mkfifo(p.with_name("pipe")), p.symlink_to("pipe")), "it is a named pipe"),
    "link to nothing": (lambda p: p.symlink_to("nothing"), "is missing"),
    "link to what has no end": (lambda p: p.symlink_to("/proc/self/mem"), "Cannot read|larger"),
}
each_odd = pytest.mark.parametrize("kind", ODD)


@each_odd
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    make, says = ODD[kind]
    make(path)
    with pytest.raises(InputError, match=says):
        read_bytes(path, error=InputError)


def test_links_to_regular_files_are_followed_as_the_hub_s_cache_needs(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json") == {"a": 1}
    assert read_text(tmp_path / "config.json") == '{"a": 1}'
    with open_regular(tmp_path / "config.json") as file:
        assert file.read() == b'{"a": 1}'


def test_a_file_is_not_larger_than_allowed_whatever_it_says(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert read_bytes(tmp_path / "a", max_bytes=100) == b"x" * 100
    with pytest.raises(SourceError, match="larger than 99 bytes"):
        read_bytes(tmp_path / "a", max_bytes=99)
    assert os.stat("/proc/self/status").st_size == 0
    with pytest.raises(SourceError, match="larger than 9 bytes"):
        read_bytes(Path("/proc/self/status"), max_bytes=9)


def test_a_missing_file_a_zero_byte_and_other_encodings(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no config here"):
        read_bytes(tmp_path / "none", missing="no config here")
    with pytest.raises(SourceError, match="Cannot read"):
        read_bytes(tmp_path / "a\0b")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(SourceError, match="not UTF-8"):
        read_text(tmp_path / "latin")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": NaN}', "NaN is not a JSON"),
        ('{"a": [Infinity]}', "Infinity is not a JSON"),
        ("[-Infinity]", "-Infinity is not a JSON"),
        ("[1e999]", "too large"),
        ("[-1e400]", "too large"),
        ("9" * 5000, "digits"),
        ("[" * 100_000, "deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deep"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "deep"),
        (r'["\ud800"]', "surrogate"),
        (r'{"\uDC00": 1}', "surrogate"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
    ids=lambda v: v[:20],
)
def test_what_the_standard_does_not_know_is_no_json(text: str, says: str) -> None:
    with pytest.raises(SourceError, match=f"x is not valid JSON: .*{says}"):
        parse_json(text.encode(), "x")


@pytest.mark.parametrize("value", [{"a": [1, 2.5e300, None, True, "\U0001f600", "\\ud800"]}, [], 3, "[" * MAX_DEPTH], ids=str)
def test_what_is_json_is_read_as_it_is(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), "x") == value
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value).encode(), "x") == value


def test_what_json_does_not_have_is_not_written() -> None:
    assert to_json({"a": "é"}) == '{\n  "a": "é"\n}\n'
    assert to_json({"a": [1, 2]}, indent=None) == '{"a":[1,2]}\n'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            to_json([value])
