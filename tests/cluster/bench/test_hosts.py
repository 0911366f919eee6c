"""Hosts as network namespaces: separate, counted, and gone afterwards."""

from __future__ import annotations

import os
import subprocess

import pytest

from cluster.bench.hosts import Host, network
from experts.errors import ConfigError

# Counts nothing itself; says when it listens, answers when all has come, and stays.
LISTEN = """
import signal, socket
with socket.create_server(("", 9000)) as server:
    print(flush=True)
    connection, _ = server.accept()
while connection.recv(65536):
    pass
connection.sendall(b".")
signal.pause()
"""
SEND = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 9000))
connection.sendall(bytes(1_000_000))
connection.shutdown(socket.SHUT_WR)
assert connection.recv(1) == b"."
"""


def test_hosts_are_counted_and_gone_even_on_an_interrupt() -> None:
    left: list[tuple[list[Host], subprocess.Popen[str]]] = []

    def interrupted() -> None:
        with network(2) as hosts:
            here, there = hosts
            listener = subprocess.Popen(there.command("python3", "-c", LISTEN), stdout=subprocess.PIPE, text=True)
            assert listener.stdout is not None
            listener.stdout.readline()
            left.append((hosts, listener))
            before = [host.traffic() for host in hosts]
            subprocess.run(here.command("python3", "-c", SEND, there.address), check=True)
            (_, sent), (received, _) = (
                [now - then for now, then in zip(host.traffic(), start, strict=True)]
                for host, start in zip(hosts, before, strict=True)
            )
            # 66 bytes of headers on every 1448: frames, not what the kernel hands over at once. A machine that
            # stalls sends some of them twice.
            assert 1_045_000 < received < 1_300_000
            assert sent == pytest.approx(received, rel=0.002)
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    except ConfigError as error:
        pytest.skip(str(error))
    ((hosts, listener),) = left
    assert listener.wait(10) != 0
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not [host for host in hosts if host.namespace in listed]


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda name: f"/sbin/{name}")
    with pytest.raises(ConfigError, match="run this as root"), network(2):
        pass


def test_a_network_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="iproute2"), network(2):
        pass
