"""`expertmesh version`."""

from importlib.metadata import version

import click


def command() -> None:
    """Print the version."""
    click.echo(version("expertmesh"))
