"""`expertmesh bench`: the benchmarks, one command each."""

from __future__ import annotations

import typer

from cluster.bench import autoscale, dispatch, experts, node_bytes, overlap, quality, serve

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("serve", help="This server and its peers: same checkpoint, same prompts.")(serve.command)
app.command("experts", help="This CPU's experts beside transformers' own.")(experts.command)
app.command("dispatch", help="Dispatch and combine beside a bare gRPC echo.")(dispatch.command)
app.command("overlap", help="A step as one batch beside the same as two micro-batches.")(overlap.command)
app.command("bytes", help="What a token costs on the network, counted on interfaces.")(node_bytes.command)
app.command("quality", help="What quantised experts and node limits cost in bits per byte of held-out text.")(
    quality.command
)
app.command("autoscale", help="Replicas that follow a load up and down, every answer checked.")(autoscale.command)


@app.callback()
def _root() -> None:
    """Benchmarks: each measures both sides in one run."""
