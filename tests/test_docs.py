"""The documents say what is there: every command parses, every method and option is told, every link leads somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from models import BY_NAME, make

import hf_grow
from hf_grow import api, errors
from hf_grow.cli import COMMANDS, main
from hf_grow.growth.growth import Method
from hf_grow.growth.tensormap import Expr
from hf_grow.methods import METHODS
from hf_grow.model.families import FAMILIES

ROOT = Path(__file__).parents[1]
USER = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*USER, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "model_cards" / "README.md"]
FILES = {"utility.json": '{"utility": [1, 2]}', "domains.yaml": "experts: [{positive: [code]}, {positive: [prose]}]"}
"""Files that the pages name."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


def commands(page: Path) -> list[list[str]]:
    """The words of every `hf-grow ...` in code, in a block or in a line; not the bare name of a command."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in blocks.splitlines()]
    lines += re.findall(r"`(hf-grow [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = [shlex.split(re.split(r" (?:&&|\|) ", line)[0], comments=True) for line in lines if line.startswith("hf-grow ")]
    return [words[1:] for words in found if len(words) > 2 or words[1:2] == ["demo"]]


def test_commands_are_found() -> None:
    """The test below would pass on a pattern that finds nothing."""
    assert ["dus", "mistralai/Mistral-7B", "--to", "10.7B", "-o", "Mistral-10.7B"] in commands(ROOT / "README.md")
    assert len(commands(ROOT / "docs" / "methods.md")) >= len(METHODS)


@pytest.mark.parametrize("page", USER, ids=lambda p: p.name)
def test_every_command_line_parses(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As far as its flags and options go; nothing is opened or run."""
    for path in ROOT.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name, content in FILES.items():  # options that read a file do so when they are parsed
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    for name, (module, _) in COMMANDS.items():
        if module != "grow":
            monkeypatch.setattr(importlib.import_module(f"hf_grow.cli.{module}"), "run", lambda arguments: 0)
        assert name
    monkeypatch.setattr("hf_grow.cli.grow.carry_out", lambda *args, **options: 0)
    for words in commands(page):
        # Where a page speaks of any size, it says SIZE.
        try:
            status = main(["10.7B" if w == "SIZE" else w for w in words])
        except SystemExit as stop:
            status = int(stop.code or 0)
        assert status == 0, f"hf-grow {shlex.join(words)}\n{capsys.readouterr().err}"


@each_page
def test_commands_that_are_named_exist(page: Path) -> None:
    if page.parent.name != "model_cards":  # speaks of one to come
        assert set(re.findall(r"`hf-grow ([a-z]+)", page.read_text())) <= set(COMMANDS)


@each_page
def test_python_compiles_and_uses_public_names(page: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        compile(code, str(page), "exec")
        assert set(re.findall(r"\bhf_grow\.(\w+)", code)) <= {*hf_grow.__all__, "training"}  # its modules are public too
        for line in ast.walk(ast.parse(code)):
            if isinstance(line, ast.ImportFrom) and str(line.module).startswith("hf_grow"):
                exec(compile(ast.Module([line], []), str(page), "exec"), {})


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    if page.name not in ("LOG.md", "CHANGELOG.md"):  # history
        named = re.findall(r"`((?:hf_grow|tests|benchmarks)/[\w/]+\.(?:py|yaml|md))", page.read_text())
        assert not [name for name in named if not (ROOT / name).exists()]


def test_architecture_md_names_files_where_they_lie() -> None:
    """In its table of folders, every file of a row lies in the folder of that row. That every folder has a row: tests/test_house.py."""
    named = {
        folder: re.findall(r"`(\w+\.py)`", row[0])
        for folder, row in rows(ROOT / "docs" / "architecture.md").items()
        if folder.endswith("/")
    }
    assert sum(map(len, named.values())) > 20
    assert all((ROOT / "hf_grow" / folder / name).is_file() for folder, names in named.items() for name in names)


def rows(page: Path) -> dict[str, list[str]]:
    """Table rows by their first cell, without its backticks."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in page.read_text().splitlines() if line.startswith("| `")]
    return {c[0].strip("`"): c[1:] for c in cells}


@each_method
def test_the_readme_tells_every_method_with_its_paper_and_guarantee(method: Method) -> None:
    paper, guarantee, when = rows(ROOT / "README.md")[method.name]
    assert paper == method.paper
    assert guarantee == method.guarantee
    assert when


@each_method
def test_methods_md_tells_every_method_and_option(method: Method) -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    section = re.split(rf"^### {method.name}\n", text, flags=re.MULTILINE)[1].split("\n### ")[0]
    assert method.guarantee.split()[0] in section.lower() or method.guarantee in section
    assert any(f"hf-grow {w} " in section for w in (method.name, method.kind))
    assert not [n for n in method.options.model_fields if f"`--{n.replace('_', '-')}" not in text]


def test_the_readme_tells_every_family() -> None:
    assert set(FAMILIES) <= set(rows(ROOT / "README.md"))


def test_growth_json_md_tells_every_key_and_expression() -> None:
    """On a grown model, so that nothing depends on what the writer adds."""
    text = (ROOT / "docs" / "growth-json.md").read_text()
    record = api.plan(make(BY_NAME["llama"]), "identity").to_json()
    keys = {f"{k}.{inner}" for k, v in record.items() if isinstance(v, dict) for inner in v} | set(record) | {"target.files", "made_by"}
    assert not [k for k in keys if f"`{k}`" not in text]
    assert not [op for op in Expr.NODES if op and f"| `{op}` |" not in text]


def test_troubleshooting_md_tells_every_class_of_error() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.GrowError) and c is not errors.GrowError]
    assert len(classes) > 4
    assert not [c.__name__ for c in classes if f"## {c.__name__}" not in text]


def test_troubleshooting_md_quotes_messages_that_the_code_has() -> None:
    """Three dots stand for what the code fills in, N and M for numbers and names, --X for a flag."""
    strings: list[str] = []
    for path in (ROOT / "hf_grow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                strings.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    code = "\n".join(strings)
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quotes = [quote for cell in rows for quote in re.findall(r"`([^`]+)`", cell)]
    pieces = {piece.strip(" ,"): quote for quote in quotes for piece in re.split(r"\.\.\.|--X|\bN\b|\bM\b|5\.\.", quote)}
    assert len(pieces) > 60
    assert not {piece: quote for piece, quote in pieces.items() if piece not in code}


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page.name} links to {target}"
            assert there.is_relative_to(ROOT)
            assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


@each_page
def test_no_page_holds_a_path_of_somebodys_machine(page: Path) -> None:
    text = re.sub(r"\w+://\S+", "", page.read_text())
    assert not re.findall(r"(?<![\w.~)\]-])/[a-z]+/[\w./-]+", text)
    assert not re.findall(r"localhost|127\.0\.0\.1|C:\\", text)


def cells(row: str) -> int:
    """How many cells a row of a table has: a pipe divides unless a backslash stands before it, in code too (GitHub Flavored Markdown, 4.10)."""
    return len(re.findall(r"(?<!\\)\|", row.strip())) - 1


@each_page
def test_tables_are_whole(page: Path) -> None:
    """Every row has as many cells as its header, and no row stands outside a table."""
    text = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = text.splitlines()
    width = 0
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("|"):
            width = 0
            continue
        if not width:
            width = cells(line)
            assert re.fullmatch(r"\s*(\|\s*:?-+:?\s*)+\|\s*", lines[number] if number < len(lines) else ""), (
                f"{page.name}:{number} has no header"
            )
            assert cells(lines[number]) == width, f"{page.name}:{number + 1}"
        assert line.rstrip().endswith("|"), f"{page.name}:{number} has no end"
        assert cells(line) == width, f"{page.name}:{number} has {cells(line)} cells, its header {width}"


def test_a_pipe_in_code_divides_and_an_escaped_one_does_not() -> None:
    assert cells("| a | `x|y` |") == 3
    assert cells("| a | `x\\|y` |") == 2


def test_the_number_of_families_is_right() -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for page in PAGES:
        found = re.findall(rf"\b({'|'.join(words)})(?: model)? families\b", page.read_text().lower())
        assert set(found) <= {words[len(FAMILIES)]}, page.name


@each_page
def test_lines_are_as_short_as_those_of_the_code(page: Path) -> None:
    long = [n for n, line in enumerate(page.read_text().splitlines(), 1) if len(line) > 150 and not line.startswith("|")]
    assert not long
