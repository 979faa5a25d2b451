"""Activated LoRA: which tokens it acts on, against PEFT, with caches, in training, in slots, in one compiled graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import save
from closeness import assert_close
from tiny import logits, tiny_llama
from torch import Tensor, nn

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore")
CALL, OTHER = [7, 3], [11]
#: in the middle; none; twice; overlapping itself, at the end; half of it at the end
IDS = torch.tensor(
    [
        [5, 7, 3, 2, 9, 8, 1, 4],
        [5, 7, 2, 3, 9, 8, 1, 4],
        [7, 3, 5, 2, 7, 3, 11, 4],
        [5, 2, 9, 8, 7, 7, 7, 3],
        [5, 2, 11, 8, 1, 4, 2, 7],
    ]
)
STARTS = [1, 8, 4, 6, 8]


def config(**fields: Any) -> fxpeft.LoraConfig:
    settings = {
        "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2},
        "alora_invocation_tokens": CALL, "task_type": "CAUSAL_LM", **fields,
    }  # fmt: skip
    return fxpeft.LoraConfig(**settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tiny_llama(), config(), tmp_path_factory.mktemp("alora"), seed=3)


@pytest.fixture(scope="module")
def peer(folder: str) -> Any:
    return peft.PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True).eval()


@pytest.fixture(scope="module")
def wanted(peer: Any) -> Tensor:
    return logits(peer, IDS)


def loaded(folder: str) -> Any:
    model = tiny_llama()
    fxpeft.load_adapter(model, folder, trainable=True)
    return model


def prepared(*folders: str, **options: Any) -> Any:
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, 8, methods=("lora", "alora"), **options)
    for name, each in zip("abc", folders, strict=False):
        fxpeft.load_adapter(model, each, name)
    return model


def test_it_acts_from_the_invocation_on(folder: str, wanted: Tensor) -> None:
    model, bare = loaded(folder), logits(tiny_llama(), IDS)
    assert_close(logits(model, IDS), wanted)
    for row, start in enumerate(STARTS):
        assert torch.equal(logits(model, IDS)[row, :start], bare[row, :start])
        assert ((wanted - bare)[row, start:].abs().amax(-1) > 1e-3).all()
    with fxpeft.disabled(model):
        assert torch.equal(logits(model, IDS), bare)


def test_gradients_are_pefts(folder: str, peer: Any) -> None:
    model = loaded(folder)
    for checkpointed in (False, True):
        if checkpointed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for each in (peer, model):
            each.zero_grad()
            each(input_ids=IDS, labels=IDS).loss.backward()
        theirs = {n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if p.grad is not None}
        held = {p.data_ptr(): p.grad for p in model.parameters()}
        for key, tensor in fxpeft.adapter_state_dict(model).items():
            assert theirs[key].abs().max() > 0
            assert_close(held[tensor.data_ptr()], theirs[key], size=float(theirs[key].abs().max()))


def test_files_both_ways(folder: str, wanted: Tensor, tmp_path: Path) -> None:
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), folder).eval()
    theirs.save_pretrained(str(tmp_path))
    assert peft.LoraConfig.from_pretrained(tmp_path).alora_invocation_tokens == CALL
    assert_close(logits(loaded(str(tmp_path)), IDS), wanted)
    assert_close(logits(fxpeft.adopt(theirs), IDS), wanted)


def generated(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    found: Tensor = model.generate(input_ids=ids, **{**settings, **options})
    return found


def steps(model: Any, ids: Tensor, **cached: Any) -> list[Tensor]:
    """The logits of a loop of one's own, with the model's own cache."""
    found, out = [], None
    with torch.no_grad():
        for part in ids.split([3, 2, 3], 1):
            out = model(input_ids=part, use_cache=True, past_key_values=None if out is None else out.past_key_values)
            found.append(out.logits)
    return found


@pytest.mark.parametrize("slots", [False, True])
def test_generate_and_caches(slots: bool, folder: str, peer: Any, wanted: Tensor) -> None:
    model = prepared(folder) if slots else loaded(folder)
    # PEFT's generated tokens are computed with the adapter where the prompt has the invocation
    for each in IDS:
        row = each.unsqueeze(0)
        assert torch.equal(generated(model, row), generated(peer, row))
    whole = generated(model)
    assert torch.equal(whole, torch.cat([generated(peer, row.unsqueeze(0)) for row in IDS]))
    assert not torch.equal(whole, generated(tiny_llama()))
    assert torch.equal(generated(model, cache_implementation="static"), whole)
    again = generated(model, num_return_sequences=2, num_beams=2)
    alone = torch.cat([generated(model, r.unsqueeze(0), num_return_sequences=2, num_beams=2) for r in IDS])
    assert torch.equal(again, alone)
    once = [0, 1, 3, 4]  # where a second invocation comes, the tokens before it were computed by then
    assert_close(torch.cat(steps(model, IDS), 1)[once], wanted[once])
    # a cache that the base filled, and one that is copied and goes two ways
    with torch.no_grad():
        with fxpeft.disabled(model):
            cache = model(IDS[:, :1], use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        first = model(input_ids=IDS[:, 1:], past_key_values=cache).logits
        second = model(input_ids=IDS[:, 1:], past_key_values=other).logits
    assert torch.equal(first, second)
    assert_close(first[once], wanted[once, 1:])


def test_slots_and_what_they_hold(folder: str, wanted: Tensor, tmp_path: Path) -> None:
    model = prepared(folder, save(tiny_llama(), config(alora_invocation_tokens=None), tmp_path, seed=4))
    plain = tiny_llama()
    fxpeft.load_adapter(plain, tmp_path)
    assert_close(logits(model, IDS), logits(plain, IDS))
    embeds = model.get_input_embeddings()(IDS)
    with torch.no_grad():
        assert_close(model(inputs_embeds=embeds).logits, logits(plain, IDS))
        hidden = model.model(input_ids=IDS).last_hidden_state
        assert_close(model.lm_head(hidden), logits(plain, IDS))
    fxpeft.set_adapter(model, "a")
    assert_close(logits(model, IDS), wanted)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, logits(tiny_llama(), IDS))
    with pytest.raises(fxpeft.AdapterError, match=r"(?s)don't act on the same tokens: a: from \[7, 3\] on; b: all"):
        fxpeft.set_adapter(model, ["a", "b"])
    assert_close(logits(model, IDS), wanted)
    twin = copy.deepcopy(model)
    assert_close(logits(twin, IDS), wanted)
    fxpeft.release_hotswap(model)
    assert_close(logits(model, IDS), wanted)


def test_rows_without_slots(folder: str, tmp_path: Path) -> None:
    folders = {"a": folder}
    for seed, (name, tokens) in enumerate({"b": OTHER, "c": None}.items()):
        folders[name] = save(tiny_llama(), config(alora_invocation_tokens=tokens), tmp_path / name, seed=seed)
    model, peer, alone = tiny_llama(), None, {}
    for name, each in folders.items():
        fxpeft.load_adapter(model, each, name)
        plain = loaded(each)
        alone[name] = logits(plain, IDS), generated(plain)
        if peer is None:
            peer = peft.PeftModel.from_pretrained(tiny_llama(), each, name).eval()
        else:
            peer.load_adapter(each, name)
    alone["__base__"] = logits(tiny_llama(), IDS), generated(tiny_llama())
    named = ["a", "c", "b", "__base__", "b"]
    with torch.no_grad():
        found = model(input_ids=IDS, adapter_names=named).logits
        assert peer is not None
        assert_close(found, peer(input_ids=IDS, adapter_names=named).logits)
    assert_close(found, torch.stack([alone[name][0][row] for row, name in enumerate(named)]))
    with fxpeft.rows(model, named):
        tokens = generated(model)
    assert torch.equal(tokens, torch.stack([alone[name][1][row] for row, name in enumerate(named)]))


class Net(nn.Module):
    """An embedding, two linears and nothing else to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(12, 5), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Takes ``[rows, tokens]``, gives ``[rows, tokens, 3]``."""
        out: Tensor = self.down(self.up(self.embed(input_ids)).tanh())
        return out


@torch.no_grad()
def test_swaps_in_one_inductor_graph(tmp_path: Path) -> None:
    torch._dynamo.reset()
    both: dict[str, Any] = {"target_modules": ["up", "down"], "rank_pattern": {}}
    configs = {
        "a": config(**both), "b": config(r=5, alora_invocation_tokens=OTHER, target_modules=["up"], rank_pattern={}),
        "c": config(**{**both, "r": 1, "alora_invocation_tokens": None}),
    }  # fmt: skip
    folders = {name: save(Net(), each, tmp_path / name, seed=5) for name, each in configs.items()}
    expected, model = {"off": Net()(IDS)}, Net()
    fxpeft.prepare_hotswap(model, 8, methods=("lora", "alora"), targets=["up", "down"])
    for name, folder in folders.items():
        plain = Net()
        fxpeft.load_adapter(plain, folder)
        expected[name] = plain(IDS)
        fxpeft.load_adapter(model, folder, name)
    compiled = torch.compile(model, fullgraph=True)
    compiled(input_ids=IDS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in "abcba":
            fxpeft.set_adapter(model, name)
            assert_close(compiled(input_ids=IDS), expected[name])
            assert_close(compiled(input_ids=IDS.flip(0)), expected[name].flip(0))  # the invocations lie elsewhere
        fxpeft.hotswap(model, folders["b"], "a")
        assert_close(compiled(input_ids=IDS), expected["b"])
        with fxpeft.disabled(model):
            assert_close(compiled(input_ids=IDS), expected["off"])


def test_compiled_without_slots(folder: str, wanted: Tensor) -> None:
    torch._dynamo.reset()
    model = loaded(folder)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(logits(compiled, IDS), wanted)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(logits(compiled, IDS.flip(0)), wanted.flip(0))


def test_what_it_can_not_be_with(folder: str, tmp_path: Path) -> None:
    for fields, message in (
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens: expected tokens, at least one"),
        ({"use_dora": True}, "alora_invocation_tokens: use_dora=True can't be with it"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.* can't be with it"),
        ({"lora_bias": True}, "lora_bias=True can't be with it"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            config(**fields)
    with pytest.raises(fxpeft.AdapterError, match="embed_tokens: alora_invocation_tokens: expected a linear layer"):
        fxpeft.add_adapter(tiny_llama(), config(target_modules=["embed_tokens"], rank_pattern={}))
    model = loaded(folder)
    for change, message in (
        (lambda: fxpeft.fold(model), "acts on the tokens from its invocation on"),
        (lambda: fxpeft.convert(model, "default"), "acts on the tokens from its invocation on"),
        (lambda: fxpeft.prepare_hotswap(model, lanes=2, methods=("lora", "alora")), "lanes=2: expected 1 with 'alora'"),
        (lambda: fxpeft.prepare_hotswap(model), "its method, alora: declare"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            change()
    out = model(IDS[:2], use_cache=True)
    with pytest.raises(fxpeft.AdapterError, match="cache: expected one of calls with 3 rows, found of 2"):
        model(input_ids=IDS[:3], past_key_values=out.past_key_values)
