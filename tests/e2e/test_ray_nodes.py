"""The Ray transport between nodes, each in a network namespace: exact to the bit, a token's row once to each node."""

import json
import subprocess
import tempfile
from pathlib import Path

import pytest

from cluster.bench.hosts import Host

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def _run(host: Host, *command: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        host.command(*command), text=True, cwd=ROOT, env=env, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_token_crosses_to_a_ray_node_once_and_sums_are_exact(
    three_hosts: list[Host], command_environment: dict[str, str]
) -> None:
    head, *others = three_hosts
    env = command_environment
    # A Unix socket's path may have 107 characters, and pytest's directories use many.
    with tempfile.TemporaryDirectory(prefix="em-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        start = ("ray", "start", "--num-cpus=2")
        here = (f"--node-ip-address={head.address}", "--port=6379", f"--temp-dir={directory}")
        _run(head, *start, "--head", "--include-dashboard=false", *here, env=env)
        for number, host in enumerate(others):
            joined = (f"--address={head.address}:6379", f"--labels=place=n{number}")
            _run(host, *start, f"--node-ip-address={host.address}", *joined, env=env)
        driver = ("python", "tests/e2e/ray_nodes_router.py", head.address, head.namespace)
        rows = [json.loads(line) for line in _run(head, *driver, env=env).splitlines()]

    print("\nRay refs, two nodes of four groups, float32: beside nodes touched x H x 4 bytes")
    for row in rows:
        counted = row["touched"] * row["hidden"] * 4
        sent, received = (row[way] / counted for way in ("sent", "received"))
        more_out, more_back = ((row[way] - counted) / row["node_calls"] for way in ("sent", "received"))
        print(f"H {row['hidden']}, {row['tokens']:5} tokens: sent {sent:.3f}, received {received:.3f} times", end="; ")
        print(f"more than that, by call and node: {more_out:.0f} out, {more_back:.0f} back")
        assert row["exact"]
        assert row["counted_sent"] == counted
        # Below, Ray's own bytes of each task show.
        if row["tokens"] >= 8:
            assert 1 <= sent <= 1.1
            assert 1 <= received <= 1.1
    assert [row["tokens"] for row in rows] == 2 * [1, 2, 8, 64, 256, 1024]
