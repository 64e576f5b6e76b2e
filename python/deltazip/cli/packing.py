"""deltazip pack DELTA [-o OUT]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deltazip.cli.shared import errors_as_messages, megabytes, progress_bar

Delta = Annotated[Path, typer.Argument(help="A folder with delta.safetensors, or the file.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for the new file. Default: replace it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT's delta.")]


def command(
    delta: Delta,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Packs a delta for disk and network, losslessly: it serves as it is, the same revision."""
    rewrite(delta, out, "zstd", overwrite=overwrite)


def rewrite(delta: Path, out: Path | None, lossless: str, *, overwrite: bool) -> None:
    """What pack and unpack do."""
    with errors_as_messages():
        from deltazip.compress.delta_file import DeltaFile
        from deltazip.compress.repack import repack

        before = DeltaFile(delta).num_bytes
        with progress_bar("rewriting") as progress:
            path = repack(delta, out, lossless, overwrite=overwrite, progress=progress)
        after = path.stat().st_size
        Console().print(f"{path}: {megabytes(before)} -> {megabytes(after)}", highlight=False)
