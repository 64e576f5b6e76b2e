"""deltazip evaluate BASE FINETUNED [CANDIDATE ...] --tasks FILE"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deltazip.cli.shared import errors_as_messages, existing_folder, progress_bar

if TYPE_CHECKING:
    from deltazip.compress.scoring.measure import Row

_INTERVAL_COLUMNS = (
    ("accuracy, %", "accuracy", 100.0),
    ("to fine-tune, points", "difference", 100.0),
    ("NLL", "nll", 1.0),
    ("KL", "kl", 1.0),
    ("top-1, %", "top1", 100.0),
)


def command(
    base: Annotated[Path, typer.Argument(help="The base model's folder.")],
    finetuned: Annotated[Path, typer.Argument(help="The fine-tune's folder, to compare with.")],
    candidates: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Deltas, or whole models with a size.json. Without any the fine-tune "
            "itself is scored."
        ),
    ] = None,
    tasks: Annotated[Path | None, typer.Option(help="A .jsonl of prompts and answers.")] = None,
    metric: Annotated[
        str, typer.Option(help="exact: the whole answer; number: what follows the last ####.")
    ] = "exact",
    max_new_tokens: Annotated[int, typer.Option(help="An answer's tokens at most.")] = 150,
    items: Annotated[int | None, typer.Option(help="Only the first so many.")] = None,
    compare: Annotated[
        int, typer.Option(help="Items on which KL and top-1 agreement are taken; 0: none.")
    ] = 100,
    engine: Annotated[
        str,
        typer.Option(help="Who generates answers: torch, deltazip (its own engine), or none."),
    ] = "torch",
    batch_size: Annotated[int, typer.Option(help="Prompts at once, with torch.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the bootstrap behind the intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Scores candidates on a task, and how close they stay to the fine-tune, token by token."""
    with errors_as_messages():
        from deltazip.compress import set_num_threads
        from deltazip.compress.scoring.candidates import find_candidate
        from deltazip.compress.scoring.measure import Bench, How
        from deltazip.compress.scoring.tasks import load_task

        existing_folder(base, "base")
        existing_folder(finetuned, "fine-tune")
        if tasks is None:
            raise ValueError("--tasks FILE is needed: a .jsonl of prompts and answers")
        how = How(engine, compare, batch_size, device, threads, seed)
        task = load_task(tasks, metric, max_new_tokens, items)
        found = [find_candidate(path) for path in candidates or ()]
        set_num_threads(threads)
        started = time.monotonic()
        with progress_bar("evaluating") as progress:
            bench = Bench(base, find_candidate(finetuned), task, how, progress)
            rows = list(bench.rows(found))
        about = {
            "task": task.name,
            "items": len(task.samples),
            "compared": min(compare, len(task.samples)),
            "engine": engine,
            "seed": seed,
            "seconds": round(time.monotonic() - started, 1),
        }
        _show(rows, about, as_json)


def _show(rows: list[Row], about: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(about | {"rows": [row.to_json() for row in rows]}))
        return
    table = Table(
        title=f"{about['task']}, {about['items']} items, 95 % intervals",
        caption=", ".join(f"{key} {about[key]}" for key in ("compared", "engine", "seed")),
    )
    table.add_column("")
    for title in (
        "MB",
        "MB plain",
        "bits of linears",
        *(title for title, _, _ in _INTERVAL_COLUMNS),
    ):
        table.add_column(title, justify="right")
    table.add_column("McNemar p", justify="right")
    for row in rows:
        cells = [f"{part / 1e6:.1f}" for part in (row.total_bytes, row.plain_bytes)]
        cells.append(f"{row.linear_bits:.2f}")
        cells += [_interval(getattr(row, key), scale) for _, key, scale in _INTERVAL_COLUMNS]
        p_value = "" if row.mcnemar_p is None else f"{row.mcnemar_p:.2g}"
        table.add_row(row.name, *cells, p_value)
    Console().print(table)


def _interval(interval: Any, scale: float) -> str:
    if interval is None:
        return ""
    value, low, high = (scale * part for part in interval)
    digits = ".2f" if scale > 1.0 else ".4f"
    return f"{value:{digits}} [{low:{digits}}, {high:{digits}}]"
