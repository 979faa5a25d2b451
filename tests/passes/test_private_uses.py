"""The source is read: private APIs of torch are used in one file, fxpeft.passes.torch_private, and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fxpeft
import fxpeft.passes
from fxpeft.passes import torch_private

#: registries of nn.Module: every pickle of a module has had them since torch 1, and no public way asks for own ones
MODULES = {
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_forward_hooks", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_load_state_dict_post_hooks",
}  # fmt: skip
#: names of other libraries'
OTHERS = {
    "_current_frames": "sys", "_getframe": "sys", "_get_running_loop": "asyncio", "_replace": "namedtuple",
    "_hf_hook": "accelerate", "_old_forward": "accelerate", "_original_forward": "accelerate",
    "_attn_implementation": "transformers", "_experts_implementation": "transformers",
    "_get_files_timestamps": "transformers",
    "_hf_peft_config_loaded": "transformers", "_hotswap_enabled": "transformers", "_load_best_model": "transformers",
    "_no_split_modules": "transformers",
    "_load_from_checkpoint": "transformers", "_prepare_peft_hotswap_kwargs": "transformers",
    "_push_from_checkpoint": "transformers", "_require_grads_hooks": "transformers",
    "_upload_modified_files": "transformers",
    "_retrieve_processors_kwargs": "transformers", "_model_supports_logits_to_keep": "transformers",
    "_load_model": "transformers", "_load_processor": "transformers", "_is_stateful": "transformers",
    "_fn_refs": "diffusers", "_lora_loadable_modules": "diffusers", "_merged_adapters": "diffusers",
}  # fmt: skip


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """What a file's classes and functions are called, and what it sets on instances of its own."""
    found = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}
    for n in ast.walk(tree):
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name):
            found.add(n.target.id)
        if isinstance(n, ast.Assign | ast.AnnAssign | ast.NamedExpr):
            for target in n.targets if isinstance(n, ast.Assign) else [n.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                        found.add(part.attr)
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "object.__setattr__":
            found.add(ast.literal_eval(n.args[1]))
    return found


def private_uses(tree: ast.AST, own: set[str]) -> list[tuple[int, str]]:
    """Line and name of every private API of torch that a file uses."""
    known, found = own | MODULES | OTHERS.keys(), []
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            names = [alias.name for alias in n.names]
        elif isinstance(n, ast.ImportFrom) and n.module and n.module.split(".")[0] == "torch":
            names = [f"{n.module}.{alias.name}" for alias in n.names]
        elif isinstance(n, ast.Attribute):
            text = ast.unparse(n)
            operator = text.startswith(("aten.", "torch.ops."))  # an operator's name, which programs hold too
            names = [] if operator else [text if text.startswith("torch.") else f"torch.?.{n.attr}"]
        elif isinstance(n, ast.Call) and ast.unparse(n.func) in ("getattr", "hasattr", "setattr", "delattr"):
            value = n.args[1] if len(n.args) > 1 else None
            names = [f"torch.?.{value.value}"] if isinstance(value, ast.Constant) else []
        else:
            continue
        parts = [(name, part) for name in names if name.startswith("torch") for part in name.split(".")]
        found += [(n.lineno, name) for name, part in parts if is_private(part) and part not in known
                  and not part.startswith("_fxpeft")]  # fmt: skip
    return found


def test_only_one_file_uses_private_apis_of_torch() -> None:
    folders = (Path(folder) for module in (fxpeft, fxpeft.passes) for folder in module.__path__)
    trees = {path: ast.parse(path.read_text("utf-8")) for folder in folders for path in folder.rglob("*.py")}
    own = set().union(*map(own_names, trees.values()))
    found = [f"{path}:{line}: {name}" for path, tree in trees.items() for line, name in private_uses(tree, own)]
    elsewhere = [place for place in found if not place.startswith(torch_private.__file__)]
    assert not elsewhere, "private APIs of torch belong into fxpeft.passes.torch_private:\n" + "\n".join(elsewhere)
    assert found


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo", "from torch._ops import OpOverload", "from torch.utils import _pytree as pytree",
        "torch._inductor.config.freezing", "graph._codegen", "getattr(tensor, '_version')", "x = a.b()._schema.name",
    ],
)  # fmt: skip
def test_a_private_use_is_found(line: str) -> None:
    assert private_uses(ast.parse(line), set())


@pytest.mark.parametrize(
    "line", ["torch.ops.aten._to_copy.default", "module._parameters", "self._mine", "x._replace(a=1)", "y.__dict__"]
)
def test_a_public_use_is_none(line: str) -> None:
    assert not private_uses(ast.parse(line), {"_mine"})
