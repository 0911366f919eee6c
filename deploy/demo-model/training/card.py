"""Writes the demo model's card, so that its figures are always those of the weights beside it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate import Evaluation

CARD = """\
---
license: apache-2.0
language: [en]
tags: [mixture-of-experts, deepseek_v3, python]
---
# ExpertMesh demo model

A {parameters:,}-parameter language model of DeepSeek-V3's architecture, small enough to come with the
repository and real enough to show what an expert-serving cluster does: multi-head latent attention, a dense
first layer, then layers of 16 routed experts in 4 groups and one shared expert, where a sigmoid gate with
a correction bias sends each token to 4 experts of at most 2 groups.

{layers} layers, hidden size {hidden_size}, expert width {expert_size}, vocabulary {vocab_size} (byte-level BPE),
context {context}, bfloat16. Plain completions and a chat template (`<|user|>`, `<|assistant|>`, `<|system|>`).

## Use
```bash
make serve                                   # from the repository's root
```
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("deploy/demo-model")
model = AutoModelForCausalLM.from_pretrained("deploy/demo-model")
prompt = tokenizer("def read_lines(path):", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

## Training
`make demo-model` writes the weights, the tokenizer and this page again. The text is the Python {python}
standard library as it lies on the machine: its modules without tests, definitions cut out of them, the language
reference's topics, and question/answer pairs made from names, docstrings and sources. Nothing is downloaded.
{steps:,} steps, {tokens:,} tokens, {minutes:.0f} minutes on {threads} CPU threads. Muon for matrices, AdamW for the
rest; experts are balanced without an auxiliary loss, by DeepSeek-V3's bias update.

| held out (a twentieth of the modules, {held_out_bytes:,} bytes) | |
|---|---|
| bits per byte | {bits_per_byte:.3f} |
| balancedness of the experts (mean load / largest load, mean over layers) | {balancedness:.2f} |

## What it writes
{samples}

## Limits
It learned the look of the standard library, not programming: names are plausible and code is often wrong.
Use it to try the server, not for its answers. The standard library's text is under the PSF licence.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """What a run did; `steps` and `tokens` are those before the wall-clock bound ended it."""

    steps: int
    tokens: int
    minutes: float
    threads: int


def write_card(
    directory: Path,
    *,
    config: Any,
    parameters: int,
    run: TrainingRun,
    score: Evaluation,
    held_out_bytes: int,
    samples: Sequence[str],
) -> None:
    text = CARD.format(
        parameters=parameters,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        expert_size=config.moe_intermediate_size,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        python=".".join(platform.python_version_tuple()[:2]),
        steps=run.steps,
        tokens=run.tokens,
        minutes=run.minutes,
        threads=run.threads,
        held_out_bytes=held_out_bytes,
        bits_per_byte=score.bits_per_byte,
        balancedness=score.balancedness,
        samples="\n\n".join(f"````text\n{sample.strip()}\n````" for sample in samples),
    )
    (directory / "README.md").write_text(text)
