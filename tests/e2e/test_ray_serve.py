"""The application on real Ray: exact over each transport, and whole again after any of its actors is killed."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.app import build
from cluster.local_ray import start_local_ray
from cluster.running_app import APPLICATION

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

WAIT_S = 180
STREAMS = 8


@pytest.fixture(scope="module")
def ray_url(free_port: Callable[[], int]) -> Iterator[str]:
    """Ray and Serve on this machine; the address that applications answer on."""
    port = free_port()
    start_local_ray()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": None})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def _deploy(url: str, checkpoint: Path, name: str, **sections: dict[str, Any]) -> None:
    document = {
        "model": {"source": str(checkpoint), "served_name": name},
        "engine": {"max_num_seqs": 16, "max_num_batched_tokens": 64},
        **sections,
    }
    document["experts"] = {"listen_host": "127.0.0.1", **document.get("experts", {})}
    serve.run(build(document), name=APPLICATION, route_prefix="/")
    _until(lambda: name in httpx.get(f"{url}/v1/models").text, f"{name} to be routed")


def _until(condition: Callable[[], object], what: str) -> float:
    """Wait for `condition`; seconds that it took."""
    began = time.monotonic()
    while True:
        try:
            if condition():
                return time.monotonic() - began
        except (httpx.TransportError, ray.exceptions.RayError):
            pass
        assert time.monotonic() - began < WAIT_S, f"waited in vain for {what}"
        threading.Event().wait(0.02)


def _status() -> dict[str, Any]:
    handle = serve.get_deployment_handle("controller", APPLICATION)
    status: dict[str, Any] = handle.status.remote().result(timeout_s=WAIT_S)
    return status


def _pid(deployment: str) -> int:
    """Process of the deployment's only replica."""
    details = serve.context._get_global_client().get_serve_details()
    replicas = details["applications"][APPLICATION]["deployments"][deployment]["replicas"]
    running = [replica for replica in replicas if str(replica["state"]).endswith("RUNNING")]
    pid: int = running[0]["pid"]
    return pid


def _log(deployment: str) -> str:
    """What the deployment's replicas, of all applications here, have written to Serve's log files."""
    directory = Path(ray._private.worker._global_node.get_logs_dir_path(), "serve")
    return "".join(file.read_text() for file in directory.glob(f"replica_{APPLICATION}_{deployment}_*.log"))


def _expected(checkpoint: Path, prompt: str, new_tokens: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def _stream(url: str, model: str, prompt: str, new_tokens: int, on_text: Callable[[], None] = lambda: None) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
    pieces = []
    with client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=new_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as chunks:
        for chunk in chunks:
            pieces += [choice.text for choice in chunk.choices]
            on_text()
    return "".join(pieces)


def test_tokens_are_exact_and_a_killed_group_comes_back(ray_url: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = tiny_checkpoint("deepseek_v3")
    _deploy(ray_url, checkpoint, "healing", experts={"groups": 4})
    prompts = [f"stream {number}: " + "x" * (30 * number) for number in range(STREAMS)]
    undisturbed = [_stream(ray_url, "healing", prompt, 150) for prompt in prompts]
    assert undisturbed[3] == _expected(checkpoint, prompts[3], 150)

    started, resumed = threading.Barrier(STREAMS + 1), threading.Event()
    killed_at = threading.Event()

    def disturbed(prompt: str) -> str:
        seen = 0

        def on_text() -> None:
            nonlocal seen
            seen += 1
            if seen == 3:
                started.wait(WAIT_S)
                killed_at.wait(WAIT_S)
            elif seen > 6:
                resumed.set()

        return _stream(ray_url, "healing", prompt, 150, on_text)

    lost_before = _status()["replicas_lost"]
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(disturbed, prompt) for prompt in prompts]
        started.wait(WAIT_S)
        os.kill(_pid("experts-1"), signal.SIGKILL)
        killed_at.set()
        began = time.monotonic()
        detect_s = _until(lambda: _status()["replicas_lost"] > lost_before, "the loss to be noticed")
        _until(lambda: not _status()["missing_groups"], "the group to come back")
        reload_s = time.monotonic() - began
        resumed.wait(WAIT_S)
        resume_s = time.monotonic() - began
        assert [stream.result(WAIT_S) for stream in streams] == undisturbed
    for deployment, words in (
        ("controller", "group 1 lost replica"),
        ("experts-1", "loaded "),
        ("engine", "expert group 1 counts as lost"),
    ):
        _until(lambda name=deployment, words=words: words in _log(name), f"{words!r} in the log of {deployment}")
    print(f"\ngroup killed: detected after {detect_s:.2f} s, reloaded {reload_s:.2f} s, streams on {resume_s:.2f} s")

    # The controller is killed too: streams do not notice, and the next one knows the groups and their experts.
    version, slots = _status()["placement_version"], [group["slots"] for group in _status()["groups"]]
    os.kill(_pid("controller"), signal.SIGKILL)
    assert _stream(ray_url, "healing", prompts[1], 150) == undisturbed[1]
    _until(lambda: _status()["placement_version"] > version, "the controller to come back")
    assert [group["slots"] for group in _status()["groups"]] == slots


@pytest.mark.parametrize("groups", [*(pytest.param(few, marks=pytest.mark.slow) for few in (1, 2)), 4])
def test_object_refs_give_the_tokens_of_generate(
    groups: int,
    ray_url: str,
    tiny_checkpoint: Callable[[str], Path],
    check_exact: Callable[[str, str, Path], None],
    check_together: Callable[[str, str, Path], None],
) -> None:
    checkpoint = tiny_checkpoint("deepseek_v3")
    # A name of its own: the engine that answers to it is this one, not that of the case before.
    model = f"refs-{groups}"
    _deploy(ray_url, checkpoint, model, experts={"groups": groups}, router={"transport": "ray"})
    assert len(_status()["groups"]) == groups
    check_exact(ray_url, model, checkpoint)
    check_together(ray_url, model, checkpoint)


def test_past_the_bound_the_error_names_the_group(ray_url: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Then the group comes back and the server serves on."""
    checkpoint = tiny_checkpoint("mixtral")
    _deploy(ray_url, checkpoint, "impatient", experts={"groups": 2}, router={"recovery_timeout_s": 1.0})
    expected = _stream(ray_url, "impatient", "hello", 8)
    os.kill(_pid("experts-1"), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="expert group 1"):
        _stream(ray_url, "impatient", "hello", 8)

    def serves_again() -> bool:
        # Until the controller has noticed, the group is back and the engine knows it, requests fail for that reason.
        try:
            return _stream(ray_url, "impatient", "hello", 8) == expected
        except openai.APIError:
            return False

    _until(serves_again, "the group to come back")
