"""``TORCH_LOGS=recompiles`` prints nothing over a whole matrix of swaps, and does print where something recompiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch, fxpeft
from adapter_files import add
from block_nets import TARGETS, inputs, net
from closeness import assert_close

LORA = dict(lora_alpha=7, target_modules=["query"])
CONFIGS = {{
    "lora": fxpeft.LoraConfig(r=3, **LORA),
    "one": fxpeft.LoraConfig(r=1, **LORA),
    "largest": fxpeft.LoraConfig(r=8, lora_alpha=2, target_modules=TARGETS),
    "patterns": fxpeft.LoraConfig(
        r=2, target_modules=["out", "value"], rank_pattern={{"0.out": 5}}, alpha_pattern={{"out": 3}}
    ),
    "biased": fxpeft.LoraConfig(r=2, lora_bias=True, **LORA),
    "dora": fxpeft.LoraConfig(r=4, use_dora=True, **LORA),
    "gains": fxpeft.IA3Config(target_modules=["query", "out"], feedforward_modules=["out"]),
    "adaptive": fxpeft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["value"]),
}}

def swap(compiler, slots=True):
    torch._dynamo.reset()
    model, x = net(), inputs()
    for seed, (name, config) in enumerate(CONFIGS.items()):
        add(model, config, name, seed)
    if slots:
        methods = ("lora", "lora_bias", "dora", "ia3", "adalora")
        fxpeft.prepare_hotswap(model, 8, targets=TARGETS, methods=methods)
    compiled = compiler(model)

    def check():
        with torch.no_grad():
            found = compiled(x)
            assert_close(found, model(x))
            return found

    swaps, seen = 0, []
    for name in (*CONFIGS, *reversed(CONFIGS)):
        fxpeft.set_adapter(model, name)
        seen.append(check())
        if name not in ("gains",):
            fxpeft.set_scale(model, name, 0.5)
            check()
            fxpeft.set_scale(model, name, 1.0)
        with fxpeft.disabled(model):
            check()
        check()
        swaps += 4
        if not slots and swaps > 8:
            return
    fxpeft.add_weighted_adapter(model, ["lora", "one"], [0.7, -0.3], "blend", combination_type="cat")
    for names in (["blend"], ["lora", "patterns"], ["patterns", "lora", "one"], []):
        fxpeft.set_adapter(model, names)
        check()
    fxpeft.hotswap(model, fxpeft.adapter_state_dict(model, "largest"), "lora", config=CONFIGS["largest"])
    fxpeft.delete_adapter(model, "one")
    fxpeft.set_adapter(model, "lora")
    check()
    with fxpeft.folded(model):
        check()
    check()
    assert len({{round(float(each.sum()), 3) for each in seen}}) == len(CONFIGS)  # each is another

for name, work in {{
    "torch.compile": lambda: swap(torch.compile),
    "fxpeft.compile": lambda: swap(fxpeft.compile),
    "without slots": lambda: swap(lambda m: torch.compile(m, backend="eager"), slots=False),
}}.items():
    print("<<<", name, file=sys.stderr, flush=True)
    work()
"""


@pytest.fixture(scope="module")
def logs() -> dict[str, str]:
    """What torch told while each way was swapped, all in one process that starts with its logs on."""
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    environment = {**os.environ, "TORCH_LOGS": "recompiles,recompiles_verbose,graph_breaks"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = done.stderr.split("<<< ")[1:]
    return {name: told for name, _, told in (part.partition("\n") for part in parts)}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["torch.compile", "fxpeft.compile"])
def test_a_whole_matrix_of_swaps_is_silent(compiler: str, logs: dict[str, str]) -> None:
    assert not [line for line in logs[compiler].splitlines() if "ecompil" in line or "raph break" in line]


def test_without_slots_the_same_swaps_are_told(logs: dict[str, str]) -> None:
    """The proof that the logs would speak."""
    assert "Recompiling function" in logs["without slots"]
