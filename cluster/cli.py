"""The `expertmesh` command. Commands are imported when they are asked for: `--help` should not wait for torch."""

from __future__ import annotations

import importlib
import sys

import click
import typer

from experts.errors import MeshError

_COMMANDS = {
    "serve": ("cluster.commands.serve:command", "Serve a model: mesh.yaml in, OpenAI endpoint out."),
    "generate": ("cluster.commands.generate:command", "Complete a prompt with a running server."),
    "status": ("cluster.commands.status:command", "Groups, nodes, slots and engines of a running server."),
    "plan": ("cluster.planner.command:command", "What a model needs, before a GPU is booked."),
    "doctor": ("cluster.doctor.command:command", "Check this machine and a mesh.yaml before serving."),
    "warmup": ("cluster.commands.warmup:command", "Compile and tune the GPU kernels once."),
    "bench": ("cluster.bench.app:app", "Benchmarks: serve, experts, dispatch."),
    "k8s": ("cluster.kubernetes.app:app", "Status, apply and scale on Kubernetes."),
    "version": ("cluster.commands.version:command", "Print the version."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name][0].split(":")
        target = getattr(importlib.import_module(module), attribute)
        if isinstance(target, typer.Typer):
            return typer.main.get_command(target)
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(name=cmd_name, help=_COMMANDS[cmd_name][1])(target)
        return typer.main.get_command(single)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 it ran and found a fault, 2 what the user gave cannot be used."""
    group = _LazyGroup("expertmesh", help="Serves Mixture-of-Experts models, one expert group at a time.")
    try:
        code = group.main(args=arguments, prog_name="expertmesh", standalone_mode=False)
    except MeshError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
