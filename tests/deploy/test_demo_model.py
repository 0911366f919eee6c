"""The committed demo model is what its card says, and its training script makes such a model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).resolve().parents[2] / "deploy" / "demo-model"
TRAINING = MODEL / "training"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_it_is_small_and_has_deepseek_v3s_parts(model: Any) -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 16_000_000
    config = model.config
    assert config.model_type == "deepseek_v3"
    assert (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok) == (16, 1, 4)
    assert (config.n_group, config.topk_group, config.first_k_dense_replace) == (4, 2, 1)
    assert (config.topk_method, config.scoring_func) == ("noaux_tc", "sigmoid")
    assert model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.abs().max() > 0


def test_weights_have_deepseeks_names() -> None:
    with safe_open(MODEL / "model.safetensors", framework="pt") as tensors:
        assert "model.layers.1.mlp.experts.15.down_proj.weight" in tensors.keys()  # noqa: SIM118
        assert "model.layers.1.mlp.gate.e_score_correction_bias" in tensors.keys()  # noqa: SIM118


def test_it_predicts_held_out_modules_as_its_card_says(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(TRAINING)  # scripts beside the model, not a package: importable only from here on
    from corpus import is_held_out, read_sources
    from evaluate import evaluate

    card = (MODEL / "README.md").read_text()
    claimed = re.search(r"bits per byte \| ([\d.]+)", card)
    assert claimed is not None
    held_out = [source for path, source in read_sources().items() if is_held_out(path)]
    score = evaluate(model, tokenizer, held_out, window=2048, max_bytes=60_000)
    # A sample of the held-out modules, on whichever Python this is; a broken model is at 3 and more.
    assert score.bits_per_byte == pytest.approx(float(claimed[1]), abs=0.4)
    assert 0.4 < score.balancedness <= 1


def test_text_survives_the_tokenizer_and_the_chat_template_has_turns(tokenizer: Any) -> None:
    text = "def größe(x):\n    return x\t# 漢字 🎉\r\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|begin|><|system|>S<|user|>U<|assistant|>A<|end|><|user|>V<|assistant|>"
    with pytest.raises(Exception, match="Unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "T"}], tokenize=False)


def test_the_script_trains_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    settings = {
        "--output": str(tmp_path),
        "--steps": "12",
        "--batch-tokens": "512",
        "--context": "128",
        "--vocab-size": "320",
        "--hidden-size": "64",
        "--layers": "2",
        "--max-bytes": "20000",
        "--sample-tokens": "4",
        "--threads": "1",
    }
    arguments = [part for pair in settings.items() for part in pair]
    done = subprocess.run(
        [sys.executable, TRAINING / "train.py", *arguments], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    printed = re.search(r"held-out bits per byte: ([\d.]+)", done.stdout)
    assert printed is not None
    # Twelve steps already beat the uniform guess over 320 tokens, about 8.3 bits for at least a byte.
    assert float(printed[1]) < 6.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.n_routed_experts == 16
    assert f"bits per byte | {printed[1]}" in (tmp_path / "README.md").read_text()
