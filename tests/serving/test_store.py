"""A store of more adapters than memory and lanes hold: each row is its adapter alone, whatever comes and goes."""

from __future__ import annotations

import gc
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import lane_net
import pytest
import torch
from adapter_files import save
from huggingface_hub.errors import EntryNotFoundError
from lane_net import IDS, Net, alone, net, prepared
from torch import Tensor

import fxpeft
from fxpeft import AdapterError, AdapterStore, StoreTimeout, UnknownAdapter
from fxpeft.serving import loader, sources

NAMES = tuple(lane_net.CONFIGS)
ONE = IDS[:1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    lane_net.write(folder)
    save(net(), lane_net.CONFIGS["lora"], folder.parent / f"{folder.name}-others" / "lora", seed=77)
    return folder


@pytest.fixture(scope="module")
def other(root: Path) -> Path:
    """Another version of ``lora``."""
    return root.parent / f"{root.name}-others" / "lora"


@pytest.fixture(scope="module")
def expected(root: Path, other: Path) -> dict[str | None, Tensor]:
    return {None: alone(None), "other": alone(str(other)), **{name: alone(str(root / name)) for name in NAMES}}


@pytest.fixture
def open_store(root: Path) -> Iterator[Callable[..., AdapterStore]]:
    stores: list[AdapterStore] = []

    def make(folder: Path | None = root, **settings: Any) -> AdapterStore:
        stores.append(AdapterStore(prepared({}, lanes=4), folder, **{"timeout": 20, **settings}))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def check(store: AdapterStore, names: list[Any], expected: dict[str | None, Tensor], **kept: Any) -> None:
    with torch.no_grad(), store.rows(names, **kept):
        found = store.model(IDS[: len(names)])
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row], rtol=1e-5, atol=1e-5)


def one(store: AdapterStore, lane: Any) -> Tensor:
    with torch.no_grad(), fxpeft.rows(store.model, [lane]):
        return store.model(ONE)[0]  # type: ignore[no-any-return]


def size_of(store: AdapterStore, name: str) -> int:
    before = store.stats().resident_bytes
    with store.lease(name):
        return store.stats().resident_bytes - before


def test_rows_name_more_adapters_than_memory_and_lanes_hold(
    open_store: Callable[..., AdapterStore], expected: dict[str | None, Tensor]
) -> None:
    sizes = {name: size_of(open_store(), name) for name in NAMES}
    budget = sum(sorted(sizes.values())[-3:])
    store, draw = open_store(max_bytes=budget), random.Random(0)
    assert store.names() == sorted(NAMES)
    for _ in range(20):
        check(store, [draw.choice([None, *draw.sample(NAMES, 3)]) for _ in range(3)], expected)
        assert store.stats().resident_bytes <= budget
    stats = store.stats()
    assert stats.hits > 0 < stats.evictions
    assert stats.misses == stats.loads == stats.evictions + stats.residents
    assert stats.swaps > 0 < stats.swap_seconds
    assert stats.in_use == stats.failures == stats.quarantined == 0
    assert len(fxpeft.loaded_adapters(store.model)) == stats.residents
    assert fxpeft.active_adapters(store.model) == []


def test_blends_scales_and_tokens(open_store: Callable[..., AdapterStore], root: Path) -> None:
    store, plain = open_store(), prepared({name: str(root / name) for name in NAMES})
    lanes: list[Any] = [{"lora": 0.7, "rslora": 0.3}, {"bias": 1}, None, {"adalora": 0.5}]
    with torch.no_grad():
        with store.rows(lanes):
            found = store.model(IDS[:4])
        with fxpeft.rows(plain, lanes):
            torch.testing.assert_close(found, plain(IDS[:4]))
    settings: Any = {"targets": ("embed", "up", "down"), "lanes": 3}  # a convolution sees no tokens
    names = {name: str(root / name) for name in ("rslora", "adalora")}
    store, plain = AdapterStore(prepared({}, **settings), root), prepared(names, **settings)
    row = [{"rslora": 0.7, "adalora": 0.3}, "adalora", None, "rslora", {"rslora": 0.5}]
    with torch.no_grad():
        with fxpeft.tokens(plain, [row]):
            expected = plain(ONE)
        with store.tokens([row]):
            torch.testing.assert_close(store.model(ONE), expected)
        leases = [store.lease(lane) for lane in row]
        with store.batch(leases):
            torch.testing.assert_close(store.model(ONE), expected)
        for lease in leases:
            lease.release()
    assert store.stats().in_use == 0
    store.close()


def test_one_in_use_is_never_evicted(
    open_store: Callable[..., AdapterStore], expected: dict[str | None, Tensor]
) -> None:
    sizes = size_of(open_store(), "lora"), size_of(open_store(), "dora")
    store = open_store(max_bytes=sum(sizes), timeout=0.3)
    with store.lease({"lora": 1.0}) as first, store.lease("dora"):
        with pytest.raises(StoreTimeout, match=r"rslora: (no room|is not loaded yet).*2 of them in use"):
            store.lease("rslora")
        torch.testing.assert_close(one(store, first.lane), expected["lora"][0], rtol=1e-5, atol=1e-5)
    check(store, ["rslora"], expected)
    assert store.quarantined() == {}
    with pytest.raises(AdapterError, match=r"lora: [\d,]+ bytes are more than the store's max_bytes, 100"):
        open_store(max_bytes=100).lease("lora")


def test_a_new_version_is_seen_whole_and_the_old_one_goes_with_its_last_user(
    open_store: Callable[..., AdapterStore], expected: dict[str | None, Tensor], other: Path, tmp_path: Path
) -> None:
    store = open_store()
    with store.lease("lora") as lease:
        store.put("lora", other)
        torch.testing.assert_close(one(store, lease.lane), expected["lora"][0], rtol=1e-5, atol=1e-5)
        with store.lease("lora") as new:
            torch.testing.assert_close(one(store, new.lane), expected["other"][0], rtol=1e-5, atol=1e-5)
        shutil.copytree(other, tmp_path / "broken")
        (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
        with pytest.raises(AdapterError, match="can't be read as safetensors"):
            store.put("lora", tmp_path / "broken")
        with store.lease("lora") as new:  # as if nothing had been asked
            torch.testing.assert_close(one(store, new.lane), expected["other"][0], rtol=1e-5, atol=1e-5)
        assert store.stats().residents == 2
    wait_until(lambda: len(fxpeft.loaded_adapters(store.model)) == 1)
    assert store.stats().residents == 1
    assert store.quarantined() == {}


def test_a_corrupt_folder_is_not_served_until_its_files_are_others(
    open_store: Callable[..., AdapterStore], expected: dict[str | None, Tensor], root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "lora", tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-40])
    store = open_store(tmp_path)
    with pytest.raises(AdapterError, match="damaged or cut short"):
        store.lease("lora")
    for _ in range(3):
        with pytest.raises(AdapterError, match=r"'lora' is quarantined until its files change: .*damaged"):
            store.lease("lora")
    store.prefetch(["lora"])
    assert store.stats().failures == store.stats().quarantined == 1  # nobody read it again
    assert "damaged" in store.quarantined()["lora"]
    weights.write_bytes(good)
    check(store, ["lora"], expected)
    assert store.quarantined() == {}


@pytest.mark.parametrize(
    "name", ["../lora", "a/lora", "/lora", "lora/..", ".", "", "lo\0ra", "x" * 300, "link", "file"]
)
def test_a_name_leads_nowhere_else(
    open_store: Callable[..., AdapterStore], root: Path, other: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "a").mkdir()
    shutil.copytree(root / "lora", tmp_path / "a" / "lora")
    (tmp_path / "a" / "link").symlink_to(other)
    shutil.copytree(root / "lora", tmp_path / "a" / "file")
    (tmp_path / "a" / "file" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "file" / "adapter_model.safetensors").symlink_to(other / "adapter_model.safetensors")
    store = open_store(tmp_path / "a")
    assert store.names() == ["lora"]
    assert name not in store
    with pytest.raises(UnknownAdapter):
        store.lease(name)
    with pytest.raises(UnknownAdapter):
        store.prefetch([name])
    with pytest.raises(AdapterError):
        store.put(name, root / "lora") if name not in ("link", "file") else store.register("lora", root / "lora")


def test_a_load_goes_on_beside_forwards(
    open_store: Callable[..., AdapterStore], expected: dict[str | None, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, build, go = open_store(), loader.build, threading.Event()
    store.prefetch(["lora", "ia3"])
    check(store, ["lora", "ia3"], expected)

    def slow(*arguments: Any) -> Any:
        assert go.wait(20)
        return build(*arguments)

    monkeypatch.setattr(loader, "build", slow)
    store.prefetch(["dora", "dora"])
    for _ in range(3):
        check(store, ["lora", None, "ia3"], expected)
    with pytest.raises(StoreTimeout, match="dora: is not loaded yet"):
        store.lease("dora", timeout=0.05)
    with fxpeft.hold(store.model), pytest.raises(fxpeft.LockError, match="inside a forward"):
        store.lease("dora")
    go.set()
    check(store, ["dora"], expected)
    assert store.stats().loads == 3


def test_tensors_are_kept_and_names_come_and_go(
    open_store: Callable[..., AdapterStore], expected: dict[str | None, Tensor], root: Path, other: Path
) -> None:
    model = net()
    fxpeft.load_adapter(model, other)
    tensors, config = fxpeft.adapter_state_dict(model), fxpeft.adapter_config(model)
    store = open_store(max_bytes=size_of(open_store(), "lora"))
    with pytest.raises(AdapterError, match="expected a config"):
        store.put("given", tensors)
    store.put("given", tensors, config=config)
    tensors.clear()
    with store.lease("given") as lease:
        torch.testing.assert_close(one(store, lease.lane), expected["other"][0], rtol=1e-5, atol=1e-5)
    with pytest.raises(StoreTimeout):
        store.lease("lora", timeout=0.1)  # it can't be read again, so it isn't evicted
    store.remove("given")
    check(store, ["lora"], expected)
    store.remove("lora")
    assert "lora" not in store  # though the folder has it
    with pytest.raises(UnknownAdapter, match="'lora'"):
        store.remove("lora")
    store.register("lora", other)
    with pytest.raises(AdapterError, match="already"):
        store.register("lora", other)
    with store.lease("lora") as lease:
        torch.testing.assert_close(one(store, lease.lane), expected["other"][0], rtol=1e-5, atol=1e-5)
    lease = store.lease("lora")
    store.close()
    with pytest.raises(AdapterError, match="closed"):
        store.lease("lora")
    with pytest.raises(AdapterError, match="closed"):
        store.put("lora", other)
    del lease  # an abandoned one gives back, too
    gc.collect()
    assert fxpeft.loaded_adapters(store.model) == []


def test_what_rows_cannot_have_is_refused_at_the_lease(open_store: Callable[..., AdapterStore], tmp_path: Path) -> None:
    store = open_store()
    with pytest.raises(AdapterError, match=r"expected the weight 1, found 0\.5"):
        store.lease({"dora": 0.5})
    save(net(), fxpeft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"]), tmp_path / "whole")
    with pytest.raises(AdapterError, match="down"):
        store.put("whole", tmp_path / "whole")
    save(net(), fxpeft.LoraConfig(r=20, target_modules=["up"]), tmp_path / "wide")
    store.put("wide", tmp_path / "wide")
    with pytest.raises(AdapterError, match="too many ranks or lanes"):
        store.lease({"wide": 0.5, "rslora": 0.5})
    with store.lease("wide") as wide, store.lease("rslora") as other:
        assert store.fit([wide, None])
        assert not store.fit([wide, other])
    assert store.stats().in_use == 0
    with pytest.raises(AdapterError, match="5 adapters at once, more than the 4 lanes"):
        store.lease(dict.fromkeys(NAMES[:5], 1.0))
    assert store.stats().loads == 3  # none was loaded for that
    with pytest.raises(AdapterError, match="needs lanes"):
        AdapterStore(prepared({}, lanes=1))
    for settings in ({"max_bytes": 0}, {"threads": 0}, {"timeout": -1}, {"folder": tmp_path / "none"}):
        with pytest.raises(AdapterError, match="expected a"):
            AdapterStore(store.model, **settings)


def test_a_thousand_versions_leave_nothing_behind(open_store: Callable[..., AdapterStore], other: Path) -> None:
    store = open_store()
    for turn in range(60):
        store.put("lora", other)
        with store.lease("lora") as lease:
            one(store, lease.lane)
        if turn == 9:
            before = store.stats().resident_bytes
    wait_until(lambda: len(fxpeft.loaded_adapters(store.model)) == 1)
    assert store.stats().resident_bytes == before
    board = fxpeft.adapters.state.state_of(store.model).serving.board  # type: ignore[union-attr]
    assert len(board.placed) <= 4
    assert len(board.used) <= 4
    assert not board.pins


def test_an_id_on_the_hub(
    open_store: Callable[..., AdapterStore], expected: dict[str | None, Tensor], other: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    there = False

    def download(repo: str, name: str, **settings: Any) -> str:
        if not there:
            raise OSError("no network")
        assert (repo, settings["revision"], settings["token"]) == ("some/lora", "v2", "secret")
        if not (other / name).is_file():
            raise EntryNotFoundError(name, response=None)  # type: ignore[arg-type]
        return str(other / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    store = open_store(None)
    store.register("far", "some/lora", revision="v2", token="secret")
    for says in ("no network", r"quarantined .*no network"):
        with pytest.raises(AdapterError, match=says):
            store.lease("far")
    there = True
    monkeypatch.setattr(sources, "RETRY", 0.0)
    store.put("far", "some/lora", revision="v2", token="secret")
    with store.lease("far") as lease:
        torch.testing.assert_close(one(store, lease.lane), expected["other"][0], rtol=1e-5, atol=1e-5)
    assert "secret" not in str(store.quarantined())


def test_a_file_that_never_finds_room_is_not_read(open_store: Callable[..., AdapterStore], root: Path) -> None:
    store = open_store(max_bytes=(root / "lora" / "adapter_model.safetensors").stat().st_size // 8)
    with pytest.raises(AdapterError, match="more than the store's max_bytes"):
        store.lease("lora")


def test_threads_that_use_put_and_remove(
    open_store: Callable[..., AdapterStore], expected: dict[str | None, Tensor], root: Path, other: Path
) -> None:
    """Every row is a version that its name had; nothing is lost, nobody waits for ever."""
    sizes = [size_of(open_store(), name) for name in NAMES]
    store = open_store(max_bytes=sum(sorted(sizes)[-4:]), threads=2)
    allowed = {name: [expected[name]] for name in NAMES}
    allowed["lora"].append(expected["other"])
    wrong: list[Any] = []

    def use(seed: int) -> int:
        draw, served = random.Random(seed), 0
        for _ in range(40):
            names = draw.sample(["lora", "rslora", "dora", "ia3", "adalora"], draw.randint(1, 2))
            try:
                with torch.no_grad(), store.rows(names):
                    found = store.model(IDS[: len(names)])
            except UnknownAdapter:
                continue
            except AdapterError as error:  # two threads name more than there are lanes or ranks
                if "more than" not in str(error):
                    raise
                continue
            served += 1
            for row, name in enumerate(names):
                if not any(torch.allclose(found[row], e[row], rtol=1e-4, atol=1e-5) for e in allowed[name]):
                    wrong.append(name)
        return served

    def change(seed: int) -> int:
        draw = random.Random(seed)
        for _ in range(25):
            store.put("lora", draw.choice([root / "lora", other]))
            if draw.random() < 0.3:
                store.put("adalora", root / "adalora")
                store.remove("adalora")
        return 1

    with ThreadPoolExecutor(4) as pool:
        done = [*pool.map(use, range(3)), *pool.map(change, [9])]
    assert not wrong
    assert all(done)
    stats = store.stats()
    assert stats.in_use == 0
    assert stats.resident_bytes <= stats.max_bytes
    wait_until(lambda: len(fxpeft.loaded_adapters(store.model)) == store.stats().residents)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        threading.Event().wait(0.01)
    assert holds()


def test_the_model_stays_one(open_store: Callable[..., AdapterStore]) -> None:
    """What the store does is no part of the model: no state_dict, no parameter."""
    store = open_store()
    with store.lease("lora"):
        assert not [name for name, p in store.model.named_parameters() if "lora" in name]
        assert isinstance(store.model, Net)
        assert set(store.model.state_dict()) == set(net().state_dict())
