"""Other versions than those that were tried: a warning, once; what a torch lost is an error of what needs it."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import textwrap
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import python

from fxpeft.errors import PassError
from fxpeft.passes import torch_private
from fxpeft.passes.tried import TRIED, warn_untried

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["2.13.0", "2.14.1+cpu", "2.15.1", "2.15.0.dev20261001+cu130", "2.14.0a0+git1"])
def test_a_version_that_was_tried_is_silent(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_untried("torch", version)


@pytest.mark.parametrize("version", ["2.9.1", "2.12.1", "2.16.0", "3.0", "2.100.1"])
def test_another_names_itself_and_those_that_were(version: str) -> None:
    first, last = TRIED["torch"]
    with pytest.warns(UserWarning, match=re.escape(f"torch {version} was not tried with fxpeft; {first} to {last}")):
        warn_untried("torch", version)


def test_each_library_warns_once_in_a_process_and_everything_works() -> None:
    code = """
        import sys, warnings
        warnings.simplefilter("always")
        import torch, transformers  # which makes its module anew at the first use of some names
        torch.__version__ = torch.torch_version.TorchVersion("9.1.0")
        sys.modules["transformers"].__version__ = "99.2"
        import fxpeft.model
        model = torch.nn.Sequential(torch.nn.Linear(5, 7))
        fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, target_modules=["0"]))
        import fxpeft.integrations.transformers, fxpeft.programs, fxpeft.tools.cli, fxpeft.passes.torch_private
        model(torch.ones(2, 5)).sum().backward()
    """
    done = python("-c", textwrap.dedent(code), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"UserWarning: (\S+ \S+) was not tried", done.stderr) == ["torch 9.1.0", "transformers 99.2"]


def test_nothing_caps_torch_or_transformers() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for library in TRIED:
        (asked,) = re.findall(rf'^    "{library}(.*)",', project, re.MULTILINE)
        assert re.fullmatch(r">=[\d.]+", asked), "without an upper end"


PRIVATE = re.findall(r'_found\(\s*"([^"]+)"', Path(torch_private.__file__).read_text("utf-8"))


def without(paths: set[str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``torch_private`` as it is where a torch has lost these."""
    real = pkgutil.resolve_name

    def resolve(path: str) -> Any:
        if path in paths:
            raise AttributeError(path)
        return real(path)

    monkeypatch.setattr(pkgutil, "resolve_name", resolve)
    spec = importlib.util.spec_from_file_location("lost", torch_private.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_module_imports_where_torch_has_lost_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(PRIVATE) > 20
    module = without(set(PRIVATE), monkeypatch)
    uses = {
        "torch._dynamo.mark_dynamic": lambda: module.mark_dynamic(torch.ones(3), 0, 2, 3),
        "torch._TorchCompileInductorWrapper": lambda: module.inner_backend("inductor", None, {}, None),
        "torch._inductor.config.freezing": module.is_freezing,
        "torch._inductor.aot_compile": lambda: module.aot_compile(None, (), {}, {}),
        "torch._dynamo.utils.counters": module.captured_graphs,
        "torch._dynamo.config.error_on_recompile": module.error_on_recompile,
        "torch._C._current_graph_task_id": module.in_backward,
        "torch._ops.OpOverload": lambda: isinstance(torch, module.OpOverload),
        "torch.utils._pytree": lambda: module.pytree.tree_leaves([1]),
        "torch._foreach_copy_": lambda: module.copy_each([], []),
        "torch._dynamo.source.ConstantSource": lambda: module.ConstantSource("x"),
    }
    for path, use in uses.items():
        with pytest.raises(PassError, match=f"needs {re.escape(path)}, which torch {re.escape(torch.__version__)} has"):
            use()


def test_an_except_clause_may_name_a_lost_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    module = without({"torch._dynamo.exc:RecompileError"}, monkeypatch)
    caught = ""
    try:
        raise KeyError("other")
    except module.RecompileError:
        caught = "as the lost one"
    except KeyError:
        caught = "as itself"
    assert caught == "as itself"


def test_frames_that_cant_be_skipped_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module = without({"torch._C._dynamo.eval_frame"}, monkeypatch)
    with pytest.warns(UserWarning, match="no way to skip a frame"):
        module.skip_frame(lambda: None)
