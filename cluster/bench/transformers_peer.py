"""transformers as a peer of the serving benchmark, in a process of its own.

    echo '{"waves": [[[5, 6, 7]]], "max_tokens": 8, "dtype": "float32"}' |
    python -m cluster.bench.transformers_peer DIRECTORY generate RESULT

Each wave is a batch of prompts (token ids) started together. RESULT becomes a JSON list with, per wave, a list
of {"sent", "token_times"}, seconds of one clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

Timings = list[dict[str, Any]]


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token of the batch was handed out; the first call carries the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, prompts: list[list[int]], config: Any) -> Timings:
    """One static batch: all prompts have one length, so nothing is padded."""
    ids = torch.tensor(prompts)
    clock = _Clock()
    sent = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock)
    return [{"sent": sent, "token_times": clock.times[1:]} for _ in prompts]


def continuous(model: Any, prompts: list[list[int]], config: Any) -> Timings:
    sent = time.perf_counter()
    results = model.generate_batch(
        prompts, generation_config=config, record_timestamps=True, persistent_manager=True, progress_bar=False
    )
    timings = []
    for result in results.values():
        if result.error or not result.timestamps:
            raise RuntimeError(f"continuous batching failed: {result.error}")
        timings.append({"sent": sent, "token_times": list(result.timestamps)})
    if len(timings) != len(prompts):
        raise RuntimeError(f"continuous batching finished {len(timings)} of {len(prompts)} requests")
    return timings


MODES = {"generate": generate, "continuous": continuous}


def main() -> None:
    directory, mode, result = sys.argv[1:]
    job = json.load(sys.stdin)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, job["dtype"])).eval()
    # -1 ends nothing: every request runs to its full length, as ignore_eos makes the servers do.
    config = GenerationConfig(
        max_new_tokens=job["max_tokens"], do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
    )
    waves = [MODES[mode](model, prompts, config) for prompts in job["waves"]]
    Path(result).write_text(json.dumps(waves))


if __name__ == "__main__":
    code = 0
    try:
        main()
    except Exception:
        traceback.print_exc()
        code = 1
    # The thread of a failed continuous-batching manager would keep the interpreter; the result is on disk.
    sys.stderr.flush()
    os._exit(code)
