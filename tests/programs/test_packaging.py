"""One package, compiled once: adapters of several methods swap in it, wrong ones change nothing."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import save, save_each
from closeness import assert_close
from torch import Tensor, nn
from torch.export import Dim

import fxpeft
from fxpeft import AdaLoraConfig, AdapterError, IA3Config, LoraConfig, Package
from fxpeft.model.fingerprint import fingerprint
from fxpeft.programs.packaging import MANIFEST, WEIGHTS, manifest

METHODS = ("lora", "lora_bias", "ia3", "adalora", "dora", "alora")
TARGETS = ["words", "up", "down", "head"]


class Net(nn.Module):
    """A look-up and linears; ``free`` gets no slot."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(17, 6)
        self.up, self.down, self.free = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Ids ``[batch, length]``."""
        h = self.free(self.down(torch.tanh(self.up(self.words(ids))))) + shift
        return {"logits": self.head(h), "hidden": h}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


IDS = torch.randint(0, 17, (3, 4), generator=torch.Generator().manual_seed(1))
CALL = IDS[1, 1:3].tolist()  # in the middle of a row, and in no other
SHIFT = torch.randn(8, generator=torch.Generator().manual_seed(2))
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, rank_pattern={"up": 6}, alpha_pattern={"head": 9}),
    "one": LoraConfig(r=1, lora_alpha=3, target_modules=["down"]),
    "bias": LoraConfig(r=2, lora_alpha=3, target_modules=["down", "head"], lora_bias=True),
    "ia3": IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
    "adalora": AdaLoraConfig(init_r=5, lora_alpha=7, total_step=10, target_modules=["up", "head"]),
    "dora": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, rank_pattern={"up": 5}, use_dora=True),
    "alora": LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down", "head"], alora_invocation_tokens=CALL),
    "full": LoraConfig(r=8, lora_alpha=4, target_modules=["up", "down"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_each(net, CONFIGS, tmp_path_factory.mktemp("adapters"))


@functools.cache
def packaged() -> Path:
    """The package, compiled once for all tests that need one."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("AOTInductor compiles with the system's C++ compiler, and there is none")
    return fxpeft.package(
        net(), Path(tempfile.mkdtemp()) / "net.pt2", (IDS, SHIFT), max_rank=8, targets=TARGETS, methods=METHODS,
        dynamic_shapes=({0: Dim("batch", min=1, max=16), 1: Dim("length", min=1, max=32)}, None),
    )  # fmt: skip


@pytest.fixture
def path() -> Path:
    return packaged()


@pytest.fixture
def opened(path: Path) -> Package:
    return fxpeft.open_package(path)


@torch.no_grad()
def live(folder: Path | None = None, ids: Tensor = IDS) -> Tensor:
    model = net()
    if folder is not None:
        fxpeft.load_adapter(model, folder)
    output: Tensor = model(ids, SHIFT)["logits"]
    return output


def close(found: dict[str, Tensor], wanted: Tensor) -> None:
    assert_close(found["logits"], wanted)


def test_an_invocation_is_looked_for_in_each_call(opened: Package, folders: dict[str, str]) -> None:
    opened.load_adapter(folders["alora"])
    for ids in (IDS.flip(0), IDS[1:2].repeat(2, 3), IDS[:1]):
        close(opened(ids, SHIFT), live(folders["alora"], ids))
    close(opened(IDS, SHIFT, adapter_reach=torch.zeros(3, 4, dtype=torch.bool)), live())
    with pytest.raises(AdapterError, match=r"adapter_reach: expected bool \[3, 4\], found torch.bool \[3, 3\]"):
        opened(IDS, SHIFT, adapter_reach=torch.zeros(3, 3, dtype=torch.bool))
    opened.manifest["cached"] = True
    with pytest.raises(AdapterError, match="adapter_reach: expected which tokens of this call are acted on"):
        opened(IDS, SHIFT)
    reach = fxpeft.invoked(torch.cat([IDS, IDS], 1), CALL)[:, -4:]
    assert reach[0].sum() == 0 < reach[1].sum()
    opened(IDS, SHIFT, adapter_reach=reach)


def test_every_adapter_equals_the_live_model(opened: Package, folders: dict[str, str]) -> None:
    close(opened(IDS, SHIFT), live())
    for name, folder in folders.items():
        wanted = live(folder)
        assert (wanted - live()).abs().max() > 0.01
        opened.load_adapter(folder, name)
        close(opened(IDS, SHIFT), wanted)
    for name in ("full", "dora", "one", "ia3", "lora", "adalora", "dora", "bias", "one"):
        opened.set_adapter(name)
        close(opened(IDS, SHIFT), live(folders[name]))
    assert opened.active_adapters() == ["one"]
    opened.disable()
    close(opened(IDS, SHIFT), live())
    opened.enable()
    opened.hotswap(folders["full"])
    close(opened(IDS, SHIFT), live(folders["full"]))
    for ids in (IDS[:1, :1], IDS.repeat(4, 3)):
        close(opened(ids, SHIFT), live(folders["full"], ids))


def test_nothing_is_compiled_or_traced_by_a_swap(
    opened: Package, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.codecache import CppCodeCache

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was compiled")

    for owner, name in ((CppCodeCache, "load"), (CppCodeCache, "load_async"), (torch, "compile")):
        monkeypatch.setattr(owner, name, refuse)
    addresses = [slot.a.data_ptr() for slot in opened._serving.slots.values()]
    opened.hotswap(folders["lora"])
    opened.hotswap(folders["full"])
    close(opened(IDS, SHIFT), live(folders["full"]))
    assert [slot.a.data_ptr() for slot in opened._serving.slots.values()] == addresses


def test_scales_sums_and_state_dicts(opened: Package, folders: dict[str, str]) -> None:
    model = net()
    for name in ("lora", "one"):
        opened.load_adapter(folders[name], name)
        fxpeft.load_adapter(model, folders[name], name)
    for each in (opened, fxpeft):
        own = () if each is opened else (model,)
        each.set_adapter(*own, ["lora", "one"])  # type: ignore[arg-type]
        each.set_scale(*own, "one", 0.3)  # type: ignore[arg-type]
    with torch.no_grad():
        close(opened(IDS, SHIFT), model(IDS, SHIFT)["logits"])
    opened.delete_adapter("one")
    close(opened(IDS, SHIFT), live(folders["lora"]))
    model = net()
    fxpeft.load_adapter(model, folders["full"])
    tensors = fxpeft.adapter_state_dict(model)
    opened.hotswap(tensors, config=CONFIGS["full"])
    close(opened(IDS, SHIFT), live(folders["full"]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=9, target_modules=["up"]), r"up: rank 9 is above max_rank 8"),
        (LoraConfig(r=2, target_modules=["up", "free"]), r"free: has no slot"),
        (LoraConfig(r=2, target_modules=["up"], modules_to_save=["free"]), r"free: has no slot"),
        (LoraConfig(r=2, target_modules=["up"], bias="lora_only"), r"up.bias: has no slot"),
    ],
)
def test_what_does_not_fit_is_refused(
    opened: Package, folders: dict[str, str], tmp_path: Path, config: Any, message: str
) -> None:
    opened.hotswap(folders["lora"])
    bad = save(net(), config, tmp_path)
    for change in (lambda: opened.hotswap(bad), lambda: opened.load_adapter(bad, "more")):
        with pytest.raises(AdapterError, match=f"(?s){message}"):
            change()
        close(opened(IDS, SHIFT), live(folders["lora"]))


def test_another_base_is_refused(opened: Package, folders: dict[str, str], tmp_path: Path) -> None:
    opened.hotswap(folders["lora"])
    for name, model in (("tuned", net(3)), ("other", nn.ModuleDict({"up": nn.Linear(6, 11)}))):
        foreign = save(model, LoraConfig(r=2, target_modules=["up"]), tmp_path / name)
        with pytest.raises(AdapterError, match=r"trained on another base: expected fingerprint \w{12}, found \w{12}"):
            opened.hotswap(foreign)
    with pytest.raises(AdapterError, match=r"up.lora_B.weight: expected \[10, 2\], found \[11, 2\]"):
        opened.hotswap(foreign, any_base=True)
    close(opened(IDS, SHIFT), live(folders["lora"]))
    opened.hotswap(tmp_path / "tuned", any_base=True)
    close(opened(IDS, SHIFT), live(tmp_path / "tuned"))


def test_a_fingerprint_is_the_base_alone() -> None:
    model = net()
    own = fingerprint(model)
    fxpeft.add_adapter(model, CONFIGS["lora"])
    assert fingerprint(model) == own == fingerprint(net().bfloat16())
    fxpeft.remove(model)
    assert fingerprint(net(1)) != own
    with torch.no_grad():
        model.down.bias[3] += 0.1
    assert fingerprint(model) != own


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((IDS.int(), SHIFT), r"input ids: expected int64 \[1..16, 1..32\], found int32 \[3, 4\]"),
        ((IDS.repeat(6, 1), SHIFT), r"found int64 \[18, 4\]"),
        ((IDS, SHIFT[:7]), r"input shift: expected float32 \[8\], found float32 \[7\]"),
        ((IDS,), "expected arguments like"),
    ],
)
def test_inputs_are_checked(opened: Package, args: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        opened(*args)


def test_threads_see_one_adapter_whole(opened: Package, folders: dict[str, str]) -> None:
    wanted = {name: live(folders[name]) for name in ("lora", "full", "ia3")}
    for name in wanted:
        opened.load_adapter(folders[name], name)
    stop, seen, errors = threading.Event(), set(), []

    def run() -> None:
        while not stop.is_set():
            logits = opened(IDS, SHIFT)["logits"]
            near = [n for n, w in wanted.items() if torch.allclose(logits, w, rtol=0, atol=1e-5)]
            seen.update(near)
            if len(near) != 1:
                errors.append(logits)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for name in [*wanted] * 40:
        opened.set_adapter(name)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert seen


def test_damaged_packages_are_refused(path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(AdapterError, match="can't be opened as a"):
        fxpeft.open_package(cut)
    with pytest.raises(AdapterError, match="no such file"):
        fxpeft.open_package(tmp_path / "none.pt2")
    plain = tmp_path / "plain.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), plain)
    with pytest.raises(AdapterError, match="and a compiled model in it"):
        fxpeft.open_package(plain)


def edited(path: Path, to: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A package whose members ``change`` has gone over; it drops those that it gives nothing for."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return to


def test_a_package_for_dora_needs_its_weights(path: Path, tmp_path: Path) -> None:
    for number, (new, message) in enumerate(((None, "has no weight of words, up, down, head"), (b"x", "is damaged"))):

        def change(name: str, content: bytes, new: bytes | None = new) -> bytes | None:
            return new if name == WEIGHTS else content

        with pytest.raises(AdapterError, match=message):
            fxpeft.open_package(edited(path, tmp_path / f"{number}.pt2", change))


def test_dora_is_refused_where_it_was_not_declared(path: Path, folders: dict[str, str], tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes | None:
        if name == WEIGHTS:
            return None
        return content.replace(b'"dora"', b'"lora"') if name.endswith(MANIFEST) else content

    opened = fxpeft.open_package(edited(path, tmp_path / "net.pt2", change))
    opened.load_adapter(folders["lora"])
    with pytest.raises(AdapterError, match=r"(?s)its method, dora"):
        opened.hotswap(folders["dora"])
    close(opened(IDS, SHIFT), live(folders["lora"]))


def test_what_cannot_be_packaged_is_refused(tmp_path: Path) -> None:
    to = tmp_path / "net.pt2"
    adapted = net()
    fxpeft.add_adapter(adapted, CONFIGS["lora"])
    for model, more, message in (
        (net(), {"methods": ("lora", "dorra")}, "methods: expected a sequence of some of"),
        (net(), {"methods": ("prompt_tuning",)}, "methods: expected a sequence of some of ia3, lora"),
        (net(), {"max_rank": 1}, "max_rank: expected at least 2, found 1"),
        (net(), {"options": {"freezing": True}}, "freezing folds slots"),
        (net().train(), {}, "call model.eval"),
        (adapted, {}, "package the bare model"),
    ):
        with pytest.raises(AdapterError, match=message):
            fxpeft.package(model, to, (IDS, SHIFT), **more)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="expected a name that ends in"):
        fxpeft.package(net(), tmp_path / "net.bin", (IDS, SHIFT))
    assert not list(tmp_path.iterdir())


def test_the_manifest_needs_no_model() -> None:
    content = json.loads(json.dumps(manifest(net(), ["up"], 8, ("lora",), "static")))
    assert content["sites"] == ["up"]
    assert set(content["modules"]) == {"words", "up", "down", "free", "head"}
    assert content["modules"]["head"] == {"kind": "linear", "in": 8, "out": 5, "dtype": "float32", "bias": True}
