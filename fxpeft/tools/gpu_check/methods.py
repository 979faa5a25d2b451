"""Each method's slots against its own training subgraph, in float32 and in half precision."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fxpeft
from fxpeft.methods.config import AdapterConfig
from fxpeft.tools.gpu_check.check import Check, Setting
from fxpeft.tools.gpu_check.compare import TOLERANCE, Outputs
from fxpeft.tools.gpu_check.models import ALL, MAX_RANK, llama, randomise, served

TARGETS = ["q_proj", "v_proj", "down_proj"]
VIRTUAL = 5
HALVED = (torch.float32, torch.bfloat16)
LORA = {"r": 6, "lora_alpha": 9, "target_modules": TARGETS, "rank_pattern": {"down_proj": 11}}


def _lora(**values: Any) -> AdapterConfig:
    return fxpeft.LoraConfig(**{**LORA, **values})


INVOCATION = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(1))[0, 5:7].tolist()

# what the slots are declared for -> a config of it
CASES: dict[str, Callable[[], AdapterConfig]] = {
    "lora": partial(_lora, use_rslora=True),
    "lora_bias": partial(_lora, lora_bias=True),
    "dora": partial(_lora, use_dora=True),
    "alora": partial(_lora, alora_invocation_tokens=INVOCATION),
    "adalora": lambda: fxpeft.AdaLoraConfig(init_r=6, lora_alpha=9, total_step=9, target_modules=TARGETS),
    "ia3": lambda: fxpeft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt_tuning": lambda: fxpeft.PromptTuningConfig(num_virtual_tokens=VIRTUAL),
    "p_tuning": lambda: fxpeft.PromptEncoderConfig(num_virtual_tokens=VIRTUAL, encoder_hidden_size=24),
    "multitask_prompt_tuning": lambda: fxpeft.MultitaskPromptTuningConfig(num_virtual_tokens=VIRTUAL),
    "cpt": lambda: fxpeft.CPTConfig(cpt_token_ids=list(range(VIRTUAL)), opt_projection_format_epsilon=9.0),
    "prefix_tuning": lambda: fxpeft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL),
    "cartridge": lambda: fxpeft.CartridgeConfig(num_virtual_tokens=VIRTUAL),
    "loha": lambda: fxpeft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "lokr": lambda: fxpeft.LoKrConfig(r=3, alpha=5, decompose_factor=4, target_modules=TARGETS),
    "vera": lambda: fxpeft.VeraConfig(r=12, d_initial=3.0, target_modules=TARGETS),
    "miss": lambda: fxpeft.MissConfig(r=6, target_modules=TARGETS),
    "vblora": lambda: fxpeft.VBLoRAConfig(r=4, num_vectors=9, vector_length=4, target_modules=TARGETS),
    "delora": lambda: fxpeft.DeloraConfig(r=6, target_modules=TARGETS),
    "miss_bat": lambda: fxpeft.MissConfig(r=8, init_weights="bat", target_modules=["v_proj"]),
    "beft": lambda: fxpeft.BeftConfig(target_modules=TARGETS),
    "gralora": lambda: fxpeft.GraloraConfig(r=4, hybrid_r=2, target_modules=TARGETS),
    "deft": lambda: fxpeft.DeftConfig(r=6, decomposition_method="qr", target_modules=TARGETS),
    "hira": lambda: fxpeft.HiraConfig(r=6, init_weights=False, target_modules=TARGETS),
    "c3a": lambda: fxpeft.C3AConfig(block_size=8, init_weights="gaussian", target_modules=TARGETS),
    "fourierft": lambda: fxpeft.FourierFTConfig(n_frequency=60, target_modules=["v_proj"]),
    "psoft": lambda: fxpeft.PsoftConfig(r=6, target_modules=TARGETS),
    "pvera": lambda: fxpeft.PveraConfig(r=12, d_initial=3.0, target_modules=TARGETS),
    "tinylora": lambda: fxpeft.TinyLoraConfig(r=4, u=9, weight_tying=0.5, target_modules=TARGETS),
    "unilora": lambda: fxpeft.UniLoraConfig(r=6, theta_d_length=8192, init_theta_d_bound=0.4, target_modules=TARGETS),
    "adamss": lambda: fxpeft.AdamssConfig(r=12, subspace_rank=2, target_modules=TARGETS),
    "shira": lambda: fxpeft.ShiraConfig(r=2, target_modules=["v_proj"]),
    "supertuning": lambda: fxpeft.SupertuningConfig(sparsity=0.9, r=3, target_modules=["v_proj"]),
    "randlora": lambda: fxpeft.RandLoraConfig(r=8, randlora_alpha=8, target_modules=["v_proj"]),
    "road": lambda: fxpeft.RoadConfig(group_size=8, target_modules=["v_proj"]),
    "waveft": lambda: fxpeft.WaveFTConfig(n_frequency=60, wavelet_family="db3", target_modules=["v_proj"]),
    "glora": lambda: fxpeft.GloraConfig(r=4, target_modules=["v_proj"]),
    "osf": lambda: fxpeft.OSFConfig(effective_rank=0.9, target_modules=["v_proj"]),
    "hra": lambda: fxpeft.HRAConfig(r=6, target_modules=TARGETS),
    "oft": lambda: fxpeft.OFTConfig(oft_block_size=16, target_modules=TARGETS),
    "boft": lambda: fxpeft.BOFTConfig(boft_n_butterfly_factor=2, target_modules=TARGETS),
    "ln_tuning": fxpeft.LNTuningConfig,
    "trainable_tokens": lambda: fxpeft.TrainableTokensConfig(token_indices=[7, 10, 22]),
}
PROMPTS = ("prompt_tuning", "p_tuning", "multitask_prompt_tuning", "cpt", "prefix_tuning", "cartridge")
# their updates are of full rank
WHOLE = ("miss_bat", "hira", "c3a", "fourierft", "shira", "supertuning", "randlora", "road", "waveft", "glora", "osf")
WITHOUT_SITES = (*PROMPTS, "ln_tuning", "trainable_tokens")


def prepared_for(name: str) -> dict[str, Any]:
    """Arguments of ``prepare_hotswap`` for a method."""
    targets = None if name in WITHOUT_SITES else ALL
    own: dict[str, Any] = {"num_virtual_tokens": VIRTUAL} if name in PROMPTS else {}
    own |= {"max_block": 16} if name in ("oft", "boft") else {"max_rank": 512} if name in WHOLE else {}
    own |= {"lokr_factor": 4} if name == "lokr" else {}
    return {"targets": targets, **own}


def method(setting: Setting, name: str) -> dict[str, Any]:
    """Two adapters of one method and "off", swapped in slots."""
    seen: dict[str, Any] = {}
    for dtype in HALVED:
        configs = {"first": CASES[name](), "second": CASES[name]()}
        make = partial(llama, setting, dtype)
        with served(setting, configs, make=make, methods=(name,), prepare=prepared_for(name)) as each:
            each.walk(each.model, rounds=1)
            seen[f"error in {str(dtype).removeprefix('torch.')}"] = f"{each.outputs.worst:.1g}"
    return seen


class Layers(nn.Module):
    """The other kinds of targets in a row: an embedding, transformers' Conv1D, convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv1d = nn.Embedding(50, 48), Conv1D(36, 48)  # type: ignore[no-untyped-call]
        self.line = nn.Conv1d(36, 24, 3, padding=1)
        self.plane, self.space = nn.Conv2d(4, 6, (3, 2), stride=(1, 2)), nn.Conv3d(1, 3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Takes ``[batch, 16]``."""
        h = self.conv1d(self.embedding(ids) * 3).tanh()  # [batch, 16, 36]
        h = self.line(h.transpose(1, 2)).tanh()  # [batch, 24, 16]
        h = self.plane(h.reshape(-1, 4, 6, 16) * 3).tanh()  # [batch, 6, 4, 8]
        return self.space(h.unsqueeze(1) * 3).flatten(1)  # type: ignore[no-any-return]


@torch.no_grad()
def layers(setting: Setting) -> dict[str, Any]:
    """LoRA and DoRA at the targets that a Llama has none of."""
    seen: dict[str, Any] = {}
    targets = ["embedding", "conv1d", "line", "plane", "space"]
    ids = torch.randint(1, 50, (3, 16), generator=torch.Generator().manual_seed(1)).to(setting.device)
    for dtype in HALVED:

        def make(dtype: torch.dtype = dtype) -> Layers:
            torch.manual_seed(0)
            return Layers().to(setting.device, dtype).eval().requires_grad_(False)

        with tempfile.TemporaryDirectory(prefix="fxpeft-gpu-check-") as root:
            model, wanted = make(), {"off": make()(ids)}
            fxpeft.prepare_hotswap(model, MAX_RANK, targets=targets, methods=("lora", "dora"))
            for seed, dora in enumerate((False, True)):
                one, name = make(), "dora" if dora else "lora"
                config = fxpeft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=dora)
                fxpeft.add_adapter(one, config)
                with torch.enable_grad():
                    randomise(one, seed)
                wanted[name] = one(ids)
                fxpeft.save_adapter(one, Path(root, name))
                fxpeft.load_adapter(model, Path(root, name), name)
            outputs = Outputs(wanted, TOLERANCE[dtype])
            for name in ("lora", "dora", "lora"):
                fxpeft.set_adapter(model, name)
                outputs.expect(model(ids), name, name)
            fxpeft.disable_adapters(model)
            outputs.expect(model(ids), "off", "off")
            seen[f"error in {str(dtype).removeprefix('torch.')}"] = f"{outputs.worst:.1g}"
    return seen


CHECKS = (
    *(
        Check(
            f"method-{name.replace('_', '-')}",
            f"Slots declared for `{name}` give what its training subgraph gives, in float32 and half precision.",
            partial(method, name=name),
        )
        for name in CASES
    ),
    Check("layers", "Embeddings, Conv1D and convolutions in slots give what their training subgraphs give.", layers),
)
