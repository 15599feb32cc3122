"""Reading checkpoints that are damaged, hostile or merely odd: a SourceError that says what is wrong, or the right tensors."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import CASES, Case, make, save
from safetensors import SafetensorError, deserialize, safe_open

from hf_grow.checkpoint.reader import INDEX, SINGLE, Checkpoint, open_folder
from hf_grow.checkpoint.safetensors_header import read_header
from hf_grow.errors import SourceError
from hf_grow.growth.plan import check_source
from hf_grow.growth.source_info import DTYPE_BYTES
from hf_grow.model.architecture import Architecture

CONFIG = {
    "model_type": "llama",
    "vocab_size": 4,
    "hidden_size": 4,
    "intermediate_size": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
HUGE = 2**61  # fits 64 bits; twice of it does not


def layout(tensors: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, dict[str, Any]]:
    """A sound header: the tensors one after the other."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header


def extent(header: Mapping[str, Any]) -> int:
    return max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)


def write(path: Path, header: Mapping[str, Any] | bytes, data: bytes | None = None, *, length: int | None = None) -> Path:
    """A safetensors file; any header, also one that is none."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = data if data is not None else bytes(extent(header)) if not isinstance(header, bytes) else b""
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
    return path


def shapes(config: Mapping[str, Any] = CONFIG) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in Architecture(config).tensors.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound checkpoint in one file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write(tmp_path / SINGLE, layout(shapes()))
    return tmp_path


@pytest.fixture
def shards(tmp_path) -> Path:
    """A sound checkpoint in two files: a.safetensors (the first five tensors) and b.safetensors."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    names = list(shapes())
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        write(tmp_path / file, layout({n: shapes()[n] for n in part}))
    index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def opened(folder: Path) -> Checkpoint:
    """What planning does with a folder before anything else."""
    checkpoint = open_folder(folder)
    check_source(checkpoint.info)
    return checkpoint


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        opened(folder)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Rewrites a JSON file."""
    data = json.loads(path.read_text())
    path.write_text(json.dumps(edit(data) or data))


# ---- sound files ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_what_save_pretrained_writes_is_read_as_safetensors_reads_it(case: Case, sharded: bool, tmp_path):
    save(make(case), tmp_path, sharded=sharded)
    checkpoint = opened(tmp_path)
    files = {p.name for p in tmp_path.glob("*.safetensors")}
    assert set(checkpoint.files) == files
    names = set()
    for file in files:
        raw = (tmp_path / file).read_bytes()
        with safe_open(tmp_path / file, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                stored = checkpoint.tensors[name]
                tensor = f.get_tensor(name)
                assert (stored.file, stored.shape, stored.dtype) == (file, tuple(tensor.shape), "F32")
                assert raw[stored.start : stored.stop] == tensor.numpy().tobytes()
                names.add(name)
    assert names == set(checkpoint.tensors)


def test_a_hand_written_checkpoint_is_read(folder):
    checkpoint = opened(folder)
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == shapes()
    assert checkpoint.files[SINGLE]["size"] == (folder / SINGLE).stat().st_size
    assert checkpoint.info.config == CONFIG


def test_shards_are_read_through_their_index(shards):
    checkpoint = opened(shards)
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == shapes()
    assert set(checkpoint.files) == {"a.safetensors", "b.safetensors"}
    assert checkpoint.path("a.safetensors").is_file()


def test_the_header_may_be_in_another_order_than_the_data(folder):
    write(folder / SINGLE, dict(reversed(layout(shapes()).items())))
    starts = [t.start for t in opened(folder).tensors.values()]
    assert starts == sorted(starts, reverse=True)


@pytest.mark.parametrize("padding", range(9))
def test_any_padding_of_the_header_is_read(folder, padding: int):
    header = layout(shapes())
    write(folder / SINGLE, json.dumps(header).encode() + b" " * padding, bytes(extent(header)))
    stored = opened(folder).tensors["model.embed_tokens.weight"]
    assert stored.start == 8 + len(json.dumps(header)) + padding


def test_metadata_of_strings_are_no_tensor(folder):
    write(folder / SINGLE, {"__metadata__": {"format": "pt"}, **layout(shapes())})
    assert set(opened(folder).tensors) == set(shapes())


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype_of_the_table_is_read(folder, dtype: str):
    write(folder / SINGLE, layout(shapes(), dtype))
    assert {t.dtype for t in opened(folder).tensors.values()} == {dtype}


def test_empty_tensors_are_read_but_no_model_has_them(folder):
    """The format allows them anywhere in the data; no family of the table has one, so the checkpoint is refused by name."""
    header = layout(shapes()) | {"nothing": {"dtype": "F32", "shape": [0, 3], "data_offsets": [32, 32]}}
    write(folder / SINGLE, header)
    assert open_folder(folder).tensors["nothing"].shape == (0, 3)
    assert "1 unknown: nothing" in refusal(folder)


def test_a_single_file_goes_before_an_index_as_in_transformers(folder):
    (folder / INDEX).write_text('{"weight_map": {"x": "missing.safetensors"}}')
    assert set(opened(folder).tensors) == set(shapes())


def test_a_stored_head_of_a_tied_checkpoint_is_known_to_be_extra(folder):
    change(folder / "config.json", lambda c: {**c, "tie_word_embeddings": True})
    assert check_source(open_folder(folder).info) == {"lm_head.weight": "equal to the embedding, to which it is tied"}


def test_rotary_buffers_of_old_converters_are_known_to_be_extra(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write(folder / SINGLE, layout({**shapes(), name: (1,)}))
    assert list(check_source(open_folder(folder).info)) == [name]


# ---- damaged weight files ------------------------------------------------------------------------------------------------------------


def entry(**changes: Any) -> bytes:
    """The header of a file of one tensor of 8 bytes, with something wrong."""
    return json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode()


DEEP = 200_000
DAMAGED: dict[str, tuple[bytes, str]] = {
    "no-json": (b"{", "damaged header"),
    "empty-header": (b"", "damaged header"),
    "not-utf8": (b'{"\xff": 1}', "damaged header"),
    "utf16": ('{"w": 1}'.encode("utf-16"), "damaged header"),
    "not-an-object": (b"[1, 2]", "damaged header"),
    "null": (b"null", "damaged header"),
    "deep-lists": (b'{"w":' + b"[" * DEEP + b"]" * DEEP + b"}", "damaged header"),
    "deep-objects": (b'{"w":' * DEEP + b"1" + b"}" * DEEP, "damaged header"),
    "huge-number": (entry(shape=0).replace(b'"shape": 0', b'"shape": [' + b"9" * 10_000 + b"]"), "damaged"),
    "duplicate-tensor": (entry()[:-1] + b", " + entry()[1:], "duplicate name"),
    "duplicate-field": (b'{"w": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', "duplicate name"),
    "metadata-number": (b'{"__metadata__": {"a": 1}}', "metadata"),
    "metadata-list": (b'{"__metadata__": []}', "metadata"),
    "metadata-null": (b'{"__metadata__": null}', "metadata"),
    "entry-is-no-object": (b'{"w": 3}', "header entry of w is invalid"),
    "no-shape": (b'{"w": {"dtype": "F32", "data_offsets": [0, 8]}}', "header entry of w is invalid"),
    "no-offsets": (b'{"w": {"dtype": "F32", "shape": [2]}}', "header entry of w is invalid"),
    "no-dtype": (b'{"w": {"shape": [2], "data_offsets": [0, 8]}}', "header entry of w is invalid"),
    "dtype-list": (entry(dtype=[]), "header entry of w is invalid"),
    "dtype-object": (entry(dtype={"a": 1}), "header entry of w is invalid"),
    "dtype-null": (entry(dtype=None), "header entry of w is invalid"),
    "dtype-unknown": (entry(dtype="F33"), "'F33'; supported: BF16, F16, F32, F64"),
    "dtype-quantized": (entry(dtype="F8_E4M3", shape=[8]), "Dequantize"),
    "dtype-long": (entry(dtype="F" * 10_000), "supported: "),
    "shape-negative": (entry(shape=[-2]), "header entry of w is invalid"),
    "shape-two-negatives": (entry(shape=[-2, -1]), "header entry of w is invalid"),
    "shape-float": (entry(shape=[2.0]), "header entry of w is invalid"),
    "shape-bool": (entry(shape=[2, True]), "header entry of w is invalid"),
    "shape-string": (entry(shape="2"), "header entry of w is invalid"),
    "shape-huge": (entry(shape=[2**64]), "header entry of w is invalid"),
    "shape-overflow": (entry(shape=[HUGE, 8]), "needs"),
    "shape-wraps-to-8": (entry(shape=[HUGE + 1, 8]), "needs"),
    "shape-many-dimensions": (entry(shape=[1] * 100_000), "header entry of w is invalid"),
    "shape-giant-product": (entry(shape=[HUGE] * 100_000), "header entry of w is invalid"),
    "offsets-three": (entry(data_offsets=[0, 8, 8]), "header entry of w is invalid"),
    "offsets-reversed": (entry(data_offsets=[8, 0]), "offsets span -8"),
    "offsets-float": (entry(data_offsets=[0, 8.0]), "header entry of w is invalid"),
    "offsets-bool": (entry(shape=[0], data_offsets=[False, False]), "header entry of w is invalid"),
    "offsets-negative": (entry(data_offsets=[-8, 0]), "header entry of w is invalid"),
    "offsets-huge": (entry(shape=[HUGE // 4], data_offsets=[0, HUGE]), "truncated"),
    "offsets-infinite": (entry().replace(b"8]", b"Infinity]"), "header entry of w is invalid"),
    "offsets-nan": (entry().replace(b"8]", b"NaN]"), "header entry of w is invalid"),
    "offsets-too-short": (entry(data_offsets=[0, 4]), "needs 8 bytes, its offsets span 4"),
    "hole-at-the-start": (entry(data_offsets=[4, 12]), "follows a gap"),
    "name-with-escape": (entry().replace(b'"w"', b'"\\u001b[2J"'), "is not a valid tensor name"),
    "name-lone-surrogate": (entry().replace(b'"w"', b'"\\ud800"'), "is not a valid tensor name"),
    "name-long": (entry().replace(b'"w"', b'"' + b"w" * 100_000 + b'"'), "is not a valid tensor name"),
}


@pytest.mark.parametrize(("header", "says"), DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_header_is_refused(folder, header: bytes, says: str):
    write(folder / SINGLE, header, bytes(8))
    message = refusal(folder)
    assert says in message
    assert SINGLE in message
    message.encode()  # it can be printed


@pytest.mark.parametrize("name", ["shape-negative", "offsets-reversed", "hole-at-the-start", "metadata-number", "deep-lists"])
def test_safetensors_itself_refuses_these_headers_too(name: str, tmp_path):
    with pytest.raises(SafetensorError), safe_open(write(tmp_path / SINGLE, DAMAGED[name][0], bytes(8)), "pt"):
        pass


PAIR = {"v": (2,), "w": (2,)}  # F32: [0, 8) and [8, 16)


@pytest.mark.parametrize(
    ("v", "w", "size", "says"),
    [
        ([0, 8], [4, 12], 12, "overlap"),
        ([0, 8], [0, 8], 8, "overlap"),
        ([0, 8], [12, 20], 20, "gap"),
        ([0, 8], [8, 16], 15, "truncated"),
        ([0, 8], [8, 16], 0, "truncated"),
        ([0, 8], [8, 16], 17, "too long"),
        ([0, 8], [2**40, 2**40 + 8], 16, "gap"),
    ],
)
def test_data_that_the_offsets_do_not_tile_are_refused(folder, v: list[int], w: list[int], size: int, says: str):
    header = layout(PAIR, "F32")
    header["v"]["data_offsets"], header["w"]["data_offsets"] = v, w
    write(folder / SINGLE, header, bytes(size))
    assert says in refusal(folder)


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 100_000_001])
def test_a_giant_header_is_refused_without_reading_it(folder, length: int):
    write(folder / SINGLE, b"{}", length=length)
    assert f"its header length is {length} bytes" in refusal(folder)


def test_a_header_longer_than_its_file_is_refused(folder):
    write(folder / SINGLE, b"{}", length=3)
    assert "truncated: its header needs 11 bytes, the file has 10" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1])
def test_a_truncated_file_is_refused_and_asks_to_download_it_again(folder, keep: int):
    raw = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw[:keep])
    message = refusal(folder)
    assert "truncated" in message
    assert "Download the file again" in message


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_in_a_header_raise_nothing_but_a_source_error(changes: list[tuple[int, int]]):
    """And what is still read lies within the file, without overlap."""
    header = layout(shapes())
    raw = json.dumps(header).encode()
    file = bytearray(struct.pack("<Q", len(raw)) + raw + bytes(extent(header)))
    for at, value in changes:
        file[at % (len(raw) + 8)] = value
    rest = memoryview(bytes(file[8:]))
    with suppress(SourceError):
        found = read_header(bytes(file[:8]), lambda n: bytes(rest[:n]), len(file), "x.safetensors")
        spans = sorted((t.start, t.stop) for t in found.values())
        assert spans[0][0] >= 8
        assert [stop for _, stop in spans] == [start for start, _ in spans[1:]] + [len(file)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 20) | st.integers() | st.floats() | st.sampled_from(["F32", "BF16", "I64", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries({"dtype": VALUES, "shape": VALUES, "data_offsets": VALUES}) | VALUES
NEARLY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16"]),
        "shape": st.lists(st.integers(0, 3), max_size=2),
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2),
    }
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.text(max_size=3), ENTRIES | NEARLY, max_size=3), st.integers(0, 24))
@example({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8)
def test_a_header_is_read_only_where_safetensors_reads_it_too(header: dict[str, Any], size: int):
    raw = json.dumps(header).encode()
    file = struct.pack("<Q", len(raw)) + raw + bytes(size)
    with suppress(SourceError):
        found = read_header(file[:8], lambda n: file[8 : 8 + n], len(file), "x.safetensors")
        theirs = dict(deserialize(file))
        assert {n: (t.dtype, list(t.shape), t.stop - t.start) for n, t in found.items()} == {
            n: (t["dtype"], t["shape"], len(t["data"])) for n, t in theirs.items()
        }


# ---- indexes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    ["../b.safetensors", "../../etc/x.safetensors", "/etc/b.safetensors", "sub/b.safetensors", "..\\b.safetensors", "C:\\b.safetensors",
     "./b.safetensors", ".safetensors", "..safetensors", "b.bin", "b.safetensors\x00", "b.safetensors\n", "~b.safetensors", "",
     "a" * 5000 + ".safetensors", "ü.safetensors", None, 3, ["b.safetensors"], {"b": 1}, True],
    ids=lambda v: repr(v)[:30],
)  # fmt: skip
def test_an_index_that_leads_out_of_the_folder_is_refused(shards, file: Any):
    (shards.parent / "b.safetensors").write_bytes((shards / "b.safetensors").read_bytes())
    change(shards / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": file}))
    assert "only names of .safetensors files in the same folder" in refusal(shards)


def test_an_index_of_names_that_speak_to_the_terminal_is_refused(shards):
    change(shards / INDEX, lambda i: i["weight_map"].update({"\x1b[2J": "a.safetensors"}))
    assert "\\x1b[2J' is not a valid tensor name" in refusal(shards)


@pytest.mark.parametrize("weight_map", [None, [], {}, "a.safetensors", 3])
def test_an_index_without_a_weight_map_is_refused(shards, weight_map: Any):
    change(shards / INDEX, lambda i: {**i, "weight_map": weight_map})
    assert "has no weight_map" in refusal(shards)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "[" * 100_000])
def test_an_index_that_is_no_json_object_is_refused(shards, text: str):
    (shards / INDEX).write_text(text)
    assert INDEX in refusal(shards)


def test_a_missing_shard_is_named(shards):
    (shards / "b.safetensors").unlink()
    message = refusal(shards)
    assert "shard b.safetensors is missing" in message
    assert "Download the checkpoint again" in message


def test_a_shard_that_is_a_folder_is_refused(shards):
    (shards / "b.safetensors").unlink()
    (shards / "b.safetensors").mkdir()
    assert "it is a folder" in refusal(shards)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(shards):
    change(shards / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "a.safetensors"}))
    message = refusal(shards)
    assert "lm_head.weight is in b.safetensors, but the index lists it in a.safetensors" in message


def test_a_tensor_that_stands_in_two_shards_is_refused(shards):
    first = next(iter(shapes()))
    part = {n: s for n, s in shapes().items() if n not in list(shapes())[:5]} | {first: shapes()[first]}
    write(shards / "b.safetensors", layout(part))
    assert f"{first} is in b.safetensors" in refusal(shards)


def test_a_tensor_that_no_shard_holds_is_named(shards):
    change(shards / INDEX, lambda i: i["weight_map"].update({"model.extra": "a.safetensors"}))
    message = refusal(shards)
    assert "lists model.extra in a.safetensors, which does not contain it" in message


def test_a_tensor_that_the_index_does_not_know_is_refused(shards):
    change(shards / INDEX, lambda i: i["weight_map"].pop("lm_head.weight") and None)
    assert "lm_head.weight is in b.safetensors, but the index lists it in no file" in refusal(shards)


def test_a_damaged_shard_is_named(shards):
    (shards / "b.safetensors").write_bytes(b"junk")
    assert "b.safetensors is truncated" in refusal(shards)


# ---- configs -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"x"', "{'a': 1}", "[" * 100_000, "\ufeff\ufeff{}", '{"a": ' + "9" * 5000 + "}"]
)
def test_a_config_that_is_no_json_object_is_refused(folder, text: str):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_a_config_that_is_not_text_is_refused(folder):
    (folder / "config.json").write_bytes(b"\x00\xff\xfe{}")
    assert "config.json is not valid JSON" in refusal(folder)


def test_a_config_that_is_a_folder_is_refused(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "Cannot read" in refusal(folder)


def test_a_giant_config_is_refused_without_reading_it(folder):
    with (folder / "config.json").open("wb") as f:
        f.truncate(2**40)  # sparse
    assert "more than a file of this kind" in refusal(folder)


def test_a_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    assert "it has no config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, "9 missing: model.layers.2."),
        ({"num_hidden_layers": 1}, "9 unknown: model.layers.1."),
        ({"hidden_size": 8}, "but config.json implies [4, 8]"),
        ({"vocab_size": 5}, "model.embed_tokens.weight has shape [4, 4], but config.json implies [5, 4]"),
        ({"num_key_value_heads": 1}, "k_proj.weight has shape [4, 4], but config.json implies [2, 4]"),
        ({"attention_bias": True}, "8 missing: "),
        ({"model_type": "qwen3", "num_key_value_heads": 2}, "4 missing: model.layers.0.self_attn.q_norm.weight"),
        ({"num_hidden_layers": 2**70}, "num_hidden_layers must be a positive integer"),
        ({"num_hidden_layers": 10**6}, "more than any real model"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer, got -1"),
        ({"vocab_size": 1e3}, "vocab_size must be a positive integer, got 1000.0"),
        ({"vocab_size": None}, "vocab_size must be a positive integer, got None"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ({"model_type": "bert"}, "Supported families: llama, mistral"),
        ({"model_type": {}}, "not supported"),
    ],
    ids=lambda v: "-".join(map(str, next(iter(v.items())))) if isinstance(v, dict) else "",
)
def test_a_config_that_lies_about_the_weights_is_refused(folder, changes: dict[str, Any], says: str):
    change(folder / "config.json", lambda c: {**c, **changes})
    assert says in refusal(folder)


@pytest.mark.parametrize(
    "key", ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_config_without_a_needed_key_is_told_which(folder, key: str):
    change(folder / "config.json", lambda c: c.pop(key) and None)
    assert key in refusal(folder)


# ---- other kinds of folder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "only pickled weights"),
        (["consolidated.00.pth", "params.json"], "only pickled weights"),
        (["adapter_config.json", "adapter_model.safetensors"], "PEFT adapter"),
        (["adapter_config.json", "adapter_model.bin"], "PEFT adapter"),
        (["model-Q4_K_M.gguf"], "GGUF"),
        (["config.json"], f"has no {SINGLE} and no {INDEX}"),
        ([], f"has no {SINGLE} and no {INDEX}"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, list) else "",
)
def test_a_folder_without_safetensors_is_told_what_it_is(tmp_path, files: list[str], says: str):
    for name in files:
        (tmp_path / name).write_text("{}")
    assert says in refusal(tmp_path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    assert "Cannot read" in refusal(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_refused(folder):
    assert "Cannot read" in refusal(folder / "config.json")


# ---- growth.json beside the weights --------------------------------------------------------------------------------------------------

GROWN = {
    "source": {"ref": "me/small", "revision": "", "config": {"num_hidden_layers": 2}, "history": []},
    "growth": {"method": "dus", "options": {}, "guarantee": {}},
    "target": {"config": {"num_hidden_layers": 4}},
}


def test_an_earlier_growth_becomes_history(folder):
    (folder / "growth.json").write_text(json.dumps(GROWN))
    (step,) = opened(folder).info.history
    assert step["layers"] == [2, 4]
    assert (step["method"], step["source"]) == ("dus", {"ref": "me/small", "revision": ""})


@pytest.mark.parametrize("part", ["source", "growth", "target", "config", "history"])
@pytest.mark.parametrize("junk", [None, 3, "abc", [], ["a"], [[1]], {}, {"a": 1}, True], ids=str)
def test_a_growth_json_of_any_other_content_is_no_history_and_no_error(folder, part: str, junk: Any):
    grown = json.loads(json.dumps(GROWN))
    (grown["source"] if part in ("config", "history") else grown)[part] = junk
    (folder / "growth.json").write_text(json.dumps(grown))
    for step in opened(folder).info.history:
        assert isinstance(step, dict)


def test_a_damaged_growth_json_is_refused_by_name(folder):
    (folder / "growth.json").write_text("{")
    assert "growth.json is not valid JSON" in refusal(folder)


# ---- files that are no files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        INDEX,
        "growth.json",
        "a.safetensors",
        SINGLE,
        "tokenizer.json",
        "README.md",
        "additional_chat_templates/a.jinja",
        "any",
    ],
)
@pytest.mark.parametrize("to", ["/dev/zero", "itself", "pipe"])
def test_a_file_of_a_checkpoint_that_is_no_regular_file_is_refused_at_once(shards, name: str, to: str):
    path = shards / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if to == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if to == "itself" else to)
    assert f"Cannot read {path}" in refusal(shards)


@pytest.mark.parametrize("name", ["config.json", INDEX, "growth.json"])
@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused_by_file(shards, name: str, value: str):
    (shards / name).write_text('{"rms_norm_eps": ' + value + "}")
    assert f"{name} is not valid JSON" in refusal(shards)
