"""Three Ray nodes, each in a network namespace of its own: the engine on one, the experts on the two others."""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cluster.bench.hosts import Host

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PORT = 8000
HIDDEN_SIZE, PROMPT_TOKENS, PROMPTS, COUNTS = 1024, 500, 4, 3
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
# Prefills, one at a time, then the engine's metrics.
PREFILL = f"""
import httpx, sys
for number in range(int(sys.argv[1])):
    prompt = (str(number) * {PROMPT_TOKENS})[:{PROMPT_TOKENS}]
    body = dict(model="tiny", prompt=prompt, max_tokens=1, temperature=0, ignore_eos=True)
    httpx.post("http://127.0.0.1:{PORT}/v1/completions", json=body, timeout=120).raise_for_status()
print(httpx.get("http://127.0.0.1:{PORT}/metrics").text)
"""


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For Ray's sockets: a Unix socket's path may have 107 characters, and pytest's directories use many."""
    with tempfile.TemporaryDirectory(prefix="em-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture
def wide_checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny DeepSeek-V3 with rows as wide as a small model's: beside narrow ones, headers would be all traffic."""
    tiny, wide = tiny_checkpoint("deepseek_v3"), tmp_path / "wide"
    config = AutoConfig.from_pretrained(tiny)
    config.hidden_size = HIDDEN_SIZE
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(wide)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(wide)
    return wide


def _run(host: Host, *command: str, env: dict[str, str], timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        host.command(*command), text=True, cwd=ROOT, env=env, capture_output=True, timeout=timeout_s, check=False
    )


def _nodes_touched(metrics: str) -> float:
    """Nodes that tokens' experts were on, summed over tokens and layers."""

    def value(name: str) -> float:
        (found,) = re.findall(rf"^{name}{{.*}} (\S+)$", metrics, re.MULTILINE)
        return float(found)

    return value("dispatch_tokens_total") * value("dispatch_nodes_per_token")


@pytest.mark.parametrize("transport", ["grpc", pytest.param("ray", marks=pytest.mark.slow)])
def test_experts_live_on_the_nodes_that_have_no_engine(
    transport: str,
    three_hosts: list[Host],
    command_environment: dict[str, str],
    wide_checkpoint: Path,
    tmp_path: Path,
    short_directory: Path,
) -> None:
    head, *others = three_hosts
    mesh = {
        "model": {"source": str(wide_checkpoint), "served_name": "tiny"},
        "experts": {"groups": 4, "label_selector": {"role": "experts"}},
        "router": {"transport": transport},
        "engine": {"label_selector": {"role": "engine"}, "max_num_seqs": 16, "max_num_batched_tokens": 512},
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
        started = _run(host, *start, f"--node-ip-address={host.address}", *arguments, env=command_environment)
        assert started.returncode == 0, started.stdout + started.stderr

    cluster = f"{head.address}:6379"
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(
            head.command("python", "-m", "cluster.cli", "serve", str(tmp_path / "mesh.yaml"), "--address", cluster),
            cwd=ROOT, env=command_environment, stdout=log, stderr=log,
        )  # fmt: skip
    answer = _run(head, "python", "-c", CLIENT, env=command_environment, timeout_s=300)
    assert answer.returncode == 0, answer.stderr + (tmp_path / "serve.log").read_text()

    model = AutoModelForCausalLM.from_pretrained(wide_checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(wide_checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert json.loads(answer.stdout)["choices"][0]["text"] == expected

    status = _run(
        head, "python", "-m", "cluster.cli", "status", "--json", "--address", cluster, env=command_environment
    )
    assert status.returncode == 0, status.stderr
    document = json.loads(status.stdout)
    addresses = [replica["address"].rsplit(":")[0] for group in document["groups"] for replica in group["replicas"]]
    assert sorted(set(addresses)) == sorted(host.address for host in others)
    assert [engine["node"] for engine in document["engines"]] == [head.address]

    # Bytes on the engine's interface, all of Ray's own included: a token's row once to each node that has any of its
    # experts, one sum back.
    def prefill(times: int) -> tuple[float, tuple[int, int]]:
        ran = _run(head, "python", "-c", PREFILL, str(times), env=command_environment)
        assert ran.returncode == 0, ran.stderr
        return _nodes_touched(ran.stdout), head.traffic()

    layers = model.config.num_hidden_layers - model.config.first_k_dense_replace
    for _ in range(COUNTS):
        touched_before, before = prefill(1)
        touched_after, after = prefill(PROMPTS)
        touched = touched_after - touched_before
        # Of the last layer, experts see each prompt's last token only.
        assert 1 < touched / (PROMPTS * (PROMPT_TOKENS * (layers - 1) + 1)) < 2
        received, sent = ((now - then) / (touched * HIDDEN_SIZE * 4) for now, then in zip(after, before, strict=True))
        if max(received, sent) <= 1.1:  # what Ray's processes tell each other meanwhile only adds
            break
    print(f"three Ray nodes, {transport}: sent {sent:.3f}, received {received:.3f} times nodes touched x H x 4 bytes")
    assert 1 <= sent <= 1.1
    assert 1 <= received <= 1.1

    server.terminate()
    assert server.wait(120) == 0, (tmp_path / "serve.log").read_text()
