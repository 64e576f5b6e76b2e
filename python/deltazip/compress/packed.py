"""The lossless stage of docs/delta_format.md, "Packed files", through the engine's codec."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

from deltazip import _C

CODECS = ("zstd", "none")
"""What --lossless takes; none leaves a file's tensors as they are."""


def check_codec(name: str) -> None:
    """Raises ValueError for a codec that is not known."""
    if name not in CODECS:
        raise ValueError(f"lossless codec must be one of {', '.join(CODECS)}, got '{name}'")


def decode(codec: str, stream: bytes | bytearray, num_bytes: int, item_bytes: int) -> bytearray:
    """A tensor's bytes from its stream.

    Raises:
        ValueError: the stream is damaged, or stands for more or fewer bytes.
    """
    return _C.StreamCodec(codec).decode(stream, num_bytes, item_bytes)


class Spool:
    """Streams on their way to a file whose header must know their sizes first.

    They wait on the disk of `folder`, in a file without a name that goes with the process.
    """

    def __init__(self, codec: str, folder: Path) -> None:
        self._codec = _C.StreamCodec(codec)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by __exit__
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, data: bytes | bytearray | memoryview, item_bytes: int) -> tuple[int, int]:
        """Encodes a tensor's bytes; returns where its stream lies: offset and size."""
        stream = self._codec.encode(data, item_bytes)
        self._file.seek(self._end)
        self._file.write(stream)
        place = (self._end, len(stream))
        self._end += len(stream)
        return place

    def read(self, place: tuple[int, int]) -> bytes:
        self._file.seek(place[0])
        return self._file.read(place[1])
