"""Trains the bundled demo model on this interpreter's standard library: `make demo-model`.

    python deploy/demo-model/training/train.py [--minutes 40] [--output deploy/demo-model]

DeepSeek-V3's architecture at 7 million parameters, bfloat16 with float32 master weights, Muon and AdamW, and
the auxiliary-loss-free balancing of the DeepSeek-V3 report (section 2.1.2). The same seed on the same machine
and Python gives the same model, unless the wall-clock bound cuts the schedule short.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from byte_bpe import train_tokenizer
from card import TrainingRun, write_card
from corpus import Corpus, build_corpus
from evaluate import LoadCounter, evaluate
from experts_forward import sorted_experts_forward
from optimiser import Optimiser
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# No newline at the end: a line break and the next line's indent are one token.
PROMPTS = ("def read_lines(path):", "class Queue:")
CHAT = [{"role": "user", "content": "Write a Python function `flatten`: Flatten a nested list."}]
# Steps between those that see whole contexts; the others see quarters, which cost half as much a token. From the
# first step on: positions that only the end of the schedule sees are never learned.
LONG_EVERY = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--minutes", type=float, default=40.0, help="wall-clock bound of the whole run")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--max-bytes", type=int, default=None, help="train and evaluate on less text")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between checkpoints")
    parser.add_argument("--sample-tokens", type=int, default=120, help="length of the samples at the end")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_model(arguments: argparse.Namespace, tokenizer: Any) -> Any:
    hidden = arguments.hidden_size
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=3 * hidden // 8,
        num_hidden_layers=arguments.layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=64,
        max_position_embeddings=arguments.context,
        num_nextn_predict_layers=0,
        topk_method="noaux_tc",  # as in DeepSeek's own config.json; transformers does without, other readers don't
        scoring_func="sigmoid",
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts_forward)
    config._experts_implementation = "sorted"
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    return model


def encode(corpus: Corpus, tokenizer: Any, rng: random.Random) -> Tensor:
    """All training texts in a random order as one stream of token ids [T]."""
    texts = [f"{tokenizer.bos_token}{text}{tokenizer.eos_token}" for text in corpus.documents]
    texts += [tokenizer.apply_chat_template(turns, tokenize=False) for turns in corpus.conversations]
    rng.shuffle(texts)
    return torch.tensor([i for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in ids])


def windows(stream: Tensor, tokens: int, context: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches [tokens // context, context + 1] of endless shuffled epochs."""
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - context - 1, context)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for batch in starts.split(max(1, tokens // context)):
            yield stream[batch[:, None] + torch.arange(context + 1)]


@torch.no_grad()
def balance(counter: LoadCounter, speed: float) -> None:
    """bias += speed * sign(mean load - load), per gate (DeepSeek-V3 report, section 2.1.2)."""
    for name, load in counter.take().items():
        counter.gates[name].e_score_correction_bias += speed * torch.sign(load.mean() - load)


def save(model: Any, tokenizer: Any, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    ).save_pretrained(output)


def train(arguments: argparse.Namespace, model: Any, tokenizer: Any, corpus: Corpus, started: float) -> TrainingRun:
    stream = encode(corpus, tokenizer, random.Random(arguments.seed))
    print(
        f"{len(stream):,} tokens an epoch, {sum(p.numel() for p in model.parameters()):,} parameters",
        flush=True,
    )
    optimiser = Optimiser(model.named_parameters())
    generator = torch.Generator().manual_seed(arguments.seed)
    short = windows(stream, arguments.batch_tokens, arguments.context // 4, generator)
    long = windows(stream, arguments.batch_tokens, arguments.context, generator)
    reserve = 0.06 * arguments.minutes * 60  # for the evaluation and the samples at the end
    bound = arguments.minutes * 60 - reserve
    training_started = saved = reported = time.monotonic()
    best, steps, tokens, loss_sum, loss_count = math.inf, 0, 0, 0.0, 0
    model.train()
    with LoadCounter(model) as counter:
        for step in range(arguments.steps):
            elapsed = time.monotonic() - started
            done = max(step / arguments.steps, elapsed / bound)
            if done >= 1:
                break
            scale = min(1.0, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            batch = next(long if step % LONG_EVERY == 0 else short)
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            optimiser.step(scale)
            balance(counter, 0.002 * scale)
            steps, tokens = step + 1, tokens + batch[:, 1:].numel()
            loss_sum, loss_count = loss_sum + loss.item(), loss_count + 1
            now = time.monotonic()
            if now - reported > 15:
                rate = tokens / (now - training_started)
                left = (now - training_started) / max(done, 1e-9) * (1 - done) / 60
                print(
                    f"step {step + 1}/{arguments.steps}  loss {loss_sum / loss_count:.3f}  "
                    f"{rate:,.0f} tokens/s  {left:.1f} min left",
                    flush=True,
                )
                reported, loss_sum, loss_count = now, 0.0, 0
            if now - saved > arguments.save_minutes * 60:
                best = save_if_better(arguments, model, tokenizer, corpus, best, counter)
                saved = time.monotonic()
        save_if_better(arguments, model, tokenizer, corpus, best, counter)
    minutes = (time.monotonic() - training_started) / 60
    return TrainingRun(steps=steps, tokens=tokens, minutes=minutes, threads=arguments.threads)


def save_if_better(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    best: float,
    counter: LoadCounter,
) -> float:
    """Writes a checkpoint if a sample of the held-out text says that it is the best so far; the new best."""
    model.eval()
    score = evaluate(model, tokenizer, corpus.held_out, window=arguments.context, max_bytes=60_000)
    model.train()
    counter.take()  # the evaluation's tokens must not move the biases
    print(f"held-out sample: {score.bits_per_byte:.3f} bits per byte", flush=True)
    if score.bits_per_byte < best:
        save(model, tokenizer, arguments.output)
    return min(best, score.bits_per_byte)


def report(arguments: argparse.Namespace, tokenizer: Any, corpus: Corpus, run: TrainingRun) -> None:
    """Prints what the written checkpoint scores and what it writes, and puts both on its card."""
    model = AutoModelForCausalLM.from_pretrained(arguments.output, dtype=torch.bfloat16).eval()
    score = evaluate(model, tokenizer, corpus.held_out, window=arguments.context)
    print(f"held-out bits per byte: {score.bits_per_byte:.3f}")
    print(f"balancedness (mean load / largest load, mean over layers): {score.balancedness:.2f}")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    prompts.append(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False))
    samples: list[str] = []
    for ids in prompts:
        torch.manual_seed(arguments.seed)
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=arguments.sample_tokens, do_sample=True, temperature=0.5
        )
        samples.append(tokenizer.decode(output[0]))
        print(f"---\n{samples[-1]}")
    write_card(
        arguments.output,
        config=model.config,
        parameters=model.num_parameters(),
        run=run,
        score=score,
        held_out_bytes=sum(len(text.encode()) for text in corpus.held_out),
        samples=samples,
    )


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    corpus = build_corpus(arguments.seed, max_bytes=arguments.max_bytes)
    print(
        f"{len(corpus.documents)} documents, {len(corpus.conversations)} conversations, "
        f"{len(corpus.held_out)} held-out files",
        flush=True,
    )
    tokenizer = train_tokenizer(corpus.documents, vocab_size=arguments.vocab_size, max_length=arguments.context)
    run = train(arguments, build_model(arguments, tokenizer), tokenizer, corpus, started)
    report(arguments, tokenizer, corpus, run)
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes; written to {arguments.output}")


if __name__ == "__main__":
    main()
