"""Compresses one fine-tune against its base: checks, the walk over its layers, the artifact."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from deltazip import __version__
from deltazip.compress import calibration, packed
from deltazip.compress.checkpoint import Checkpoint
from deltazip.compress.delta_file import (
    FILE_NAME,
    write_delta,
)
from deltazip.compress.llama import LlamaShape
from deltazip.compress.plan import (
    Settings,
    check_pair,
    estimate_file_bytes,
    plan_tensors,
)
from deltazip.compress.stored import atomic_file
from deltazip.compress.walk import CompressError, Models, Progress, Run
from deltazip.compress.workspace import Workspace

__all__ = ["TOKENIZER_FILES", "CompressError", "Progress", "Result", "compress"]

# Files of the fine-tune that travel with the delta when they are not the base's.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run made: sizes in bytes, errors as in solver.Solved averaged over matrices."""

    path: Path
    content_digest: str
    file_bytes: int
    finetuned_bytes: int
    mean_error: float
    seconds: float
    peak_rss_bytes: int

    @property
    def ratio(self) -> float:
        return self.finetuned_bytes / self.file_bytes


def compress(
    base: Path,
    finetuned: Path | Checkpoint,
    out: Path,
    calibration_file: Path,
    settings: Settings,
    *,
    device: str = "cpu",
    lossless: str = packed.CODECS[0],
    overwrite: bool = False,
    progress: Progress = lambda what, share: None,
) -> Result:
    """Writes OUT/delta.safetensors, and the fine-tune's tokenizer files where they differ.

    An interrupted run leaves OUT.partial; the same call goes on from there. The delta appears whole
    or not at all. `lossless` packs it, by one of packed.CODECS; it is no part of a run's identity.

    Raises:
        CompressError, CheckpointError, calibration.CalibrationError: naming what is wrong.
        OSError: the disk is full or not writable.
    """
    started = time.monotonic()
    packed.check_codec(lossless)
    check_out(out, overwrite=overwrite)
    tuned = finetuned if isinstance(finetuned, Checkpoint) else Checkpoint(finetuned)
    models = Models(Checkpoint(base), tuned)
    shape = check_pair(models.base, tuned)
    tokenizer = calibration.load_tokenizer(tuned.folder)
    sequences = calibration.calibration_sequences(
        tokenizer,
        calibration.load_samples(calibration_file),
        num_samples=settings.num_samples,
        max_tokens=settings.num_tokens,
        max_length=settings.max_length,
        seed=settings.seed,
    )
    _check_ids(sequences, shape, calibration_file)
    planned = plan_tensors(models.base, shape, settings)
    num_tokens = sum(len(ids) for ids in sequences)
    width = max(shape.hidden, shape.num_heads * shape.head_dim)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Pieces, packed streams and the file lie side by side at the end.
    check_disk(out.parent, 3 * estimate_file_bytes(planned) + 6 * 4 * num_tokens * width)
    progress("reading the base's digest", 0.0)
    base_digest = models.base.digest()
    progress("reading the fine-tune's digest", 0.0)
    run_digest = settings.digest(
        __version__, base_digest, models.finetuned.digest(), repr(sequences), device
    )
    workspace = Workspace(out, run_digest)
    run = Run(models, shape, settings, workspace, sequences, torch.device(device), progress)
    with torch.inference_mode():
        run.all_pieces({p.name for p in planned})
    facts = {"calibration_sequences": len(sequences), "calibration_tokens": num_tokens}
    return finish(
        base, tuned, out, workspace, settings, models, base_digest, started,
        lossless=lossless, facts=facts, progress=progress,
    )  # fmt: skip


def finish(
    base: Path,
    tuned: Checkpoint,
    out: Path,
    workspace: Workspace,
    settings: Settings,
    models: Models,
    base_digest: str,
    started: float,
    *,
    lossless: str,
    facts: Mapping[str, Any],
    progress: Progress,
) -> Result:
    """The artifact from a workspace that has every piece; the workspace goes.

    facts: what the report says beside sizes and errors.
    """
    planned = plan_tensors(models.base, LlamaShape(models.base), settings)
    entries, stored, report = workspace.collect()
    missing = {p.name for p in planned} ^ set(entries)
    if missing:
        raise CompressError(f"tensor '{min(missing)}' was not compressed: this is a bug")
    progress("writing", 1.0)
    out.mkdir(parents=True, exist_ok=True)
    _copy_tokenizer(base, tuned.folder, out)
    errors = [row["error"] for row in report.values() if "error" in row]
    mean_error = sum(errors) / len(errors) if errors else 0.0
    digest = write_delta(
        out / FILE_NAME,
        base_digest=base_digest,
        entries=entries,
        stored=stored,
        base={"name": base.resolve().name, "architecture": models.base.architecture},
        compressor={
            "version": __version__,
            "settings": dataclasses.asdict(settings),
            "report": {
                "finetuned": tuned.name,
                "finetuned_bytes": tuned.files_bytes,
                **facts,
                "mean_error": round(mean_error, 6),
                "tensors": report,
            },
        },
        lossless=lossless,
    )
    workspace.remove()
    return Result(
        out / FILE_NAME,
        digest,
        (out / FILE_NAME).stat().st_size,
        tuned.files_bytes,
        mean_error,
        time.monotonic() - started,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _check_ids(sequences: Iterable[tuple[int, ...]], shape: LlamaShape, path: Path) -> None:
    highest = max(max(ids) for ids in sequences)
    if highest >= shape.vocab:
        raise CompressError(
            f"{path}: the fine-tune's tokenizer gives token {highest}, the model has {shape.vocab}"
        )


def check_out(folder: Path, *, overwrite: bool) -> None:
    """Raises CompressError if a delta lies in `folder` that may not be replaced."""
    path = folder / FILE_NAME
    if path.exists() and not overwrite:
        raise CompressError(f"{path} is there already; remove it or pass --overwrite")


def check_disk(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CompressError(
            f"{folder}: {needed_bytes / 1e6:.0f} MB are needed while compressing, "
            f"{free / 1e6:.0f} MB are free"
        )


def _copy_tokenizer(base: Path, finetuned: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        ours, theirs = finetuned / name, base / name
        if not ours.is_file():
            continue
        data = ours.read_bytes()
        if theirs.is_file() and theirs.read_bytes() == data:
            continue
        with atomic_file(out / name) as file:
            file.write(data)
