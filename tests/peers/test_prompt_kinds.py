"""What is of one sort of prompt alone, against PEFT: CPT's loss, tasks and where they begin, a cartridge's tokens."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from commands import run, told
from prompt_cases import IDS, VIRTUAL, logits, prompted
from prompt_peers import both, gemma4, tiny_qwen, tiny_t5, tokenizer, trained
from prompt_peers import peft_knows_the_cache as peft_knows_the_cache
from safetensors.torch import load_file, save_file
from tiny import randomise, tiny_bert, tiny_llama, token_ids
from torch import Tensor

import fxpeft
from fxpeft import AdapterError, CartridgeConfig, CheckpointError, CPTConfig, MultitaskPromptTuningConfig

EXAMPLES: dict[str, Any] = {
    "cpt_token_ids": [3, 9, 4, 11, 7, 5, 8, 2], "cpt_tokens_type_mask": [1, 2, 3, 4, 0, 5, 8, 12],
    "opt_projection_epsilon": 2.0, "opt_projection_format_epsilon": 0.7,
}  # fmt: skip
TYPES = torch.tensor([[1, 2, 3, 4, 4, 8], [0, 2, 4, 4, 8, 12], [4, 4, 1, 2, 3, 4]])


def causal(config: Any, theirs: Any, **fields: Any) -> tuple[Any, Any]:
    """Fresh adapters of one seed on copies of a Llama."""
    base = tiny_llama()
    torch.manual_seed(7)
    peer: Any = peft.get_peft_model(copy.deepcopy(base), theirs(task_type="CAUSAL_LM", **fields)).eval()
    torch.manual_seed(7)
    fxpeft.add_adapter(base, config(task_type="CAUSAL_LM", **fields))
    return base, peer


# --- CPT ---


@pytest.mark.parametrize("weights", [{}, {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.6}])
@pytest.mark.parametrize("typed", [False, True])
def test_examples_are_trained_as_pefts(weights: dict[str, Any], typed: bool) -> None:
    """Losses, and steps of an optimiser whose differences are cut on the way; labels stay where they are."""
    model, peer = causal(CPTConfig, peft.CPTConfig, **EXAMPLES, **weights)
    labels = token_ids(3, 6).clone()
    labels[0, 4] = -100
    inputs: dict[str, Any] = {"input_ids": token_ids(3, 6), "labels": labels}
    optimisers = [torch.optim.Adam(trained(m), lr=0.3, weight_decay=0.1) for m in (model, peer)]
    for _ in range(4):
        losses = []
        for each, optimiser in zip((model, peer), optimisers, strict=True):
            types = TYPES.clone()  # PEFT adds to it in place
            loss = each(**inputs, **({"input_type_mask": types} if typed else {})).loss
            assert each is peer or torch.equal(types, TYPES)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss)
        assert_close(*losses)
    delta = model.adapters.default.delta
    assert_close(delta, peer.prompt_encoder.default.delta_embedding.weight)
    assert delta.norm(dim=1).max() > 1.2 * 2.0 * (32 / 2048) ** 0.5  # the last step goes beyond what is allowed
    assert torch.equal(delta.norm(dim=1) > 0, torch.tensor([True, True, True, False, False, True, False, False]))
    with torch.no_grad():
        assert_close(model(**inputs).logits, peer(**inputs).logits)


def test_an_examples_loss_in_a_tuple_and_compiled() -> None:
    model, _ = causal(CPTConfig, peft.CPTConfig, **EXAMPLES, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.6)
    delta = model.adapters.default.delta
    randomise([delta], seed=1)
    inputs = {"input_ids": token_ids(3, 6), "labels": token_ids(3, 6), "input_type_mask": TYPES}
    start = delta.detach().clone()
    model(**inputs).loss.backward()
    wanted, cut = delta.grad.clone(), delta.detach().clone()
    assert not torch.allclose(start, cut)  # a forward that trains cuts it
    delta.grad = None
    delta.data.copy_(start)
    torch._dynamo.reset()
    loss, scores, *_ = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, return_dict=False)
    loss.backward()
    assert scores.shape == (3, 6 + 8, 40)
    assert_close(delta.grad, wanted)
    assert_close(delta.detach(), cut)
    assert model(**inputs).loss.item() == pytest.approx(loss.item(), rel=1e-4)
    delta.data.copy_(start)
    with torch.no_grad():
        assert_close(model(**inputs).loss, loss.detach())
    assert torch.equal(delta.detach(), start)  # and one that doesn't leaves it


def test_a_saved_context_is_trained_on_from_its_prompt(tmp_path: Path) -> None:
    model, _ = causal(CPTConfig, peft.CPTConfig, **EXAMPLES)
    randomise(trained(model.adapters), seed=1)
    wanted = logits(model)
    fxpeft.save_adapter(model, tmp_path)
    again = tiny_llama()
    fxpeft.load_adapter(again, tmp_path, trainable=True)
    assert_close(logits(again), wanted)
    assert not again.adapters.default.delta.any()
    assert [name for name, p in again.named_parameters() if p.requires_grad] == ["adapters.default.delta"]
    randomise(trained(again.adapters), seed=2)
    fxpeft.load_adapter_state_dict(again, fxpeft.adapter_state_dict(model))
    assert_close(logits(again), wanted)


def test_a_forward_that_continues_a_cache_has_the_models_own_loss() -> None:
    model, _ = causal(CPTConfig, peft.CPTConfig, **EXAMPLES)
    with torch.no_grad():
        first = model(IDS[:, :3], use_cache=True)
        cache = first["cache"] if "cache" in first else first["past_key_values"]
        rest = model(IDS[:, 3:], **{"cache" if "cache" in first else "past_key_values": cache}, labels=IDS[:, 3:])
    wanted = torch.nn.functional.cross_entropy(rest.logits[:, :-1].flatten(0, 1), IDS[:, 4:].flatten())
    assert_close(rest.loss, wanted)


# --- tasks ---


def tasks(count: int = 3, seed: int = 5, **fields: Any) -> Any:
    model = tiny_llama()
    config = MultitaskPromptTuningConfig(num_virtual_tokens=VIRTUAL, num_tasks=count, num_ranks=2, **fields)
    fxpeft.add_adapter(model, config)
    randomise(model.adapters.parameters(), seed, scale=0.9)
    return model


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_start_from_source_tasks_is_pefts(start: str, suffix: str, tmp_path: Path) -> None:
    """What was trained from it no longer needs the file, neither here nor in PEFT."""
    path = tmp_path / f"source.{suffix}"
    source = {k: v.clone() for k, v in fxpeft.adapter_state_dict(tasks()).items()}
    if suffix == "bin":
        torch.save(source, path)
    else:
        save_file(source, path)
    model, peer = causal(
        MultitaskPromptTuningConfig, peft.MultitaskPromptTuningConfig, num_virtual_tokens=VIRTUAL, num_ranks=2,
        prompt_tuning_init=start, prompt_tuning_init_state_dict_path=str(path), prompt_tuning_init_task=1,
    )  # fmt: skip
    for own, other in zip(trained(model), trained(peer), strict=True):
        assert torch.equal(own, other)
    model.adapters.default.embedding.data.add_(0.1)
    path.unlink()
    fxpeft.save_adapter(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text("utf-8"))
    assert (config["prompt_tuning_init"], config["prompt_tuning_init_state_dict_path"]) == ("RANDOM", None)
    again = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert_close(again(IDS, task_ids=torch.tensor([0, 0])).logits, logits(model))


class Runs:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a file was run')",)


def test_a_source_that_is_no_file_of_tensors(tmp_path: Path) -> None:
    whole = dict(fxpeft.adapter_state_dict(tasks()))
    (tmp_path / "code.bin").write_bytes(pickle.dumps({"prompt_embeddings": Runs()}))
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    torch.save([1], tmp_path / "list.bin")
    save_file({"prompt_embeddings": torch.ones(VIRTUAL, 32)}, tmp_path / "plain.safetensors")
    save_file({k: v.contiguous() for k, v in whole.items()}, tmp_path / "whole.safetensors")
    for name, fields, message in (
        (None, {}, "prompt_tuning_init_state_dict_path: prompt_tuning_init='EXACT_SOURCE_TASK' needs it, found None"),
        ("none.bin", {}, "expected a file, found none"),
        ("code.bin", {}, "can't be read as tensors"),
        ("cut.safetensors", {}, "can't be read as tensors"),
        ("list.bin", {}, "expected a dict of tensors, found list"),
        ("plain.safetensors", {}, "expected a tensor prefix_task_cols"),
        ("whole.safetensors", {"prompt_tuning_init_task": 3}, "one of the 3 tasks in .*, found 3"),
        ("whole.safetensors", {"prompt_tuning_init_task": None}, "one of the 3 tasks in .*, found None"),
        ("whole.safetensors", {"num_tasks": 2}, r"expected \[2, 4, 2\], .* found \[1, 4, 2\] \(num_tasks: 1"),
        ("whole.safetensors", {"num_virtual_tokens": 5}, r"prompt_embeddings: expected \[5, 32\], .* \[4, 32\]$"),
    ):
        given = {"num_virtual_tokens": VIRTUAL, "num_ranks": 2, "prompt_tuning_init": "EXACT_SOURCE_TASK", **fields}
        path = None if name is None else str(tmp_path / name)
        model = tiny_llama()
        with pytest.raises(AdapterError, match=message):
            fxpeft.add_adapter(model, MultitaskPromptTuningConfig(**given, prompt_tuning_init_state_dict_path=path))
        assert type(model) is type(tiny_llama())


def test_a_file_that_is_loaded_names_no_other_to_be_read(tmp_path: Path) -> None:
    fxpeft.save_adapter(tasks(), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    other = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "/etc/passwd"}
    path.write_text(json.dumps({**config, **other}), "utf-8")
    for trainable in (False, True):
        model = tiny_llama()
        fxpeft.load_adapter(model, tmp_path, trainable=trainable)
        ids = torch.tensor([2, 1])
        assert_close(logits(model, task_ids=ids), logits(tasks(), task_ids=ids), terms=1)


def test_rows_name_their_tasks() -> None:
    model = tasks()
    each = [logits(model, task_ids=torch.tensor([task])) for task in range(3)]
    assert all((one - other).abs().max() > 1e-2 for one, other in pairwise(each))
    assert_close(logits(model, task_ids=torch.tensor([2, 0])), torch.stack((each[2][0], each[0][1])))
    for ids, message in (
        (None, "task_ids: expected a tensor of each row's task, from 0 to 2, found None"),
        (torch.tensor([0.0, 1.0]), "expected a tensor of each row's task"),
        (torch.tensor([0, 3]), r"expected tasks from 0 to 2, found \[0, 3\]"),
        (torch.tensor([0, -1]), "expected tasks from 0 to 2"),
        (torch.tensor([0, 1, 2]), "expected 3 rows, as they were named, found 2"),
    ):
        with pytest.raises(AdapterError, match=message):
            logits(model, task_ids=ids)
    one = tasks(1)
    assert_close(logits(one), logits(one, task_ids=torch.tensor([0, 0])))


def test_one_task_is_a_plain_prompt(tmp_path: Path) -> None:
    """In slots and in PEFT, which can't tell it from prompt tuning's; the whole adapter says what to do."""
    model = tasks()
    fxpeft.save_adapter(model, tmp_path / "all")
    served = tiny_llama()
    fxpeft.prepare_hotswap(served, methods=("multitask_prompt_tuning",), num_virtual_tokens=VIRTUAL)
    with pytest.raises(AdapterError, match=r"for each of 3 tasks, and a slot holds one.*fxpeft\.one_task"):
        fxpeft.load_adapter(served, tmp_path / "all")
    with pytest.raises(AdapterError, match="for each of 3 tasks"):
        fxpeft.prepare_hotswap(tasks(), methods=("prompt_tuning",))
    for task in (0, 2):
        folder, wanted = tmp_path / str(task), logits(model, task_ids=torch.tensor([task]))
        if task:
            run("convert", tmp_path / "all", folder, "--task", task)
        else:
            fxpeft.one_task(tmp_path / "all", folder, task)
        fxpeft.load_adapter(served, folder, f"task{task}")
        assert_close(logits(served), wanted)
        assert_close(logits(peft.PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()), wanted)
        assert fxpeft.adapter_config(served).peft_type == "PROMPT_TUNING"
    with pytest.raises(AdapterError, match="task_ids: a slot holds one task's prompt"):
        logits(served, task_ids=torch.tensor([0, 1]))
    with pytest.raises(AdapterError, match="task: expected one of 3, 0 to 2, found 3"):
        fxpeft.one_task(tmp_path / "all", tmp_path / "no", 3)
    with pytest.raises(AdapterError, match="expected MULTITASK_PROMPT_TUNING, found PROMPT_TUNING"):
        fxpeft.one_task(tmp_path / "0", tmp_path / "no", 0)
    save_file({"prompt_embeddings": torch.ones(VIRTUAL, 32)}, tmp_path / "all" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="expected tensors"):
        fxpeft.one_task(tmp_path / "all", tmp_path / "no", 0)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("declared", ["multitask_prompt_tuning", "prompt_tuning"])
def test_an_encoder_decoders_slot_takes_prompts_with_and_without_a_second_half(declared: str, tmp_path: Path) -> None:
    """PEFT's default has one, which nothing reads; a multitask prompt has none."""
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    wanted = []
    for name, config in (
        ("halves", fxpeft.PromptTuningConfig(num_virtual_tokens=VIRTUAL)),
        ("task", MultitaskPromptTuningConfig(num_virtual_tokens=VIRTUAL, num_transformer_submodules=1)),
    ):
        model = tiny_t5()
        fxpeft.add_adapter(model, config)
        randomise(model.adapters.parameters(), seed=len(name), scale=0.9)
        fxpeft.save_adapter(model, tmp_path / name)
        with torch.no_grad():
            wanted.append(model(**inputs).logits)
    served = tiny_t5()
    fxpeft.prepare_hotswap(served, methods=(declared,), num_virtual_tokens=VIRTUAL)
    for name, expected in zip(("halves", "task"), wanted, strict=True):
        fxpeft.load_adapter(served, tmp_path / name, name)
        with torch.no_grad():
            assert_close(served(**inputs).logits, expected)


# --- cartridges ---


def test_frozen_tokens_stay_and_come_back_frozen(tmp_path: Path) -> None:
    """No weight decay reaches them; a loaded cartridge is parted again."""
    model, peer = causal(CartridgeConfig, peft.CartridgeConfig, num_virtual_tokens=VIRTUAL, num_frozen_tokens=3)
    first = model.adapters.default.frozen.clone()
    for each in (model, peer):
        optimiser = torch.optim.AdamW(each.parameters(), lr=0.1, weight_decay=0.5)
        each(IDS, labels=IDS).loss.backward()
        for parameter in each.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
        optimiser.step()
    assert torch.equal(model.adapters.default.frozen, first)
    found = fxpeft.adapter_state_dict(model)["prompt_embeddings"]
    assert_close(found, peer.prompt_encoder.default.weight)
    assert not torch.allclose(found[3:], torch.cat((first, found[3:]))[:1], atol=1e-3)
    fxpeft.save_adapter(model, tmp_path)
    again = tiny_llama()
    fxpeft.load_adapter(again, tmp_path, trainable=True)
    own = again.adapters.default
    assert (own.frozen.shape, own.embedding.shape) == ((3, found.shape[1]), (1, found.shape[1]))
    assert [p is own.embedding for p in trained(again)] == [True]
    assert_close(logits(again), logits(model), terms=1)
    other = tiny_llama()
    fxpeft.add_adapter(other, CartridgeConfig(num_virtual_tokens=VIRTUAL, num_frozen_tokens=0))
    fxpeft.load_adapter_state_dict(other, {"prompt_embeddings": found})
    assert_close(logits(other), logits(model), terms=1)
    assert not hasattr(other.adapters.default, "frozen")


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen, gemma4])
def test_a_cartridge_of_a_text_is_the_text(make: Callable[[], Any]) -> None:
    """A text that was read once stands in the prefix: what comes after it is as if it had been read again."""
    model, ids = make(), token_ids(1, 12)
    with torch.no_grad():
        wanted = model(ids).logits[:, 5:]
        read = model(ids[:, :7], use_cache=True)
    fxpeft.add_adapter(model, CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2))
    cache = read["cache"] if "cache" in read else read["past_key_values"]
    fxpeft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    with torch.no_grad():
        assert_close(model(ids[:, 5:]).logits, wanted)


def test_a_start_from_a_text_is_pefts(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tmp_path)
    model, peer = causal(CartridgeConfig, peft.CartridgeConfig, num_virtual_tokens=VIRTUAL)
    found = fxpeft.initialize_kv_prefix_from_text(model, words, text="a b c b a b")
    wanted = peft.initialize_kv_prefix_from_text(peer, words, text="a b c b a b")
    assert_close(found, wanted)
    assert_close(fxpeft.adapter_state_dict(model)["prompt_embeddings"], peer.prompt_encoder.default.weight)
    assert_close(logits(model), logits(peer))
    fxpeft.prepare_hotswap(model, methods=("cartridge",))
    fxpeft.initialize_kv_prefix_from_text(model, words, text="c a a b")
    peft.initialize_kv_prefix_from_text(peer, words, text="c a a b")
    assert_close(logits(model), logits(peer))
    before = logits(model)
    for text, message in (("a b", "expected the first 4 tokens, as num_virtual_tokens says, found 2"),):
        with pytest.raises(AdapterError, match=message):
            fxpeft.initialize_kv_prefix_from_text(model, words, text=text)
    pair: Tensor = torch.zeros(1, 2, 9, 8)
    for cache, message in (
        ([(pair, pair)], "expected layer 1 in it, found 1 layers"),
        ([(pair.repeat(2, 1, 1, 1),) * 2] * 2, r"layer 0: expected \[1, 2, tokens, 8\], found \[2, 2, 9, 8\]"),
        ([(pair[..., :7],) * 2] * 2, r"expected \[1, 2, tokens, 8\], found \[1, 2, 9, 7\]"),
    ):
        with pytest.raises(AdapterError, match=message):
            fxpeft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    assert torch.equal(logits(model), before)
    for name in ("prompt", "projected"):
        with pytest.raises(AdapterError, match="expected a cartridge, or a prefix without a projection"):
            fxpeft.initialize_kv_prefix_from_past_key_values(prompted(name), past_key_values=[])


def test_cartridges_one_behind_the_other(tmp_path: Path) -> None:
    for name, count in (("one", 3), ("two", 4)):
        model = tiny_llama()
        fxpeft.add_adapter(model, CartridgeConfig(num_virtual_tokens=count, num_frozen_tokens=2, task_type="CAUSAL_LM"))
        randomise(model.adapters.parameters(), seed=count)
        fxpeft.save_adapter(model, tmp_path / name)
    paths = [str(tmp_path / name) for name in ("one", "two")]
    fxpeft.compose_cartridge_adapters(paths, output_path=tmp_path / "ours")
    peft.tuners.cartridge.utils.compose_cartridge_adapters(paths, output_path=tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() == {"prompt_embeddings"}
    assert torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])
    for folder in ("ours", "theirs"):
        model = tiny_llama()
        fxpeft.load_adapter(model, tmp_path / folder)
        config: Any = fxpeft.adapter_config(model)
        assert (config.num_virtual_tokens, config.num_frozen_tokens) == (7, 2)
    assert_close(logits(peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"))), logits(model))
    other = prompted("prefix")
    fxpeft.save_adapter(other, tmp_path / "prefix")
    for given, message in (
        (paths[:1], "expected two cartridges or more, found 1"),
        ([*paths, str(tmp_path / "prefix")], "expected a CARTRIDGE adapter, found PREFIX_TUNING"),
    ):
        with pytest.raises(AdapterError, match=message):
            fxpeft.compose_cartridge_adapters(given, output_path=tmp_path / "no")
    assert not (tmp_path / "no").exists()


# --- what is refused, and the command line ---

REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "frozen": (
        tiny_llama, lambda: CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=4),
        "num_frozen_tokens: expected 0 to 3, the number of virtual tokens, found 4",
    ),
    "fewer": (tiny_llama, lambda: CartridgeConfig(num_frozen_tokens=-1), "num_frozen_tokens: expected 0 or more"),
    "ranks": (tiny_llama, lambda: MultitaskPromptTuningConfig(num_ranks=0), "num_ranks: expected a positive"),
    "two submodules": (
        tiny_t5, lambda: MultitaskPromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
        "num_transformer_submodules: expected 1, found 2, PEFT's default",
    ),
    "a classifier": (tiny_bert, lambda: CPTConfig(cpt_token_ids=[1]), "CPT is for CAUSAL_LM alone.*BertFor.*SEQ_CLS"),
    "another task": (tiny_llama, lambda: CPTConfig(task_type="SEQ_CLS"), "CPT is for CAUSAL_LM alone"),
    "no tokens": (tiny_llama, lambda: CPTConfig(cpt_token_ids=[]), "cpt_token_ids: expected some tokens.*found 0"),
    "another length": (
        tiny_llama, lambda: CPTConfig(cpt_token_ids=[1, 2], num_virtual_tokens=3), "expected 3 tokens.*found 2",
    ),
    "types": (
        tiny_llama, lambda: CPTConfig(cpt_token_ids=[1, 2], cpt_tokens_type_mask=[1]),
        "cpt_tokens_type_mask: expected 2 numbers, as cpt_token_ids has, found 1",
    ),
    "no type": (
        tiny_llama, lambda: CPTConfig(cpt_token_ids=[1], cpt_tokens_type_mask=[-4]), "expected numbers from 0 on",
    ),
    "length": (tiny_llama, lambda: CPTConfig(opt_projection_epsilon=-0.1), "opt_projection_epsilon: expected a length"),
    "vocabulary": (
        tiny_llama, lambda: CPTConfig(cpt_token_ids=[1, 40]), "expected tokens below 40.*found 40; are they another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    make, config, message = REFUSED[case]
    model = make()
    with pytest.raises(AdapterError, match=message):
        fxpeft.add_adapter(model, config())
    assert "adapters" not in model._modules


def test_labels_that_no_type_counts_are_refused() -> None:
    """PEFT's loss is NaN there; with types of the input that are labels it is a number."""
    model, peer = causal(CPTConfig, peft.CPTConfig, cpt_token_ids=[3, 9])
    assert peer(IDS, labels=IDS).loss.isnan()
    with pytest.raises(AdapterError, match=r"cpt_tokens_type_mask ends with 1.*the loss is no number"):
        model(IDS, labels=IDS)
    with pytest.raises(AdapterError, match=r"input_type_mask: expected \[2, 6\], as labels, found \[2, 5\]"):
        model(IDS, labels=IDS, input_type_mask=torch.ones(2, 5))
    types = torch.full_like(IDS, 3)
    assert_close(
        model(IDS, labels=IDS, input_type_mask=types).loss, peer(IDS, labels=IDS, input_type_mask=types.clone()).loss
    )


def test_defaults_and_lengths_are_pefts() -> None:
    for ours, theirs in (
        (CPTConfig(), peft.CPTConfig(task_type="CAUSAL_LM")),
        (MultitaskPromptTuningConfig(), peft.MultitaskPromptTuningConfig()),
        (CartridgeConfig(), peft.CartridgeConfig()),
    ):
        written = json.loads(json.dumps({k: list(v) if isinstance(v, set) else v for k, v in theirs.to_dict().items()}))
        own = ours.to_dict()
        unsaid = {"peft_version", "task_type", "num_transformer_submodules"}
        assert own.keys() == written.keys() - {"peft_version"}
        assert {k: v for k, v in own.items() if k not in unsaid} == {
            k: v for k, v in written.items() if k not in unsaid
        }


@pytest.mark.parametrize("name", ["task", "context", "cartridge"])
def test_the_command_line_knows_them(name: str, tmp_path: Path) -> None:
    model = prompted(name)
    fxpeft.save_adapter(model, tmp_path / "one")
    wanted = logits(model)
    randomise(trained(model.adapters), seed=9)
    fxpeft.save_adapter(model, tmp_path / "two")
    one, two, half = (str(tmp_path / each) for each in ("one", "two", "half"))
    said = told("inspect", one)
    assert fxpeft.adapter_config(model).peft_type in json.dumps(said)
    assert "prompt_embeddings" in run("diff", one, two, code=1)
    run("convert", one, half, "--dtype", "float16")
    again = tiny_llama()
    fxpeft.load_adapter(again, half)
    torch.testing.assert_close(logits(again), wanted, atol=0.01, rtol=0)


def test_both_of_a_seed() -> None:
    """What is shared of tasks begins as prompt tuning's does, with a text or tokens of the vocabulary too."""
    model, peer = both(tiny_llama(), "multitask", prompt_tuning_init="SAMPLE_VOCAB")
    for own, other in zip(trained(model), trained(peer), strict=True):
        assert torch.equal(own, other)
