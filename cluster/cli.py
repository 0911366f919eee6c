"""The `expertmesh` command. Commands are imported when they are asked for: `--help` should not wait for torch."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from experts.errors import MeshError

_COMMANDS = {
    "serve": ("cluster.commands.serve:command", "Serve a model: mesh.yaml in, OpenAI endpoint out."),
    "generate": ("cluster.commands.generate:command", "Complete a prompt with a running server."),
    "status": ("cluster.commands.status:command", "Groups, nodes, slots and engines of a running server."),
    "plan": ("cluster.planner.command:command", "What a model needs, before a GPU is booked."),
    "doctor": ("cluster.doctor.command:command", "Check this machine and a mesh.yaml before serving."),
    "warmup": ("cluster.commands.warmup:command", "Compile and tune the GPU kernels once."),
    "bench": ("cluster.bench.app:app", "Benchmarks, one command each."),
    "k8s": ("cluster.kubernetes.app:app", "Status, apply and scale on Kubernetes."),
    "version": ("cluster.commands.version:command", "Print the version."),
}


class _LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        target, text = _COMMANDS[cmd_name]
        module, attribute = target.split(":")
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            return typer.main.get_command(found)
        single = _typer()
        single.command(name=cmd_name, help=text)(found)
        return typer.main.get_command(single)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.format_usage(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(self.help or "")
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


def _typer(**options: Any) -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **options)


app = _typer(cls=_LazyGroup, help="Serves Mixture-of-Experts models, one expert group at a time.")


@app.callback()
def _root() -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 it ran and found a fault, 2 what the user gave cannot be used."""
    try:
        app(arguments, prog_name="expertmesh")
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
