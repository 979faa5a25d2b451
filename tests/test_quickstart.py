"""The quickstart does what it says: both adapters win, in one graph; and it takes any model and texts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from processes import python
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return python(QUICKSTART, *options, timeout=400)


@pytest.mark.slow
def test_each_adapter_wins_on_its_own_text_in_one_graph(tmp_path: Path) -> None:
    done = run("--steps", "20", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "compiled graphs: 1;" in done.stdout
    rows = re.findall(r"^(base|adapter [AB]).*?(\d+\.\d{3})\s+(\d+\.\d{3})\s+[\d.]+ ms$", done.stdout, re.MULTILINE)
    (_, *base), (_, *a), (_, *b) = [(name, float(x), float(y)) for name, x, y in rows]
    assert a[0] < min(base[0], b[0])
    assert b[1] < min(base[1], a[1])
    assert {p.name for p in (tmp_path / "A").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


@pytest.mark.slow
def test_any_model_and_any_texts(tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(40)}
    tokenizer = Tokenizer(models.WordLevel({**words, "?": 40}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for name, step in (("a", 1), ("b", 3)):
        (tmp_path / name).write_text(" ".join(f"w{i * step % 40}" for i in range(6000)))
    texts = ("--text-a", str(tmp_path / "a"), "--text-b", str(tmp_path / "b"))
    done = run("--model", str(tmp_path / "model"), *texts, "--steps", "15", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "compiled graphs: 1;" in done.stdout
