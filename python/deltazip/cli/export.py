"""deltazip export BASE DELTA -o OUT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltazip.cli.shared import console, errors_as_messages, existing_folder, progress_bar


def command(
    base: Annotated[Path, typer.Argument(help="The base model's folder.")],
    delta: Annotated[Path, typer.Argument(help="A delta made from it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the whole model.")],
    dtype: Annotated[
        str, typer.Option(help="base (as the base has it, rounded), bf16, fp16 or fp32.")
    ] = "base",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT's weights.")] = False,
) -> None:
    """Puts base and delta together again, as a Hugging Face folder."""
    with errors_as_messages():
        existing_folder(base, "base")
        with progress_bar("exporting") as progress:
            from deltazip.compress.export import export

            path = export(base, delta, out, dtype=dtype, overwrite=overwrite, progress=progress)
        console.print(str(path), highlight=False)
