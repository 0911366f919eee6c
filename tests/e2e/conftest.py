"""The whole system to try things on: in one process without Ray, on this machine's Ray, on hosts of their own."""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from transformers import AutoModelForCausalLM

from cluster.bench.hosts import Host, network
from cluster.config.load import parse_mesh
from cluster.control.controller import Controller
from cluster.engine_host import EngineHost
from cluster.group_host import GroupHost, HostIdentity
from cluster.model_files import check_model
from experts.errors import ConfigError
from router_service.transport.grpc_health import watch_health
from router_service.transport.grpc_stream import GrpcTransport

ROOT = Path(__file__).parents[2]
SPECIAL = {256: "<|bos|>", 257: "<|eos|>", 258: "<|user|>", 259: "<|assistant|>"}
# Around a chunk of 48 tokens, and of many chunks.
LENGTHS = (1, 2, 47, 48, 49, 200, 700)
NEW_TOKENS = 10


@pytest.fixture
def three_hosts() -> Iterator[list[Host]]:
    """Three hosts that reach each other and nothing else; gone afterwards, with all that ran on them."""
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(network(3))
        except ConfigError as error:
            pytest.skip(str(error))
        yield hosts


@pytest.fixture(scope="session")
def command_environment() -> dict[str, str]:
    """Environment for child processes: this interpreter's scripts first, this tree importable, no cluster to join."""
    from router_service.transport.ray_group import LONG_BYTES

    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_NAMESPACE")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    environment["RAY_AUTH_MODE"] = "token"
    # As in the manifests.
    environment["RAY_max_direct_call_object_size"] = str(LONG_BYTES)
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A port of the loopback that nothing listens on."""
    return _free_port


@asynccontextmanager
async def _mesh(document: dict[str, Any]) -> AsyncIterator[str]:
    """Controller, groups and engine of one mesh.yaml document on this event loop, and HTTP at the URL."""
    config = parse_mesh(document, origin="test")
    groups: list[GroupHost] = []
    controller = transport = None
    if config.router.transport == "grpc":
        controller = Controller(
            experts_per_layer=check_model(config).experts_per_layer,
            num_groups=config.experts.groups,
            watch_health=watch_health,
        )
        transport = GrpcTransport()
        for number in range(config.experts.groups):
            identity = HostIdentity(replica=f"group-{number}", node="here", host="127.0.0.1")
            groups.append(GroupHost(group=number, config=config, controller=controller, identity=identity))
        await asyncio.gather(*(group.start() for group in groups))
    engine = EngineHost(config=config, controller=controller, transport=transport)
    await engine.start()
    # It listens from here on: a client that is early waits to be accepted.
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(engine.app, log_level="warning"))
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        await engine.stop()
        await asyncio.gather(*(group.stop() for group in groups))


@pytest.fixture(scope="session")
def serve_here() -> Iterator[Callable[[dict[str, Any]], str]]:
    """Serve a mesh.yaml document in this process, without Ray; returns the URL. All stop with the session."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="meshes")
    thread.start()
    running: list[Any] = []

    def serve(document: dict[str, Any]) -> str:
        mesh = _mesh(document)
        url = asyncio.run_coroutine_threadsafe(mesh.__aenter__(), loop).result(120)
        running.append(mesh)
        return url

    yield serve
    for mesh in running:
        asyncio.run_coroutine_threadsafe(mesh.__aexit__(None, None, None), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def _prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def _name(token_id: int) -> str:
    """How /v1/completions names a token of the tiny checkpoints: id below 256 is that byte."""
    if token_id >= 256:
        return SPECIAL.get(token_id, "")
    return chr(token_id) if token_id < 128 else f"bytes:\\x{token_id:02x}"


@cache
def _generate(checkpoint: Path, prompt: tuple[int, ...]) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [_name(token) for token in output[0, len(prompt) :].tolist()]


def _complete(url: str, model: str, prompt: list[int]) -> list[str]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
    }
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    tokens: list[str] = response.json()["choices"][0]["logprobs"]["tokens"]
    return tokens


@pytest.fixture(scope="session")
def check_exact() -> Callable[[str, str, Path], None]:
    """A model at a URL gives `generate`'s greedy tokens of a checkpoint, for prompts of 1 to 700 tokens."""

    def check(url: str, model: str, checkpoint: Path) -> None:
        for length in LENGTHS:
            prompt = _prompt(length)
            assert _complete(url, model, prompt) == _generate(checkpoint, tuple(prompt)), f"prompt of {length} tokens"

    return check


@pytest.fixture(scope="session")
def check_together() -> Callable[[str, str, Path], None]:
    """16 requests of mixed lengths at once give what each gives alone."""

    def check(url: str, model: str, checkpoint: Path) -> None:
        prompts = [_prompt(1 + 23 * index, seed=1) for index in range(16)]
        alone = [_complete(url, model, prompt) for prompt in prompts]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda prompt: _complete(url, model, prompt), prompts))
        assert together == alone
        assert alone[5] == _generate(checkpoint, tuple(prompts[5]))

    return check
