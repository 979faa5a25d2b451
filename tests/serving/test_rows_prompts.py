"""Rows of one batch have soft prompts each of their own, beside rows that have other adapters or none, in one graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import save_each
from prompt_cases import CONFIGS, VIRTUAL
from tiny import tiny_gpt2
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import fxpeft
from fxpeft import AdapterError
from fxpeft.serving.prompts import PromptSlot

IDS = torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(1))
METHODS = {"prompt": ("prompt_tuning", "p_tuning"), "prefix": ("prefix_tuning",)}
KINDS = {"prompt": {"p": "prompt", "q": "mlp"}, "prefix": {"p": "prefix", "q": "projected"}}


def one_layer() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=39
    )
    return T5ForConditionalGeneration(config).eval()


class Site:
    """A prepared model with two prompts, and a LoRA that has a head; what each gives alone."""

    def __init__(self, kind: str, folder: Path, make: Any = one_layer, target: str = "q_proj") -> None:
        configs = {name: CONFIGS[each]() for name, each in KINDS[kind].items()}
        configs["l"] = fxpeft.LoraConfig(r=2, lora_alpha=9, target_modules=[target], modules_to_save=["lm_head"])
        self.make, self.folders, self.model = make, save_each(make, configs, folder), make()
        fxpeft.prepare_hotswap(
            self.model, 8, targets=[target], modules_to_save=["lm_head"], methods=("lora", *METHODS[kind]),
            num_virtual_tokens=VIRTUAL, lanes=3,
        )  # fmt: skip
        for name, place in self.folders.items():
            fxpeft.load_adapter(self.model, place, name)
        fxpeft.set_adapter(self.model, [])

    def alone(self, name: str | None) -> Any:
        model = self.make()
        if name is not None:
            fxpeft.load_adapter(model, self.folders[name])
        return model

    def check(self, call: Any, names: Sequence[str | None], **inputs: Any) -> None:
        """The last tokens of each row are what its adapter gives alone."""
        with torch.no_grad():
            with fxpeft.rows(self.model, names):
                found = call(IDS, **inputs).logits
            for row, name in enumerate(names):
                own = {key: value[row : row + 1] for key, value in inputs.items()}
                expected = self.alone(name)(IDS[row : row + 1], **own).logits[0, -4:]
                torch.testing.assert_close(found[row, -4:], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["prompt", "prefix"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    return Site(request.param, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_every_row_has_its_own_in_one_graph(kind: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    site = Site(kind, tmp_path)
    # a prefix is written into the cache, and beside that the graph is the same
    counter = CompileCounterWithBackend("inductor" if kind == "prompt" else "aot_eager")
    call: Any = torch.compile(site.model, backend=counter, fullgraph=True)
    with torch.no_grad(), fxpeft.rows(site.model, ["p", "p", "l", "p"]):
        call(IDS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names in (["p", "l", None, "q"], ["q", "q", "p", "p"], ["l", None, None, "q"]):
            site.check(call, names)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_batches_without_prompts_and_masks(site: Site) -> None:
    model = site.model
    mask = torch.ones_like(IDS)
    mask[1:3, :2] = 0  # padding on the left
    for names in (["p", "l", None, "q"], ["l", None, "l", None]):
        site.check(model, names)
        site.check(model, names, attention_mask=mask)
    with torch.no_grad(), fxpeft.rows(model, ["l", None, None, "l"]):
        assert model(IDS).logits.shape[1] == IDS.shape[1]
    with torch.no_grad():
        for active in ("q", "l"):  # a call that names no rows
            fxpeft.set_adapter(model, active)
            torch.testing.assert_close(model(IDS).logits, site.alone(active)(IDS).logits, rtol=1e-5, atol=1e-5)
            site.check(model, ["p", None, "p", None])
        torch.testing.assert_close(model(IDS).logits, site.alone("l")(IDS).logits, rtol=1e-5, atol=1e-5)
    with fxpeft.rows(model, ["p", None, "p"]), pytest.raises(AdapterError, match=r"expected 3 rows"):
        model(IDS)
    with (
        pytest.raises(AdapterError, match="tokens: p: a prompt stands before a whole row"),
        fxpeft.tokens(model, [["p", None]]),
    ):
        pass
    with pytest.raises(AdapterError, match="only one prompt can be active"), fxpeft.rows(model, [{"p": 1, "q": 1}]):
        pass
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        site.model = copied
        site.check(copied, ["p", None, "l", "q"])
    with torch.no_grad(), fxpeft.rows(model, [{"p": 1, "l": 1}, "p", None, None]):
        found = model(IDS).logits[0, -4:]
    both = site.alone("l")
    fxpeft.load_adapter(both, site.folders["p"], "p")
    fxpeft.set_adapter(both, ["default", "p"])
    torch.testing.assert_close(found, both(IDS[:1]).logits[0, -4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_every_row_is_generated_as_alone(site: Site, settings: dict[str, Any]) -> None:
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **settings}
    names = ["p", "__base__", "l", "q"]
    found = site.model.generate(IDS, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = site.alone(name if name in site.folders else None)
        assert torch.equal(found[row], alone.generate(IDS[row : row + 1], **options)[0]), name


@pytest.mark.parametrize(
    ("make", "target", "why"),
    [(tiny_gpt2, "c_attn", "its positions are not rotary"), (tiny_t5, "q", "SEQ_2_SEQ_LM")],
)
def test_rows_without_a_prompt_are_refused_where_a_mask_cannot_tell(
    make: Any, target: str, why: str, tmp_path: Path
) -> None:
    site = Site("prompt", tmp_path, make, target)
    for names in (["p", None], ["l", "q"]):
        with (
            pytest.raises(AdapterError, match=f"has no prompt, and . has one: .*{why}"),
            fxpeft.rows(site.model, names),
        ):
            pass
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    found = site.model.generate(IDS[:3], adapter_names=["p", "q", "p"], **options)
    for row, name in enumerate(["p", "q", "p"]):
        assert torch.equal(found[row], site.alone(name).generate(IDS[row : row + 1], **options)[0])
    with torch.no_grad():
        found = site.model.generate(IDS[:2], adapter_names=["l", None], **options)
    assert torch.equal(found[:1], site.alone("l").generate(IDS[:1], **options))


def test_what_counts_from_the_beginning_is_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
    model = LlamaForCausalLM(LlamaConfig(**{**one_layer().config.to_dict(), "rope_parameters": rope})).eval()
    fxpeft.prepare_hotswap(
        model, 8, targets=["q_proj"], methods=("lora", "prompt_tuning"), num_virtual_tokens=2, lanes=2
    )
    fxpeft.add_adapter(model, fxpeft.PromptTuningConfig(num_virtual_tokens=2), "p")
    with pytest.raises(AdapterError, match="count from the beginning"), fxpeft.rows(model, ["p", None]):
        pass


def test_tokens_stand_for_those_of_a_prompt(site: Site) -> None:
    """As a batch of requests has them: each its own prompt's, or none, in rows of one length."""
    if site.model.slot.plan.prefix:
        with (
            pytest.raises(AdapterError, match="tokens: p: a prompt stands before a whole row, and of keys and values"),
            fxpeft.tokens(site.model, [["p"]], [[0]]),
        ):
            pass
        return
    names: list[Any] = ["q", {"p": 1, "l": 1}, None, "l"]
    ids = torch.cat((torch.zeros(4, VIRTUAL, dtype=torch.long), IDS), dim=1)
    ids[2:, :6], ids[2:, 6:] = IDS[2:], 0  # whose own tokens come first; causal, they don't see what is behind
    places = [*range(VIRTUAL), *[-1] * 6]
    virtual = [places, places, [-1] * 10, [-1] * 10]
    store = fxpeft.AdapterStore(site.model, Path(site.folders["p"]).parent)
    for named in (fxpeft.tokens(site.model, [[n] * 10 for n in names], virtual),
                  store.tokens([[n] * 10 for n in names], virtual)):  # fmt: skip
        with torch.no_grad(), named:
            found = site.model(ids).logits
        assert found.shape[1] == 10
        for row, name in enumerate(names):
            alone = site.alone("p" if row == 1 else name)
            if row == 1:
                fxpeft.load_adapter(alone, site.folders["l"], "l")
                fxpeft.set_adapter(alone, ["default", "l"])
            own = found[row, :6] if row > 1 else found[row, -6:]
            torch.testing.assert_close(own, alone(IDS[row : row + 1]).logits[0, -6:], rtol=1e-5, atol=1e-5)
    store.close()
    wrong: list[tuple[Any, Any, str]] = [
        ([["p", "p"]], [[0]], "virtual: expected an integer for every token"),
        ([["p"]], [[0.5]], "virtual: expected an integer for every token"),
        ([["p"]], [[VIRTUAL]], f"virtual: expected places from -1 to {VIRTUAL - 1}, found {VIRTUAL}"),
        ([["p", "l"]], [[0, 0]], "a token that names l can't stand for one of a prompt"),
        ([["p", None]], [[0, 1]], "a token that names None can't stand for one of a prompt"),
    ]
    for tokens, places_of, message in wrong:
        with pytest.raises(AdapterError, match=message), fxpeft.tokens(site.model, tokens, places_of):
            pass


def test_a_store_hands_prompts_to_rows(site: Site) -> None:
    store = fxpeft.AdapterStore(site.model, Path(site.folders["p"]).parent)
    names: list[Any] = ["q", None, "p", "l"]
    with torch.no_grad(), store.rows(names):
        found: Tensor = site.model(IDS).logits
    for row, name in enumerate(names):
        expected = site.alone(name)(IDS[row : row + 1]).logits[0, -4:]
        torch.testing.assert_close(found[row, -4:], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match="a prompt stands before a whole row"), store.tokens([["p"] * 3]):
        pass
    store.close()


def test_a_swap_that_fails_leaves_rows_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site("prompt", tmp_path)
    names, hold, failing = ["p", "l", None, "p"], PromptSlot.hold, [True]

    def torn(self: PromptSlot, lane: int, prompt: Tensor | None) -> None:
        hold(self, lane, None if prompt is None else torch.full_like(prompt, 9.0))
        if failing and failing.pop():
            raise MemoryError
        hold(self, lane, prompt)

    with torch.no_grad(), fxpeft.rows(site.model, names):
        before = site.model(IDS).logits
        monkeypatch.setattr(PromptSlot, "hold", torn)
        with pytest.raises(MemoryError), fxpeft.rows(site.model, ["q"] * 4):
            pass
        monkeypatch.undo()
        assert torch.equal(site.model(IDS).logits, before)
        fxpeft.hotswap(site.model, site.folders["q"], "p")  # another version is seen by the next call
        swapped = site.model(IDS).logits
    torch.testing.assert_close(swapped[0, -4:], site.alone("q")(IDS[:1]).logits[0, -4:], rtol=1e-5, atol=1e-5)
    site.check(site.model, ["q", "l", None, "q"])
