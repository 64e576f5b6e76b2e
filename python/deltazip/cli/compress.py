"""deltazip compress BASE FINETUNED -o OUT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deltazip.cli.shared import (
    INTERRUPTED,
    console,
    errors_as_messages,
    existing_folder,
    megabytes,
    progress_bar,
)


def command(
    base: Annotated[Path, typer.Argument(help="The base model's folder.")],
    finetuned: Annotated[Path, typer.Argument(help="The full fine-tune's folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for delta.safetensors.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="What the fine-tune is asked: a .jsonl of conversations, or plain text."),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="int4, int2, ternary, sign, dense4 or dense8.")
    ] = "int4",
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale. 0: what suits the format.")
    ] = 0,
    bits: Annotated[
        float, typer.Option(help="With sign: bits a weight, ternary takes what is left. 0: 1.")
    ] = 0.0,
    embedding_format: Annotated[str, typer.Option(help="int4, int8 or exact.")] = "int4",
    embedding_group_size: Annotated[int, typer.Option(help="The same, of embeddings.")] = 0,
    embedding_step: Annotated[
        float, typer.Option(help="No finer than this share of its rms movement. -1: what suits.")
    ] = -1.0,
    samples: Annotated[int, typer.Option(help="Calibration sequences at most.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Calibration tokens at most, roughly.")] = 40960,
    max_length: Annotated[int, typer.Option(help="Tokens of each at most.")] = 1024,
    damping: Annotated[
        float, typer.Option(help="Added to the Hessian's diagonal, a share.")
    ] = 0.01,
    correction: Annotated[
        float, typer.Option(help="Share of earlier errors to make up for, 0 to 1.")
    ] = 1.0,
    lengthening: Annotated[
        float, typer.Option(help="Share of the length lost in compression to add beforehand.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Which calibration sequences are taken.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    lossless: Annotated[
        str, typer.Option(help="zstd packs the file for disk and network; none leaves it.")
    ] = "zstd",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print sizes, stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT's delta.")] = False,
) -> None:
    """Compresses a full fine-tune to a delta of its base. An interrupted run resumes."""
    with errors_as_messages():
        from deltazip.compress import set_num_threads
        from deltazip.compress.plan import Settings

        existing_folder(base, "base")
        existing_folder(finetuned, "fine-tune")
        settings = Settings(
            format=format_,
            group_size=group_size,
            bits=bits,
            embedding_format=embedding_format,
            embedding_group_size=embedding_group_size,
            embedding_step=embedding_step,
            num_samples=samples,
            num_tokens=tokens,
            max_length=max_length,
            damping=damping,
            correction=correction,
            lengthening=lengthening,
            seed=seed,
        )
        if dry_run:
            _print_plan(base, finetuned, settings)
            return
        if calibration is None:
            raise ValueError("--calibration FILE is needed: texts like those the fine-tune is for")
        set_num_threads(threads)
        try:
            with progress_bar("compressing") as progress:
                from deltazip.compress.pipeline import compress

                result = compress(
                    base, finetuned, out, calibration, settings,
                    device=device, lossless=lossless, overwrite=overwrite, progress=progress,
                )  # fmt: skip
        except KeyboardInterrupt:
            console.print(
                f"interrupted; what is done waits in {out}.partial: run it again to go on"
            )
            raise typer.Exit(INTERRUPTED) from None
        Console().print(
            f"{result.path}: {megabytes(result.file_bytes)}, {result.ratio:.2f} times smaller than "
            f"the fine-tune ({megabytes(result.finetuned_bytes)})\n"
            f"mean output error {result.mean_error:.4%} of the delta's own, "
            f"{result.seconds:.0f} s, peak memory {megabytes(result.peak_rss_bytes)}",
            highlight=False,
        )


def _print_plan(base: Path, finetuned: Path, settings: object) -> None:
    from deltazip.compress.checkpoint import Checkpoint
    from deltazip.compress.plan import Settings, check_pair, estimate_file_bytes, plan_tensors

    assert isinstance(settings, Settings)
    checkpoint, tuned = Checkpoint(base), Checkpoint(finetuned)
    planned = plan_tensors(checkpoint, check_pair(checkpoint, tuned), settings)
    table = Table("type", "tensors", "weights", "size", title="if every tensor moved")
    for type_ in sorted({p.type for p in planned}):
        rows = [p for p in planned if p.type is type_]
        weights = sum(checkpoint.tensors[p.name].num_bytes for p in rows)
        size = sum(p.num_bytes for p in rows)
        table.add_row(type_.value, str(len(rows)), megabytes(weights), megabytes(size))
    total = estimate_file_bytes(planned)
    table.add_section()
    table.add_row("whole file", str(len(planned)), megabytes(tuned.files_bytes), megabytes(total))
    out = Console()
    out.print(table)
    out.print(f"about {tuned.files_bytes / total:.2f} times smaller than the fine-tune")
