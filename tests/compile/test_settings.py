"""What users set: Inductor's modes and options, Dynamo's settings, through torch.compile and fxpeft.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from block_nets import check_swaps, inputs, prepared
from closeness import assert_close
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError

import fxpeft
import fxpeft.programs.backend
from fxpeft.testing import no_recompiles

pytestmark = pytest.mark.usefixtures("fresh_graphs")
X = inputs()
COMPILERS: dict[str, Callable[..., Any]] = {"torch": torch.compile, "fxpeft": fxpeft.compile}


@contextmanager
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The options that Inductor compiles graphs with."""
    import torch._inductor.compile_fx as inductor

    found: list[dict[str, Any]] = []
    whole = inductor.compile_fx

    def compile_fx(*args: Any, **options: Any) -> Any:
        if options.get("config_patches"):  # it calls itself once these are set
            found.append(dict(options["config_patches"]))
        return whole(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(inductor, "compile_fx", compile_fx)
        yield found


def check(model: nn.Module, compiled: Any) -> None:
    """Every swap in one graph."""
    with no_recompiles() as counted, torch.no_grad():
        compiled(X)
        check_swaps(model, compiled, X)
    assert counted.graphs == 1


ASKED: dict[str, dict[str, Any]] = {
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
    "options": {"options": {"triton.cudagraphs": True, "shape_padding": True}},
}


def asked_for(asked: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = asked.get("options") or torch._inductor.list_mode_options(asked["mode"])
    assert options
    return options


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("asked", ASKED)
def test_modes_and_options_reach_inductor(compiler: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared()
    with seen(monkeypatch) as found:
        check(model, COMPILERS[compiler](model, fullgraph=True, **ASKED[asked]))
    graphs = 2 if compiler == "fxpeft" else 1  # the one without slots too
    assert found == [asked_for(ASKED[asked])] * graphs


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_cpp_wrapper_with_any_shape(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared()
    with seen(monkeypatch) as found:
        check(model, COMPILERS[compiler](model, fullgraph=True, dynamic=True, options={"cpp_wrapper": True}))
    assert found
    assert all(options == {"cpp_wrapper": True} for options in found)


def test_the_backend_by_name_takes_a_mode_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ({"mode": "max-autotune"}, {"options": {"shape_padding": False}}):
        torch._dynamo.reset()
        model = prepared()
        with seen(monkeypatch) as found:
            check(model, torch.compile(model, backend=fxpeft.programs.backend.backend, **asked))  # type: ignore[arg-type]
        assert found == [asked_for(asked)] * 2


def test_a_filter_of_guards_is_dynamos() -> None:
    asked: list[int] = []

    def keep_none(entries: Any) -> list[bool]:
        asked.append(len(entries))
        return [False for _ in entries]

    for compiler in COMPILERS.values():
        torch._dynamo.reset()
        model = prepared()
        check(model, compiler(model, fullgraph=True, options={"guard_filter_fn": keep_none}))
    assert len(asked) == len(COMPILERS)
    assert all(asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mode": "fast"}, "mode, options: .*fast.*reduce-overhead"),
        ({"options": {"cpp_wraper": True}}, "mode, options: .*cpp_wraper"),
        ({"options": {"cpp_wrapper": "yes"}}, "mode, options: .*cpp_wrapper.*str.*bool"),
        ({"mode": "default", "options": {"cpp_wrapper": True}}, "mode, options: expected one .*'default'.*cpp_wrapper"),
    ],
)
def test_what_inductor_does_not_know_is_refused_before_compiling(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(fxpeft.AdapterError, match=message):
        fxpeft.compile(prepared(), **asked)


DYNAMO: dict[str, dict[str, Any]] = {
    "modules are specialised": {"inline_inbuilt_nn_modules": False},
    "modules are not guarded": {"guard_nn_modules": False},
    "shapes are dynamic at once": {"assume_static_by_default": False},
    "shapes stay static": {"automatic_dynamic_shapes": False},
    "scalars are captured": {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True},
    "numbers are constants": {"specialize_int": True, "specialize_float": True},
    "one compile at most": {"recompile_limit": 1, "fail_on_recompile_limit_hit": True},
    "parameters may have symbols": {
        "force_parameter_static_shapes": False, "force_nn_module_property_static_shapes": False,
        "allow_unspec_int_on_nn_module": True,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*inline_inbuilt_nn_modules")
@pytest.mark.parametrize("setting", DYNAMO)
def test_every_swap_under_a_setting_of_dynamos(setting: str) -> None:
    with torch._dynamo.config.patch(DYNAMO[setting]):
        model = prepared()
        check(model, torch.compile(model, fullgraph=True))


def test_two_compiles_of_one_model_are_apart() -> None:
    model = prepared()
    both = [torch.compile(model, isolate_recompiles=True, recompile_limit=1) for _ in range(2)]
    with no_recompiles() as counted, torch.no_grad():
        for compiled in both:
            compiled(X)
        for compiled in both:
            check_swaps(model, compiled, X)
    assert counted.graphs == 2


CONSTANTS: dict[str, Any] = {
    "torch._inductor.config.freezing": lambda: torch._inductor.config.patch(freezing=True),
    "torch._dynamo.config.prepare_freezing": lambda: torch._dynamo.config.patch(prepare_freezing=True),
    "torch._dynamo.config.install_free_tensors": lambda: torch._dynamo.config.patch(install_free_tensors=True),
}


@pytest.mark.parametrize("rank", ["dynamic", "static"])
@pytest.mark.parametrize("setting", CONSTANTS)
def test_slots_become_no_constants(setting: str, rank: str) -> None:
    """A setting may be made between preparing and compiling, for the first call alone."""
    model, bare = prepared(rank=rank), nn.Linear(17, 5)
    compiled, larger = torch.compile(model), torch.compile(lambda x: model(x) * 2)
    with CONSTANTS[setting](), torch.no_grad():
        for refused in (compiled, larger):
            with pytest.raises(InternalTorchDynamoError, match=f"PassError: {setting}: expected False"):
                refused(X)
        assert_close(torch.compile(bare)(X), bare(X))  # others' models go on
    check(model, compiled)


def test_freezing_among_the_options_leaves_slots_alone() -> None:
    for rank in ("static", "dynamic"):
        torch._dynamo.reset()
        model = prepared(rank=rank)
        check(model, torch.compile(model, options={"freezing": True}))
