"""deltazip inspect DELTA"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deltazip.cli.shared import errors_as_messages, megabytes

if TYPE_CHECKING:
    from deltazip.compress.delta_file import DeltaFile


def command(
    delta: Annotated[Path, typer.Argument(help="A folder with delta.safetensors, or the file.")],
    layers: Annotated[bool, typer.Option("--layers", help="Every layer's error too.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read it all, check its digest.")
    ] = False,
) -> None:
    """Shows what is in a delta: sizes, bits a weight, ratio of the whole file, errors, settings."""
    with errors_as_messages():
        from deltazip.compress.delta_file import DeltaFile

        file = DeltaFile(delta)
        if verify:
            file.verify()
        out = Console()
        rows: dict[str, list[str]] = {}
        for name, entry in file.entries.items():
            rows.setdefault(entry.type.value, []).append(name)
        table = Table("type", "tensors", "weights", "size", "bits a weight", title=str(file.path))
        if file.codec != "none":
            table.add_column("unpacked")
            table.add_column("bits a weight")
        for type_, names in sorted(rows.items()):
            weights = sum(math.prod(file.entries[n].shape) for n in names)
            size = sum(file.stored_bytes(n) for n in names)
            row = [type_, str(len(names)), f"{weights:,}", *_size(size, weights)]
            if file.codec != "none":
                row += _size(sum(file.decoded_bytes(n) for n in names), weights)
            table.add_row(*row)
        stored = sum(info.num_bytes for info in file.stored.values())
        weights = sum(math.prod(entry.shape) for entry in file.entries.values())
        header = file.num_bytes - stored
        table.add_row("header and manifest", "", "", megabytes(header), "")
        table.add_section()
        row = [
            "whole file",
            str(len(file.entries)),
            f"{weights:,}",
            *_size(file.num_bytes, weights),
        ]
        if file.codec != "none":
            row += _size(header + sum(map(file.decoded_bytes, file.entries)), weights)
        table.add_row(*row)
        out.print(table)
        compressor: dict[str, Any] = file.manifest.get("compressor") or {}
        report: dict[str, Any] = compressor.get("report") or {}
        _print_facts(out, file, report)
        if layers:
            _print_layers(out, report.get("tensors") or {})
        if verify:
            out.print("content digest: verified")


def _size(num_bytes: int, weights: int) -> list[str]:
    return [megabytes(num_bytes), f"{8 * num_bytes / max(weights, 1):.3f}"]


def _print_facts(out: Console, file: DeltaFile, report: dict[str, Any]) -> None:
    manifest = file.manifest
    facts = Table(show_header=False, box=None)
    facts.add_column()
    facts.add_column(overflow="fold")
    if report.get("finetuned_bytes"):
        ratio = report["finetuned_bytes"] / file.num_bytes
        whole = megabytes(report["finetuned_bytes"])
        facts.add_row("ratio", f"{ratio:.2f} (fine-tune {whole}, the whole file counted)")
    facts.add_row("lossless", file.codec)
    base = manifest.get("base") or {}
    facts.add_row("base", f"{base.get('name', '?')} ({base.get('architecture', '?')})")
    facts.add_row("base digest", str(manifest["base_digest"]))
    facts.add_row("content digest", str(manifest["content_digest"]))
    for key in ("finetuned", "calibration_sequences", "calibration_tokens", "mean_error"):
        if key in report:
            facts.add_row(key.replace("_", " "), str(report[key]))
    for key, value in ((manifest.get("compressor") or {}).get("settings") or {}).items():
        facts.add_row(key.replace("_", " "), str(value))
    out.print(facts)


def _print_layers(out: Console, tensors: dict[str, Any]) -> None:
    table = Table("tensor", "output error", "weight error",
                  title="squared error as a share of the delta's own")  # fmt: skip
    for name, row in sorted(tensors.items(), key=lambda item: _natural(item[0])):
        table.add_row(name, f"{row['error']:.4%}", f"{row['weight_error']:.2%}")
    out.print(table)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """model.layers.10 after model.layers.9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
