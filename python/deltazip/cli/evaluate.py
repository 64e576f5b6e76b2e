"""deltazip evaluate BASE FINETUNED [DELTA] --tasks FILE"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deltazip.cli.shared import errors_as_messages, existing_folder, progress_bar


def command(
    base: Annotated[Path, typer.Argument(help="The base model's folder.")],
    finetuned: Annotated[Path, typer.Argument(help="The fine-tune's folder, to compare with.")],
    delta: Annotated[
        Path | None, typer.Argument(help="Its delta. Without one the fine-tune itself is scored.")
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
        str, typer.Option(help="torch, or deltazip: its own engine (accuracy only).")
    ] = "torch",
    batch_size: Annotated[int, typer.Option(help="Prompts at once, with torch.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Scores a delta on a task, and how close it stays to its fine-tune, token by token."""
    with errors_as_messages():
        from deltazip.compress import set_num_threads
        from deltazip.compress.tasks import load_task

        existing_folder(base, "base")
        existing_folder(finetuned, "fine-tune")
        if tasks is None:
            raise ValueError("--tasks FILE is needed: a .jsonl of prompts and answers")
        if engine not in ("torch", "deltazip"):
            raise ValueError(f"engine must be torch or deltazip, got '{engine}'")
        if engine == "deltazip" and delta is None:
            raise ValueError("deltazip's engine runs a base and deltas: name a delta, or use torch")
        task = load_task(tasks, metric, max_new_tokens, items)
        set_num_threads(threads)
        started = time.monotonic()
        if engine == "torch":
            result = _with_torch(base, finetuned, delta, task, compare, batch_size, device)
        else:
            result = _with_engine(base, finetuned, delta, task, threads, device)
        result |= {
            "task": task.name,
            "items": len(task.samples),
            "seconds": round(time.monotonic() - started, 1),
        }
        _show(result, as_json)


def _with_torch(
    base: Path, finetuned: Path, delta: Path | None, task: Any, compare: int, batch_size: int,
    device: str,
) -> dict[str, Any]:  # fmt: skip
    from deltazip.compress.calibration import load_tokenizer
    from deltazip.compress.evaluate import closeness, load_model
    from deltazip.compress.tasks import TorchRunner, begun_answers, score

    tokenizer = load_tokenizer(finetuned)
    model = load_model(base if delta else finetuned, delta, device=device)
    reference = None
    if delta and compare:
        reference = load_model(finetuned, None, device=device)
    with progress_bar("wanted answers") as progress:
        close = closeness(
            model, tokenizer, task.samples, reference,
            num_compared=compare, progress=lambda share: progress("", share),
        )  # fmt: skip
    begun = begun_answers(tokenizer, task, close.likeliest)
    with progress_bar("own answers") as progress:
        runner = TorchRunner(
            model, tokenizer, batch_size=batch_size, progress=lambda share: progress("", share)
        )
        scored = score(runner, tokenizer, task, begun)
    return {
        "right": scored.num_right,
        "accuracy": scored.share,
        "nll": close.nll,
        "whole answer likeliest": close.exact,
        "kl to fine-tune": close.kl,
        "top-1 agreement": close.top1,
    }


def _with_engine(
    base: Path, finetuned: Path, delta: Path | None, task: Any, threads: int, device: str
) -> dict[str, Any]:
    from deltazip.compress.calibration import load_tokenizer
    from deltazip.compress.tasks import EngineRunner, score

    options: dict[str, object] = {"device": device}
    if threads:
        options["num_threads"] = threads
    runner = EngineRunner(base, delta, **options)
    try:
        scored = score(runner, load_tokenizer(finetuned), task)
    finally:
        runner.close()
    return {"right": scored.num_right, "accuracy": scored.share}


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    table = Table(show_header=False, title=f"{result.pop('task')}, {result['items']} items")
    for key, value in result.items():
        if value is not None:
            is_share = key in ("accuracy", "whole answer likeliest", "top-1 agreement")
            text = f"{value:.2%}" if is_share else f"{value:.6g}"
            table.add_row(key, text)
    Console().print(table)
