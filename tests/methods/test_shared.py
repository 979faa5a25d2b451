"""What all sites of an adapter share, by a method of one's own whose frozen factors are one pair for all, as VeRA's."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft.methods.base import Base, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.registry import METHODS
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind


@dataclass
class PairConfig(AdapterConfig):
    r: int = 3
    seed: int = 0
    save_projection: bool = False
    train_projection: bool = False

    peft_type: ClassVar[str] = "PAIR"


def pair(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, d: Tensor, b: Tensor, A: Tensor, B: Tensor
) -> Tensor:
    y = base(x)
    h = kind.scale(kind.reduce(x, A[:, : kind.in_features]), d)
    out: Tensor = (y + kind.expand(h, B[: kind.out_features]) * b).type_as(y)
    return out


class Pair(Method[PairConfig]):
    """y = base(x) + b * (B (d * (A x))), A and B cut to each site's size."""

    name = "pair"
    peft_type = "PAIR"
    shared_keys: ClassVar[Mapping[str, str]] = {"A": "base_model.pair_A", "B": "base_model.pair_B"}
    config_class = PairConfig

    def plan(self, config: PairConfig, site: str, kind: Kind) -> SitePlan:
        return SitePlan(kind, config.r, 1.0)

    def shared(self, config: PairConfig, plans: Mapping[str, SitePlan]) -> dict[str, tuple[int, ...]]:
        kinds = [plan.kind for plan in plans.values()]
        return {
            "A": (config.r, max(kind.in_features for kind in kinds)),
            "B": (max(kind.out_features for kind in kinds), config.r),
        }

    def initialise_shared(self, config: PairConfig, shared: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        for tensor in shared.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(config.r))

    def shared_trained(self, config: PairConfig) -> Collection[str]:
        return tuple(self.shared_keys) if config.train_projection else ()

    def shared_stored(self, config: PairConfig) -> Collection[str]:
        return tuple(self.shared_keys) if config.save_projection else ()

    def shapes(self, config: PairConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return {"d": (plan.rank,), "b": (plan.kind.out_features,)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {"d": "pair_d", "b": "pair_b"}

    def initialise(self, config: PairConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        assert base.shared.keys() == {"A", "B"}  # they are there before the sites
        nn.init.constant_(parameters["d"], 0.1)
        nn.init.zeros_(parameters["b"])

    def rewrite(self, name: str, config: PairConfig, site: SiteAdapter) -> Rewrite:
        own = {f"{name}.{key}": getattr(site, key) for key in ("d", "b")}
        shared = {f"{name}.shared.{key}": getattr(site.shared, key) for key in ("A", "B")}
        return Rewrite(f"pair:{name}", pair, {**own, **shared}, shared=tuple(shared))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        a, b = base.shared["A"][:, : plan.kind.in_features], base.shared["B"][: plan.kind.out_features]
        return SlotValues(a, (b * parameters["b"].unsqueeze(1)).t(), parameters["d"].float())

    def scales(self, config: PairConfig) -> bool:
        return False


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    method = Pair()
    fxpeft.register(method)
    yield
    METHODS.remove(method)


IDS = token_ids()
TARGETS = ["q_proj", "k_proj", "down_proj"]  # [32, 32], [16, 32], [32, 48]
SITES = 2 * len(TARGETS)
FIRST = "model.layers.0.self_attn.q_proj"


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def adapted(config: PairConfig, seed: int = 1) -> nn.Module:
    model = tiny_llama()
    fxpeft.add_adapter(model, config)
    randomise((p for p in model.parameters() if p.requires_grad), seed)
    return model


def config(**changes: object) -> PairConfig:
    return PairConfig(target_modules=TARGETS, **{"r": 5, "seed": 3, **changes})  # type: ignore[arg-type]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def shared_in(model: nn.Module) -> dict[str, Tensor]:
    """What the model lists of it: parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if ".shared." in name}


def test_the_subgraph_reads_it_at_every_site() -> None:
    model = adapted(config())
    assert (output(model) - output(tiny_llama())).abs().max() > 0.01
    layer = model.model.layers[1]  # type: ignore[union-attr, index]
    x = torch.randn(4, 48)
    own = layer.mlp.down_proj.adapters.default
    shared = own.shared
    base = nn.functional.linear(x, layer.mlp.down_proj.weight)
    close(layer.mlp.down_proj(x), base + x @ shared.A.T * own.d @ shared.B[:32].T * own.b)
    x = torch.randn(4, 32)
    own = layer.self_attn.k_proj.adapters.default
    base = nn.functional.linear(x, layer.self_attn.k_proj.weight)
    close(layer.self_attn.k_proj(x), base + x @ shared.A[:, :32].T * own.d @ shared.B[:16].T * own.b)


def test_it_is_there_once_and_frozen() -> None:
    model = adapted(config())
    assert {name: tuple(t.shape) for name, t in shared_in(model).items()} == {
        f"{FIRST}.adapters.default.shared.A": (5, 48),
        f"{FIRST}.adapters.default.shared.B": (32, 5),
    }
    assert [key for key in model.state_dict() if ".shared." in key] == list(shared_in(model))
    assert not any(".shared." in name for name, p in model.named_parameters() if p.requires_grad)
    assert fxpeft.trainable_parameters(model, show=False).trainable == 2 * (32 + 16 + 32 + 3 * 5)
    output(model).sum()
    model(input_ids=IDS).logits.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * SITES
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_it_is_moved_and_copied_with_the_model() -> None:
    model = adapted(config())
    expected = output(model)
    twin = copy.deepcopy(model)
    model.double()
    assert {t.dtype for t in shared_in(model).values()} == {torch.float64}
    torch.testing.assert_close(output(model), expected.double(), rtol=0, atol=1e-4)
    with torch.no_grad():
        for tensor in shared_in(model).values():
            tensor.zero_()
    close(output(model).float(), output(tiny_llama()))
    close(output(twin), expected)
    with torch.no_grad():
        for tensor in shared_in(twin).values():
            tensor.zero_()  # every site of the copy reads the copy's own
    close(output(twin), output(tiny_llama()))


def test_a_pickle_holds_it_once() -> None:
    model = adapted(config())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    close(output(loaded), output(model))
    with torch.no_grad():
        for tensor in shared_in(loaded).values():
            tensor.zero_()
    close(output(loaded), output(tiny_llama()))


def test_several_are_active_together_and_come_and_go() -> None:
    model = adapted(config())
    one = output(model)
    fxpeft.add_adapter(model, config(r=2, seed=8), "two")
    randomise((p for p in model.parameters() if p.requires_grad), 6)
    two = output(model)
    assert (one - two).abs().max() > 0.01
    fxpeft.set_adapter(model, ["default", "two"])
    both = output(model)
    assert (both - one).abs().max() > 0.01
    fxpeft.set_adapter(model, "default")
    close(output(model), one)
    fxpeft.delete_adapter(model, "default")
    assert list(shared_in(model)) == [f"{FIRST}.adapters.two.shared.{name}" for name in "AB"]
    fxpeft.remove(model)
    assert not shared_in(model)
    assert list(model.state_dict()) == list(tiny_llama().state_dict())
    close(output(model), output(tiny_llama()))


@pytest.mark.parametrize("stored", [True, False])
def test_live_slot_fold_and_file_agree(stored: bool, tmp_path: Path) -> None:
    model = adapted(config(save_projection=stored))
    if stored:  # values that no seed gives
        with torch.no_grad():
            for tensor in shared_in(model).values():
                tensor.mul_(1.5)
    expected = output(model)
    fxpeft.save_adapter(model, tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {k for k in keys if "layers" not in k} == ({"base_model.pair_A", "base_model.pair_B"} if stored else set())
    assert len([k for k in keys if "layers" in k]) == 2 * SITES

    loaded = tiny_llama()
    fxpeft.load_adapter(loaded, tmp_path)
    close(output(loaded), expected)
    fxpeft.fold(loaded)
    close(output(loaded), expected)
    fxpeft.unfold(loaded)
    close(output(loaded), expected)
    fxpeft.convert(loaded, "default")
    close(output(loaded), expected)

    fxpeft.prepare_hotswap(model, 7, methods=("lora", "pair"))
    close(output(model), expected)
    fxpeft.fold(model)
    close(output(model), expected)
    fxpeft.unfold(model)
    fxpeft.release_hotswap(model)
    close(output(model), expected)
    assert len(shared_in(model)) == 2

    fxpeft.remove(model)
    fxpeft.prepare_hotswap(model, 7, targets=TARGETS, methods=("lora", "pair"))
    fxpeft.load_adapter(model, tmp_path)
    close(output(model), expected)
    again = tmp_path / "again"
    fxpeft.save_adapter(model, again)
    fxpeft.remove(model)
    fxpeft.load_adapter(model, again)
    close(output(model), expected)


def test_swaps_recompile_nothing(tmp_path: Path) -> None:
    configs = {"one": config(save_projection=True), "two": config(r=2, seed=8), "three": config(seed=9)}
    expected = {}
    for seed, (name, each) in enumerate(configs.items()):
        model = adapted(each, seed)
        expected[name] = output(model)
        fxpeft.save_adapter(model, tmp_path / name)
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, 7, targets=TARGETS, methods=("lora", "pair"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    fxpeft.load_adapter(model, tmp_path / "one")
    close(output(compiled), expected["one"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("two", "three", "one"):
            fxpeft.hotswap(model, tmp_path / name)
            close(output(compiled), expected[name])
        fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, target_modules=["q_proj"]), "lora")
        output(compiled)
        fxpeft.load_adapter(model, tmp_path / "two", "other")
        close(output(compiled), expected["two"])
        fxpeft.set_adapter(model, "default")
        close(output(compiled), expected["one"])


def test_a_compiled_live_model_reads_it() -> None:
    model = adapted(config())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    close(output(compiled), output(model))


def test_what_a_file_lacks_or_has_too_much_is_told(tmp_path: Path) -> None:
    model = adapted(config(save_projection=True))
    tensors = dict(fxpeft.adapter_state_dict(model))
    fxpeft.remove(model)
    fxpeft.prepare_hotswap(model, 7, targets=TARGETS, methods=("pair",))
    fxpeft.add_adapter(model, config(save_projection=True))
    fxpeft.hotswap(model, tensors)
    held = output(model)
    without = {key: t for key, t in tensors.items() if key != "base_model.pair_A"}
    with pytest.raises(fxpeft.CheckpointError, match=r"doesn't fill:\n.*base_model\.pair_A \[5, 48\]"):
        fxpeft.hotswap(model, without)
    narrow = {**tensors, "base_model.pair_B": torch.ones(31, 5)}
    with pytest.raises(fxpeft.CheckpointError, match=r"base_model\.pair_B: expected \[32, 5\], found \[31, 5\]"):
        fxpeft.hotswap(model, narrow)
    broken = {**tensors, "base_model.pair_B": torch.full((32, 5), math.nan)}
    with pytest.raises(fxpeft.CheckpointError, match=r"base_model\.pair_B: expected finite"):
        fxpeft.hotswap(model, broken, check_finite=True)
    assert torch.equal(output(model), held)
    other = {**tensors, "base_model.pair_A": torch.ones(5, 48)}
    with pytest.warns(UserWarning, match=r"base_model\.pair_A, base_model\.pair_B are left out"):
        fxpeft.hotswap(model, other, config=config())  # PEFT: the seed says it, whatever the file has
    close(output(model), held)


def test_values_are_overwritten_and_filled_later() -> None:
    model = adapted(config(save_projection=True))
    tensors = {key: t.clone() for key, t in fxpeft.adapter_state_dict(model).items()}
    expected = output(model)
    randomise(fxpeft.adapter_state_dict(model).values(), 7)
    held = list(shared_in(model).values())
    assert (output(model) - expected).abs().max() > 0.01
    fxpeft.load_adapter_state_dict(model, tensors)
    close(output(model), expected)
    assert all(a is b for a, b in zip(held, shared_in(model).values(), strict=True))
    seeded = adapted(config(), 7)
    with pytest.warns(UserWarning, match=r"base_model\.pair_A, base_model\.pair_B are left out"):
        fxpeft.load_adapter_state_dict(seeded, tensors)
    close(output(seeded), expected)
    empty = tiny_llama()
    fxpeft.inject(empty, None, config(save_projection=True), empty=True)
    assert all(t.is_meta for t in shared_in(empty).values())
    fxpeft.load_adapter_state_dict(empty, tensors)
    close(output(empty), expected)


def test_keys_as_modules_in_memory_have_them() -> None:
    model = adapted(config(save_projection=True))
    tensors = fxpeft.adapter_state_dict(model)
    named = {f"{key}.tuned": tensor.clone() for key, tensor in tensors.items()}  # PEFT's, before it strips the name
    assert {"base_model.pair_A.tuned", f"base_model.model.{FIRST}.pair_d.tuned"} <= named.keys()
    injected = tiny_llama()
    with pytest.warns(RuntimeWarning, match=r"only in the state_dict, and taken:\n.*k_proj"):
        fxpeft.inject(injected, named, PairConfig(r=5, save_projection=True, target_modules=["q_proj", "down_proj"]))
    assert fxpeft.adapter_config(injected).modules_to_save is None
    close(output(injected), output(model))
    with pytest.raises(fxpeft.CheckpointError, match="expected one adapter's tensors, found those of other, tuned"):
        fxpeft.inject(tiny_llama(), {**named, f"base_model.model.{FIRST}.pair_d.other": torch.ones(5)}, config())
    with pytest.raises(fxpeft.AdapterError, match=r"pair_b, pair_d: a method whose config holds more than its tensors"):
        fxpeft.infer_config(tensors)


def test_it_is_trained_where_the_method_says_so(tmp_path: Path) -> None:
    model = adapted(config(train_projection=True, save_projection=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 2 * SITES + 2
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    before = {name: t.detach().clone() for name, t in shared_in(model).items()}
    model(input_ids=IDS).logits.square().mean().backward()
    optimiser.step()
    assert all((t - before[name]).abs().max() > 0 for name, t in shared_in(model).items())
    fxpeft.disable_adapters(model)
    assert not any(p.requires_grad for p in model.parameters())
    fxpeft.enable_adapters(model)
    assert sum(p.requires_grad for p in model.parameters()) == len(parameters)
    fxpeft.save_adapter(model, tmp_path)
    again = tiny_llama()
    fxpeft.load_adapter(again, tmp_path, trainable=True)
    assert sum(p.requires_grad for p in again.parameters()) == len(parameters)
    close(output(again), output(model))


def test_the_plan_counts_it_once() -> None:
    made = fxpeft.plan(tiny_llama(), config(), roles=False)
    sites = 2 * (32 + 16 + 32 + 3 * 5)
    assert sum(site.parameters for site in made.sites) == sites
    assert made.parameters == sites + 5 * 48 + 32 * 5
    assert made.extra_bytes == 4 * made.parameters
    assert "shared by all sites: A, 240 parameters" in str(made)
    assert type(made).from_json(made.to_json()) == made
    older = made.to_json().replace('"shared"', '"unknown"')
    assert type(made).from_json(older).shared == ()
    picture = fxpeft.plan(tiny_llama(), config()).draw()
    assert len(picture.after) > len(picture.before)


@pytest.mark.parametrize("exported", [True, False])
def test_a_program_has_it_once(exported: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7))
    x = torch.randn(4, 6)
    own = PairConfig(r=3, seed=2, target_modules=["0", "2"], save_projection=True)
    live = copy.deepcopy(net)
    fxpeft.add_adapter(live, own)
    randomise(fxpeft.adapter_state_dict(live).values(), 4)
    tensors = fxpeft.adapter_state_dict(live)
    program = torch.export.export(net, (x,)) if exported else torch.fx.symbolic_trace(net)
    rewritten = fxpeft.rewrite(program, own, state_dict=tensors)
    with torch.no_grad():
        run = rewritten.module() if isinstance(rewritten, torch.export.ExportedProgram) else rewritten
        close(run(x), live(x))  # type: ignore[operator]
    asked = fxpeft.rewrite(program, own, state_dict=tensors, adapters="inputs")
    inputs = fxpeft.adapter_inputs(asked)
    assert [name for name in inputs if name.endswith((".A", ".B"))] == ["default.shared.A", "default.shared.B"]
    with torch.no_grad():
        run = asked.module() if isinstance(asked, torch.export.ExportedProgram) else asked
        close(run(x, adapters=inputs), live(x))  # type: ignore[operator]
    bare = fxpeft.eject(rewritten)
    with torch.no_grad():
        run = bare.module() if isinstance(bare, torch.export.ExportedProgram) else bare
        close(run(x), net(x))  # type: ignore[operator]
    assert not [name for name, _ in run.named_buffers() if "shared" in name]  # type: ignore[union-attr]


def test_transformers_takes_it_from_a_state_dict(tmp_path: Path) -> None:
    model = adapted(config(save_projection=True))
    given = {key: value + 1 for key, value in model.state_dict().items()}
    fxpeft.install()
    try:
        model.save_pretrained(tmp_path, state_dict=given)
    finally:
        fxpeft.uninstall()
    own = fxpeft.adapter_state_dict(model)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == own.keys()
    torch.testing.assert_close(found, {key: value + 1 for key, value in own.items()})


def test_mismatched_sizes_are_filled_with_first_values(tmp_path: Path) -> None:
    model = adapted(config(save_projection=True, r=4))
    fxpeft.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({**tensors, "base_model.pair_A": torch.ones(4, 40)}, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"base_model\.pair_A: expected \[4, 48\], found \[4, 40\]"):
        fxpeft.load_adapter(model, tmp_path, "other", ignore_mismatched_sizes=True)
    close(output(model), output(adapted(config(save_projection=True, r=4))))
