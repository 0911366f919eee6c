"""Machines to try the whole system on: this one's Ray, and hosts of their own in network namespaces."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Host:
    """A network namespace with an address of its own on a bridge that it shares with its siblings."""

    namespace: str
    address: str

    def popen(self, *command: str, **options: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(["ip", "netns", "exec", self.namespace, *command], text=True, cwd=ROOT, **options)  # type: ignore[call-overload, no-any-return]

    def run(self, *command: str, timeout_s: float = 120, **options: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["ip", "netns", "exec", self.namespace, *command],
            text=True,
            cwd=ROOT,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            **options,  # type: ignore[call-overload]
        )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def three_hosts() -> Iterator[list[Host]]:
    """Three hosts that reach each other and nothing else; gone afterwards, with all that ran on them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = uuid.uuid4().hex[:6]
    probe = subprocess.run(["ip", "netns", "add", f"em{tag}p"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"this kernel gives no network namespaces: {probe.stderr.strip()}")
    _ip("netns", "del", f"em{tag}p")
    bridge, hosts = f"em{tag}", []
    _ip("netns", "add", f"{bridge}-lan")
    try:
        _ip("-n", f"{bridge}-lan", "link", "add", "lan", "type", "bridge")
        _ip("-n", f"{bridge}-lan", "link", "set", "lan", "up")
        for index in range(3):
            host = Host(f"{bridge}-{index}", f"10.77.0.{index + 1}")
            _ip("netns", "add", host.namespace)
            hosts.append(host)
            _ip("link", "add", "eth0", "netns", host.namespace, "type", "veth", "peer", f"port{index}", "netns", f"{bridge}-lan")
            _ip("-n", f"{bridge}-lan", "link", "set", f"port{index}", "master", "lan", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
            # Without a route to anywhere Ray cannot tell its own address.
            _ip("-n", host.namespace, "route", "add", "default", "dev", "eth0")
        yield hosts
    finally:
        for host in hosts:
            pids = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=False)
            for pid in pids.stdout.split():
                subprocess.run(["kill", "-9", pid], check=False, capture_output=True)
            _ip("netns", "del", host.namespace)
        _ip("netns", "del", f"{bridge}-lan")


@pytest.fixture(scope="session")
def command_environment() -> dict[str, str]:
    """Environment for child processes: this interpreter's scripts first, this tree importable, no cluster to join."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_NAMESPACE")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    environment["RAY_AUTH_MODE"] = "token"
    return environment
