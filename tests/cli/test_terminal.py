"""Terminal output: no control characters from untrusted files, and one message for every failure of stdout and the environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make, save

from hf_grow.cli import main
from hf_grow.errors import MAX_COLUMNS, InputError, printable

HOSTILE = "\x1b[31mred\x1b]0;title\x07 \u202eback\x9b2J \ud800\r"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make(BY_NAME["mistral"], dtype=torch.bfloat16), tmp_path_factory.mktemp("terminal") / "small")


def control_characters(text: str) -> list[str]:
    """Characters that a terminal would interpret or cannot show."""
    return [c for c in text if not c.isprintable() and c != "\n"]


def test_printable_keeps_text_and_escapes_control_characters() -> None:
    assert printable("Größe 日本\nnext") == "Größe 日本\nnext"
    assert not control_characters(printable(HOSTILE))
    assert "\\x1b[31mred" in printable(HOSTILE) and "\\u202e" in printable(HOSTILE) and "\\ud800" in printable(HOSTILE)
    long = printable("a" * 200_000 + "\n" + "b" * 10)
    assert len(long) <= MAX_COLUMNS + 11 and long.startswith("aaa") and long.endswith("a\nbbbbbbbbbb")


def test_messages_are_printable_and_bounded() -> None:
    error = InputError(HOSTILE + "x" * 200_000 + "\ny" * 100_000, hint=HOSTILE)
    assert not control_characters(str(error))
    assert len(str(error)) < 4_000
    assert "more lines" in str(error)


def config_with(source: Path, folder: Path, **changes: object) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    "change", [{"model_type": "\x1b[2J\x9b"}, {"hidden_size": "\x1b]0;owned\x07" * 9_000}, {"tie_word_embeddings": "\x1b[5m"}]
)
def test_a_config_cannot_send_control_characters(
    change: dict[str, str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = config_with(source, tmp_path / "bad", **change)
    assert main(["inspect", str(bad)]) == 2
    said = capsys.readouterr()
    assert not control_characters(said.err + said.out)
    assert len(said.err) < 4_000


def test_a_growth_json_cannot_send_control_characters(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dus", str(source), "-o", str(tmp_path / "out")]) == 0
    record = tmp_path / "out" / "growth.json"
    data = json.loads(record.read_text())
    data["growth"]["method"] = "\x1b[2J\x1b]0;owned\x07\x9b\x7f"
    data["source"]["ref"] = "\x1b[2J" + "a" * 100_000
    record.write_text(json.dumps(data))
    for words in (["inspect"], ["inspect", "--json"], ["verify", str(source), "--structure-only", "--no-record"]):
        capsys.readouterr()
        main(
            [
                words[0],
                *(w for w in words[1:] if not w.startswith("-")),
                str(tmp_path / "out"),
                *(w for w in words[1:] if w.startswith("-")),
            ]
        )
        said = capsys.readouterr()
        assert not control_characters(said.err + said.out), words
        if "--json" in words:
            assert json.loads(said.out)


def ended(words: list[object], stdout: int, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "hf_grow", *map(str, words)], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--json"], ["dus", "--dry-run"], ["plan", "--to", "70K", "--json"]], ids=str)
def test_a_full_disk_behind_stdout_is_one_message(words: list[str], source: Path) -> None:
    with open("/dev/full", "w") as full:
        status, said = ended([words[0], source, *words[1:]], full.fileno())
    assert status == 1
    assert "No space left" in said


def test_a_closed_stdout_gives_no_traceback(source: Path) -> None:
    script = f'exec "{sys.executable}" -m hf_grow inspect "{source}" --json >&-'
    done = subprocess.run(["bash", "-c", script], stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "-1", "1e3", "٣", "9" * 400])
def test_variables_of_a_launcher_must_be_numbers(
    name: str, value: str, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["inspect", str(source)]) == 2
    assert f"unset {name}" in capsys.readouterr().err


def test_a_file_as_hf_home_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, said = ended(["inspect", "nobody/nothing"], subprocess.DEVNULL, HF_HOME=str(tmp_path / "file"))
    assert status == 2
    assert "HF_HOME" in said


def test_a_terminal_without_unicode_gets_escapes(source: Path, tmp_path: Path) -> None:
    (tmp_path / "größe").symlink_to(source)
    for words in (["inspect", tmp_path / "größe"], ["inspect", tmp_path / "größe", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "hf_grow", *map(str, words)],
            capture_output=True,
            timeout=120,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        assert done.returncode == 0, done.stderr
        if "--json" in words:
            assert json.loads(done.stdout)["model"].endswith("größe")


# ---- what the fuzzer found: a growth.json of other types and names ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grown") / "grown"
    assert main(["dus", str(source), "-o", str(out)]) == 0
    assert main(["verify", str(source), str(out), "--structure-only"]) == 0
    return out


def _misname_a_source(record: dict[str, Any]) -> None:
    tensors = record["source"]["tensors"]
    tensors["other"] = tensors.pop("model.layers.0.mlp.up_proj.weight")


def _forget_a_target(record: dict[str, Any]) -> None:
    del record["target"]["tensors"]["model.layers.4.self_attn.o_proj.weight"]


def _list_for_a_name(record: dict[str, Any]) -> None:
    record["verification"]["checks"][0] |= {"name": ["x"], "status": ["pass"], "detail": {"a": 1}}


def _number_without_end(record: dict[str, Any]) -> None:
    record["verification"]["metrics"] |= {"kl_nats_per_token": 10**400, "perplexity_old": [1], "tokens": 10**400}


def _method_of_another_type(record: dict[str, Any]) -> None:
    record["growth"]["method"] = {"a": [1]}


def _many_layers(record: dict[str, Any]) -> None:
    record["target"]["config"]["num_hidden_layers"] = 9_999


@pytest.mark.parametrize(
    "change",
    [_misname_a_source, _forget_a_target, _list_for_a_name, _number_without_end, _method_of_another_type, _many_layers],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(
    "command", ["card {new} --offline", "inspect {new}", "verify {old} {new} --structure-only --no-record", "dus {new} -o {out}"]
)
def test_a_growth_json_with_wrong_types_gives_no_traceback(
    change: Callable[[dict[str, Any]], None], command: str, source: Path, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    shutil.copytree(grown, new)
    record = json.loads((new / "growth.json").read_text())
    change(record)
    (new / "growth.json").write_text(json.dumps(record))
    capsys.readouterr()
    status = main(command.format(old=source, new=new, out=tmp_path / "out").split())
    said = capsys.readouterr()
    assert status in (0, 1, 2)
    assert status == 0 or "growth.json" in said.err + said.out
    assert len(said.err) < 4_000


def test_output_of_a_library_to_descriptor_1_does_not_precede_the_json(source: Path) -> None:
    """tokenizers writes its warnings from Rust to file descriptor 1."""
    code = (
        "import os, sys; from hf_grow import cli\n"
        "run = cli.run_command\n"
        "cli.run_command = lambda words: (os.write(1, b'a warning\\n'), run(words))[1]\n"
        "status = cli.main(sys.argv[1:])\n"
        "print('after')\n"
        "sys.exit(status)"
    )
    for words, status in ((["inspect", str(source), "--json"], 0), (["inspect", str(source / "nowhere"), "--json"], 2)):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stderr
        assert done.stdout.endswith("after\n") and isinstance(json.loads(done.stdout.removesuffix("after\n")), dict)
        assert "a warning" in done.stderr
