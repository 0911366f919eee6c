from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class ScriptedServer:
    """An OpenAI-shaped endpoint: `events` are what a completion streams, None stands for the asked tokens."""

    url: str
    events: list[dict[str, object]] | None = None
    stream: bytes | None = None  # as it is, byte by byte, in place of `events`
    status: int = 200
    bodies: list[dict[str, object]] = field(default_factory=list)
    most_at_once: int = 0


@pytest.fixture
def scripted_server() -> Iterator[ScriptedServer]:
    lock = threading.Lock()
    at_once = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(200, json.dumps({"data": [{"id": "tiny"}]}).encode())

        def do_POST(self) -> None:
            nonlocal at_once
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                script.bodies.append(body)
                at_once += 1
                script.most_at_once = max(script.most_at_once, at_once)
            if script.status != 200:
                self._answer(script.status, b'{"error": {"message": "no such model"}}')
            elif script.stream is not None:
                self.send_response(200)
                self.end_headers()
                for at in range(len(script.stream)):
                    self.wfile.write(script.stream[at : at + 1])
                    self.wfile.flush()
            else:
                events = script.events
                if events is None:
                    events = [{"choices": [{"text": " t"}]} for _ in range(body["max_tokens"])]
                    events.append({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
                lines = [f"data: {json.dumps(event)}\n\n" for event in events]
                self._answer(200, "".join([*lines, "data: [DONE]\n\n"]).encode())
            with lock:
                at_once -= 1

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script = ScriptedServer(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield script
    server.shutdown()
    thread.join()
    server.server_close()
