"""The C++ host of the examples runs a package and swaps adapters in it, without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from adapter_files import save
from closeness import assert_close
from safetensors.torch import save_file
from test_packaging import CALL, CONFIGS, IDS, SHIFT, live, net, packaged

import fxpeft

SOURCE = Path(__file__).parents[2] / "examples" / "cpp" / "host.cpp"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the C++ host")
def test_the_host_computes_what_the_live_model_does(tmp_path: Path) -> None:
    root = Path(torch.__path__[0])
    build = [
        "g++", "-std=c++20", "-O0", str(SOURCE), "-o", str(tmp_path / "host"), f"-I{root}/include",
        f"-I{root}/include/torch/csrc/api/include", f"-L{root}/lib", "-ltorch", "-ltorch_cpu", "-lc10",
        f"-Wl,-rpath,{root}/lib", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]  # fmt: skip
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    package = packaged()
    for file, reach in {
        "inputs": torch.ones(IDS.shape, dtype=torch.bool),
        "invoked": fxpeft.invoked(IDS, CALL),
    }.items():
        save_file({"0": IDS, "1": SHIFT, "2": reach}, tmp_path / f"{file}.safetensors")
    opened = fxpeft.open_package(package)
    wanted = {}
    for name in ("lora", "ia3", "full", "alora"):
        folder = Path(save(net(), CONFIGS[name], tmp_path / name))
        opened.hotswap(folder)
        opened.save_slots(tmp_path / f"{name}.safetensors")
        wanted[name] = live(folder)
    files = [str(tmp_path / f"{name}.safetensors") for name in wanted]
    for inputs, slots in {"inputs": files[:3], "invoked": files[3:]}.items():
        run = subprocess.run(
            [str(tmp_path / "host"), str(package), str(tmp_path / f"{inputs}.safetensors"), *slots],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("tensors swapped in") == len(slots)
    for name, expected in wanted.items():
        raw = bytearray((tmp_path / f"{name}.safetensors.out").read_bytes())
        output = torch.frombuffer(raw, dtype=torch.float32).view(expected.shape)
        assert_close(output, expected)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(files[0]).read_bytes()[:-100])
    run = subprocess.run(
        [str(tmp_path / "host"), str(package), str(tmp_path / "inputs.safetensors"), str(cut)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "cut short" in run.stderr
