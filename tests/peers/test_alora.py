"""Activated LoRA: which tokens it acts on, against PEFT, with caches, in training, in slots, in one compiled graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from adapter_files import save
from closeness import assert_close
from tiny import logits, tiny_llama
from torch import Tensor, nn
from torch.nn.functional import pad

import fxpeft
from fxpeft.passes.slots.lanes import form_of

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
    fxpeft.prepare_hotswap(model, 8 * options.get("lanes", 1), methods=("lora", "alora"), **options)
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


def test_two_of_one_invocation_look_for_it_once(folder: str) -> None:
    model, ids = loaded(folder), torch.tensor([[5, 2, 3, 7]])
    fxpeft.load_adapter(model, folder, "other")
    fxpeft.set_adapter(model, ["default", "other"])
    with torch.no_grad():
        cache = model(ids[:, :2], use_cache=True).past_key_values
        found = model(ids[:, 2:], past_key_values=cache).logits
    assert_close(found, logits(tiny_llama(), ids)[:, 2:])  # 7, 3 is nowhere in there


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


class Alone(NamedTuple):
    """What an adapter gives alone: freshly loaded logits and generated tokens."""

    logits: Tensor
    tokens: Tensor


NAMED = ["a", "c", "b", "__base__", "b"]


@pytest.fixture(scope="module")
def several(folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two with invocations, and one without."""
    folders = {"a": folder}
    for seed, (name, tokens) in enumerate({"b": OTHER, "c": None}.items()):
        given = config(alora_invocation_tokens=tokens)
        folders[name] = save(tiny_llama(), given, tmp_path_factory.mktemp("several") / name, seed=seed)
    return folders


@pytest.fixture(scope="module")
def alone(several: dict[str, str]) -> dict[str, Alone]:
    models = {"__base__": tiny_llama(), **{name: loaded(each) for name, each in several.items()}}
    return {name: Alone(logits(model, IDS), generated(model)) for name, model in models.items()}


def in_lanes(several: dict[str, str]) -> Any:
    return prepared(*several.values(), lanes=3)


def expected(found: Tensor, alone: dict[str, Alone], named: list[str]) -> None:
    assert_close(found, torch.stack([alone[name].logits[row] for row, name in enumerate(named)]))


@pytest.mark.parametrize("slots", [False, True])
def test_rows(slots: bool, several: dict[str, str], alone: dict[str, Alone]) -> None:
    model, peer = in_lanes(several) if slots else tiny_llama(), None
    for name, each in several.items():
        if not slots:
            fxpeft.load_adapter(model, each, name)
        if peer is None:
            peer = peft.PeftModel.from_pretrained(tiny_llama(), each, name).eval()
        else:
            peer.load_adapter(each, name)
    assert peer is not None
    for named in (NAMED, ["c", "b", "a", "a", "__base__"], ["c"] * 5):
        with torch.no_grad():
            found = model(input_ids=IDS, adapter_names=named).logits
            assert_close(found, peer(input_ids=IDS, adapter_names=named).logits)
        expected(found, alone, named)
        with fxpeft.rows(model, named):
            tokens = generated(model)
        assert torch.equal(tokens, torch.stack([alone[name].tokens[row] for row, name in enumerate(named)]))


def test_rows_in_lanes_generate(several: dict[str, str], alone: dict[str, Alone]) -> None:
    model, apart = in_lanes(several), tiny_llama()
    for name, each in several.items():
        fxpeft.load_adapter(apart, each, name)
    wanted = torch.stack([alone[name].tokens[row] for row, name in enumerate(NAMED)])
    assert torch.equal(generated(model, adapter_names=NAMED, cache_implementation="static"), wanted)
    padded = generated(model, pad(IDS, (3, 0)), attention_mask=pad(torch.ones_like(IDS), (3, 0)), adapter_names=NAMED)
    assert torch.equal(padded[:, 3:], wanted)
    for options in ({"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}):
        found = []
        for each in (model, apart):
            torch.manual_seed(0)
            with fxpeft.rows(each, NAMED):
                found.append(generated(each, **options))
        assert torch.equal(*found)
    with fxpeft.rows(model, NAMED):  # a cache of one's own, in a loop
        expected(torch.cat(steps(model, IDS), 1), alone, NAMED)


def test_what_rows_in_lanes_have(several: dict[str, str], alone: dict[str, Alone], tmp_path: Path) -> None:
    model, bare, plain = in_lanes(several), alone["__base__"].logits, tiny_llama()
    both = {"a": 0.5, "b": -0.75, "c": 0.25}
    for name, scale in both.items():
        fxpeft.load_adapter(plain, several[name], name)
        fxpeft.set_scale(plain, name, scale)
    fxpeft.set_adapter(plain, list(both))
    with fxpeft.rows(model, [both, "a", {"a": 0.5, "b": 1}, both, "a"]), fxpeft.hold(model):
        found = logits(model, IDS)
    assert_close(found[[0, 3]], logits(plain, IDS)[[0, 3]])
    assert torch.equal(found[1], bare[1])  # it is nowhere in there
    assert torch.equal(found[2, :4], bare[2, :4])
    assert torch.equal(found[4], bare[4])
    # tokens have what they name, wherever an invocation is
    with fxpeft.tokens(model, [["c", "c", None, None, None, "c", "c", "c"]] * 5):
        expected(logits(model, IDS)[:, :2], {"c": Alone(alone["c"].logits[:, :2], bare)}, ["c"] * 5)
    same = loaded(save(tiny_llama(), config(alora_invocation_tokens=None), tmp_path, seed=3))
    with fxpeft.tokens(model, [["a"] * 8] * 5):
        assert_close(logits(model, IDS), logits(same, IDS))
    # what nobody told the tokens of
    embeds = model.get_input_embeddings()(IDS)
    with fxpeft.rows(model, NAMED), torch.no_grad():
        expected(model(inputs_embeds=embeds).logits, {**alone, "a": alone["__base__"], "b": alone["__base__"]}, NAMED)
        part, x = model.model.layers[0].mlp.down_proj, torch.randn(5, 2, 48)
        own = tiny_llama().model.layers[0].mlp.down_proj(x)
        assert torch.equal(part(x)[[0, 2, 3, 4]], own[[0, 2, 3, 4]])
        assert not torch.allclose(part(x)[1], own[1])
        assert torch.equal(part(x[:, 0])[0], own[0, 0])
    # what is active has no part in it, and has its own again
    fxpeft.set_adapter(model, "a")
    with fxpeft.rows(model, NAMED):
        expected(logits(model, IDS), alone, NAMED)
    expected(logits(model, IDS), alone, ["a"] * 5)
    twin = copy.deepcopy(model)
    with fxpeft.rows(twin, NAMED), torch.inference_mode():
        expected(twin(IDS).logits, alone, NAMED)
    with fxpeft.rows(model, NAMED[:4]), pytest.raises(fxpeft.AdapterError, match="expected 4 rows, as rows or tokens"):
        logits(model, IDS)


class Net(nn.Module):
    """An embedding, two linears and nothing else to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dummy_inputs = {"input_ids": IDS[:2]}
        self.embed, self.up, self.down = nn.Embedding(12, 5), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, input_ids: Tensor, past: Any = None) -> Tensor:
        """Takes ``[rows, tokens]``, gives ``[rows, tokens, 3]``; a cache goes along."""
        out: Tensor = self.down(self.up(self.embed(input_ids)).tanh())
        return out


class Past:
    """A cache that has nothing but its length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


class Compiled(NamedTuple):
    """A compiled net that has slots for four lanes, its adapters' files, and what each gives alone."""

    model: Net
    call: Any
    folders: dict[str, str]
    alone: dict[str | None, Callable[[Tensor], Tensor]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    torch._dynamo.reset()
    both: dict[str, Any] = {"target_modules": ["up", "down"], "rank_pattern": {}}
    configs = {
        "a": config(**both), "b": config(r=5, alora_invocation_tokens=OTHER, target_modules=["up"], rank_pattern={}),
        "c": config(**{**both, "r": 1, "alora_invocation_tokens": None}),
    }  # fmt: skip
    model, root = Net(), tmp_path_factory.mktemp("net")
    folders = {name: save(Net(), each, root / name, seed=5) for name, each in configs.items()}
    fxpeft.prepare_hotswap(model, 16, methods=("lora", "alora"), targets=["up", "down"], lanes=4)
    alone: dict[str | None, Any] = {None: Net()}
    for name, folder in folders.items():
        alone[name] = Net()
        fxpeft.load_adapter(alone[name], folder)
        fxpeft.load_adapter(model, folder, name)
    yield Compiled(model, torch.compile(model, fullgraph=True, dynamic=False), folders, alone)
    torch._dynamo.reset()


@torch.no_grad()
def test_swaps_in_one_inductor_graph(compiled: Compiled) -> None:
    model, call, folders, alone = compiled
    call(input_ids=IDS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in "abcba":
            fxpeft.set_adapter(model, name)
            for ids in (IDS, IDS.flip(0)):  # the invocations lie elsewhere
                assert_close(call(input_ids=ids), alone[name](ids))
        fxpeft.hotswap(model, folders["b"], "a")
        assert_close(call(input_ids=IDS), alone["b"](IDS))
        fxpeft.hotswap(model, folders["a"], "a")
        with fxpeft.disabled(model):
            assert_close(call(input_ids=IDS), alone[None](IDS))


#: of five rows of 8 tokens, four lanes; of 16; of one
FORMS = {"packed": IDS, "gathered": torch.cat([IDS, IDS[[1, 4, 0, 2, 3]]], 1), "summed": IDS[:, 2:3]}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_rows_in_one_inductor_graph(form: str, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    model, call, _, alone = compiled
    ids = FORMS[form]
    with fxpeft.rows(model, [None] * 5):
        bare = call(input_ids=ids)  # the one compilation
        with monkeypatch.context() as patched:
            patched.setattr(torch.compiler, "is_compiling", lambda: True)
            assert form_of(model.up.slot, model.embed(ids)).__name__ == form
    mixed: list[Any] = ["a", "c", "b", {"a": 0.5, "c": 2}, "b"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names in (mixed, ["c"] * 5, ["b", "a", "a", "a", "a"], [None, "b", "a", "a", None]):
            with fxpeft.rows(model, names):
                found, eager = call(input_ids=ids), model(input_ids=ids)
                assert_close(found, eager)
                for row, name in enumerate(names):
                    if not isinstance(name, dict):
                        wanted = alone[name](ids)[row]
                        assert_close(found[row], wanted)
                        same = (wanted == alone[None](ids)[row]).all(-1)
                        assert torch.equal(found[row][same], bare[row][same])
        if form == "summed":  # a decode step, which goes on from what the prefill found
            with fxpeft.rows(model, mixed):
                cache = Past(0)
                model(input_ids=IDS[:, :3], past=cache)
                cache.length = 3
                found = call(input_ids=IDS[:, 3:4], past=cache)
            for row, name in enumerate(["a", "c"]):
                assert_close(found[row], alone[name](IDS[:, :4])[row, 3:])
            assert not torch.equal(found[0], bare[0])


def test_compiled_without_slots(folder: str, wanted: Tensor) -> None:
    torch._dynamo.reset()
    model = loaded(folder)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(logits(compiled, IDS), wanted)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(logits(compiled, IDS.flip(0)), wanted.flip(0))


def test_a_head_that_sees_the_last_tokens_alone(tmp_path: Path) -> None:
    targets = ["lm_head", "q_proj"]
    folder = save(tiny_llama(), config(target_modules=targets, rank_pattern={}), tmp_path, seed=6)
    peer, model = peft.PeftModel.from_pretrained(tiny_llama(), folder).eval(), tiny_llama()
    wanted = torch.cat([generated(peer, row.unsqueeze(0)) for row in IDS])
    assert torch.equal(generated(loaded(folder)), wanted)
    fxpeft.prepare_hotswap(model, 12, methods=("lora", "alora"), lanes=2, targets=targets)
    fxpeft.load_adapter(model, folder)
    assert torch.equal(generated(model), wanted)
    assert torch.equal(generated(model, adapter_names=["default"] * 5), wanted)
    with pytest.raises(
        fxpeft.AdapterError, match=r"lm_head: .* some of the call's 5 x 8 tokens.*an input of \[5, 3, 32\]"
    ):
        model(IDS, logits_to_keep=torch.tensor([0, 2, 7]))


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
        (
            lambda: fxpeft.prepare_hotswap(model, methods=("alora", "p_tuning"), num_virtual_tokens=2),
            "methods: 'alora' beside a prompt of embeddings",
        ),
        (lambda: fxpeft.prepare_hotswap(model), "its method, alora: declare"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            change()
    out = model(IDS[:2], use_cache=True)
    with pytest.raises(fxpeft.AdapterError, match="cache: expected one of calls with 3 rows, found of 2"):
        model(input_ids=IDS[:3], past_key_values=out.past_key_values)
