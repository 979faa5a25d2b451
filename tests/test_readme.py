"""The README and the guides: their Python runs and prints what they show, their links and names lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from test_house import LAYERS, PACKAGES, WINGS

import fxpeft
from fxpeft.tools.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
QUICKSTART = ROOT / "examples" / "quickstart.py"  # the README's first command
PAGES = [README, *sorted((ROOT / "examples").glob("*/*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """Code and expected output of each block."""
    return [(match[1], match[2] or "") for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def marked(page: Path) -> object:
    """A page that compiles with Inductor or AOTInductor may take over 10 s where nothing is in a cache."""
    slow = any(
        re.search(r"torch\.compile\((?![^\n]*backend=)|fxpeft\.(compile|package)\(|assert_swaps_clean\(", c)
        for c, _ in blocks(page)
    )
    return pytest.param(page, id=name(page), marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if blocks(page)])
def test_a_page_runs_alone_and_prints_what_it_shows(page: Path) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    namespace: dict[str, object] = {}
    for code, expected in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page.name, "exec"), namespace)
        assert printed.getvalue().strip() == expected.strip()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: {name(target)} has {sorted(anchors(target))}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_imports_what_is_public(page: Path) -> None:
    trees = [ast.parse(code) for code, _ in blocks(page)]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in nodes:
        if node.module is None or node.module.partition(".")[0] != "fxpeft":
            continue
        assert node.module in ("fxpeft", "fxpeft.passes", "fxpeft.testing"), f"line {node.lineno}: {node.module}"
        module = importlib.import_module(node.module)
        public = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        assert not [alias.name for alias in node.names if alias.name not in public]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?!\S*NAME)(?:[\w.]+/)+[\w.]+\.(?:py|cpp|md|toml))`", text):
        found = [ROOT / path, ROOT / path.removeprefix("fxpeft/"), page.parent / path]
        assert any(p.exists() for p in found), f"`{path}`: no such file"
    for dotted in set(re.findall(r"\bfxpeft((?:\.[A-Za-z_]\w*)+)", text)):
        value: object = fxpeft
        for part in dotted.strip(".").split("."):
            if not hasattr(value, part):
                value = importlib.import_module(f"{getattr(value, '__name__', '')}.{part}")
            else:
                value = getattr(value, part)


def test_the_readme_is_a_front_door() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 230
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(text)}
    assert not [name(page) for page in PAGES[1:] if page not in linked]
    everywhere = {(page.parent / link).resolve() for page in PAGES for link in LINK.findall(prose(page))} | {QUICKSTART}
    assert not [name(script) for script in (ROOT / "examples").glob("**/*.py") if script not in everywhere]


def test_every_public_name_is_in_some_pages_code() -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    code = [span for text in pages for span in [*FENCED.findall(text), *re.findall(r"`[^`]+`", FENCED.sub("", text))]]
    words = set(re.findall(r"\w+", " ".join(code)))
    for module in (fxpeft, importlib.import_module("fxpeft.passes")):
        missing = [public for public in module.__all__ if public not in words]
        assert not missing, f"{module.__name__}: say in examples/guides what {', '.join(missing)} is for"


def test_the_architecture_is_the_folder_tree_from_above() -> None:
    table = README.read_text(encoding="utf-8").partition("## Architecture\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    assert list(rows) == [each for each in reversed(LAYERS) if f"fxpeft.{each}" in PACKAGES]
    assert re.findall(r"`(\w+)`", rows["passes"]) == [wing for wing in WINGS if wing]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_command_lines_are_ones_that_fxpeft_has(page: Path) -> None:
    commands = typer.main.get_command(app)
    for line in re.findall(r"^fxpeft .*$", page.read_text(encoding="utf-8"), re.MULTILINE):
        command, *arguments = shlex.split(line, comments=True)[1:]
        commands.commands[command].make_context(command, arguments)  # type: ignore[attr-defined]


def test_the_verbs_of_the_readme_are_public() -> None:
    table = README.read_text(encoding="utf-8").partition("## Which verb\n")[2].partition("\n## ")[0]
    verbs = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    assert len(verbs) > 10
    assert not [verb for verb in verbs if verb not in fxpeft.__all__]


@pytest.mark.parametrize(("heading", "anchor"), [("`a_b`: C, d's", "a_b-c-ds"), ("Threads, forks", "threads-forks")])
def test_anchors_are_those_of_github(tmp_path: Path, heading: str, anchor: str) -> None:
    (tmp_path / "page.md").write_text(f"# {heading}\n\n```bash\n# no heading\n```\n")
    assert anchors(tmp_path / "page.md") == {anchor}
