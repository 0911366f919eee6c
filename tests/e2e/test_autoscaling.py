"""Autoscaling on real Ray: under load the engine and the hot group grow, and the new replicas take their share; without
it they shrink, under requests that must not notice."""

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch
from ray import serve
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.app import build
from cluster.local_ray import start_local_ray
from cluster.running_app import APPLICATION

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

WAIT_S = 240
GROUPS = 4
QUICK = {"look_back_period_s": 2, "upscale_delay_s": 1, "downscale_delay_s": 3}
AUTOSCALING = {
    "engine": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 3, **QUICK},
    "experts": {
        "min_replicas": 1,
        "max_replicas": 2,
        "policy": {
            "policy_function": "cluster.autoscale.policies:Skew",
            "policy_kwargs": {
                "max_load_share": 1.5,
                "min_tokens_per_s": 300,
                "upscale_cooldown_s": 0,
                "downscale_cooldown_s": 0,
            },
        },
        **QUICK,
        # Groups report one after the other, once a second: for that long the first to see a load seems to have it all.
        "upscale_delay_s": 4,
    },
}


@pytest.fixture(scope="module")
def ray_url(free_port: Callable[[], int]) -> Iterator[str]:
    """Ray and Serve on this machine, where replicas report every second; the address that applications answer on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        port = free_port()
        start_local_ray()
        serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": None})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def skewed_checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """Every token chooses experts 0 and 1, which group 0 holds, and a third that varies."""
    directory = shutil.copytree(tiny_checkpoint("deepseek_v3"), tmp_path / "skewed")
    tensors = load_file(directory / "model.safetensors")
    biases = [tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")]
    assert biases
    for bias in biases:
        bias[:2] += 10
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@dataclass(frozen=True)
class Case:
    """A prompt, and what transformers' greedy decoding makes of it."""

    prompt: list[int]
    new_tokens: int
    text: str


class Clients:
    """Streams that ask for greedy completions and compare each with transformers' own."""

    def __init__(self, url: str, checkpoint: Path) -> None:
        self._url = url
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.answered = 0

    def case(self, prompt_tokens: int, new_tokens: int, seed: int) -> Case:
        prompt = torch.randint(0, 128, (1, prompt_tokens), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            output = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        text = self._tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
        return Case(prompt=prompt[0].tolist(), new_tokens=new_tokens, text=text)

    def run(self, cases: list[Case], until: threading.Event, pause_s: float = 0) -> None:
        """One after the other until `until`; raises where one fails or differs."""
        with httpx.Client(base_url=self._url, timeout=WAIT_S) as client:
            for case in itertools.cycle(cases):
                body = {
                    "model": "scaling",
                    "prompt": case.prompt,
                    "max_tokens": case.new_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == case.text
                self.answered += 1
                if until.wait(pause_s):
                    return


def _until(condition: Callable[[], object], what: str, running: list[Any]) -> float:
    """Wait for `condition`; seconds that it took. A client that failed fails the test at once."""
    began = time.monotonic()
    while not condition():
        for client in running:
            if client.done():
                client.result()
        waited_s = time.monotonic() - began
        assert waited_s < WAIT_S, f"waited in vain for {what}: {_running()}, {_groups()}"
        threading.Event().wait(0.1)
    return time.monotonic() - began


def _running() -> dict[str, dict[str, int]]:
    """Deployment -> state -> replicas."""
    deployments = serve.status().applications[APPLICATION].deployments
    return {name: dict(deployment.replica_states) for name, deployment in deployments.items()}


def _groups() -> list[list[dict[str, Any]]]:
    """The replicas of each group, as the controller knows them."""
    handle = serve.get_deployment_handle("controller", APPLICATION)
    return [group["replicas"] for group in handle.status.remote().result(timeout_s=WAIT_S)["groups"]]


def _both_work(replicas: list[dict[str, Any]]) -> bool:
    return len(replicas) == 2 and all(r["ready"] and r["tokens_per_s"] > 0 for r in replicas)


def test_replicas_follow_the_load_and_no_request_notices(ray_url: str, skewed_checkpoint: Path) -> None:
    document = {
        "model": {"source": str(skewed_checkpoint), "served_name": "scaling"},
        # A call that a departing replica does not answer fails its request: draining has to be enough.
        "experts": {"groups": GROUPS, "listen_host": "127.0.0.1", "on_expert_loss": "fail"},
        "engine": {"max_num_seqs": 4, "max_num_batched_tokens": 256},
        "autoscaling": AUTOSCALING,
    }
    serve.run(build(document), name=APPLICATION, route_prefix="/")
    clients = Clients(ray_url, skewed_checkpoint)
    assert _running()["engine"] == _running()["experts-0"] == {"RUNNING": 1}
    _until(lambda: httpx.get(f"{ray_url}/health").status_code == 200, "the endpoint", [])
    report: dict[str, float] = {}

    with ThreadPoolExecutor(6) as pool:
        stop = threading.Event()
        try:
            load = [
                pool.submit(clients.run, [clients.case(200 + 40 * n, 16, seed) for seed in (n, n + 6)], stop)
                for n in range(6)
            ]
            report["engine grew"] = _until(lambda: _running()["engine"] == {"RUNNING": 2}, "a second engine", load)
            report["group grew"] = _until(lambda: _both_work(_groups()[0]), "two replicas of group 0 at work", load)
            assert [len(replicas) for replicas in _groups()] == [2, 1, 1, 1]
        finally:
            stop.set()
        for client in load:
            client.result(WAIT_S)

        stop = threading.Event()
        try:
            # Both engines decode when one of them is told to go.
            load = [pool.submit(clients.run, [clients.case(8, 200, 20 + n)], stop) for n in range(2)]
            report["engine shrank"] = _until(lambda: _running()["engine"] == {"RUNNING": 1}, "one engine", load)
        finally:
            stop.set()
        for client in load:
            client.result(WAIT_S)

        stop = threading.Event()
        try:
            load = [pool.submit(clients.run, [clients.case(8, 4, 30)], stop, 0.5)]
            report["group shrank"] = _until(lambda: _running()["experts-0"] == {"RUNNING": 1}, "one replica", load)
        finally:
            stop.set()
        for client in load:
            client.result(WAIT_S)
    assert [len(replicas) for replicas in _groups()] == [1, 1, 1, 1]
    assert clients.answered > 10
    print(f"\n{clients.answered} requests exact; seconds:", {what: round(s, 1) for what, s in report.items()})
