"""``blockrepl completion``: the script that makes a shell complete blockrepl's commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    Examples:
      blockrepl completion bash > /etc/bash_completion.d/blockrepl
      blockrepl completion zsh > "${fpath[1]}/_blockrepl"
      blockrepl completion fish > ~/.config/fish/completions/blockrepl.fish
    """
    from blockrepl.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None, "click knows all of SHELLS"
    click.echo(kind(cli, {}, "blockrepl", "_BLOCKREPL_COMPLETE").source())
