"""The command line, on tiny folders: as a subprocess where exit codes and streams count, else in this process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from commands import run, told
from peer_files import CASES, FILES
from processes import python
from tiny import randomise, tiny_bert, tiny_llama, token_ids

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.checkpoint import Checkpoint, read
from fxpeft.checkpoint.adapter_file import diff_files, shrink, site_scale, site_tensors

TARGETS = "role:attention | role:mlp.down"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and adapters ``a`` (ranks 6 and 3), ``b`` (rank 2, rsLoRA, an embedding) and ``whole``."""
    root = tmp_path_factory.mktemp("cli")
    model = tiny_llama()
    model.save_pretrained(root / "base")
    configs = {
        "a": LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS, rank_pattern={"role:mlp.down": 3},
                        alpha_pattern={"layers[1:]": 5}, base_model_name_or_path="the/base"),
        "b": LoraConfig(r=5, lora_alpha=4, target_modules=["q_proj", "embed_tokens"], use_rslora=True),
        "whole": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }  # fmt: skip
    for seed, (name, config) in enumerate(configs.items()):
        fxpeft.add_adapter(model, config)
        randomise((p for n, p in model.named_parameters() if "lora_" in n), seed=seed)
        fxpeft.save_adapter(model, root / name)
        fxpeft.remove(model)
    return root


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return python("-m", "fxpeft", *arguments, timeout=180)


# --- as a subprocess ---


def test_plan_prints_a_table_and_writes_the_plan(folder: Path, tmp_path: Path) -> None:
    done = process("plan", folder / "base", "--target", TARGETS, "--rank", 4, "--save", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert "model.layers.{0-1}.mlp.down_proj" in done.stdout
    plan = fxpeft.Plan.from_json((tmp_path / "plan.json").read_text())
    config = LoraConfig(r=4, target_modules=TARGETS, base_model_name_or_path=str(folder / "base"))
    assert plan == fxpeft.plan(tiny_llama(), config)
    fxpeft.apply(plan, tiny_llama())


def test_a_wrong_question_is_one_message_and_code_2(folder: Path) -> None:
    done = process("plan", folder / "base", "--target", "role:attention.qury")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: target_modules='role:attention.qury' selects nothing:")
    assert "nearest: attention.query" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_answers_with_its_exit_code(folder: Path) -> None:
    fits = process("check", folder / "a", "--model", folder / "base", "--json")
    assert fits.returncode == 0, fits.stderr
    assert json.loads(fits.stdout) == {"loads": True, "swaps": True, "why_not": None, "sites": 10}
    tight = process("check", folder / "a", "--model", folder / "base", "--max-rank", 4)
    assert tight.returncode == 1
    assert "loads: yes\nswaps: no\n" in tight.stdout
    assert "model.layers.0.self_attn.q_proj: rank 6 is above max_rank 4" in tight.stdout


# --- in this process ---


def test_plan_takes_names_patterns_and_pefts_expressions(folder: Path) -> None:
    base = folder / "base"
    for targets, count in [
        (("q_proj",), 2), (("q_proj", "k_proj"), 4), (("all-linear",), 14), ((r".*\.q_proj",), 2), ((), 4),
        (("layers[1:] & role:mlp",), 3), (("q_proj", "role:mlp.up"), 4),
    ]:  # fmt: skip
        options = [o for t in targets for o in ("--target", t)]
        assert len(told("plan", base, *options)["sites"]) == count, targets
    left = told("plan", base, "--target", "role:mlp", "--exclude", "layers[0:1]", "--method", "dora", "--rank", 2)
    assert [s["parameters"] for s in left["sites"]] == [2 * 80 + 48, 2 * 80 + 48, 2 * 80 + 32]
    assert left["config"]["use_dora"] is True


def test_plan_draws(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency")
    run("plan", folder / "base", "--target", "role:mlp", "--draw", tmp_path / "p.svg", "--layer", 1)
    assert "model.layers.1" in (tmp_path / "p.svg").read_text()


def test_inspect(folder: Path) -> None:
    seen = told("inspect", folder / "a")
    assert (seen["method"], seen["base"], seen["sites"], seen["ranks"]) == ("lora", "the/base", 10, [3, 6])
    assert seen["dtypes"] == ["float32"]
    assert seen["bytes"] == 4 * seen["parameters"] == sum(4 * s["parameters"] for s in seen["site"])
    found = read(folder / "a")
    for site in seen["site"]:
        own = site_tensors(found)[0][site["name"]]
        alpha = 5 if ".1." in site["name"] else 9
        expected = (own["lora_B"] @ own["lora_A"] * alpha / site["rank"]).norm()
        assert site["norm"] == pytest.approx(float(expected), rel=1e-5)
    text = run("inspect", folder / "whole")
    assert "base_model.model.lm_head.weight [40, 32]" in text
    rows = [line.split()[:2] for line in text.splitlines()]
    assert ["model.layers.1.self_attn.q_proj", "2"] in rows


def test_check_says_why_not(folder: Path, tmp_path: Path) -> None:
    base = folder / "base"
    assert told("check", folder / "whole", "--model", base)["swaps"] is True
    slots = told("check", folder / "a", "--model", base, "--slots", "role:mlp", code=1)
    assert (slots["loads"], slots["swaps"]) == (True, False)
    assert "model.layers.0.self_attn.q_proj: has no slot" in slots["why_not"]
    other = tiny_llama()
    other.config.intermediate_size, other.config.architectures = 50, ["LlamaForCausalLM"]
    other.config.save_pretrained(tmp_path / "other")
    wrong = told("check", folder / "a", "--model", tmp_path / "other", code=1)
    assert (wrong["loads"], wrong["swaps"]) == (False, False)
    assert "expected [3, 50], found [3, 48]" in wrong["why_not"]


@torch.no_grad()
def update(folder: Path, name: str) -> dict[str, torch.Tensor]:
    found = read(folder / name)
    sites = site_tensors(found)[0]
    return {
        n: t["lora_B"].double() @ t["lora_A"].double() * site_scale(found.config, n, len(t["lora_A"]))
        for n, t in sites.items()
    }


@pytest.mark.parametrize(("name", "rank"), [("a", 2), ("a", 4), ("b", 2), ("b", 9)])
def test_convert_to_a_smaller_rank_is_the_best_one(folder: Path, tmp_path: Path, name: str, rank: int) -> None:
    result = told("convert", folder / name, tmp_path / "out", "--rank", rank)
    before, after = update(folder, name), update(tmp_path, "out")
    old = {n: len(t["lora_A"]) for n, t in site_tensors(read(folder / name))[0].items()}
    assert set(result["errors"]) == {n for n, r in old.items() if r > rank}
    for site, whole in before.items():
        values = torch.linalg.svdvals(whole)
        best = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        error = float((whole - after[site]).norm() / whole.norm())
        assert error == pytest.approx(best, abs=2e-6)
        assert result["errors"].get(site, 0.0) == pytest.approx(error, abs=2e-6)
        new = len(site_tensors(read(tmp_path / "out"))[0][site]["lora_A"])
        assert new == min(rank, old[site])
    assert result["worst_error"] == max([0.0, *result["errors"].values()])


@pytest.mark.parametrize("release", ["0.17", "0.18", "0.21"])
def test_convert_leaves_stacks_in_the_layout_of_the_release_that_it_names(release: str, tmp_path: Path) -> None:
    case = CASES["square"]
    run("convert", FILES / f"peft-{release}" / "square", tmp_path, "--dtype", "float32")
    named = json.loads((tmp_path / "adapter_config.json").read_text()).get("peft_version")
    assert named == {"0.17": None, "0.18": "0.18.1", "0.21": "0.21.2"}[release]
    found, wanted = case.base(), case.base()
    fxpeft.load_adapter(found, tmp_path)
    fxpeft.load_adapter(wanted, FILES / f"peft-{release}" / "square")
    with torch.no_grad():
        assert torch.equal(case.run(found), case.run(wanted))
        assert (case.run(found) - case.run(case.base())).abs().max() > 0.1


def test_what_convert_writes_is_pefts_too(folder: Path, tmp_path: Path) -> None:
    run("convert", folder / "a", tmp_path / "small", "--rank", 4)
    ids, model = token_ids(), tiny_llama()
    fxpeft.load_adapter(model, tmp_path / "small")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "small")
    with torch.no_grad():
        ours = model(ids).logits
        assert (ours - tiny_llama()(ids).logits).abs().max() > 1e-2
        assert_close(theirs(ids).logits, ours)


def test_convert_dtypes(folder: Path, tmp_path: Path) -> None:
    run("convert", folder / "a", tmp_path / "half", "--dtype", "bfloat16")
    old, new = read(folder / "a"), read(tmp_path / "half")
    assert new.config == old.config
    assert all(torch.equal(new.tensors[k], t.bfloat16()) for k, t in old.tensors.items())
    big = Checkpoint("big", old.config, {k: t * 1e6 for k, t in old.tensors.items()})
    from fxpeft.checkpoint.adapter_file import cast

    with pytest.raises(AdapterError, match=r"values too large for torch\.float16"):
        cast(big, torch.float16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "say what to: --dtype, --rank, --to or --for"),
        (("--rank", 2), "only a plain LoRA can be given a smaller rank; .*dora"),
    ],
)
def test_what_cannot_be_converted(folder: Path, tmp_path: Path, options: tuple[Any, ...], message: str) -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["q_proj"], use_dora=True))
    fxpeft.save_adapter(model, tmp_path / "dora")
    with pytest.raises(AdapterError, match=message):
        run("convert", tmp_path / "dora", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_rank_below_one_is_refused(folder: Path) -> None:
    with pytest.raises(AdapterError, match="rank: expected a positive number, found 0"):
        shrink(read(folder / "a"), 0)


def test_diff(folder: Path, tmp_path: Path) -> None:
    assert run("diff", folder / "a", folder / "a") == "no difference\n"
    run("convert", folder / "a", tmp_path / "c", "--rank", 4)
    found = told("diff", folder / "a", tmp_path / "c", code=1)
    assert (found["config"]["r"], found["added"], found["removed"]) == ([6, 4], [], [])
    before, after = update(folder, "a"), update(tmp_path, "c")
    assert {c["name"] for c in found["changed"]} == {n for n in before if "down" not in n}
    for change in found["changed"]:
        whole, less = before[change["name"]], after[change["name"]]
        assert change["ranks"] == [6, 4]
        assert change["distance"] == pytest.approx(float((whole - less).norm() / whole.norm()), abs=1e-6)
    text = run("diff", folder / "a", folder / "b", code=1)
    assert "+ model.embed_tokens" in text.splitlines()
    assert "- model.layers.0.mlp.down_proj" in text.splitlines()


def test_diff_sees_what_is_no_site() -> None:
    config = LoraConfig(target_modules=["x"])
    old = Checkpoint("old", config, {"base_model.model.head.weight": torch.ones(2)})
    new = Checkpoint("new", config, {"base_model.model.head.weight": torch.zeros(2)})
    assert diff_files(old, new).rest == ("base_model.model.head.weight",)
    assert not diff_files(old, old)


def test_bench_measures_without_recompiling(folder: Path) -> None:
    seen = told("bench", folder / "base", "--random", "--rounds", 2, "--rank", 2, "--length", 4)
    assert set(seen["milliseconds"]) == {"base", "adapter", "swap"}
    assert all(value > 0 for value in seen["milliseconds"].values())
    assert (seen["sites"], seen["graphs"]) == (14, 0)
    with pytest.raises(AdapterError, match="rank: expected at most max_rank 4, found 9"):
        run("bench", folder / "base", "--rank", 9, "--max-rank", 4)
    with pytest.raises(AdapterError, match="expected a model's folder or hub id"):
        run("bench", folder / "nowhere")


def test_fold_saves_a_model_with_the_adapter_in_its_weights(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    with pytest.raises(AdapterError, match=r"names no base model"):
        run("fold", folder / "b", output)
    found = told("fold", folder / "b", output, "--model", folder / "base")
    assert "model.embed_tokens" in found["sites"]
    model = tiny_llama()
    fxpeft.load_adapter(model, folder / "b")
    merged = type(model).from_pretrained(output).eval()
    with torch.no_grad():
        assert_close(merged(token_ids()).logits, model(token_ids()).logits)
        assert not torch.allclose(merged(token_ids()).logits, tiny_llama()(token_ids()).logits, atol=1e-3)
    with pytest.raises(AdapterError, match="new or an empty folder"):
        run("fold", folder / "b", output, "--model", folder / "base")


def test_convert_makes_a_plain_lora_of_another_method(folder: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, fxpeft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=9, target_modules=["q_proj"]))
    randomise(fxpeft.adapter_state_dict(model).values())
    fxpeft.save_adapter(model, tmp_path / "adalora")
    told("convert", tmp_path / "adalora", tmp_path / "lora", "--to", "lora", "--model", folder / "base")
    assert isinstance(read(tmp_path / "lora").config, LoraConfig)
    plain = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        assert_close(plain(token_ids()).logits, model(token_ids()).logits)
    with pytest.raises(AdapterError, match="--dtype, --rank, --to or --for"):
        run("convert", tmp_path / "adalora", tmp_path / "other")


def test_convert_for_an_engine_is_one_rank_and_one_scale(folder: Path, tmp_path: Path) -> None:
    ids = token_ids()

    def outputs(adapter: Path, **options: Any) -> torch.Tensor:
        model = type(tiny_llama()).from_pretrained(folder / "base")
        fxpeft.load_adapter(model.eval(), adapter, **options)
        with torch.no_grad():
            return model(ids).logits

    model = type(tiny_llama()).from_pretrained(folder / "base")
    fxpeft.add_adapter(model, fxpeft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "v_proj"]))
    randomise(fxpeft.adapter_state_dict(model).values(), seed=5)
    fxpeft.save_adapter(model, tmp_path / "loha")
    for name, source, engine, rank in (
        ("a", folder / "a", "vllm", 6), ("b", folder / "b", "llama.cpp", 5), ("loha", tmp_path / "loha", "sglang", 4),
        ("whole", folder / "whole", "peft", 2),
    ):  # fmt: skip
        made = told("convert", source, tmp_path / name / engine, "--for", engine, "--model", folder / "base")
        assert made["worst_error"] < 1e-6
        config = json.loads((tmp_path / name / engine / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
        assert (config["rank_pattern"], config["alpha_pattern"], config["peft_type"]) == ({}, {}, "LORA")
        factors = read(tmp_path / name / engine).tensors
        assert {t.shape[0] for k, t in factors.items() if k.endswith(("lora_A.weight", "embedding_A"))} == {rank}
        assert_close(outputs(tmp_path / name / engine), outputs(source))
        peer = peft.PeftModel.from_pretrained(
            type(tiny_llama()).from_pretrained(folder / "base"), str(tmp_path / name / engine)
        ).eval()
        with torch.no_grad():
            assert_close(peer(ids).logits, outputs(source))


@pytest.mark.parametrize("name", ["head", "biases", "tokens"])
def test_convert_splits_off_what_no_engine_reads(name: str, tmp_path: Path) -> None:
    build, ids = (tiny_bert if name == "biases" else tiny_llama), token_ids()
    fields: dict[str, Any] = {
        "head": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
        "biases": {"target_modules": ["query"], "bias": "lora_only", "task_type": "SEQ_CLS"},
        "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3, 5, 9], "use_rslora": True},
    }[name]
    build().save_pretrained(tmp_path / "base")
    model = build()
    fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=5, **fields))
    randomise(fxpeft.adapter_state_dict(model).values(), seed=2)
    fxpeft.save_adapter(model, tmp_path / "adapter")
    made = told("convert", tmp_path / "adapter", tmp_path / "plain", "--for", "vllm", "--rest", tmp_path / "rest")
    assert made["rest_tensors"]
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in read(tmp_path / "plain").tensors)
    # the rest is an adapter, which PEFT loads too; the base with it folded in and the plain LoRA are the adapter
    told("fold", tmp_path / "rest", tmp_path / "served", "--model", tmp_path / "base")
    served = build().from_pretrained(tmp_path / "served").eval()
    fxpeft.load_adapter(served, tmp_path / "plain")
    peer = peft.PeftModel.from_pretrained(build(), str(tmp_path / "rest")).eval()
    folded = build().from_pretrained(tmp_path / "served").eval()
    with torch.no_grad():
        assert_close(served(ids).logits, model(ids).logits)
        assert_close(peer(ids).logits, folded(ids).logits)
        assert (folded(ids).logits - build()(ids).logits).abs().max() > 1e-3
    with pytest.raises(AdapterError, match="--rest needs --for"):
        run("convert", tmp_path / "adapter", tmp_path / "out", "--dtype", "float16", "--rest", tmp_path / "other")


def test_convert_for_an_engine_says_what_it_cannot_take(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"vllm can't take it:\n.*lm_head.weight: it reads nothing beside the sites"):
        run("convert", folder / "whole", tmp_path / "out", "--for", "vllm")
    model = tiny_llama()
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[3, 5]))
    fxpeft.save_adapter(model, tmp_path / "tokens")
    with pytest.raises(AdapterError, match=r"sglang can't take it:\n.*trainable_tokens_delta: it reads nothing beside"):
        run("convert", tmp_path / "tokens", tmp_path / "out", "--for", "sglang")
    shown = told("inspect", tmp_path / "tokens")
    assert list(shown["other"].values()) == [[2, 32]]
    assert shown["config"]["trainable_token_indices"] == [3, 5]
    checked = told("check", tmp_path / "tokens", "--model", folder / "base")
    assert (checked["loads"], checked["swaps"]) == (True, True)
    assert told("diff", tmp_path / "tokens", tmp_path / "tokens")["rest"] == []
    fxpeft.remove(model)
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["q_proj"], use_dora=True))
    randomise((p for n, p in model.named_parameters() if "lora_" in n), seed=1)
    fxpeft.save_adapter(model, tmp_path / "dora")
    with pytest.raises(AdapterError, match="multiplies what the base computes"):
        run("convert", tmp_path / "dora", tmp_path / "out", "--for", "vllm", "--model", folder / "base")
    made = told(
        "convert", tmp_path / "dora", tmp_path / "near", "--for", "vllm", "--rank", 3, "--model", folder / "base"
    )
    assert made["parameters"] == 2 * 3 * (32 + 32)
    assert not (tmp_path / "out").exists()
    for name, config in {
        "vera": fxpeft.VeraConfig(r=5, target_modules=["q_proj", "v_proj"]), "norms": fxpeft.LNTuningConfig(),
        "rows": fxpeft.TrainableTokensConfig(token_indices=[4]),
    }.items():  # fmt: skip
        fxpeft.remove(model)
        fxpeft.add_adapter(model, config)
        fxpeft.save_adapter(model, tmp_path / name)
        assert told("inspect", tmp_path / name)["method"] in ("vera", "ln_tuning", "trainable_tokens")
        assert told("check", tmp_path / name, "--model", folder / "base")["swaps"]
