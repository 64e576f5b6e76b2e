"""A delta written anew, packed or plain: other bytes on the disk, the same revision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deltazip.compress.delta_file import (
    FILE_NAME,
    DeltaFile,
    write_delta,
)
from deltazip.compress.pipeline import TOKENIZER_FILES, check_out
from deltazip.compress.stored import Stored, atomic_file


def repack(
    delta: Path,
    out: Path | None,
    lossless: str,
    *,
    overwrite: bool = False,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Path:
    """Writes `delta` with another lossless codec and returns the path of the new file.

    Args:
        delta: a folder with delta.safetensors, or the file.
        out: the folder to write to, tokenizer files included; None replaces the file, at once and
            whole.
        lossless: one of packed.CODECS.

    Raises:
        DeltaFileError: the delta is damaged.
        CompressError: the output is there already.
        ValueError: the codec is unknown.
        OSError: the disk is full or not writable; what was there is left as it was.
    """
    source = DeltaFile(delta)
    target = source.path
    if out is not None:
        check_out(out, overwrite=overwrite)
        target = out / FILE_NAME
    stored: dict[str, Stored] = {}
    for number, (name, (dtype, shape)) in enumerate(source.layout.items()):

        def load(name: str = name, share: float = number / len(source.layout)) -> bytearray:
            progress(name, share)
            return source.read(name)

        stored[name] = Stored(dtype, shape, load)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_delta(
        target,
        base_digest=source.base_digest,
        entries=source.entries,
        stored=stored,
        base=source.manifest.get("base") or {},
        compressor=source.manifest.get("compressor") or {},
        lossless=lossless,
        expect=source.content_digest,
    )
    if out is not None:
        for name in TOKENIZER_FILES:
            companion = source.path.parent / name
            if companion.is_file() and companion.resolve() != (out / name).resolve():
                with atomic_file(out / name) as file:
                    file.write(companion.read_bytes())
    return target
