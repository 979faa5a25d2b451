"""Expressions and globs of strangers: no match, compile or parse hangs, and ordinary ones mean what ``re`` says."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Layer, randomise, tiny_llama
from torch import nn
from typer.testing import CliRunner

import fxpeft
from fxpeft import AdapterError, IA3Config, LoraConfig
from fxpeft.checkpoint import read
from fxpeft.passes.targets import regex as engine
from fxpeft.passes.targets.globs import Glob
from fxpeft.passes.targets.names import FORMS, NameSelector, PatternTable, Selection, pattern_value
from fxpeft.passes.targets.patterns import pattern
from fxpeft.passes.targets.regex import Expression, PatternError, limited
from fxpeft.passes.targets.terms import Subject
from fxpeft.tools.cli import app

LONG = "model.layers.1.self_attn." + "a" * 200
EVIL = r"(?:.|[a-z])*(?:[XY]|Z)"  # tried in 2**len(name) ways
TEXTS = {
    "backtracking": EVIL,
    "alternatives": r"(a|ab|abc|m|mo|b|bc|.)*(?:[XY]|Z)",
    "deep": "(" * 3000 + "q" + ")" * 3000,
    "deep groups": "(?:" * 20_000 + "q" + ")" * 20_000,
    "counts": r"(?:(?:a?){1000}){1000}Z",
    "count": r"a{1,999999999999999999999}",
    "long": r".*q|" * 200_000,
}
FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "target_modules": lambda t: {"target_modules": t},
    "exclude_modules": lambda t: {"exclude_modules": t},
    "target_parameters": lambda t: {"target_parameters": t},
    "modules_to_save": lambda t: {"modules_to_save": [t]},
    "layers_pattern": lambda t: {"layers_pattern": [t], "layers_to_transform": [1]},
    "rank_pattern": lambda t: {"rank_pattern": {t: 3}},
    "alpha_pattern": lambda t: {"alpha_pattern": {t: 3}},
}


class Named(nn.Module):
    """Twelve layers below names that are long enough to blow a backtracking match up."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"a" * 60: Layer()}) for _ in range(12))})


@pytest.fixture(autouse=True)
def _less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the time: these tests spend it all, again and again."""
    monkeypatch.setattr(engine, "SECONDS", 0.2)


def quick(call: Callable[[], Any]) -> BaseException | None:
    """The error, if there was one; fails where the call took over 5 s."""
    start = time.perf_counter()
    error: BaseException | None = None
    try:
        call()
    except BaseException as caught:  # noqa: BLE001
        error = caught
    assert time.perf_counter() - start < 5
    return error


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", TEXTS)
def test_a_hostile_expression_names_its_field(field: str, kind: str) -> None:
    values = {"r": 2, "target_modules": ["up"], **FIELDS[field](TEXTS[kind])}
    model = Named()
    error = quick(lambda: fxpeft.add_adapter(model, LoraConfig(**values)))
    assert isinstance(error, AdapterError), error
    assert field in str(error)
    assert len(str(error)) < 3000
    assert "_fxpeft" not in vars(model)


@pytest.mark.parametrize("kind", TEXTS)
def test_ia3_feedforward_modules(kind: str) -> None:
    model = Named()
    values = {"target_modules": ["up"], "feedforward_modules": TEXTS[kind]}
    error = quick(lambda: fxpeft.add_adapter(model, IA3Config(**values)))
    assert isinstance(error, AdapterError), error
    assert "feedforward_modules" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        f"re:{EVIL}",
        f"kind:linear & ~re:({EVIL})",
        "name:" + "*a" * 400,
        "name:" + "*a" * 4000,
        "class:" + "*" * 900 + "Z",
        "name:" + "{a,b}" * 190,
        "name:" + "{" * 5000,
        "(" * 5000 + "kind:linear" + ")" * 5000,
        "~" * 5000 + "kind:linear",
        "kind:linear & in>=" + "9" * 6000,
        "layers[" + "9" * 6000 + ":]",
        "layers[0," + "9" * 6000 + "] & kind:linear",
        "kind:linear & " + "up | " * 300_000 + "up",
    ],
    ids=lambda text: text[:24],
)
def test_a_hostile_pattern(text: str) -> None:
    model = Named()
    error = quick(lambda: fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=text)))
    assert isinstance(error, AdapterError), error
    assert "target_modules" in str(error)
    assert len(str(error)) < 3000


def test_many_globs_with_many_stars_take_linear_time() -> None:
    """An automaton: 20,000 long names and stars that a backtracking matcher would try in every way."""
    names = [f"model.layers.{i % 90}.{'ab' * 12}{i}.q_proj" for i in range(20_000)]
    wanted = Glob("**" + "*a*b" * 12 + "*.q_proj")
    assert quick(lambda: [wanted.takes(name) for name in names]) is None
    assert all(wanted.takes(name) for name in names[:50])
    assert not wanted.takes(names[0] + "x")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's config, and a LoRA of it."""
    root = tmp_path_factory.mktemp("hang")
    model = tiny_llama()
    model.config.save_pretrained(root / "base")
    fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]))
    randomise(fxpeft.adapter_state_dict(model).values())
    fxpeft.save_adapter(model, root / "good")
    return root


def mutated(saved: Path, folder: Path, **fields: Any) -> Path:
    """The good adapter with other fields in its config."""
    folder.mkdir()
    for file in (saved / "good").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **fields}))
    return folder


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save"]
)
def test_a_file_with_a_hostile_expression(saved: Path, tmp_path: Path, field: str) -> None:
    evil = r"(?:.|[a-z_])*(?:[XY]|Z)"
    bad = mutated(saved, tmp_path / "bad", **FIELDS[field](evil))
    model = tiny_llama()
    error = quick(lambda: fxpeft.load_adapter(model, bad))
    assert isinstance(error, AdapterError)
    assert field in str(error)
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj", "v_proj"])
    fxpeft.load_adapter(model, saved / "good")
    before = {k: v.clone() for k, v in fxpeft.adapter_state_dict(model).items()}
    error = quick(lambda: fxpeft.hotswap(model, bad))
    assert isinstance(error, AdapterError)
    assert field in str(error)
    assert all(v.equal(before[k]) for k, v in fxpeft.adapter_state_dict(model).items())
    results: list[Any] = []
    for command in (["check", bad, "--model", saved / "base"], ["inspect", bad], ["diff", bad, saved / "good"]):
        assert quick(lambda: results.append(CliRunner().invoke(app, list(map(str, command))))) is None  # noqa: B023
    assert results[0].exit_code == 1
    assert field in results[0].output
    for result in results[1:]:  # these may need no match
        assert result.exception is None or isinstance(result.exception, AdapterError | SystemExit)


def test_one_budget_for_a_whole_plan() -> None:
    """Many expressions that each take a while are given up together, not one after the other."""
    texts = {f"{EVIL}{i}": 3 for i in range(50)}
    error = quick(lambda: fxpeft.add_adapter(Named(), LoraConfig(r=2, target_modules=["up"], rank_pattern=texts)))
    assert isinstance(error, AdapterError)
    assert "gave up" in str(error)


# --- ordinary ones mean what they meant ---

NAMES = [
    *(
        f"model.layers.{i}.{part}"
        for i in (0, 1, 7, 10, 11, 31, 110)
        for part in (
            "self_attn.q_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.experts.3.w1",
            "input_norm",
        )
    ),
    *(f"model.visual.blocks.{i}.attn.qkv" for i in (0, 1, 13)),
    "model.language_model.layers.2.self_attn.k_proj",
    "lm_head",
    "model.embed_tokens",
    "model",
    "",
    "transformer.h.0.attn.c_attn",
    "transformer.h.11.mlp.c_proj",
    "encoder.layer.3.attention.self.query",
    "vision_tower.encoder.layers.4.mlp.fc1",
    "unet.down_blocks.0.attentions.1.to_q",
    "q_proj",
    "x-y.q_proj",
    "a{e}.q",
    "Q_PROJ",
    "model.layers.0.q_proj.base",
    "überlayer.0.q",
]
CORPUS = [
    r".*\.(q|v)_proj",
    r"model\.layers\.(?:1?\d)\..*",
    r"^(?!.*visual).*(?:q_proj|qkv|v_proj)$",
    r".*self_attn\.[qkvo]_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|out_proj"
    r"|fc1|fc2|o_proj|gate_proj|up_proj|down_proj|c_attn|query).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention"
    r"|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    r"model\.layers\.(0|1|2|3|4|5|6|7|8|9|10)\..*",
    r"^(.*\.)?(?=.*attn).*proj$",
    r".*(?<!\.o)_proj",
    r".*(?<=self_attn\.)[qk]_proj",
    r"model\.layers\.(\d)\1\..*",
    r"(?P<a>model)\.(?:layers|visual).*(?P=a)?",
    r"(?i).*Q_PROJ",
    r".*\.[0-9]+\.mlp.*",
    r".*\d{2,3}\..*",
    r"[^.]+",
    r"\w+\.\w+",
    r"lm_head|model\.embed_tokens",
    r"q_proj",
    r"model\.layers\.0\.self_attn\.q_proj|lm_head|x\-y\.q_proj",
    r"a{e}\.q",
    r"a{,2}.*",
    r".*[[:alpha:]]*",
    r".*x{}.*",
    r"",
    r".*(?:attn|mlp)\.(?!experts).*",
    r"(?s:.*)\.q(?#part)_proj",
    r"transformer\.h\.(?:[0-9]|1[01])\.(?:attn\.c_attn|mlp\.c_proj)",
    r".*\bq\w*\b",
    r"(?x) .* \. q_proj # names",
    r"überlayer.*",
    r"(model)?(?(1)\.layers\..*|.*q_proj)",
    r"\Amodel.*proj\Z",
    r".*\.([qv]|to_[qkv])(_proj)?",
    r"(?!)",
    r"[]a]*",
    r"[^]]*proj",
]


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.parametrize("form", ["%s", *sorted(set(FORMS.values()))])
@pytest.mark.parametrize("text", CORPUS)
def test_an_expression_means_what_re_says(text: str, form: str) -> None:
    try:
        theirs = re.compile(form % text)
    except re.error:
        with pytest.raises(PatternError):
            Expression(text, "field", form)
        return
    ours = Expression(text, "field", form)
    found = {name: ours.match(name) for name in NAMES} if form != "%s" else {}
    assert {n: m and m.span() for n, m in found.items()} == {n: (m := theirs.match(n)) and m.span() for n in found}
    assert [n for n in NAMES if ours.fullmatch(n)] == [n for n in NAMES if theirs.fullmatch(n)]


def made_up(source: random.Random, depth: int = 2) -> str:
    """An expression in the alphabet of names."""
    if depth == 0 or source.random() < 0.3:
        return source.choice(
            ["q", "_proj", r"\.", ".", r"\d", "[qv]", "[^.]", ".*", "layers", r"\w+?", "(?=.*q)", "(?!v)"]
        )
    parts = [made_up(source, depth - 1) for _ in range(source.randint(1, 3))]
    text = source.choice(["", "|"]).join(parts)
    return f"(?:{text}){source.choice(['', '?', '+', '{1,2}', '{2}'])}" if source.random() < 0.6 else f"({text})"


def test_made_up_expressions_mean_what_re_says() -> None:
    source, taken = random.Random(12), 0
    names = ["q", "qv", "l.1.q_proj", "v_proj", "layersq", "1.q", ""]  # short: re has no limit
    for _ in range(300):
        text = made_up(source)
        theirs, ours = re.compile(text), Expression(text, "field")
        wanted = [name for name in names if theirs.fullmatch(name)]
        assert [name for name in names if ours.fullmatch(name)] == wanted, text
        taken += bool(wanted)
    assert taken > 50


KEYS = [
    "q_proj",
    r"^model\.layers\.1\.self_attn\.q_proj",
    "layers.1.self_attn.q_proj",
    "layers..0.self_attn.q_proj",
    "self.attn.v_proj",
    "(q|v)_proj",
    "proj",
    r"layers\.\d\..*",
    "model.layers.10.mlp.gate_proj$",
    "lm_head|embed_tokens",
    "^lm_head",
    "x-y.q_proj",
    "mlp.experts.3.w1",
    ".mlp.gate_proj",
    "l.yers.7.input_norm",
]


def test_looked_up_keys_are_those_that_match() -> None:
    """Plain keys are looked up and not matched: the first in the dict's order wins all the same."""
    source = random.Random(3)
    for _ in range(60):
        keys = source.sample(KEYS, source.randint(1, 6))
        table = PatternTable(keys)
        expected = {n: [k for k in keys if re.match(rf"(.*\.)?({k})$", n)] for n in NAMES}
        assert {n: table.first(n) for n in NAMES} == {n: next(iter(k), None) for n, k in expected.items()}, keys
        met = {k for own in expected.values() for k in own}
        assert table.unmatched(NAMES) == [k for k in keys if k not in met]


def old_glob(glob: str) -> re.Pattern[str]:
    """The glob as a regular expression."""
    out, at = "", 0
    while at < len(glob):
        if glob.startswith("**.", at) and (at == 0 or glob[at - 1] == "."):
            out, at = out + r"(?:.*\.)?", at + 3
        elif glob[at:] == ".**":
            out, at = out + r"(?:\..*)?", at + 3
        elif glob.startswith("**", at):
            out, at = out + ".*", at + 2
        else:
            signs = {"*": r"[^.]*", "?": "[^.]", "{": "(?:", "}": ")", ",": "|"}
            out, at = out + signs.get(glob[at], re.escape(glob[at])), at + 1
    return re.compile(out)


GLOBS = [
    "**.q_proj",
    "model.layers.*.self_attn.{q,v}_proj",
    "model.**",
    "**",
    "*",
    "*.*",
    "lm_head",
    "**.{attn,mlp}.**",
    "?_proj",
    "model.layers.{1?,0}.**",
    "**.{mlp.{gate,up},self_attn.o}_proj",
    "{,model}*",
    "**o**",
    "m*l.**.w?",
    "model.layers.*.*.q*",
]


@pytest.mark.parametrize("text", GLOBS)
def test_a_glob_means_what_it_meant(text: str) -> None:
    wanted = [name for name in NAMES if old_glob(text).fullmatch(name)]
    assert [name for name in NAMES if Glob(text).takes(name)] == wanted
    assert [name for name in NAMES if pattern(f"name:{text}")(Subject(name))] == wanted


def test_a_big_model_is_planned_quickly() -> None:
    """Full names of 20,000 sites, as a list, an expression and keys: looked up, not compared each with each."""
    names = [f"model.layers.{i % 100}.mlp.experts.{i // 100}.down_proj" for i in range(20_000)]
    keys = {f"^{re.escape(n)}": i for i, n in enumerate(names)} | {n.partition(".")[2]: 1 for n in names}
    selectors = [
        NameSelector(names, exclude=names[:10], below=["lm_head"]),
        NameSelector("|".join(map(re.escape, names)), exclude=names[:10]),
        NameSelector(r".*\.experts\.\d+\.(?:up|down)_proj", exclude=names[:10]),
    ]
    for selector in selectors:
        assert quick(lambda: selector.select(names)) is None  # noqa: B023
        assert selector.select(names[:30]) == names[10:30]

    def values() -> None:
        with limited():
            assert [pattern_value(keys, name, -1) for name in names] == list(range(20_000))

    assert quick(values) is None


def test_the_time_is_this_threads() -> None:
    """A slow machine or busy threads don't use a plan's budget up: only matching does."""
    with limited() as budget:
        selection = Selection(r".*\.(q|v)_proj")
        assert selection("a.q_proj")
        time.sleep(0.3)
        assert not selection("a.k_proj")
    assert budget.left > 0.1


def test_an_error_is_shorter_than_its_text(saved: Path, tmp_path: Path) -> None:
    bad = mutated(saved, tmp_path / "bad", target_modules="(" + "q" * 5000)
    with pytest.raises(AdapterError, match=r"target_modules: 'qqq|target_modules: '\(qqq") as caught:
        read(bad)
    assert len(str(caught.value)) < 1000
