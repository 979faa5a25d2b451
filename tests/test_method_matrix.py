"""What each method can do, tried: the README's table of methods is what happened here."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import spread
from closeness import assert_close
from method_cases import KINDS, METHODS
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import fxpeft
from fxpeft import AdapterError
from fxpeft.methods import METHODS as REGISTERED
from fxpeft.methods.prompts import PromptLearningConfig

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
START, END = "<!-- matrix -->\n", "<!-- end matrix -->"
IDS = token_ids().clone()
IDS[0, :3] = torch.tensor([3, 17, 21])
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
VIRTUAL = 4


SPEC = importlib.util.spec_from_file_location("own_method", ROOT / "examples" / "own_method.py")
assert SPEC is not None
assert SPEC.loader is not None
OWN: Any = importlib.util.module_from_spec(SPEC)
sys.modules["own_method"] = OWN  # where its dataclasses look for it
SPEC.loader.exec_module(OWN)
EXAMPLE = OWN.Own()


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    fxpeft.register(EXAMPLE)
    yield
    REGISTERED.remove(EXAMPLE)
    torch._dynamo.reset()  # it counts the graphs of one forward, and others compile this net too


@dataclass(frozen=True)
class Case:
    """A method on a model that is small and has it: two linears, or for what is no matter of targets a Llama."""

    config: Callable[..., Any]
    declared: str
    whole: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What ``prepare_hotswap`` has to know."""
        if self.whole:
            prompt = isinstance(self.config(), PromptLearningConfig)
            return {"methods": (self.declared,), **({"num_virtual_tokens": VIRTUAL} if prompt else {})}
        return {"methods": (self.declared,), "max_rank": 16, "targets": ["first", "second"]}

    def bare(self) -> Any:
        if not self.whole:
            return KINDS["Linear"].net()
        model = tiny_llama()
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        return model

    def adapted(self, seed: int = 0, model: Any = None, name: str = "default") -> Any:
        """A model with an adapter whose every number is random, and which is the active one."""
        model = self.bare() if model is None else model
        seeded = self.declared == "trainable_tokens"  # of which two adapters have other ones
        fxpeft.add_adapter(model, self.config(seed) if seeded else self.config(), name)
        if "adapters" in model._modules:  # a prompt's encoder makes what a checkpoint holds
            randomise(model.adapters.get_submodule(name).parameters(), seed, scale=0.6)
        else:
            spread(fxpeft.adapter_state_dict(model, name), seed)
        return model

    def saved(self, folder: Path, seed: int = 0) -> Path:
        fxpeft.save_adapter(self.adapted(seed), folder)
        return folder

    def loaded(self, *folders: Path) -> Any:
        """Live, named ``a0``, ``a1``, ..."""
        model = self.bare()
        for number, folder in enumerate(folders):
            fxpeft.load_adapter(model, folder, f"a{number}")
        return model

    def input(self) -> Tensor:
        return IDS if self.whole else X

    @torch.no_grad()
    def output(self, model: Any) -> Tensor:
        found = model(self.input())
        return getattr(found, "logits", found)  # type: ignore[no-any-return]


def of(name: str) -> Case:
    return Case(METHODS[name].config, METHODS[name].declared)


CASES = {
    "LoRA": of("LoRA"),
    "DoRA": of("DoRA"),
    "AdaLoRA": of("AdaLoRA"),
    "IA3": of("IA3"),
    "prompt tuning": Case(lambda: fxpeft.PromptTuningConfig(num_virtual_tokens=VIRTUAL), "prompt_tuning", True),
    "p-tuning": Case(
        lambda: fxpeft.PromptEncoderConfig(num_virtual_tokens=VIRTUAL, encoder_hidden_size=9), "p_tuning", True
    ),
    "prefix tuning": Case(lambda: fxpeft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL), "prefix_tuning", True),
    "multitask prompts": Case(
        lambda: fxpeft.MultitaskPromptTuningConfig(num_virtual_tokens=VIRTUAL, num_ranks=2), "multitask_prompt_tuning",
        True,
    ),
    "CPT": Case(
        lambda: fxpeft.CPTConfig(cpt_token_ids=[3, 17, 21, 5], opt_projection_format_epsilon=30.0), "cpt", True
    ),
    "cartridge": Case(lambda: fxpeft.CartridgeConfig(num_virtual_tokens=VIRTUAL), "cartridge", True),
    "LoHa": of("LoHa"),
    "LoKr": of("LoKr"),
    "VeRA": of("VeRA"),
    "MiSS": of("MiSS"),
    "VB-LoRA": of("VB-LoRA"),
    "DeLoRA": of("DeLoRA"),
    "HRA": of("HRA"),
    "OFT": of("OFT"),
    "BOFT": of("BOFT"),
    "LN tuning": Case(fxpeft.LNTuningConfig, "ln_tuning", True),
    "trainable tokens": Case(
        lambda seed=0: fxpeft.TrainableTokensConfig(token_indices=[[3, 17, 22], [21, 5]][seed % 2]), "trainable_tokens",
        True,
    ),
    "[your own](examples/own_method.py)": Case(
        lambda: OWN.OwnConfig(r=5, target_modules=["first", "second"]), "own"
    ),
}  # fmt: skip


def trains(case: Case, folder: Path) -> str:
    """A loss falls, and the base stays."""
    model = case.adapted()
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    wanted = case.output(case.adapted(seed=3))
    optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.03)
    losses = []
    for _ in range(15):
        found = model(case.input())
        loss = (getattr(found, "logits", found) - wanted).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.95 * losses[0]
    assert base
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    return "yes"


def files(case: Case, folder: Path) -> str:
    """PEFT reads what was saved, to the same outputs, and what it then saves is read here."""
    model = case.adapted()
    fxpeft.save_adapter(model, folder / "ours")
    if case.declared == "own":
        assert_close(case.output(case.loaded(folder / "ours")), case.output(model))
        return "its own"
    peer = peft.PeftModel.from_pretrained(case.bare(), str(folder / "ours")).eval()
    if isinstance(case.config(), fxpeft.MultitaskPromptTuningConfig):  # whose forward asks for the task of each row
        peer.forward = functools.partial(peer.forward, task_ids=torch.zeros(len(IDS), dtype=torch.long))
    assert_close(case.output(peer), case.output(model))
    peer.save_pretrained(str(folder / "theirs"))
    assert_close(case.output(case.loaded(folder / "theirs")), case.output(peer))
    return "yes"


def adds_up(case: Case, folder: Path) -> str:
    """Two at once differ from each alone, and are in slots what they are live, where slots take them."""
    folders = [case.saved(folder / str(i), i) for i in (0, 1)]
    model = case.loaded(*folders)
    alone = [case.output(case.loaded(f)) for f in folders]
    fxpeft.set_adapter(model, ["a0", "a1"])
    both = case.output(model)
    assert all((both - each).abs().max() > 0.01 for each in alone)
    try:
        fxpeft.prepare_hotswap(model, **case.options)
    except AdapterError:
        return "live"
    assert_close(case.output(model), both)
    return "yes"


def scales(case: Case, folder: Path) -> str:
    """Another strength changes the outputs, 1 brings them back; live and in a slot the same."""
    model = case.adapted()
    first = case.output(model)
    fxpeft.set_scale(model, "default", 0.5)
    half = case.output(model)
    assert (half - first).abs().max() > 0.01
    fxpeft.set_scale(model, "default", 1)
    assert_close(case.output(model), first)
    fxpeft.prepare_hotswap(model, **case.options)
    fxpeft.set_scale(model, "default", 0.5)
    assert_close(case.output(model), half)
    return "yes"


@functools.cache
def compiled_with(methods: tuple[str, ...]) -> tuple[Any, Any]:
    """A model with slots for these methods, in one graph of Inductor's; its prompts are of a graph to come.

    What is in the cache, or before the embeddings, is one kind of slot, whichever method made it."""
    case = next(case for case in CASES.values() if case.declared == methods[0])
    model = case.bare()
    fxpeft.prepare_hotswap(model, **{**case.options, "methods": methods})
    compiled = torch.compile(model, fullgraph=True)
    case.output(compiled)
    return model, compiled


def swaps(case: Case, folder: Path) -> str:
    """Two adapters in one graph of Inductor's; "off" is the bare model, for a prompt in a graph of its own."""
    folders = [case.saved(folder / str(i), i) for i in (0, 1)]
    prompt = "num_virtual_tokens" in case.options
    model, compiled = compiled_with(next(kind for kind in PROMPTS if case.declared in kind) if prompt else
                                    NO_PROMPTS[case.whole])  # fmt: skip
    fxpeft.load_adapter(model, folders[0])
    if prompt:
        case.output(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (1, 0):
            fxpeft.hotswap(model, folders[number])
            assert_close(case.output(compiled), case.output(case.loaded(folders[number])))
    fxpeft.disable_adapters(model)
    assert_close(case.output(compiled), case.output(case.bare()))
    fxpeft.enable_adapters(model)
    fxpeft.delete_adapter(model, "default")
    return "yes"


def folds(case: Case, folder: Path) -> str:
    """The same outputs from the weights alone, which come back bit for bit."""
    model = case.adapted()
    wanted, before = case.output(model), {k: v.clone() for k, v in case.bare().state_dict().items()}
    fxpeft.fold(model)
    assert_close(case.output(model), wanted)
    folded = case.bare()
    folded.load_state_dict({k: v for k, v in model.state_dict().items() if k in before})
    assert_close(case.output(folded), wanted)
    fxpeft.unfold(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    return "yes"


def blends(case: Case, folder: Path) -> str:
    """``cat`` is the weighted sum of the updates."""
    model = case.loaded(*(case.saved(folder / str(i), i) for i in (0, 1)))
    fxpeft.add_weighted_adapter(model, ["a0", "a1"], [0.7, -0.4], "mixed", "cat")
    found = case.output(model)
    fxpeft.set_adapter(model, ["a0", "a1"])
    fxpeft.set_scale(model, "a0", 0.7)
    fxpeft.set_scale(model, "a1", -0.4)
    assert_close(found, case.output(model))
    return "yes"


def converts(case: Case, folder: Path) -> str:
    """To a LoRA, exactly or to the nearest of a rank."""
    model = case.adapted()
    wanted, word = case.output(model), "exact"
    try:
        fxpeft.convert(model, "default", new_name="lora")
    except AdapterError as error:
        if "rank" not in str(error):
            raise
        word = "nearest"
        fxpeft.convert(model, "default", new_name="lora", rank=99)
    assert fxpeft.adapter_config(model, "lora").peft_type == "LORA"
    assert_close(case.output(model), wanted)  # as many ranks as a layer has, which is all of it
    return word


def parameters(case: Case, folder: Path) -> str:
    """Experts that are one parameter."""
    config = case.config()
    if not hasattr(config, "target_parameters"):
        return ""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=40, hidden_size=32, intermediate_size=48, **sizes)).eval()
    ids = token_ids()
    with torch.no_grad():
        bare = model(ids).logits
        names = ["experts.gate_up_proj", "experts.down_proj"]
        fxpeft.add_adapter(
            model,
            replace(config, target_modules=[], rank_pattern={}, alpha_pattern={}, target_parameters=names),
        )
        randomise(fxpeft.adapter_state_dict(model).values())
        wanted = model(ids).logits
        assert (wanted - bare).abs().max() > 0.01
        fxpeft.fold(model)
        assert_close(model(ids).logits, wanted)
    return "yes"


def rewrites(case: Case, folder: Path) -> str:
    """An exported program computes what the live model does, and eject gives it back."""
    saved = case.saved(folder / "a")
    if case.whole:  # a program of the smaller net: what such a method needs is a model, whichever
        case = Case(case.config, case.declared)
    program = torch.export.export(case.bare(), (case.input(),))
    rewritten = fxpeft.rewrite(program, str(saved))
    assert_close(case.output(rewritten.module()), case.output(case.loaded(saved)))
    assert str(fxpeft.eject(rewritten).graph) == str(program.graph)
    return "yes"


@functools.cache
def packaged(folder: Path) -> Path:
    """One package for all methods that one takes."""
    methods = tuple(dict.fromkeys(case.declared for case in CASES.values() if not case.whole))
    net = KINDS["Linear"].net()
    return fxpeft.package(
        net, folder / "net.pt2", (X,), max_rank=8, targets=["first", "second"], methods=methods
    )  # fmt: skip


def packages(case: Case, folder: Path) -> str:
    """In a package it computes what the live model does."""
    if case.whole:
        fxpeft.package(case.bare(), folder / "net.pt2", (case.input(),), methods=(case.declared,))
        raise AssertionError("a package takes it now: let it compute one here")
    served = fxpeft.open_package(packaged(folder.parent))
    saved = case.saved(folder / "a")
    served.load_adapter(saved, "a")
    assert_close(served(X), case.output(case.loaded(saved)))
    return "yes"


ROWS: dict[str, Callable[[Case, Path], str]] = {
    "trains (`add_adapter`)": trains,
    "PEFT's files, both ways (`save_adapter`, `load_adapter`)": files,
    "several at once (`set_adapter`)": adds_up,
    "a scale (`set_scale`)": scales,
    "swaps in one compiled graph (`prepare_hotswap`)": swaps,
    "folds into the weights (`fold`, `refold`)": folds,
    "blends (`add_weighted_adapter`)": blends,
    "becomes a LoRA (`convert`)": converts,
    "experts and other parameters (`target_parameters`)": parameters,
    "captured programs (`rewrite`)": rewrites,
    "packages (`package`)": packages,
}
COMPILES = (swaps, packages)
PROMPTS = ("prompt_tuning", "p_tuning", "multitask_prompt_tuning", "cpt"), ("prefix_tuning", "cartridge")
NO_PROMPTS = {
    whole: tuple(
        dict.fromkeys(
            case.declared for case in CASES.values() if case.whole is whole and "num_virtual_tokens" not in case.options
        )
    )
    for whole in (False, True)
}


def cell(check: Callable[[Case, Path], str], case: Case, folder: Path) -> str:
    """What a method can do, nothing where it says that it can't."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    try:
        return check(case, folder)
    except AdapterError:
        return ""


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow if check in COMPILES else ()) for row, check in ROWS.items()]
)
def test_the_readme_says_what_each_method_can_do(row: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = [cell(ROWS[row], case, tmp_path / str(i)) for i, case in enumerate(CASES.values())]
    line = f"| {row} | " + " | ".join(found) + " |"
    text = README.read_text(encoding="utf-8")
    table = text.partition(START)[2].partition(END)[0].splitlines()
    assert table[0] == "| | " + " | ".join(CASES) + " |"
    place = 2 + list(ROWS).index(row)
    if request.config.getoption("--fxpeft-update"):
        README.write_text(text.replace(table[place], line), encoding="utf-8")
        return
    assert table[place] == line
    assert len(table) == 2 + len(ROWS)
