"""deltazip unpack DELTA [-o OUT]"""

from __future__ import annotations

from deltazip.cli.packing import Delta, Out, Overwrite, rewrite


def command(delta: Delta, out: Out = None, overwrite: Overwrite = False) -> None:
    """Undoes pack: every tensor lies in the file as docs/delta_format.md lists it."""
    rewrite(delta, out, "none", overwrite=overwrite)
