"""Hosts of their own on one machine: network namespaces on a bridge, whose interfaces count what crosses them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from experts.errors import ConfigError

INTERFACE = "eth0"


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace with an address of its own."""

    namespace: str
    address: str

    def command(self, *arguments: str) -> tuple[str, ...]:
        """The argv that runs `arguments` on this host."""
        return ("ip", "netns", "exec", self.namespace, *arguments)

    def traffic(self) -> tuple[int, int]:
        """Bytes (received, sent) by its interface so far: whole Ethernet frames, without preamble and checksum."""
        shown = _ip("-n", self.namespace, "-s", "-j", "link", "show", INTERFACE)
        (link,) = json.loads(shown)
        return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]


@contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """`count` hosts that reach each other and nothing else; gone afterwards, with all that still ran on them.

    Frames carry 1500 bytes and are counted one by one, as on a real Ethernet: a kernel that hands packets of 64 KiB
    from namespace to namespace would count their headers once.

    Raises ConfigError where this is not Linux with iproute2, or not root's to do.
    """
    if shutil.which("ip") is None:
        raise ConfigError("hosts of their own need network namespaces and the command `ip` of iproute2; install it")
    if os.geteuid() != 0:
        raise ConfigError("hosts of their own are network namespaces, which only root can make; run this as root")
    name = f"expertmesh-{uuid.uuid4().hex[:8]}"
    lan = f"{name}-lan"
    hosts = [Host(f"{name}-{index}", f"10.77.0.{index + 1}") for index in range(count)]
    try:
        _ip("netns", "add", lan)
        _ip("-n", lan, "link", "add", "lan", "type", "bridge")
        _ip("-n", lan, "link", "set", "lan", "up")
        for index, host in enumerate(hosts):
            _ip("netns", "add", host.namespace)
            pair = ("type", "veth", "peer", "name", f"port{index}", "netns", lan)
            _ip("link", "add", INTERFACE, "netns", host.namespace, *pair)
            _ip("-n", lan, "link", "set", f"port{index}", "master", "lan", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "link", "set", INTERFACE, "gso_max_segs", "1", "up")
            # Without a route to anywhere Ray cannot tell its own address.
            _ip("-n", host.namespace, "route", "add", "default", "dev", INTERFACE)
        yield hosts
    finally:
        for namespace in (*(host.namespace for host in hosts), lan):
            _remove(namespace)


def _remove(namespace: str) -> None:
    pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False).stdout
    for pid in pids.split():
        subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"this machine gives no such network: ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
