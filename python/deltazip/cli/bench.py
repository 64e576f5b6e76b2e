"""deltazip bench MODE... --shape NAME | --base FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from deltazip.cli.shared import console, errors_as_messages


def command(
    modes: Annotated[
        list[str],
        typer.Argument(help="latency, prefill, throughput, load; one or several, in one engine."),
    ],
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights: llama-2-7b, llama-3-8b, smollm2-135m or tiny."),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Or a real base's folder.")] = None,
    variants: Annotated[int, typer.Option(help="So many random deltas.")] = 0,
    variant: Annotated[
        list[str] | None, typer.Option(help="Or real ones: NAME=FOLDER, repeatable.")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="int4, int2, ternary or sign.")] = "int2",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 128,
    embedding_format: Annotated[
        str, typer.Option(help="Of embedding and lm_head: unchanged, int4 or int8.")
    ] = "unchanged",
    distinct: Annotated[
        int, typer.Option(help="Files of different content; the rest are hard links to them.")
    ] = 4,
    mix: Annotated[
        str, typer.Option(help="Who is asked, a list: base, even, even:N, zipf, zipf:N.")
    ] = "",
    batch: Annotated[str, typer.Option(help="Requests at once, a list.")] = "1,8,32",
    prompt: Annotated[int, typer.Option(help="Prompt tokens of latency and load.")] = 128,
    output: Annotated[int, typer.Option(help="Output tokens of latency.")] = 136,
    prefill_batch: Annotated[int, typer.Option(help="Prompts of prefill.")] = 16,
    prefill_prompt: Annotated[int, typer.Option(help="Tokens of each.")] = 1024,
    requests: Annotated[int, typer.Option(help="Requests of throughput.")] = 512,
    rounds: Annotated[int, typer.Option(help="Measured, after one that warms up.")] = 3,
    seed: Annotated[int, typer.Option(help="Of prompts and of the zipf mix.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    memory_budget: Annotated[
        float, typer.Option(help="GB for weights, slots and KV; 0: the engine's choice.")
    ] = 0.0,
    prefill_chunk: Annotated[
        str,
        typer.Option(help="Prompt tokens of a step that also decodes, a list for load; 0: all."),
    ] = "",
    engine: Annotated[
        list[str] | None, typer.Option(help="FIELD=VALUE of EngineConfig, repeatable.")
    ] = None,
    workdir: Annotated[
        Path | None, typer.Option(help="Keep random files here and use them again.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file; - is stdout.")
    ] = None,
) -> None:
    """Measures the engine without HTTP, on a real checkpoint or on random weights of a shape."""
    with errors_as_messages():
        from deltazip.bench.modes import MODES, Plan
        from deltazip.bench.report import make_report, print_tables
        from deltazip.bench.setup import Subject, file_bytes, open_session, work_folder
        from deltazip.bench.synthetic import DeltaOptions
        from deltazip.bench.workload import Mix

        for name in modes:
            if name not in MODES:
                raise ValueError(f"mode must be one of {', '.join(MODES)}, got '{name}'")
        real = {
            name: Path(path) for name, path in _pairs("--variant", variant or [], "NAME=FOLDER")
        }
        delta = DeltaOptions(format_, group_size, embedding_format, distinct)
        subject = Subject(base, shape, real, variants, delta)
        options = _engine_options(engine or [])
        chunks = prefill_chunk or str(options.get("prefill_chunk_tokens", 0))
        plan = Plan(
            _numbers("--batch", batch), prompt, output, prefill_batch, prefill_prompt, requests,
            rounds, seed, _numbers("--prefill-chunk", chunks, least=0),
        )  # fmt: skip
        options["prefill_chunk_tokens"] = plan.prefill_chunks[0]
        _check_positive(
            prompt=prompt, output=output, prefill_batch=prefill_batch, rounds=rounds,
            prefill_prompt=prefill_prompt, requests=requests, distinct=distinct,
        )  # fmt: skip
        count = subject.num_variants(modes)
        texts = (mix or ("even" if count else "base")).split(",")
        mixes = [Mix.parse(text, count) for text in texts]
        if memory_budget:
            options["memory_budget_bytes"] = int(memory_budget * 1e9)

        with work_folder(workdir, file_bytes(subject, modes)) as folder:
            setup = open_session(subject, plan, modes, folder, device, options, _say)
            with setup.session as session:
                results: list[dict[str, Any]] = []
                for name in modes:
                    for one in mixes:
                        _say(f"{name}, {one.name}")
                        results += MODES[name](session, plan, one)
                report = make_report(setup, plan, results)
        is_stdout = str(json_path) == "-"
        print_tables(report, Console(width=None if sys.stdout.isatty() else 200, stderr=is_stdout))
        if is_stdout:
            print(json.dumps(report))
        elif json_path is not None:
            json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    console.print(f"[dim]{text}[/]", highlight=False)


def _numbers(option: str, text: str, least: int = 1) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise ValueError(
            f"{option}: expected numbers from {least} on, as in {least},8,32, got '{text}'"
        )
    return values


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _pairs(option: str, texts: list[str], form: str) -> list[tuple[str, str]]:
    for text in texts:
        if "=" not in text:
            raise ValueError(f"{option}: expected {form}, got '{text}'")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in texts]


def _engine_options(texts: list[str]) -> dict[str, Any]:
    """Values as JSON where they are JSON (numbers, true), else as text."""
    return {name: _value(text) for name, text in _pairs("--engine", texts, "FIELD=VALUE")}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
