"""1,200 mutated adapter folders, seeded: each loads, or is refused by an error that left everything as it was."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Layer, randomise
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.passes.base import PassError
from fxpeft.tools.cli import app

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ODD: list[str] = [
    "1e400",
    "-1e400",
    "NaN",
    "1" + "0" * 400,
    "9" * 5000,
    "-1",
    "0",
    "8.0",
    "0.5",
    "true",
    "false",
    "null",
    '""',
    '"x"',
    '"("',
    '"(?:.|[a-z])*(?:[XY]|Z)"',
    '"name:*a*a*a*a*a*Z"',
    r'"\ud800"',
    "[]",
    "[1]",
    '["x", null]',
    '["up", "up"]',
    "[[[[]]]]",
    "[" * 5000 + "]" * 5000,
    "{}",
    '{"a": 1}',
    '{"up": 3}',
    '{"up": -1}',
    '{"(": 1}',
    '{"a": {"b": 1e999}}',
    '"all-linear"',
    '".*"',
    '"' + "y" * 50_000 + '"',
    json.dumps(["x"] * 20_000),
    '["bias"]',
    '"lora_only"',
    '"all"',
    '"pissa"',
    '"loftq"',
    '"eva"',
    '"SEQ_CLS"',
    '"IA3"',
    '"ADALORA"',
    '"PREFIX_TUNING"',
    "3",
    "1000000000000",
    '["down"]',
    '"re:up"',
    '"kind:linear"',
]
DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.bool,
    torch.uint16,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


class Net(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Layer(), Layer()]), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``: a model; ``net`` and ``llama``: adapters of the two; ``other`` and ``plain``: two more of ``net``."""
    root = tmp_path_factory.mktemp("mutated")
    llama().save_pretrained(root / "base")
    adapters: list[tuple[str, nn.Module, LoraConfig]] = [
        (
            "net",
            net(),
            LoraConfig(
                r=3,
                lora_alpha=5,
                target_modules=["up", "down"],
                rank_pattern={r"layers\.0\.up": 2},
                alpha_pattern={"down": 7},
                modules_to_save=["head"],
            ),
        ),
        ("other", net(), LoraConfig(r=2, lora_alpha=9, target_modules=["up"], modules_to_save=["head"])),
        (
            "llama",
            llama(),
            LoraConfig(
                r=3, lora_alpha=4, target_modules=["q_proj", "up_proj"], base_model_name_or_path=str(root / "base")
            ),
        ),
        ("plain", net(), LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], rank_pattern={"0.up": 2})),
    ]
    for seed, (name, model, config) in enumerate(adapters):
        fxpeft.add_adapter(model, config)
        randomise(fxpeft.adapter_state_dict(model).values(), seed=seed)
        fxpeft.save_adapter(model, root / name)
    return root


# --- mutations: each changes a copy of a good folder ---


def flipped(folder: Path, source: random.Random) -> None:
    path = folder / source.choice([CONFIG, WEIGHTS, WEIGHTS])
    data = bytearray(path.read_bytes())
    for _ in range(source.choice([1, 1, 2, 8])):
        data[source.randrange(min(len(data), source.choice([16, 400, len(data)])))] = source.randrange(256)
    path.write_bytes(data)


def cut(folder: Path, source: random.Random) -> None:
    path = folder / source.choice([CONFIG, WEIGHTS])
    data = path.read_bytes()
    path.write_bytes(source.choice([data[: source.randrange(len(data))], data + b"x" * source.randrange(1, 99), b""]))


def header(folder: Path, source: random.Random) -> None:
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    content = json.loads(data[8 : 8 + size])
    key = source.choice([k for k in content if k != "__metadata__"])
    entry = content[key]
    match source.randrange(7):
        case 0:
            entry["dtype"] = source.choice(["F64", "I8", "BOOL", "F8_E4M3", "C64", "F4", "X", 3, None])
        case 1:
            entry["shape"] = source.choice(
                [[], [0], [-1, 6], entry["shape"][::-1], [2**40, 2**40], [*entry["shape"], 1], "x"]
            )
        case 2:
            entry["data_offsets"] = source.choice([[0, 0], [-4, 0], [10**18, 10**18 + 8], [8, 4], None, [0]])
        case 3:
            content[source.choice(["", "x", key + ".x", "base_model.model.head.other", "y" * 3000, "\u0000"])] = (
                content.pop(key)
            )
        case 4:
            content["__metadata__"] = source.choice([{"a": 1}, [], "x", {"format": "tf"}, {"fxpeft_config": "x"}, {}])
        case 5:
            del content[key]
        case 6:
            content[key] = source.choice([None, [], 3, {}])
    text = json.dumps(content).encode()
    length = len(text) if source.random() < 0.85 else source.choice([0, 2**63, len(text) + 8, len(text) - 1])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + text + data[8 + size :])


def tensors(folder: Path, source: random.Random) -> None:
    held = load_file(folder / WEIGHTS)
    key = source.choice(sorted(held))
    value = held[key]
    match source.randrange(6):
        case 0:
            held[key] = value.to(source.choice(DTYPES))
        case 1:
            dtype = source.choice(DTYPES)
            held = {k: v.to(dtype) for k, v in held.items()}
        case 2:
            held[key] = source.choice(
                [
                    value.flatten(),
                    value[:0],
                    value[0],
                    value.t() if value.ndim == 2 else value,
                    value[:1],
                    torch.ones(()),
                    value.expand(2, *value.shape),
                ]
            )
        case 3:
            renames = [
                key + ".weight",
                key.replace("lora_A", "lora_B"),
                key.replace("layers.0", "layers.7"),
                key.lower(),
                "",
                key.replace("base_model.model.", ""),
                key.replace("lora_A", "lora_E"),
                f"base_model.model.{key}",
            ]
            held[source.choice(renames)] = held.pop(key)
        case 4:
            del held[key]
        case 5:
            held[key] = value.clone().fill_(source.choice([float("nan"), float("inf"), 1e38, 0.0]))
    save_file({k: v.contiguous().clone() for k, v in held.items()}, folder / WEIGHTS, {"format": "pt"})


def field(folder: Path, source: random.Random) -> None:
    values = json.loads((folder / CONFIG).read_text())
    name = source.choice([*sorted(values), "sparkles", "use_sparkles", "layers"])
    text = json.dumps({k: v for k, v in values.items() if k != name})
    written = f'{text[:-1]}, "{name}": {source.choice(ODD)}}}' if source.random() < 0.97 else text
    (folder / CONFIG).write_text(written, encoding="utf-8")


def place(folder: Path, source: random.Random) -> None:
    path = folder / source.choice([CONFIG, WEIGHTS])
    path.unlink()
    match source.randrange(5):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(source.choice(["nothing", "/dev/zero", "/dev/null", path.name, "."]))
        case 3:
            path.symlink_to(folder / source.choice([CONFIG, WEIGHTS]))
        case 4:
            path.write_text(source.choice(["null", "[]", "{}", "3", '{"peft_type": []}', '{"peft_type": "LORA"}']))


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    flipped,
    cut,
    header,
    header,
    tensors,
    tensors,
    field,
    field,
    field,
    place,
]


# --- what is asked of a mutated folder ---


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(X).clone()  # type: ignore[no-any-return]


class Asked:
    """One model of each sort, asked again and again; every question leaves it as it found it, or raises."""

    def __init__(self, root: Path) -> None:
        self.root, self.bare, self.live, self.prepared = root, net(), net(), net()
        fxpeft.load_adapter(self.live, root / "other", "first")
        fxpeft.prepare_hotswap(self.prepared, 8, targets=["up", "down"], modules_to_save=["head"])
        fxpeft.load_adapter(self.prepared, root / "other")
        self.before = {m: output(m) for m in (self.bare, self.live, self.prepared)}

    def unchanged(self) -> None:
        for model, before in self.before.items():
            assert torch.equal(output(model), before)
        assert "_fxpeft" not in vars(self.bare)
        assert fxpeft.active_adapters(self.live) == ["first"]
        for model in (self.live, self.prepared):
            assert fxpeft.adapter_config(model).lora_alpha == 9  # type: ignore[attr-defined]

    def load(self, folder: Path, source: random.Random) -> None:
        fxpeft.load_adapter(self.bare, folder, check_finite=source.random() < 0.3)
        fxpeft.remove(self.bare)

    def load_beside(self, folder: Path, source: random.Random) -> None:
        fxpeft.load_adapter(self.live, folder, "second")
        fxpeft.delete_adapter(self.live, "second")
        fxpeft.set_adapter(self.live, "first")

    def hotswap(self, folder: Path, source: random.Random) -> None:
        fxpeft.hotswap(self.prepared, folder)
        output(self.prepared)
        fxpeft.hotswap(self.prepared, self.root / "other")

    def command(self, *arguments: object) -> None:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception

    def inspect(self, folder: Path, source: random.Random) -> None:
        self.command("inspect", folder, "--json")

    def diff(self, folder: Path, source: random.Random) -> None:
        self.command("diff", *source.sample([folder, self.root / "net"], 2))

    def convert(self, folder: Path, source: random.Random) -> None:
        out = folder.with_name("out")
        options = source.choice([("--rank", 1), ("--rank", 2, "--dtype", "float16"), ("--dtype", "bfloat16")])
        try:
            self.command("convert", folder, out, *options)
        except AdapterError:
            assert not out.exists()
            raise
        fxpeft.checkpoint.read(out)
        shutil.rmtree(out)

    def check(self, folder: Path, source: random.Random) -> None:
        self.command("check", folder, "--model", self.root / "base", "--json")

    def fold(self, folder: Path, source: random.Random) -> None:
        out = folder.with_name("folded")
        try:
            self.command("fold", folder, out, "--model", self.root / "base")
        except AdapterError:
            assert not out.exists()
            raise
        shutil.rmtree(out)

    def to_lora(self, folder: Path, source: random.Random) -> None:
        out = folder.with_name("lora")
        self.command("convert", folder, out, "--to", "lora", "--model", self.root / "base")
        shutil.rmtree(out)


OFTEN = [("load", 22), ("load_beside", 14), ("hotswap", 30), ("inspect", 10), ("diff", 10), ("convert", 11)]
SELDOM = [("check", 7), ("fold", 2), ("to_lora", 1)]  # each makes or loads a model of transformers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(6))
def test_mutated_files(root: Path, tmp_path: Path, part: int) -> None:
    """200 in each part."""
    source, asked, refused, slow = random.Random(part), Asked(root), 0, []
    names = [name for name, _ in OFTEN + SELDOM]
    weights = [weight for _, weight in OFTEN + SELDOM]
    for number in range(200):
        what = source.choices(names, weights)[0]
        folder = tmp_path / f"{number}"
        shutil.copytree(root / ("net" if what in dict(OFTEN) else "llama"), folder)
        mutation = source.choice(MUTATIONS)
        mutation(folder, source)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                getattr(asked, what)(folder, source)
        except (AdapterError, PassError):
            refused += 1
        except BaseException as error:
            raise AssertionError(f"part {part}, file {number}: {mutation.__name__}, {what}: {error!r}") from error
        if (took := time.perf_counter() - start) > 5:
            slow.append((number, mutation.__name__, what, took))
        asked.unchanged()
    assert not slow
    assert 80 < refused < 192


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_and_a_package(root: Path, tmp_path: Path) -> None:
    path = fxpeft.package(net(), tmp_path / "net.pt2", (X,), max_rank=8, targets=["up", "down"])
    served, source, refused = fxpeft.open_package(path), random.Random(8), 0
    served.load_adapter(root / "plain", "mine")
    before = served(X).clone()
    for number in range(150):
        folder = tmp_path / f"{number}"
        shutil.copytree(root / "plain", folder)
        mutation = source.choice(MUTATIONS)
        mutation(folder, source)
        start = time.perf_counter()
        try:
            served.hotswap(folder)
        except AdapterError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"file {number}: {mutation.__name__}: {error!r}") from error
        else:
            served.hotswap(root / "plain")
        assert time.perf_counter() - start < 5
        assert torch.equal(served(X), before)
    assert 60 < refused < 145
