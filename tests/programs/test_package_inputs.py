"""Compiled code reads memory as it was compiled to: a package fits its inputs to that, or refuses them."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from processes import python
from tiny import randomise
from torch import Tensor, nn
from torch.export import Dim

import fxpeft
from fxpeft import AdapterError, LoraConfig, Package
from fxpeft.programs.inputs import describe, fit
from fxpeft.programs.packaging import MANIFEST

WORDS = 4001


class Net(nn.Module):
    """Ids ``[batch, length]``, an image in channels-last order, twice the batch plus one weights, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(WORDS, 6), nn.Linear(6, 5)
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, ids: Tensor, image: Tensor, weights: Tensor, double: bool = True) -> Tensor:
        h = self.up(self.words(ids)) + self.conv(image).mean((2, 3)).unsqueeze(1)
        return h * weights[::2].sum() * (2 if double else 1)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def inputs(batch: int = 3, length: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (batch, length), generator=generator)
    image = torch.randn(batch, 3, 6, 5, generator=generator)
    return ids, image.to(memory_format=torch.channels_last), torch.rand(2 * batch + 1, generator=generator)


@functools.cache
def packaged() -> Path:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("AOTInductor compiles with the system's C++ compiler, and there is none")
    ids, image, weights = inputs()
    batch = Dim("batch", min=2, max=5000)
    wide = torch.stack([weights, weights], 1)[:, 0]  # an example with gaps in its memory
    return fxpeft.package(
        net(), Path(tempfile.mkdtemp()) / "net.pt2", (ids, image, wide, True), max_rank=4, targets=["up"],
        dynamic_shapes=({0: batch, 1: Dim("length", min=2, max=3000)}, {0: batch}, {0: 2 * batch + 1}, None),
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = net(), tmp_path_factory.mktemp("adapter")
    fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=5, target_modules=["up"]))
    randomise(fxpeft.adapter_state_dict(model).values())
    fxpeft.save_adapter(model, folder)
    return folder


@pytest.fixture
def opened(adapter: Path) -> Package:
    package = fxpeft.open_package(packaged())
    package.load_adapter(adapter)
    return package


@torch.no_grad()
def live(adapter: Path, *args: Any) -> Tensor:
    model = net()
    fxpeft.load_adapter(model, adapter)
    output: Tensor = model(*args)
    return output


IDS, IMAGE, WEIGHTS = inputs()
COMPLEX = torch.view_as_complex(torch.randn(7, 2, generator=torch.Generator().manual_seed(2)))
GAPS = torch.zeros(2 * 7).as_strided((7,), (2,)).copy_(WEIGHTS)
ODD: dict[str, tuple[Any, ...]] = {
    "as the examples": (IDS, IMAGE, WEIGHTS),
    "transposed ids": (IDS.t().contiguous().t(), IMAGE, WEIGHTS),
    "expanded row": (IDS[:1].expand(3, 4), IMAGE, WEIGHTS),
    "expanded columns": (IDS[:, :1].expand(3, 4), IMAGE, WEIGHTS),
    "every second id": (IDS.repeat_interleave(2, 1)[:, ::2], IMAGE, WEIGHTS),
    "rows of a larger tensor": (torch.cat([IDS, IDS], 1)[:, 4:], IMAGE, WEIGHTS),
    "an offset": (torch.cat([IDS[:1], IDS])[1:], IMAGE, WEIGHTS),
    "image not channels-last": (IDS, IMAGE.contiguous(), WEIGHTS),
    "image flipped axes": (IDS, IMAGE.transpose(2, 3).contiguous().transpose(2, 3), WEIGHTS),
    "one image for all": (IDS, IMAGE[:1].expand(3, 3, 6, 5), WEIGHTS),
    "weights with gaps": (IDS, IMAGE, GAPS),
    "one weight": (IDS, IMAGE, torch.tensor(0.25).expand(7)),
    "negated by a bit": (IDS, IMAGE, COMPLEX.conj().imag),
    "parameter": (IDS, IMAGE, nn.Parameter(WEIGHTS)),
}


@pytest.mark.parametrize("case", ODD)
def test_inputs_in_any_memory_give_the_live_models_rows(opened: Package, adapter: Path, case: str) -> None:
    assert_close(opened(*ODD[case], True), live(adapter, *ODD[case]))


def test_inputs_made_in_inference_mode(opened: Package, adapter: Path) -> None:
    with torch.inference_mode():
        ids = IDS.t().contiguous().t() + 0
    torch.testing.assert_close(opened(ids, IMAGE, WEIGHTS, True), live(adapter, IDS, IMAGE, WEIGHTS))


def test_threads_with_inputs_that_are_copied(opened: Package, adapter: Path) -> None:
    """Copies freed while the program runs would wait for the interpreter's lock, and its holder for the program."""
    wanted, wrong = live(adapter, IDS, IMAGE, WEIGHTS), []

    def run() -> None:
        for _ in range(300):
            found = opened(*ODD["transposed ids"][:1], IMAGE.contiguous(), GAPS, True)
            if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
                wrong.append(found)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


LARGE = """
import sys, torch, fxpeft
package = fxpeft.open_package(sys.argv[1])
package.load_adapter(sys.argv[2])
batch, length = 2000, 1500
generator = torch.Generator().manual_seed(1)
row = torch.randint(0, 4001, (1, length), generator=generator)
ids = {"expanded": row.expand(batch, length), "transposed": row.repeat(batch, 1).t().contiguous().t()}
image = torch.randn(batch, 3, 6, 5, generator=generator)
for name, each in ids.items():
    out = package(each, image, torch.rand(2 * batch + 1, generator=torch.Generator().manual_seed(3)), True)
    wanted = package(each.contiguous(), image.contiguous(memory_format=torch.channels_last),
                     torch.rand(2 * batch + 1, generator=torch.Generator().manual_seed(3)), True)
    assert torch.equal(out, wanted), name
print("equal")
"""


@pytest.mark.slow
def test_large_inputs_do_not_crash_the_process(adapter: Path) -> None:
    """An expanded row of 12 kB read as 24 MB ends outside of the process's memory; hence a process of its own."""
    done = python("-c", LARGE, packaged(), adapter, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "equal"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (inputs(1), r"input ids: expected int64 \[2..5000, 2..3000\], found int64 \[1, 4\]"),
        ((IDS, IMAGE[:2], WEIGHTS), r"input image: expected float32 \[2..5000, 3, 6, 5\], found float32 \[2, 3"),
        ((IDS, IMAGE, WEIGHTS[:6]), r"input weights: expected float32 \[2\*s\d+ \+ 1 in 5..10001\], found .* \[6\]"),
        ((IDS, IMAGE, WEIGHTS[:5]), r"input weights: .* found float32 \[5\]"),
        ((IDS.float(), IMAGE, WEIGHTS), r"input ids: expected int64 .* found float32"),
        ((IDS, IMAGE, WEIGHTS.double()), r"input weights: .* found float64"),
        ((IDS.to("meta"), IMAGE, WEIGHTS), r"input ids: .* found int64 \[3, 4\] on meta"),
        ((IDS[0], IMAGE, WEIGHTS), r"input ids: .* found int64 \[4\]"),
        ((IDS, IMAGE, WEIGHTS.to_sparse()), r"input weights: expected a dense torch.Tensor, found Tensor of layout sp"),
        ((IDS, IMAGE), "expected arguments like"),
    ],
)  # fmt: skip
def test_what_it_was_not_exported_for_is_refused(opened: Package, args: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        opened(*args, *[True] * (len(args) == 3))


def test_a_flag_has_the_one_value_that_was_compiled(opened: Package) -> None:
    with pytest.raises(AdapterError, match="argument 3: it was exported for True alone, found False"):
        opened(IDS, IMAGE, WEIGHTS, False)


def test_a_tensor_of_another_class_is_refused(opened: Package) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(WEIGHTS)
    with pytest.raises(AdapterError, match=r"expected a dense torch.Tensor, found FakeTensor"):
        opened(IDS, IMAGE, fake, True)


def test_off_is_exact_for_inf(opened: Package, adapter: Path) -> None:
    weights = WEIGHTS.clone()
    weights[2] = torch.inf
    image = IMAGE.clone()
    image[1] = torch.inf
    opened.disable()
    with torch.no_grad():
        wanted = net()(IDS, image, weights)
    found = opened(IDS, image, weights, True)
    assert wanted.isinf().any()
    assert_close(found, wanted)


# --- the file ---


def test_no_code_of_a_file_without_a_manifest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.export.pt2_archive import _package

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(_package, "load_pt2", load)
    for number, (member, text, message) in enumerate((
        ("net/extra/other.json", "{}", "expected fxpeft.json and a compiled model in it"),
        (f"net/extra/{MANIFEST}", "[]", "fxpeft.json is damaged"),
        (f"net/extra/{MANIFEST}", "{", "fxpeft.json is damaged"),
        (f"net/extra/{MANIFEST}", '{"version": 99}', "expected manifest version 1, found 99"),
        (f"net/extra/{MANIFEST}", '{"version": 1, "rank": 3}', "fxpeft.json is damaged: it lacks device, fingerprint"),
    )):  # fmt: skip
        path = tmp_path / f"{number}.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, text)
        with pytest.raises(AdapterError, match=message):
            fxpeft.open_package(path)


def test_a_package_of_before_serves_as_before(tmp_path: Path, adapter: Path) -> None:
    """Its manifest says nothing of memory, devices and flags."""
    old = tmp_path / "old.pt2"
    with zipfile.ZipFile(packaged()) as archive, zipfile.ZipFile(old, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith(MANIFEST):
                manifest = json.loads(content)
                del manifest["constants"]
                for each in manifest["inputs"]:
                    for field in ("order", "device", "written"):
                        del each[field]
                content = json.dumps(manifest).encode()
            copy.writestr(name, content)
    package = fxpeft.open_package(old)
    package.load_adapter(adapter)
    torch.testing.assert_close(package(IDS, IMAGE, WEIGHTS, True), live(adapter, IDS, IMAGE, WEIGHTS))


def test_sizes_that_depend_on_each_other() -> None:
    """Sums are written down and checked; a product can't be, and is refused before anything is compiled."""

    class Both(nn.Module):
        def __init__(self, product: bool) -> None:
            super().__init__()
            self.product = product

        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return x.flatten() + z if self.product else torch.cat([x[:, 0], y, y]) + z

    dims = [{0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO}, {0: Dim.AUTO}]
    x, y = torch.randn(4, 3), torch.randn(5)
    program = torch.export.export(Both(False), (x, y, torch.randn(14)), dynamic_shapes=dims, strict=False)
    manifest = describe(program)
    assert sorted(manifest["inputs"][2]["shape"][0]["terms"].values()) == [1, 2]
    assert len(fit(manifest, (x[:2], y[:3], torch.randn(8)), "p")) == 3
    for size in (7, 9):
        with pytest.raises(AdapterError, match=rf"input z: expected float32 \[.* \+ .* found float32 \[{size}\]"):
            fit(manifest, (x[:2], y[:3], torch.randn(size)), "p")
    program = torch.export.export(Both(True), (x, y, torch.randn(12)), dynamic_shapes=dims, strict=False)
    with pytest.raises(AdapterError, match=r"input z: its size s\d+\*s\d+ is no sum of other sizes"):
        describe(program)


def test_an_input_that_the_program_writes_to_is_not_copied() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x[1:].add_(1)
            return x * 2

    x = torch.randn(3, 4)
    manifest = describe(torch.export.export(Writes(), (x,), strict=False))
    assert fit(manifest, (x,), "p")[0].data_ptr() == x.data_ptr()
    with pytest.raises(AdapterError, match="input x: the program writes to it"):
        fit(manifest, (torch.randn(4, 3).t(),), "p")


@pytest.mark.slow
def test_a_killed_packaging_is_swept_and_links_stay(tmp_path: Path) -> None:
    from fxpeft import files

    store, link = tmp_path / "store", tmp_path / "net.pt2"
    store.mkdir()
    (store / "blob.pt2").write_bytes(b"old")
    (store / "blob.pt2").chmod(0o640)
    (store / f".unfinished-{'a' * 16}-blob.pt2").write_bytes(b"half")
    link.symlink_to(store / "blob.pt2")
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    fxpeft.package(model, link, (torch.ones(2, 3),), max_rank=2, rank="static")
    assert link.is_symlink()
    assert [p.name for p in store.iterdir()] == ["blob.pt2"]
    assert (store / "blob.pt2").stat().st_mode & 0o777 == 0o640
    assert not files.unfinished(link)
    x = torch.randn(2, 3)
    torch.testing.assert_close(fxpeft.open_package(link)(x), model(x).detach())
