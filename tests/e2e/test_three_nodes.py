"""Three Ray nodes, each in a network namespace of its own: the engine on one, the experts on the two others."""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PORT = 8000
ENGINE, EXPERTS = "--labels=role=engine", "--labels=role=experts"
PROMPT = "three nodes serve one model"
# Runs on the engine's host: waits for the server, asks for a completion, prints it.
CLIENT = f"""
import httpx, time
deadline = time.monotonic() + 240
while True:
    try:
        if httpx.get("http://127.0.0.1:{PORT}/health").status_code == 200:
            break
    except httpx.TransportError:
        pass
    assert time.monotonic() < deadline, "the server did not come up"
    time.sleep(0.2)
body = dict(model="tiny", prompt={PROMPT!r}, max_tokens=24, temperature=0, ignore_eos=True)
print(httpx.post("http://127.0.0.1:{PORT}/v1/completions", json=body, timeout=120).text)
"""


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For Ray's sockets: a Unix socket's path may have 107 characters, and pytest's directories use many."""
    with tempfile.TemporaryDirectory(prefix="em-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def _received_bytes(host: Any) -> int:
    counter = host.run("cat", "/sys/class/net/eth0/statistics/rx_bytes")
    return int(counter.stdout)


def test_experts_live_on_the_nodes_that_have_no_engine(
    three_hosts: list[Any],
    command_environment: dict[str, str],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    short_directory: Path,
) -> None:
    head, *others = three_hosts
    checkpoint = tiny_checkpoint("deepseek_v3")
    mesh = {
        "model": {"source": str(checkpoint), "served_name": "tiny"},
        "experts": {"groups": 4, "label_selector": {"role": "experts"}},
        "engine": {"label_selector": {"role": "engine"}, "max_num_seqs": 16, "max_num_batched_tokens": 64},
    }
    (tmp_path / "mesh.yaml").write_text(yaml.safe_dump(mesh))
    start = ("ray", "start", "--num-cpus=2")
    for host, arguments in (
        (
            head,
            (
                "--head",
                "--include-dashboard=false",
                "--port=6379",
                f"--temp-dir={short_directory}",
                "--labels=role=engine",
            ),
        ),
        (others[0], (f"--address={head.address}:6379", EXPERTS)),
        (others[1], (f"--address={head.address}:6379", EXPERTS)),
    ):
        started = host.run(*start, f"--node-ip-address={host.address}", *arguments, env=command_environment)
        assert started.returncode == 0, started.stdout + started.stderr

    cluster = f"{head.address}:6379"
    with (tmp_path / "serve.log").open("w") as log:
        server = head.popen(
            "python", "-m", "cluster.cli", "serve", str(tmp_path / "mesh.yaml"), "--address", cluster,
            env=command_environment, stdout=log, stderr=log,
        )  # fmt: skip
    answer = head.run("python", "-c", CLIENT, env=command_environment, timeout_s=300)
    assert answer.returncode == 0, answer.stderr + (tmp_path / "serve.log").read_text()

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert json.loads(answer.stdout)["choices"][0]["text"] == expected

    status = head.run("python", "-m", "cluster.cli", "status", "--json", "--address", cluster, env=command_environment)
    assert status.returncode == 0, status.stderr
    document = json.loads(status.stdout)
    addresses = [replica["address"].rsplit(":")[0] for group in document["groups"] for replica in group["replicas"]]
    assert sorted(set(addresses)) == sorted(host.address for host in others)
    assert [engine["node"] for engine in document["engines"]] == [head.address]

    # Hidden states really cross the wire: at least the prompt's rows to each node that holds experts.
    before = [_received_bytes(host) for host in others]
    assert head.run("python", "-c", CLIENT, env=command_environment).returncode == 0
    rows_bytes = len(ids[0]) * 64 * 4
    for host, count in zip(others, before, strict=True):
        assert _received_bytes(host) - count > rows_bytes

    server.terminate()
    assert server.wait(120) == 0, (tmp_path / "serve.log").read_text()
