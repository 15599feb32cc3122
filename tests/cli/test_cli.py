"""The command line as a user meets it: results, refusals, exit statuses, and what it must never do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import BY_NAME, make, save
from transformers import AutoModelForCausalLM

from hf_grow.cli import COMMANDS, main
from hf_grow.methods import METHODS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make(BY_NAME["mistral"], dtype=torch.bfloat16), tmp_path_factory.mktemp("cli") / "small", sharded=True)


def run(*words: object) -> int:
    return main([str(w) for w in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object, status: int = 2) -> str:
    """Runs a command that must fail, and returns its one message."""
    try:
        found = run(*words)
    except SystemExit as stop:  # argparse
        found = int(stop.code or 0)
    captured = capsys.readouterr()
    assert found == status
    assert "Traceback" not in captured.err
    assert captured.err.strip()
    return captured.err


def test_dus_grows_verifies_and_loads(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grown"
    assert run("dus", source, "--layers-to", 6, "-o", out) == 0
    said = capsys.readouterr().out
    assert "0-2, 1-3" in said
    assert f"hf-grow verify {source} {out}" in said
    assert run("verify", source, out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["metrics"]["kl_nats_per_token"] > 0
    assert json.loads((out / "growth.json").read_text())["verification"] == report
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 6
    assert run("inspect", out) == 0
    assert "dus from" in capsys.readouterr().out


def test_verify_exits_1_when_the_bytes_are_wrong(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("depth", source, "--method", "identity", "-o", tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run("verify", source, tmp_path / "out", "--structure-only", "--no-record") == 1
    assert "FAIL" in capsys.readouterr().out
    assert "verification" not in json.loads((tmp_path / "out" / "growth.json").read_text())


def test_a_comparison_with_another_source_is_not_recorded(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("dus", source, "-o", tmp_path / "out")
    assert run("verify", source, tmp_path / "out", "--structure-only") == 0
    other = save(make(BY_NAME["mistral"], num_hidden_layers=3, dtype=torch.bfloat16), tmp_path / "other")
    assert run("verify", other, tmp_path / "out", "--structure-only") == 1
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["verification"]["ok"]


def test_a_dry_run_writes_nothing_and_gives_the_same_plan(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dus", source, "--layers-to", 6, "-o", tmp_path / "out", "--json"]
    assert run(*words, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert run(*words) == 0
    done = json.loads(capsys.readouterr().out)
    assert planned["plan"] == done["plan"]
    assert planned["dry_run"]
    assert not done["dry_run"]
    assert done["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_the_default_output_is_named_after_source_method_and_size(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("depth", source, "--layers", "0-3,3") == 0
    (made,) = tmp_path.iterdir()
    assert made.name.startswith("small-layers-")


def test_every_method_grows_through_the_command_of_its_kind(source: Path, tmp_path: Path) -> None:
    for name, method in METHODS.items():
        extra = {"layers": ["--layers", "0-3,1"], "hybrid": ["--to", "80K"], "experts": ["--experts", 4]}.get(
            name, ["--factor", 2] if method.kind == "width" else []
        )
        chosen = ["--method", name] if name not in COMMANDS else []
        assert run(name if name in COMMANDS else method.kind, source, *chosen, *extra, "-o", tmp_path / name) == 0
        assert (tmp_path / name / "growth.json").exists()


def test_plan_lists_ways_whose_commands_work(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", source, "--to", "70K", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {w["method"] for w in found["ways"]} >= {"dus", "stack", "interleave", "identity", "tile", "aki", "hypercloning"}
    assert [abs(w["off_target"]) for w in found["ways"]] == sorted(abs(w["off_target"]) for w in found["ways"])
    for way in found["ways"]:
        words = way["command"].split()
        assert words[0] == "hf-grow"
        assert run(*words[1:], "-o", tmp_path / way["method"], "--json") == 0
        assert json.loads(capsys.readouterr().out)["plan"]["parameters"] == way["parameters"]
    assert run("plan", source, "--to", "70K") == 0


def test_a_recipe_gives_what_the_flags_give(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {source}\nmethod: identity\nlayers_to: 6\nnoise: 0.01\noutput: {tmp_path / 'a'}\nmax_shard_size: 50KB\n")
    assert run("grow", recipe) == 0
    assert (
        run("depth", source, "--method", "identity", "--layers-to", 6, "--noise", 0.01, "-o", tmp_path / "b", "--max-shard-size", "50KB")
        == 0
    )
    capsys.readouterr()
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert len(names) > 5
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    other = tmp_path / "other"
    other.symlink_to(source)
    assert run("grow", recipe, "--source", other, "-o", tmp_path / "c", "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(tmp_path / "c")
    assert found["plan"]["source"] == str(other)


def test_a_recipe_tells_all_its_mistakes_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('method: identity\nlayers_to: "10"\nnoise: 1e-2\nlayer_too: 3\n')
    said = refused(capsys, "grow", recipe)
    assert all(
        word in said for word in ("3 mistakes", "source: is missing", "'10' is a string", "without quotes", "layer_too: unknown key")
    )
    recipe.write_text("- a\n")
    assert "key: value" in refused(capsys, "grow", recipe)
    recipe.write_text("a: [\n")
    assert "not valid YAML" in refused(capsys, "grow", recipe)
    assert "Cannot read" in refused(capsys, "grow", tmp_path / "none.yaml")
    recipe.write_text("method: nonsense\n")
    assert "Methods: dus" in refused(capsys, "grow", recipe)


WRONG = {
    "no command": (["--json"], "COMMAND"),
    "unknown command": (["grwo"], "grwo"),
    "unknown flag": (["dus", "{source}", "--nose", "3"], "--nose"),
    "flag of another method": (["depth", "{source}", "--method", "stack", "--drop", "1"], "an option of: dus"),
    "words for numbers": (["dus", "{source}", "--noise", "much", "--seed", "-3"], "2 mistakes"),
    "size": (["dus", "{source}", "--to", "10 apples"], "10.7B"),
    "plan size": (["plan", "{source}", "--to", "many"], "10.7B"),
    "plan of no growth": (["plan", "{source}", "--to", "10K"], "is not larger"),
    "size out of reach": (["dus", "{source}", "--to", "10B"], "Reachable around it"),
    "two targets": (["dus", "{source}", "--to", "60K", "--layers-to", "6"], "give one"),
    "layers": (["depth", "{source}", "--layers", "0-9"], "layers 0-3"),
    "layers backwards": (["depth", "{source}", "--layers", "3-1"], "decreasing range"),
    "list missing": (["depth", "{source}", "--method", "layers"], "layers: is missing"),
    "bytes": (["dus", "{source}", "--max-shard-size", "big"], "5GB"),
    "folder": (["dus", "./nowhere"], "no folder"),
    "not a checkpoint": (["dus", "{empty}"], "model.safetensors"),
    "revision of a folder": (["dus", "{source}", "--revision", "main"], "evision"),
    "unwritable": (["dus", "{source}", "-o", "/proc/nowhere/x"], "Cannot write"),
    "publishing nowhere": (["dus", "{source}", "--private"], "private: requires push"),
    "verify nothing": (["verify", "{source}", "./nowhere"], "not a folder"),
    "verify text": (["verify", "{source}", "{source}", "--text", "./nowhere"], "is not a file"),
    "verify tokens": (["verify", "{source}", "{source}", "--tokens", "0"], "tokens: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_message_and_status_2(
    case: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words, expected = WRONG[case]
    said = refused(capsys, *[w.format(source=source, empty=tmp_path / "empty") for w in words])
    assert expected in said
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_an_output_that_exists_is_refused_before_the_plan_is_shown(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    assert "--overwrite" in refused(capsys, "dus", source, "-o", tmp_path / "out")
    assert run("dus", source, "-o", tmp_path / "out", "--overwrite") == 0
    assert not (tmp_path / "out" / "x").exists()


def process(*words: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "hf_grow", *map(str, words)], stdout=-1, stderr=-1, text=True, **options)  # type: ignore[call-overload]


def test_ctrl_c_is_one_line_and_status_1_and_resume_goes_on(tmp_path: Path) -> None:
    config = {**BY_NAME["llama"].config, "hidden_size": 768, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 4096}
    source = save(make(config, dtype=torch.bfloat16), tmp_path / "source")
    child = process("depth", source, "--method", "stack", "--noise", "0.1", "-o", tmp_path / "out")
    deadline = time.monotonic() + 300
    while not (tmp_path / "out.partial" / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 1, said
    assert "interrupted" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert main(["depth", str(source), "--method", "stack", "--noise", "0.1", "-o", str(tmp_path / "out"), "--resume"]) == 0
    assert main(["verify", str(source), str(tmp_path / "out"), "--structure-only"]) == 0


def test_a_file_size_limit_is_told_as_a_full_disk(source: Path, tmp_path: Path) -> None:
    """A real refusal by the operating system, not a simulated one."""
    import resource

    child = process("dus", source, "-o", tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    _, said = child.communicate(timeout=300)
    assert child.returncode == 1, said
    assert "full" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_closed_pipe_is_no_traceback(source: Path) -> None:
    child = process("inspect", source)
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert "Traceback" not in child.stderr.read()
    child.wait(timeout=300)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["plan", "{source}", "--to", "70K"], ["dus", "--help"], ["dus", "{source}", "--dry-run"], ["inspect", "{source}"]],
    ids=str,
)
def test_help_and_planning_never_import_torch(words: list[str], source: Path) -> None:
    code = (
        "import sys; from hf_grow.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "loaded = {'torch', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules); sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    filled = [w.format(source=source) for w in words]
    done = subprocess.run(
        [sys.executable, "-c", code, *filled], capture_output=True, text=True, timeout=300, check=False, cwd=source.parent
    )
    assert done.returncode == 0, done.stderr


def test_a_plain_copy_growth_never_imports_torch(source: Path, tmp_path: Path) -> None:
    code = "import sys; from hf_grow.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for method in ("dus", "identity"):
        words = [sys.executable, "-c", code, "depth", str(source), "--method", method, "-o", str(tmp_path / method)]
        assert subprocess.run(words, capture_output=True, timeout=300, check=False).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert COMMANDS[command][1][1:] in " ".join(said.split())


def test_the_flags_of_dus_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("dus", "--help")
    flags = {w.strip(",[]") for w in capsys.readouterr().out.split() if w.strip("[").startswith("--")}
    assert flags == {
        "--help", "--revision", "--noise", "--seed", "--to", "--layers-to", "--drop", "--seam-average", "--output", "--max-shard-size",
        "--resume", "--overwrite", "--dry-run", "--memory-budget", "--allow-nonfinite", "--with-optimizer", "--optimizer-policy", "--exact-steps", "--json",
        "--push", "--private", "--push-revision", "--create-pr", "--message", "--stream-push", "--stream-source", "--source-cache",
    }  # fmt: skip


def test_python_m_hf_grow_works() -> None:
    done = subprocess.run([sys.executable, "-m", "hf_grow", "--version"], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.startswith("hf-grow 0.")


def test_plan_tells_active_parameters_flops_and_memory_for_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by hand from the shapes: what a token passes through, twice that in FLOPs, and 16 bit for all weights and the KV cache."""
    source = save(make(BY_NAME["mistral"]), tmp_path / "source")
    c = BY_NAME["mistral"].config
    attention = c["hidden_size"] * c["head_dim"] * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    ffn, norms, layers = 3 * c["hidden_size"] * c["intermediate_size"], 2 * c["hidden_size"], c["num_hidden_layers"]
    outside = c["hidden_size"] * c["vocab_size"]  # the head; the embedding is looked up
    active = layers * (attention + norms + 3 * ffn + 6 * c["hidden_size"]) + c["hidden_size"] + outside
    total = active + layers * 3 * ffn + outside
    assert run("plan", source, "--to", total, "--active", active, "--context", 100, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    way = next(w for w in facts["ways"] if w["method"] == "experts")
    assert way["command"].endswith("--experts 6 --top-k 3")
    assert (way["parameters"][1], way["active_parameters"][1], way["flops_per_token"][1]) == (total, active, 2 * active)
    cache = 2 * layers * c["num_key_value_heads"] * c["head_dim"] * 100
    assert way["serving_bytes"] == 2 * (total + cache)
    assert run("plan", source, "--to", total, "--active", active) == 0
    said = capsys.readouterr().out
    assert all(column in said for column in ("active", "FLOPs", "disk", "serving"))
    assert "--experts 6 --top-k 3" in said
