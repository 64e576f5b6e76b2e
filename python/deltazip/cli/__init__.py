"""The command line. Each command is a module of this folder; torch loads only when one needs it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable

import typer

# Name on the command line -> module of this folder whose `command` it is.
COMMANDS = {
    "compress": "compress",
    "inspect": "inspection",
    "evaluate": "evaluate",
    "export": "export",
    "import": "importing",
    "pack": "packing",
    "unpack": "unpacking",
    "bench": "bench",
    "serve": "serve",
}


def make_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The program with these commands; each one's module is imported here."""
    app = typer.Typer(
        name="deltazip",
        help="Serves many full fine-tunes of one base model from one process, as small deltas.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name in names:
        app.command(name)(importlib.import_module(f"deltazip.cli.{COMMANDS[name]}").command)
    app.callback()(lambda: None)  # so that a lone command keeps its name
    return app


def main() -> None:
    """The `deltazip` program."""
    # Idle OpenMP threads that spin make torch many times slower beside other busy processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    asked = [name for name in sys.argv[1:2] if name in COMMANDS]
    make_app(asked or COMMANDS)()
