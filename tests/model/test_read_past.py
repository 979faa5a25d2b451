"""Modules whose weight is read and that nothing calls: an adapter there would do nothing, whoever reads them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from beside import peft_file, peft_reads
from closeness import assert_close
from families import DECODER, FAMILIES
from safetensors.torch import load_file
from tiny import randomise, token_ids
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.integrations.transformers import install, uninstall
from fxpeft.model.reads import idle, read_past

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


class Owner(nn.Module):
    """What every owner below has: ``used`` is always called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.proj = nn.Linear(6, 5), nn.Linear(5, 7)
        self.many = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 7)])
        self.plain = True


class Direct(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.used(x), self.proj.weight, self.proj.bias)


class Alias(Owner):
    def forward(self, x: Tensor) -> Tensor:
        proj = self.proj
        weight = proj.weight
        return self.used(x) @ weight.t() + proj.bias


class Method(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.used(x))

    def project(self, x: Tensor) -> Tensor:
        """Named by the forward."""
        return x @ self.transposed

    @property
    def transposed(self) -> Tensor:
        """Named by the method."""
        return getattr(self, "proj").weight.t()  # type: ignore[no-any-return]  # noqa: B009


class Super(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Loop(Owner):
    def forward(self, x: Tensor) -> Tensor:
        x = self.used(x)
        for i, layer in enumerate(self.many):
            x = F.linear(x, layer.weight) + i  # type: ignore[arg-type]
        return x


class Item(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.used(x), self.many[0].weight), self.many[1].weight)  # type: ignore[arg-type]


class Above(nn.Module):
    """The reader is not the next module around."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.inner = nn.Linear(6, 5), nn.Module()
        self.inner.proj = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.used(x), self.inner.proj.weight)  # type: ignore[arg-type, union-attr]


READERS: list[tuple[type[nn.Module], list[str]]] = [
    (Direct, ["proj"]), (Alias, ["proj"]), (Method, ["proj"]), (Super, ["proj"]), (Loop, ["many.0", "many.1"]),
    (Item, ["many.0", "many.1"]), (Above, ["inner.proj"]),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "names"), READERS, ids=lambda value: getattr(value, "__name__", None))
def test_a_reader_is_found(cls: type[nn.Module], names: list[str]) -> None:
    model = cls()
    assert cls()(X).shape == (4, 7)
    for name in names:
        said = rf"{name}: {cls.__name__} reads this module's weight without calling it.*add it to exclude_modules"
        with pytest.raises(AdapterError, match=said):
            fxpeft.add_adapter(model, LoraConfig(target_modules=["used", name]))
        with pytest.raises(AdapterError, match=said):
            fxpeft.prepare_hotswap(model, 4, targets=["used", name])
        with pytest.raises(AdapterError, match=rf"{cls.__name__} reads it without calling its module"):
            fxpeft.add_adapter(model, LoraConfig(target_modules=[], target_parameters=[f"{name}.weight"]))
    plan = fxpeft.plan(model, LoraConfig(target_modules="all-linear"), roles=False)
    assert {site.name for site in plan.sites}.isdisjoint(names)
    reasons = {skip.site: skip.reason for skip in plan.skipped}
    assert all("without calling it" in reasons[name] for name in names)
    assert "without calling it" in str(plan)


class Asks(Owner):
    def forward(self, x: Tensor) -> Tensor:
        x = self.used(x)
        if x.dtype != self.proj.weight.dtype and isinstance(self.proj.weight, Tensor):
            x = x.to(self.proj.weight.dtype)
        return self.proj(x) if self.proj.bias is not None else x


class Either(Owner):
    def forward(self, x: Tensor) -> Tensor:
        x = self.used(x)
        return self.proj(x) if self.plain else F.linear(x, self.proj.weight)


class Tied(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.used(x)) @ self.proj.weight


class Handed(Owner):
    def forward(self, x: Tensor) -> Tensor:
        x = self.used(x) + self.proj.weight.sum() * 0
        for layer in (self.proj,):
            x = layer(x)
        return x


class Named(Owner):
    def forward(self, x: Tensor) -> Tensor:
        name = "pr" + "oj"
        return getattr(self, name)(self.used(x)) + self.proj.weight.sum()  # type: ignore[no-any-return]


class Start(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.used(x))

    def reset(self) -> None:
        """No part of the forward."""
        nn.init.zeros_(self.used.weight)


@pytest.mark.parametrize("cls", [Asks, Either, Tied, Handed, Named, Start], ids=lambda cls: cls.__name__)
def test_an_honest_site_is_taken(cls: type[nn.Module]) -> None:
    model = cls()
    before = model(X).detach()
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["used", "proj"]))
    randomise(fxpeft.adapter_state_dict(model).values())
    assert (model(X) - before).abs().max() > 0.1


def test_a_branch_that_reads_past_the_call_is_noted() -> None:
    plan = fxpeft.plan(Either(), LoraConfig(target_modules=["proj", "used"]), roles=False)
    assert [site.name for site in plan.sites] == ["used", "proj"]
    assert any("Either also reads the weight of proj without calling it" in note for note in plan.notes)


def test_a_forward_that_is_not_the_classes_own_is_not_judged_by_it() -> None:
    model = Direct()
    model.forward = lambda x: model.proj(model.used(x))  # type: ignore[method-assign]
    fxpeft.add_adapter(model, LoraConfig(target_modules=["proj"]))


def test_code_without_a_source_is_read_too() -> None:
    made: dict[str, Any] = {"Owner": Owner, "F": F}
    lines = {
        "Reads": "F.linear(self.used(x), self.proj.weight)",
        "Inside": "[F.linear(y, self.proj.weight) for y in [self.used(x)]][0]",
        "Calls": "self.proj(self.used(x)) + self.proj.weight.sum() * 0",
        "Hands": "(lambda proj: proj(self.used(x)) + self.proj.bias)(self.proj)",
    }
    for name, line in lines.items():
        exec(f"class {name}(Owner):\n    def forward(self, x):\n        return {line}\n", made)
        modules = dict(made[name]().named_modules())
        assert bool(idle("proj", modules)) == (name in ("Reads", "Inside"))
        assert idle("used", modules) is None


def mamba() -> tf.MambaForCausalLM:
    torch.manual_seed(0)
    config = tf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=4, time_step_rank=3)
    model = tf.MambaForCausalLM(config).eval()
    randomise(model.parameters(), scale=0.2, seed=3)
    return model


def siglip() -> tf.SiglipVisionModel:
    torch.manual_seed(0)
    config = tf.SiglipVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=16, patch_size=8
    )
    return tf.SiglipVisionModel(config).eval()


PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))}
FILES: dict[str, tuple[Callable[[], Any], dict[str, Tensor], Any, list[str]]] = {
    # model, its inputs, PEFT's targets, those that nothing calls
    "mamba": (mamba, {"input_ids": token_ids()}, ["in_proj", "dt_proj"], ["mixer.dt_proj"]),
    "siglip": (siglip, PIXELS, ["q_proj", "out_proj"], ["head.attention.out_proj"]),
    "siglip all-linear": (siglip, PIXELS, "all-linear", ["head.attention.out_proj"]),
}


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]  # type: ignore[no-any-return]


def bring(model: Any, folder: Path, way: str) -> None:
    """Load a folder's adapter in one of the ways that there are."""
    if way == "slots":
        fxpeft.prepare_hotswap(model, 8)
    if way == "inject":
        config = LoraConfig.from_dict(peft.LoraConfig.from_pretrained(str(folder)).to_dict())
        fxpeft.inject(model, load_file(folder / "adapter_model.safetensors"), config, "a")
    elif way == "transformers":
        install()
        try:
            model.load_adapter(str(folder), adapter_name="a")
        finally:
            uninstall()
    else:
        fxpeft.load_adapter(model, folder, "a")


@pytest.mark.parametrize("which", FILES)
@pytest.mark.parametrize("way", ["load", "slots", "inject", "transformers"])
def test_a_file_of_pefts_loads_without_what_does_nothing(which: str, way: str, tmp_path: Path) -> None:
    make, inputs, targets, dead = FILES[which]
    model = make()
    peft_file(model, tmp_path / "peft", target_modules=targets)
    theirs = peft_reads(model, tmp_path / "peft")
    expected = run(theirs, inputs)
    assert (expected - run(model, inputs)).abs().max() > 1e-3
    with pytest.warns(UserWarning, match=rf"left out\n.*{dead[0]}: 2 tensors; .* without calling it"):
        bring(model, tmp_path / "peft", way)
    assert_close(run(model, inputs), expected)
    assert not any("dt_proj" in key or "head.attention" in key for key in fxpeft.adapter_state_dict(model))
    # what is written then says itself what was left out: nobody warns again, and PEFT has the same outputs
    fxpeft.save_adapter(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out")
        again = make()
        fxpeft.load_adapter(again, tmp_path / "ours")
    assert_close(run(again, inputs), expected)
    back = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    assert_close(run(back, inputs), expected)


def test_tensors_of_an_excluded_module_are_left_out_as_asked(tmp_path: Path) -> None:
    base = siglip()
    peft_file(base, tmp_path, target_modules=["q_proj", "out_proj"])
    path = tmp_path / "adapter_config.json"
    excluded = {"exclude_modules": ["layers.1.self_attn.out_proj", "head.attention.out_proj"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | excluded))
    with pytest.warns(UserWarning, match=r"layers\.1\.self_attn\.out_proj: 2 tensors; exclude_modules names it"):
        fxpeft.load_adapter(base, tmp_path)
    own = fxpeft.adapter_state_dict(base)
    assert any("layers.0.self_attn.out_proj" in key for key in own)
    assert not any("layers.1.self_attn.out_proj" in key for key in own)


def test_no_attention_is_found_where_it_reads_its_projections() -> None:
    torch.manual_seed(0)
    config = tf.WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, conv_dim=(8,),
        conv_kernel=(10,), conv_stride=(5,), num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=4,
    )  # fmt: skip
    model = tf.WavLMModel(config).eval()
    with pytest.raises(AdapterError, match=r"q_proj: WavLMAttention reads this module's weight without calling it"):
        fxpeft.add_adapter(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="no default target_modules"):
        fxpeft.add_adapter(model, LoraConfig())


DEFAULTS: dict[str, Callable[[], Any]] = {
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
        )
    ),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)),
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
        )
    ),
    "deberta": lambda: tf.DebertaForSequenceClassification(
        tf.DebertaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
            relative_attention=True, pos_att_type=["c2p", "p2c"],
        )
    ),
    "deberta-v2": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
        )
    ),
    "electra": lambda: tf.ElectraForMaskedLM(
        tf.ElectraConfig(
            vocab_size=40, hidden_size=16, embedding_size=12, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=20,
        )
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**{**DECODER, "num_key_value_heads": 4})),
    "codegen": lambda: tf.CodeGenForCausalLM(
        tf.CodeGenConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=4, rotary_dim=4)
    ),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=40, d_model=16, n_layers=2, n_heads=2)),
    "mt5": lambda: tf.MT5ForConditionalGeneration(
        tf.MT5Config(vocab_size=40, d_model=16, d_kv=5, d_ff=20, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FAMILIES, *DEFAULTS])
def test_what_a_model_calls_is_never_refused(name: str) -> None:
    """The code's reading agrees with one real forward, and no usual target is refused."""
    if name in FAMILIES:
        model, inputs = FAMILIES[name].build(), dict(FAMILIES[name].inputs())
    else:
        model = DEFAULTS[name]().eval()
        inputs = {"input_ids": token_ids()} | ({"decoder_input_ids": token_ids()} if name == "mt5" else {})
    modules = dict(model.named_modules())
    called: set[str] = set()
    for path, module in modules.items():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | Conv1D):
            module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
    with torch.no_grad():
        model(**inputs)
    refused = {path for path in modules if path and idle(path, modules)}
    assert not refused & called
    if name in DEFAULTS:
        assert fxpeft.plan(model, LoraConfig(), roles=False).sites
    assert fxpeft.plan(model, LoraConfig(target_modules="all-linear"), roles=False).sites


def test_torchs_own_attention() -> None:
    modules = dict(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2).named_modules())
    assert "nn.MultiheadAttention" in str(idle("layers.0.self_attn.out_proj", modules))
    past = read_past("layers.0.linear1", modules)
    assert past is not None
    assert past.called
