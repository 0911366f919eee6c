"""Everything up, a first completion, the URLs; then wait, and take everything down again."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import ray
import typer
from ray import serve
from ray._private import auto_init_hook
from ray.serve import Application

from cluster.api_keys import read_api_keys
from cluster.app import build
from cluster.commands.generate import stream_completion
from cluster.commands.progress import Progress
from cluster.config.mesh import MeshConfig
from cluster.listen_ports import named_ports, port_problem
from cluster.local_ray import shape_proxy_errors, start_local_ray
from cluster.model_files import check_model, served_name
from cluster.preflight import setting_problems
from cluster.running_app import (
    APPLICATION,
    connect,
    deployment_failure,
    end_sequences,
    own_words,
    router_services,
)
from experts.errors import ConfigError


def serve_mesh(config: MeshConfig, mesh: Path, address: str | None, prompt: str) -> None:
    """Return when it is stopped; `mesh` is the file that says `config`. See `cluster.commands.serve` for the rest."""
    http = config.http
    _stop_on_signals()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    progress = Progress()
    try:
        with progress.phase("model"):
            check_model(config)
            if problems := setting_problems(config, here=not address):
                raise ConfigError("\n".join(f"{mesh}: {problem}" for problem in problems))
        if not address:  # a cluster's Serve may listen there already, and is then used as it is
            _check_ports(config)
        with _ray(address, progress):
            if not address:
                # As all of a local Ray: a laptop should not offer its experts around.
                local = config.experts.model_copy(update={"listen_host": "127.0.0.1"})
                config = config.model_copy(update={"experts": local})
            with _application(config, progress):
                url = f"http://{'127.0.0.1' if http.host == '0.0.0.0' else http.host}:{http.port}"
                with progress.phase("first completion"):
                    _first_completion(config, url, prompt, progress)
                progress.say(_ready(url, prompt, config))
                threading.Event().wait()
    except KeyboardInterrupt:
        progress.say("stopped")


def _stop_on_signals() -> None:
    """SIGTERM as Ctrl-C. Again once Ray is up: Ray's own SIGTERM handler aborts the process after three seconds."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)


def _check_ports(config: MeshConfig) -> None:
    for key, host, port in named_ports(config):
        if problem := port_problem(host, port):
            another = "another with --port (make serve PORT=...)" if key == "http.port" else "another"
            raise ConfigError(
                f"{key}: cannot listen on {host}:{port} ({problem}); stop what listens there or choose {another}"
            )


@contextmanager
def _ray(address: str | None, progress: Progress) -> Iterator[None]:
    """Join the cluster at `address`, or start Ray on this machine's loopback; undo whichever it was."""
    with progress.phase("Ray"):
        if address:
            connect(address)
        else:
            start_local_ray()
        _stop_on_signals()
    try:
        yield
    finally:
        # A thread that is still deploying asks on, and would have Ray started again.
        auto_init_hook.enable_auto_connect = False
        ray.shutdown()


@contextmanager
def _application(config: MeshConfig, progress: Progress) -> Iterator[None]:
    """The application, ready; deleted afterwards, with a word to streams that are not at their end."""
    http = config.http
    with progress.phase("Serve"):
        serve.start(http_options={"host": http.host, "port": http.port, "request_timeout_s": None})
    failed: list[Exception] = []
    # A daemon, so that Ctrl-C need not wait for an application that cannot start.
    deploying = threading.Thread(target=_run, args=(build(config.model_dump(mode="json")), failed), daemon=True)
    try:
        with progress.phase("experts and engine"):
            deploying.start()
            while deploying.is_alive():
                shape_proxy_errors()
                progress.update(_loading())
                deploying.join(0.25)
            if failed:
                raise ConfigError(deployment_failure()) from None
        yield
    finally:
        progress.say("stopping ...")
        end_sequences()
        try:
            serve.delete(APPLICATION)
        except TimeoutError:
            progress.say("Serve has not taken the application down within a minute")


def _run(application: Application, failed: list[Exception]) -> None:
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except Exception as error:  # Serve's own words are in its status
        failed.append(error)


def _loading() -> str:
    """One line: which groups are ready, how many bytes are loaded."""
    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return "starting actors"
    states = {name: deployment.status.value for name, deployment in application.deployments.items()}
    if states.get("controller") != "HEALTHY":
        return "starting the controller"
    try:
        status = serve.get_deployment_handle("controller", APPLICATION).status.remote().result(timeout_s=2)
    except Exception as error:  # it may be restarting; the next look will tell
        return f"waiting for the controller ({type(error).__name__})"
    replicas = [replica for group in status["groups"] for replica in group["replicas"]]
    ready = sum(replica["ready"] for replica in replicas)
    loaded, total = (sum(replica[key] for replica in replicas) for key in ("loaded_bytes", "total_bytes"))
    problem = "".join(f"; trying again after: {words}" for words in own_words(application)[:1])
    return f"{ready}/{len(status['groups'])} groups ready, {loaded / 1e6:.1f} of {total / 1e6:.1f} MB loaded{problem}"


def _api_headers(config: MeshConfig) -> dict[str, str]:
    keys = read_api_keys(config.http.api_keys_file)
    return {"Authorization": f"Bearer {keys[0]}"} if keys else {}


def _first_completion(config: MeshConfig, url: str, prompt: str, progress: Progress) -> None:
    """Stream one completion through the endpoint itself, to standard output."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 64, "temperature": 0.0, "stream": True}
    with httpx.Client(base_url=url, headers=_api_headers(config), timeout=httpx.Timeout(10, read=None)) as client:
        pieces = stream_completion(client, body)
        first = next(pieces, "")
        progress.say("")
        typer.echo(prompt + first, nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo("\n")


def _ready(url: str, prompt: str, config: MeshConfig) -> str:
    name = served_name(config.model)
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.http.api_keys_file else ""
    services = "".join(f"RouterService    {address}\n" for address in router_services().values())
    return (
        "The same with curl:\n"
        f"  curl -N {url}/v1/completions -H 'Content-Type: application/json'{key} \\\n"
        f'    -d \'{{"model": "{name}", "prompt": "{prompt}", "max_tokens": 64, "temperature": 0, "stream": true}}\'\n'
        f"OpenAI base URL  {url}/v1\n"
        f"Health           {url}/health\n"
        f"Metrics          {url}/metrics\n"
        f"{services}"
        "Status           expertmesh status\n"
        "Ctrl-C stops everything."
    )
