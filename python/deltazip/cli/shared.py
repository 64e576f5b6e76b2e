"""What commands have in common: progress, clear errors, an exit status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)
INTERRUPTED = 130


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """A caller's mistake is one line on stderr and status 1, not a stack trace."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        console.print(f"[red]error:[/] {error.name} is needed: pip install 'deltazip\\[compress]'")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError) as error:
        console.print("[red]error:[/] ", end="")
        console.print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left; gives what to call with a text and the share done, 0 to 1."""
    columns = (
        TextColumn("[bold]" + title),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=1.0)

        def update(what: str, share: float) -> None:
            progress.update(task, description=what, completed=share)

        yield update


def megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def existing_folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise ValueError(f"{what} {path}: no such folder")
    return path
