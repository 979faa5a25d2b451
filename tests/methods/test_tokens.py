"""Trained tokens beside PEFT: gradients, files both ways, tied heads, slots in one graph, folded and out again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from adapter_files import add, spread
from closeness import assert_close
from tiny import VOCABULARY, logits, randomise, tiny_llama
from torch import Tensor, nn

import fxpeft
from fxpeft.passes.slots.tokens import TokenSlot

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 7, 9, 3, 7, 22], [5, 39, 0, 9, 2, 11]])
TIED = "tied"
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3}}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    TIED: ("Lora", {**LORA, "trainable_token_indices": [7, 22, 9]}, True),
    "untied": ("Lora", {**LORA, "trainable_token_indices": [7, 39]}, False),
    "each": ("Lora", {**LORA, "trainable_token_indices": {"embed_tokens": [7, 2], "lm_head": [39]}}, False),
    "same": (
        "Lora", {**LORA, "trainable_token_indices": {"embed_tokens": [7, 2], "lm_head": [7, 2]},
                 "ensure_weight_tying": True}, True,
    ),
    "dora": ("Lora", {**LORA, "use_dora": True, "trainable_token_indices": [7]}, True),
    "alone": ("TrainableTokens", {"token_indices": [0, 9, 39]}, False),
    "alone tied": ("TrainableTokens", {"token_indices": [22, 9, 39]}, True),
}  # fmt: skip


def llama(tied: bool, **changes: Any) -> Any:
    """One layer, nowhere square; tied, the head has the embeddings' weight."""
    config = copy.deepcopy(tiny_llama().config)
    config.tie_word_embeddings, config.num_hidden_layers = tied, 1
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return type(tiny_llama())(config).eval()


def of(case: str) -> tuple[Any, Any, Any]:
    """Fresh: the model and both libraries' configs."""
    name, fields, tied = CASES[case]
    return llama(tied), getattr(fxpeft, f"{name}Config")(**fields), getattr(peft, f"{name}Config")(**fields)


def peer_of(case: str, folder: Path | None = None, trainable: bool = False) -> Any:
    """PEFT's model, random or from a folder."""
    model, _, config = of(case)
    if folder is not None:
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable).eval()
    peer = peft.get_peft_model(model, config).eval()
    randomise((p for _, p in peer.named_parameters() if p.requires_grad), seed=3)
    return peer


@pytest.mark.parametrize("case", CASES)
def test_gradients_outputs_and_files_are_those_of_peft(case: str, tmp_path: Path) -> None:
    model, config, _ = of(case)
    bare = logits(model, IDS)
    fxpeft.add_adapter(model, config)
    if "dora" not in case:
        assert_close(logits(model, IDS), bare)  # rows start as the base's
    spread(fxpeft.adapter_state_dict(model), seed=4)
    assert (logits(model, IDS) - bare).abs().max() > 0.1
    fxpeft.save_adapter(model, tmp_path / "ours")
    peer = peer_of(case, tmp_path / "ours", trainable=True)
    assert_close(logits(peer, IDS), logits(model, IDS))
    for each in (peer, model):
        each(IDS, labels=IDS).loss.backward()
    parameters = {p.data_ptr(): p for p in model.parameters()}
    grads = {n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if p.grad is not None}
    for key, tensor in fxpeft.adapter_state_dict(model).items():
        wanted, own = grads.get(key, grads.get(f"{key}.weight")), parameters[tensor.data_ptr()].grad
        assert wanted is not None
        assert own is not None
        assert wanted.abs().max() > 0
        assert_close(own, wanted, size=float(wanted.abs().max()) + 0.1)
    assert {p for n, p in model.named_parameters() if p.grad is not None} == {
        p for n, p in model.named_parameters() if "adapters" in n
    }

    other = peer_of(case)
    other.save_pretrained(str(tmp_path / "theirs"))
    loaded = of(case)[0]
    fxpeft.load_adapter(loaded, tmp_path / "theirs")
    assert_close(logits(loaded, IDS), logits(other, IDS))
    assert fxpeft.adapter_config(loaded).to_dict()["peft_type"] == other.peft_config["default"].peft_type.value


@pytest.fixture(scope="module")
def served() -> tuple[Any, Any]:
    """A tied model with slots for LoRA and tokens, compiled by Inductor."""
    model = llama(True)
    fxpeft.prepare_hotswap(
        model, 8, targets=["q_proj", "down_proj"], methods=("lora", "dora", "trainable_tokens"), max_tokens=5
    )
    compiled = torch.compile(model, fullgraph=True)
    logits(compiled, IDS)
    return model, compiled


def test_tokens_come_and_go_in_one_graph(served: tuple[Any, Any], tmp_path: Path) -> None:
    model, compiled = served
    wanted: dict[str, Tensor] = {}
    plain = fxpeft.LoraConfig(**LORA)
    configs = {case: of(case)[1] for case in (TIED, "same", "dora", "alone tied")} | {"plain": plain}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number, (name, config) in enumerate(configs.items()):
            live = llama(True)
            add(live, config, seed=number)
            fxpeft.save_adapter(live, tmp_path / name)
            wanted[name] = logits(live, IDS)
            fxpeft.load_adapter(model, tmp_path / name, name.replace(" ", "_"))
        for name in (*configs, *reversed(configs)):
            fxpeft.set_adapter(model, name.replace(" ", "_"))
            assert_close(logits(compiled, IDS), wanted[name])
        fxpeft.disable_adapters(model)
        assert_close(logits(compiled, IDS), logits(llama(True), IDS))
        fxpeft.enable_adapters(model)
        fxpeft.set_adapter(model, TIED)
        fxpeft.hotswap(model, tmp_path / "plain")
        assert_close(logits(compiled, IDS), wanted["plain"])
        fxpeft.hotswap(model, tmp_path / TIED)
        assert_close(logits(compiled, IDS), wanted[TIED])
        before = logits(compiled, IDS)
        many = llama(True)
        add(many, fxpeft.TrainableTokensConfig(token_indices=[1, 2, 3, 4, 5, 6]))
        fxpeft.save_adapter(many, tmp_path / "many")
        with pytest.raises(fxpeft.AdapterError, match=r"embed_tokens: 6 tokens are above max_tokens 5"):
            fxpeft.load_adapter(model, tmp_path / "many", "many")
        with pytest.raises(fxpeft.AdapterError, match=r"embed_tokens: (same|alone_tied).* and (same|alone_tied)"):
            fxpeft.set_adapter(model, ["same", "alone_tied"])
        assert_close(logits(compiled, IDS), before, terms=0)
        fxpeft.set_adapter(model, ["plain", "alone_tied"])  # other modules: they go together
        both = llama(True)
        for name in ("plain", "alone tied"):
            fxpeft.load_adapter(both, tmp_path / name, name.replace(" ", "_"))
        fxpeft.set_adapter(both, ["plain", "alone_tied"])
        assert_close(logits(compiled, IDS), logits(both, IDS))
    fxpeft.release_hotswap(model)
    assert_close(logits(model, IDS), logits(both, IDS))
    fxpeft.remove(model)
    assert_close(logits(model, IDS), logits(llama(True), IDS), terms=0)


def lane_net() -> nn.Module:
    """Token ids ``[rows, length]`` to scores ``[rows, length, 11]``; the head has a bias, and a weight of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 11)).eval()
    net.dummy_inputs = {"input": torch.arange(6).view(2, 3)}
    return net


def test_rows_of_a_batch_have_tokens_each_of_their_own_in_one_graph() -> None:
    ids = torch.tensor([[1, 7, 9], [7, 7, 3], [0, 10, 1], [9, 1, 7]])
    configs = {
        "a": fxpeft.LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [7, 9], "3": [1]}),
        "b": fxpeft.LoraConfig(r=3, target_modules=["1"], use_dora=True, trainable_token_indices={"0": [1]}),
        "c": fxpeft.TrainableTokensConfig(token_indices=[10, 7, 1], target_modules=["0", "3"]),
    }
    model, lives = lane_net(), {None: lane_net()}
    fxpeft.prepare_hotswap(
        model, 8, targets=["1"], methods=("lora", "dora", "trainable_tokens"), lanes=3, max_tokens=4,
        token_modules=["0", "3"],
    )  # fmt: skip
    for number, (name, config) in enumerate(configs.items()):
        lives[name] = lane_net()  # type: ignore[index]
        add(lives[name], config, seed=number)  # type: ignore[index]
        fxpeft.add_adapter(model, config, name)
        state = {k: v.clone() for k, v in fxpeft.adapter_state_dict(lives[name]).items()}  # type: ignore[index]
        fxpeft.load_adapter_state_dict(model, state, name)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        with fxpeft.rows(model, ["a", None, "b", "c"]):
            compiled(ids)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for names in (["a", None, "b", "c"], ["c", "b", "a", "a"], [None, None, "c", None]):
                with fxpeft.rows(model, names):
                    found = compiled(ids)
                for row, name in enumerate(names):
                    assert_close(found[row], lives[name](ids)[row])  # type: ignore[index]
        every = [["a", "b", None], ["c", "a", "a"], ["b", "c", None], [None, "c", "b"]]
        with fxpeft.tokens(model, every):
            found = model(ids)
        for row, own in enumerate(every):
            for place, name in enumerate(own):
                assert_close(found[row, place], lives[name](ids)[row, place])  # type: ignore[index]
        fxpeft.set_adapter(model, "c")
        assert_close(model(ids), lives["c"](ids))  # type: ignore[index]
        fxpeft.delete_adapter(model, "b")
        with fxpeft.rows(model, ["a", "c", None, "a"]):
            assert_close(model(ids)[1], lives["c"](ids)[1])  # type: ignore[index]
    for mixture, message in (
        ({"a": 0.5}, "expected the weight 1, found 0.5: its rows of an embedding"),
        ({"a": 1, "c": 1}, "each has its own row of a token|can't share a slot"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message), fxpeft.rows(model, [mixture] * 4):
            pass


@pytest.mark.parametrize("lanes", [3, 9])
def test_a_change_of_residents_writes_the_lanes_that_changed(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int | None] = []
    model, ids = lane_net(), torch.tensor([[1, 7, 9], [7, 7, 3]])
    fxpeft.prepare_hotswap(
        model, 16, targets=["1"], methods=("lora", "dora", "trainable_tokens"), lanes=lanes, max_tokens=4,
        token_modules=["0"],
    )  # fmt: skip
    live: dict[str, nn.Module] = {}
    for number, indices in enumerate(([7, 9], [1], None, [3, 7])):
        name = "abcd"[number]
        config = fxpeft.LoraConfig(
            r=2, target_modules=["1"], use_dora=indices is None, trainable_token_indices=indices and {"0": indices}
        )
        live[name] = lane_net()
        tensors = add(live[name], config, seed=number)
        fxpeft.add_adapter(model, config, name)
        fxpeft.load_adapter_state_dict(model, {key: value.clone() for key, value in tensors.items()}, name)
    fxpeft.set_adapter(model, [])
    hold = TokenSlot.hold

    def counted(self: TokenSlot, tokens: Any, rows: Any, lane: int | None = None) -> None:
        written.append(lane)
        hold(self, tokens, rows, lane)

    monkeypatch.setattr(TokenSlot, "hold", counted)
    for names, count in ((["a", "b"], 2), (["b", "a"], 0), (["a", "d"], 1), (["d", "c"], 0 if lanes > 3 else 1)):
        written.clear()
        with torch.no_grad(), fxpeft.rows(model, names):
            found = model(ids)
        assert sum(lane is not None for lane in written) == count
        for row, name in enumerate(names):  # c has a gain, and nothing of the rows that were in its lane
            assert_close(found[row], live[name](ids)[row])


def test_beams_of_a_row_have_its_tokens() -> None:
    model, live = llama(True), llama(True)
    add(live, of(TIED)[1])
    add(model, of(TIED)[1], "a")
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj"], methods=("lora", "trainable_tokens"), lanes=2)
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    with fxpeft.rows(model, ["a", None]):
        together = model.generate(IDS, **options)
    assert torch.equal(together[:1], live.generate(IDS[:1], **options))
    assert torch.equal(together[1:], llama(True).generate(IDS[1:], **options))


@pytest.mark.parametrize("case", [TIED, "each", "alone"])
def test_rows_fold_into_the_weights_and_come_out_bit_for_bit(case: str) -> None:
    model, config, _ = of(case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    add(model, config)
    wanted = logits(model, IDS)
    for keep in ("original", "delta"):
        fxpeft.fold(model, keep=keep)  # type: ignore[arg-type]
        folded = of(case)[0]
        folded.load_state_dict({k: v for k, v in model.state_dict().items() if k in before})
        assert_close(logits(model, IDS), wanted)
        assert_close(logits(folded, IDS), wanted)
        fxpeft.unfold(model)
        assert torch.equal(model.state_dict()["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
        assert_close(logits(model, IDS), wanted)


def test_a_head_keeps_its_bias_and_an_embedding_its_scale() -> None:
    class Scaled(nn.Embedding):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 3

    torch.manual_seed(0)
    net = nn.Sequential(Scaled(9, 5), nn.Linear(5, 9))
    x = torch.arange(8).view(2, 4)
    add(net, fxpeft.TrainableTokensConfig(token_indices=[2, 7], target_modules=["0", "1"]))
    wanted = net(x)
    rows = fxpeft.adapter_state_dict(net)
    first, second = net[0].weight.detach().clone(), net[1].weight.detach().clone()
    first[[2, 7]], second[[2, 7]] = (rows[f"base_model.model.{n}.trainable_tokens_delta"] for n in "01")
    assert_close(wanted, nn.functional.linear(first[x] * 3, second, net[1].bias))
    fxpeft.prepare_hotswap(net, methods=("trainable_tokens",), token_modules=["0", "1"])
    assert_close(net(x), wanted)


def test_an_offloaded_head_is_tied_too() -> None:
    model, config, _ = of(TIED)
    offloaded = llama(True)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.lm_head.weight is not offloaded.model.embed_tokens.weight
    for each in (model, offloaded):
        add(each, config)
    assert_close(logits(offloaded, IDS), logits(model, IDS))


def test_other_live_adapters_have_other_tokens(tmp_path: Path) -> None:
    model = llama(True)
    add(model, fxpeft.TrainableTokensConfig(token_indices=[7]), "a")
    add(model, fxpeft.TrainableTokensConfig(token_indices=[9]), "b", seed=1)
    add(model, fxpeft.TrainableTokensConfig(token_indices=[9, 3]), "c", seed=2)
    fxpeft.set_adapter(model, ["a", "b"])
    both = logits(model, IDS)
    with pytest.raises(fxpeft.AdapterError, match=r"lm_head: token 9: b and c\n.*embed_tokens: token 9"):
        fxpeft.set_adapter(model, ["b", "c"])
    assert_close(logits(model, IDS), both, terms=0)
    fxpeft.fold(model, ["a", "b"])
    assert_close(logits(model, IDS), both)


def test_what_a_resized_vocabulary_brings_is_read(tmp_path: Path) -> None:
    base = llama(True)
    base.save_pretrained(tmp_path / "base")
    resized = type(base).from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    resized.resize_token_embeddings(VOCABULARY + 3)
    config = peft.LoraConfig(**{**LORA, "trainable_token_indices": [VOCABULARY, VOCABULARY + 2, 3]})
    peer = peft.get_peft_model(resized, config).eval()
    randomise((p for n, p in peer.named_parameters() if p.requires_grad), seed=3)
    peer.save_pretrained(str(tmp_path / "theirs"))
    ids = torch.tensor([[1, VOCABULARY, 3, VOCABULARY + 1, VOCABULARY + 2]])
    model = type(base).from_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    model.resize_token_embeddings(VOCABULARY + 3)
    fxpeft.load_adapter(model.eval(), tmp_path / "theirs")
    assert_close(logits(model, ids), logits(peer, ids))


def test_the_state_dict_puts_them_back_and_peft_is_taken_over(tmp_path: Path) -> None:
    model, config, _ = of(TIED)
    add(model, config)
    state, wanted = {k: v.clone() for k, v in fxpeft.adapter_state_dict(model).items()}, logits(model, IDS)
    spread(fxpeft.adapter_state_dict(model), seed=7)
    fxpeft.load_adapter_state_dict(model, state)
    assert_close(logits(model, IDS), wanted, terms=0)
    with pytest.raises(fxpeft.AdapterError, match="rows of an embedding don't say which tokens"):
        fxpeft.infer_config(state)
    again = llama(True)
    fxpeft.inject(again, state, config)
    assert_close(logits(again, IDS), wanted)
    copied = copy.deepcopy(model)
    assert_close(logits(copied, IDS), wanted)
    fxpeft.convert(model, "default", new_name="lora")
    assert_close(logits(model, IDS), wanted)
    peer = peer_of(TIED)
    theirs = logits(peer, IDS)
    assert_close(logits(fxpeft.adopt(peer), IDS), theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable_token_indices": [VOCABULARY]}, "embed_tokens has 40 rows, found token 40"),
        ({"trainable_token_indices": []}, "expected numbers of tokens, from 0 on"),
        ({"trainable_token_indices": [3, 3]}, "each token once, found 3 again"),
        ({"trainable_token_indices": [-1]}, "found -1"),
        ({"trainable_token_indices": {"embed": [1]}}, "no module of the model is named\n.*'embed'"),
        ({"trainable_token_indices": {"norm": [1]}}, "norm: .*tokens are rows of an embedding or of a linear head"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "can't have rows of it too"),
        ({"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, "lm_head has one weight with .* follows it"),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
            "ensure_weight_tying: .*embed_tokens and lm_head have one weight, and other tokens",
        ),
    ],
)
def test_what_is_refused_is_named(changes: dict[str, Any], message: str) -> None:
    model = llama(True)
    with pytest.raises(fxpeft.AdapterError, match=message):
        fxpeft.add_adapter(model, fxpeft.LoraConfig(**{**LORA, **changes}))
    assert_close(logits(model, IDS), logits(llama(True), IDS), terms=0)


def test_slots_and_programs_say_what_they_lack(tmp_path: Path) -> None:
    model, config, _ = of(TIED)
    add(model, config)
    fxpeft.save_adapter(model, tmp_path)
    slots = llama(True)
    fxpeft.prepare_hotswap(slots, 8, targets=["q_proj", "down_proj"])
    with pytest.raises(fxpeft.AdapterError, match="embed_tokens: has no slot for tokens; declare 'trainable_tokens'"):
        fxpeft.load_adapter(slots, tmp_path)
    with pytest.raises(fxpeft.AdapterError, match="only with 'trainable_tokens' among the methods"):
        fxpeft.prepare_hotswap(llama(True), 8, max_tokens=3)
    program = torch.export.export(nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 9)), (torch.arange(8).view(2, 4),))
    own = fxpeft.LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [1]})
    with pytest.raises(fxpeft.AdapterError, match="trainable_token_indices: a program has no place"):
        fxpeft.rewrite(program, own)
    with fxpeft.rows(model.eval(), ["default", None]):  # without slots they can
        found = logits(model, IDS)
    assert_close(found[:1], logits(model, IDS[:1]))
    assert_close(found[1:], logits(llama(True), IDS[1:]))
    text = str(fxpeft.plan(llama(True), config))
    assert "model.embed_tokens: 3 rows of its own" in text
    assert "lm_head: the rows of model.embed_tokens" in text
