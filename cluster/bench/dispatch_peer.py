"""The far end of the dispatch benchmark: an expert group that does no arithmetic, and a bare echo of bytes.

    python -m cluster.bench.dispatch_peer ADDRESS_FILE [HOST]

writes the two addresses to ADDRESS_FILE and serves until it is stopped. HOST: address to listen on, 127.0.0.1 by
default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import torch

from experts.group import ExpertGroup
from experts.server import ExpertServer
from experts.spec import ExpertCall
from experts.wire.codec import MAX_MESSAGE_BYTES

ECHO = "/expertmesh.bench.Echo/Stream"


class IdleGroup:
    """Answers with what it was sent: the cost of a call without the experts'."""

    def answer(self, request: bytes) -> None:
        """Every call is for `forward`."""

    def forward(self, call: ExpertCall) -> torch.Tensor:
        return call.hidden_TH.float()


def _echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from requests


def serve(address_file: Path, host: str) -> None:
    """Serve both until the process is stopped."""
    torch.set_num_threads(1)
    expert_server = ExpertServer(cast(ExpertGroup, IdleGroup()), host)
    expert_server.start()
    options = (
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", 0),
    )
    echo_server = grpc.server(ThreadPoolExecutor(8), options=options)
    service, method = ECHO.strip("/").split("/")
    handlers: dict[str, Any] = {method: grpc.stream_stream_rpc_method_handler(_echo)}
    echo_server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = echo_server.add_insecure_port(f"{host}:0")
    echo_server.start()
    written = address_file.with_suffix(".part")
    written.write_text(f"{expert_server.address} {host}:{port}")
    os.replace(written, address_file)
    echo_server.wait_for_termination()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1")
