"""Variants that others have compressed or adapted already, as delta files."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from deltazip import __version__
from deltazip.compress import packed, pipeline
from deltazip.compress.checkpoint import Checkpoint
from deltazip.compress.delta_file import Entry, stored_of_matrix
from deltazip.compress.imports.bitdelta import BitDeltaCheckpoint
from deltazip.compress.imports.derived import DerivedCheckpoint
from deltazip.compress.imports.lora import LoraCheckpoint
from deltazip.compress.pipeline import Result, compress, finish
from deltazip.compress.plan import Settings, check_pair, estimate_file_bytes, plan_tensors
from deltazip.compress.solve.factor import Factor
from deltazip.compress.solve.solver import Spec, round_to_nearest, solve
from deltazip.compress.walk import Models, Piece, Progress
from deltazip.compress.workspace import Workspace

KINDS: dict[str, type[LoraCheckpoint] | type[BitDeltaCheckpoint]] = {
    "lora": LoraCheckpoint,
    "bitdelta": BitDeltaCheckpoint,
}


def import_variant(
    kind: str,
    base: Path,
    source: Path,
    out: Path,
    settings: Settings,
    *,
    calibration_file: Path | None = None,
    device: str = "cpu",
    lossless: str = packed.CODECS[0],
    overwrite: bool = False,
    progress: Progress = lambda what, share: None,
) -> Result:
    """Writes OUT/delta.safetensors from `source`, a PEFT adapter or a BitDelta file.

    What the source holds in a form that delta files have is taken as it is: whole tensors, and
    BitDelta's signs. A low-rank product is compressed as any delta is: against the inputs of
    `calibration_file`, or, without one, as if all inputs were alike.

    Raises:
        CheckpointError, CompressError: naming what is wrong.
        OSError: the disk is full or not writable.
    """
    if kind not in KINDS:
        raise ValueError(f"what is imported must be one of {', '.join(KINDS)}, got '{kind}'")
    tuned = KINDS[kind](base, source)
    if calibration_file is not None:
        if kind == "bitdelta":
            raise ValueError("a BitDelta file is taken as it is: it needs no calibration")
        return compress(
            base, tuned, out, calibration_file, settings,
            device=device, lossless=lossless, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    started = time.monotonic()
    packed.check_codec(lossless)
    pipeline.check_out(out, overwrite=overwrite)
    models = Models(Checkpoint(base), tuned)
    planned = plan_tensors(models.base, check_pair(models.base, tuned), settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    pipeline.check_disk(out.parent, 3 * estimate_file_bytes(planned))
    base_digest = models.base.digest()
    run_digest = settings.digest(__version__, base_digest, tuned.digest(), kind, device)
    workspace = Workspace(out, run_digest)
    factors: dict[int, Factor] = {}
    with torch.inference_mode():
        for number, plan in enumerate(planned):
            piece_name = f"tensor-{number:05d}"
            if workspace.has_piece(piece_name):
                continue
            progress(plan.name, number / len(planned))
            piece = Piece()
            spec = Spec(plan.type, plan.group_size)
            _convert(piece, models, tuned, plan.name, spec, factors, torch.device(device))
            workspace.save_piece(piece_name, piece.entries, piece.stored, piece.report)
    return finish(
        base, tuned, out, workspace, settings, models, base_digest, started,
        lossless=lossless, facts={"imported": kind}, progress=progress,
    )  # fmt: skip


def _convert(
    piece: Piece,
    models: Models,
    tuned: DerivedCheckpoint,
    name: str,
    spec: Spec,
    factors: dict[int, Factor],
    device: torch.device,
) -> None:
    taken = tuned.quantized(name)
    if taken is not None:
        piece.entries[name] = Entry(taken.type, taken.shape, taken.group_size)
        piece.stored |= stored_of_matrix(name, taken)
        return
    before, after = models.read(name)
    if not spec.type.is_matrix or torch.equal(before.float(), after.float()):
        piece.exact(name, before, after)
        return
    delta = (after.float() - before.float()).to(device)
    if not spec.type.is_sparse:
        piece.matrix(name, round_to_nearest([delta], spec))
        return
    columns = delta.shape[1]
    if columns not in factors:
        factors[columns] = Factor(torch.eye(columns, device=device))
    piece.matrix(name, solve(delta, factors[columns], spec))
