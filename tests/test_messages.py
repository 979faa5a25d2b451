"""What the package says, in errors, warnings and docstrings, names only what exists."""

from __future__ import annotations

import ast
import asyncio
import builtins
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import fxpeft

ROOT = Path(__file__).parents[1]
FILES = sorted({*ROOT.glob("fxpeft/**/*.py"), *ROOT.glob("passes/**/*.py")} - {ROOT / "fxpeft" / "moved.py"})
OUTSIDE = (builtins, asyncio, torch, torch.nn, torch.nn.Module, torch.Tensor, PreTrainedModel)
DOTTED = re.compile(r"\bfxpeft(?:\.[A-Za-z_]\w*)+")
ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):`~?([\w.]+)`")
CALL = re.compile(r"(?<![\w.\0])([a-z_]\w{2,}(?:\.\w+)*)\((?!s\))")  # not "adapter(s)"
SNAKE = re.compile(r"(?<![\w.\0/'-])[a-z]+(?:_[a-z0-9]+)+\b(?![/*-]|=\0)")  # neither values nor a repr's labels


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fxpeft", *parts) if parts[0] == "passes" else parts).removesuffix(".__init__")


def literals(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Line, text and whether it is a docstring; in an f-string each value is a NUL."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and node.body]
    docstrings = {id(first.value) for first in bodies if isinstance(first, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value, id(node) in docstrings
        elif isinstance(node, ast.JoinedStr):
            texts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
            yield node.lineno, "".join(map(str, texts)), False


def sentences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What is said to users: neither docstrings, nor keys, patterns and names, which have no spaces."""
    return ((line, text) for line, text, is_docstring in literals(tree) if not is_docstring and " " in text)


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def where(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def exists(dotted: str) -> bool:
    value: object = fxpeft
    for part in dotted.split(".")[1:]:
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(f"{getattr(value, '__name__', '')}.{part}")
            except ModuleNotFoundError:
                return False
    return True


def test_dotted_names(trees: dict[Path, ast.Module]) -> None:
    """``fxpeft.x.y`` in any text; a literal that is nothing but such a name is a key or a file."""
    found = [
        (where(file, line), name)
        for file, tree in trees.items()
        for line, text, _ in literals(tree)
        for name in DOTTED.findall(text)
        if name != text
    ]
    assert len(found) > 50
    assert not [each for each in found if not exists(each[1])]


def test_roles_of_docstrings(trees: dict[Path, ast.Module]) -> None:
    """``:func:`name``` and its kin are in the file's module, or an attribute of one of its classes."""
    missing, count = [], 0
    for file, tree in trees.items():
        module = importlib.import_module(module_name(file))
        own = [value for value in vars(module).values() if isinstance(value, type)]
        fields = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}  # self.reports
        for line, text, _ in literals(tree):
            for name in ROLE.findall(text):
                count += 1
                first, _, rest = name.partition(".")
                holder = getattr(module, first, None)
                fields_of_it = getattr(holder, "__annotations__", {})  # those without a default are no attributes
                held = holder is not None and (not rest or hasattr(holder, rest) or rest in fields_of_it)
                of_class = not rest and (any(hasattr(each, first) for each in own) or first in fields)
                if not (exists(name) if first == "fxpeft" else held or of_class):
                    missing.append((where(file, line), name))
    assert count > 100
    assert not missing


def found_in(trees: dict[Path, ast.Module], wanted: re.Pattern[str]) -> list[tuple[str, str]]:
    """Place and match of an expression in all sentences."""
    return [
        (where(file, line), name)
        for file, tree in trees.items()
        for line, text in sentences(tree)
        for name in wanted.findall(text)
    ]


def test_calls_in_messages(trees: dict[Path, ast.Module]) -> None:
    """``release_hotswap(model)`` in a sentence is a function or method of ours, of Python, torch or transformers."""
    made = (ast.FunctionDef, ast.ClassDef)
    defined = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, made)}
    found = found_in(trees, CALL)
    assert len(found) > 10
    known = [(place, name, name.rpartition(".")[2]) for place, name in found]
    assert not [each for each in known if each[2] not in defined and not any(hasattr(o, each[2]) for o in OUTSIDE)]


def test_words_in_messages(trees: dict[Path, ast.Module]) -> None:
    """``set_adapter`` in a sentence: a word with an underscore is a name in the code, of a function or a setting."""
    known = set[str]()
    for tree in trees.values():
        for node in ast.walk(tree):
            for field in ("id", "attr", "arg", "name"):
                known.add(str(getattr(node, field, "")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                known.add(node.value)
    found = found_in(trees, SNAKE)
    assert len(found) > 100
    assert not [each for each in found if each[1] not in known and not any(hasattr(o, each[1]) for o in OUTSIDE)]


@pytest.mark.parametrize("name", ["fxpeft.plan.make_plan", "fxpeft.targets.sites.no_such", "fxpeft.no_such.thing"])
def test_a_name_that_leads_nowhere_is_found(name: str) -> None:
    assert DOTTED.findall(f"make the plan with the model: {name}(model, config)") == [name]
    assert not exists(name)


def test_what_is_read_as_a_name() -> None:
    text = "take it out with release_hotswap(model), or set_adapter one; 2 adapter(s), 'pissa_niter_16', \0_x, a/b_c"
    assert CALL.findall(text) == ["release_hotswap"]
    assert SNAKE.findall(text) == ["release_hotswap", "set_adapter"]
