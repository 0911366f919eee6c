"""`expertmesh serve`: what is to be served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.config.load import load_mesh

_PROMPT = "def main("


def command(
    mesh: Annotated[Path, typer.Argument(help="mesh.yaml")],
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to join; without one, Ray starts here"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Overrides http.host")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Overrides http.port")] = None,
    prompt: Annotated[str, typer.Option(help="What the first completion continues")] = _PROMPT,
) -> None:
    """Serve a model until Ctrl-C."""
    config = load_mesh(mesh)
    # Torch and Ray take seconds to load, and who has mistyped a key need not wait for them.
    from cluster.commands.serve_mesh import serve_mesh

    http = config.http.model_copy(update={k: v for k, v in {"host": host, "port": port}.items() if v is not None})
    serve_mesh(config.model_copy(update={"http": http}), mesh, address, prompt)
