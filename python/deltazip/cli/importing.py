"""deltazip import lora BASE ADAPTER -o OUT, deltazip import bitdelta BASE FILE -o OUT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deltazip.cli.shared import errors_as_messages, existing_folder, megabytes, progress_bar


def command(
    kind: Annotated[str, typer.Argument(help="lora (a PEFT adapter's folder) or bitdelta.")],
    base: Annotated[Path, typer.Argument(help="The base model's folder.")],
    source: Annotated[Path, typer.Argument(help="An adapter's folder, or a .safetensors.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for delta.safetensors.")],
    format_: Annotated[
        str,
        typer.Option("--format", help="Of low-rank products; see compress."),
    ] = "dense4",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    embedding_format: Annotated[str, typer.Option(help="int4, int8 or exact.")] = "int8",
    calibration: Annotated[
        Path | None, typer.Option(help="As of compress; without one all inputs count alike.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    lossless: Annotated[str, typer.Option(help="zstd or none.")] = "zstd",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT's delta.")] = False,
) -> None:
    """Makes a delta of a LoRA adapter or a BitDelta file. An interrupted run resumes."""
    with errors_as_messages():
        from deltazip.compress import set_num_threads
        from deltazip.compress.plan import Settings

        existing_folder(base, "base")
        settings = Settings(
            format=format_, group_size=group_size, embedding_format=embedding_format
        )
        set_num_threads(threads)
        with progress_bar("importing") as progress:
            from deltazip.compress.imports.convert import import_variant

            result = import_variant(
                kind, base, source, out, settings,
                calibration_file=calibration, device=device, lossless=lossless,
                overwrite=overwrite, progress=progress,
            )  # fmt: skip
        Console().print(
            f"{result.path}: {megabytes(result.file_bytes)}, mean output error "
            f"{result.mean_error:.4%} of the delta's own, {result.seconds:.0f} s",
            highlight=False,
        )
