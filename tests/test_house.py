"""The architecture: imports run downwards, no two files in a circle, and the folder tree says what is where."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import fxpeft

ROOT = Path(__file__).parents[1]
# from the ground up; the first part of a module's name after ``fxpeft.``
LAYERS = (
    "moved", "errors", "files", "outside", "passes", "model", "methods", "targets", "checkpoint", "adapters", "serving",
    "planning", "transform", "programs", "integrations", "live_model", "", "testing", "tools", "gpu_check", "__main__",
)  # fmt: skip
# the same inside passes; a file that isn't named here is at its root, and lies on the ground
WINGS = ("targets", "rewrite", "slots", "live", "captured", "backend", "")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fxpeft", *parts) if parts[0] == "passes" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for place in ("fxpeft", "passes") for path in sorted((ROOT / place).rglob("*.py"))}
PACKAGES = sorted(name for name, path in FILES.items() if path.name == "__init__.py" and name != "fxpeft")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import of fxpeft's own, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def floor(module: str) -> tuple[int, int]:
    """How high up a module lies; ``ValueError`` where no layer is named for it."""
    _, layer, wing, *_ = *module.split("."), "", ""
    if layer != "passes":
        return LAYERS.index(layer), 0
    return LAYERS.index(layer), WINGS.index(wing) + 1 if wing in WINGS else 0


def test_every_file_has_a_layer() -> None:
    for module in FILES:
        floor(module)


def test_imports_run_downwards() -> None:
    upwards = [
        f"{FILES[module].relative_to(ROOT)}:{line}: {module} imports {other}, which lies above it"
        for module, path in FILES.items()
        for line, other in imports(path)
        if other in FILES and floor(other) > floor(module)
    ]
    assert not upwards, "\n".join(upwards)


def test_no_two_files_are_in_a_circle() -> None:
    graph = nx.DiGraph((m, other) for m, path in FILES.items() for _, other in imports(path) if other in FILES)
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    assert not circles


def test_every_import_of_our_own_exists() -> None:
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {other}"
        for path in FILES.values()
        for line, other in imports(path)
        if other.partition(".")[0] == "fxpeft" and other not in FILES
    ]
    assert not missing, "\n".join(missing)


def test_the_checks_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "low.py"
    file.write_text("def f():\n    from fxpeft.serving import swap\n")
    assert list(imports(file)) == [(2, "fxpeft.serving.swap")]
    assert floor("fxpeft.serving.swap") > floor("fxpeft.adapters.state") > floor("fxpeft.passes")
    assert floor("fxpeft.passes.backend.clean") > floor("fxpeft.passes.slots.slot") > floor("fxpeft.passes.base")


def test_a_wheel_has_every_package() -> None:
    listed = re.search(
        r"\[tool\.setuptools\]\npackages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.DOTALL
    )
    assert listed
    assert sorted(re.findall(r'"([\w.]+)"', listed[1])) == sorted(["fxpeft", *PACKAGES])


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_a_sentence_and_its_public_names(package: str) -> None:
    tree = ast.parse(FILES[package].read_text("utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        names = isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
        assert names or isinstance(node, ast.ImportFrom), f"{package}: {ast.unparse(node)}"
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", ()):
        assert not inspect.ismodule(getattr(module, name)), f"{package}.{name} is a file of that name, which hides it"


def test_no_package_is_named_like_a_public_name_beside_it() -> None:
    for package in PACKAGES:
        around, _, name = package.rpartition(".")
        assert name not in getattr(importlib.import_module(around), "__all__", ()), f"{package} hides the name"


def test_the_public_names_are_one_list() -> None:
    stub = ast.parse((ROOT / "fxpeft" / "__init__.pyi").read_text("utf-8"))
    listed = {a.name: n.module for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert sorted(listed) == fxpeft.__all__
    assert set(fxpeft.__all__) <= set(dir(fxpeft))
    for name, home in listed.items():
        files = "fxpeft.errors", "fxpeft.integrations.adopting", "fxpeft.integrations.peft", "fxpeft.live_model"
        assert home in (*PACKAGES, *files), f"{name}: {home}"
        assert getattr(fxpeft, name) is getattr(importlib.import_module(home or ""), name)
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        fxpeft.lora  # noqa: B018


def test_every_file_is_under_400_lines() -> None:
    long = {
        module: count for module, path in FILES.items() if (count := len(path.read_text("utf-8").splitlines())) >= 400
    }
    assert not long
