"""Compresses one fine-tune against its base, layer by layer.

One decoder layer of both models is in memory at a time, and one batch of hidden states. A layer's
linears are compressed in the order in which data meets them, and each is put back as base + delta
before the next one's inputs are taken: what a Hessian sees is what the compressed model will see.
"""

from __future__ import annotations

import dataclasses
import resource
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltazip.compress import calibration, llama
from deltazip.compress.activations import ActivationFile, HessianSum, make_batches
from deltazip.compress.checkpoint import Checkpoint, CheckpointError
from deltazip.compress.delta_file import (
    FILE_NAME,
    Entry,
    Stored,
    atomic_file,
    stored_of_matrix,
    write_delta,
)
from deltazip.compress.llama import LlamaForward, LlamaShape
from deltazip.compress.pack import DeltaType
from deltazip.compress.plan import (
    EMBEDDING_FORMATS,
    FORMATS,
    Settings,
    check_pair,
    estimate_file_bytes,
    plan_tensors,
)
from deltazip.compress.solver import Factor, Solved, Spec, round_to_nearest, solve
from deltazip.compress.workspace import Workspace

# Files of the fine-tune that travel with the delta when they are not the base's.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
_ROWS_AT_ONCE = 8192  # of an embedding

Progress = Callable[[str, float], None]
"""Told what is being done and the share of the whole that is done, 0 to 1."""


class CompressError(ValueError):
    """Compression cannot start or go on; the message says why and what was expected."""


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
    finetuned: Path,
    out: Path,
    calibration_file: Path,
    settings: Settings,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = lambda what, share: None,
) -> Result:
    """Writes OUT/delta.safetensors, and the fine-tune's tokenizer files where they differ.

    An interrupted run leaves OUT.partial; the same call goes on from there. The delta appears whole
    or not at all.

    Raises:
        CompressError, CheckpointError, calibration.CalibrationError: naming what is wrong.
        OSError: the disk is full or not writable.
    """
    started = time.monotonic()
    if (out / FILE_NAME).exists() and not overwrite:
        raise CompressError(f"{out / FILE_NAME} is there already; remove it or pass --overwrite")
    models = _Models(Checkpoint(base), Checkpoint(finetuned))
    shape = check_pair(models.base, models.finetuned)
    tokenizer = calibration.load_tokenizer(finetuned)
    sequences = calibration.calibration_sequences(
        tokenizer,
        calibration.load_samples(calibration_file),
        num_samples=settings.num_samples,
        max_length=settings.max_length,
        seed=settings.seed,
    )
    _check_ids(sequences, shape, calibration_file)
    planned = plan_tensors(models.base, shape, settings)
    num_tokens = sum(len(ids) for ids in sequences)
    width = max(shape.hidden, shape.num_heads * shape.head_dim)
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(out.parent, 2 * estimate_file_bytes(planned) + 3 * 4 * num_tokens * width)
    progress("reading the base's digest", 0.0)
    base_digest = models.base.digest()
    progress("reading the fine-tune's digest", 0.0)
    run_digest = settings.digest(base_digest, models.finetuned.digest(), repr(sequences), device)
    workspace = Workspace(out, run_digest)
    run = _Run(models, shape, settings, workspace, sequences, torch.device(device), progress)
    with torch.inference_mode():
        run.all_pieces({p.name for p in planned})
    entries, stored, report = workspace.collect()
    missing = {p.name for p in planned} ^ set(entries)
    if missing:
        raise CompressError(f"tensor '{min(missing)}' was not compressed: this is a bug")
    progress("writing", 1.0)
    out.mkdir(parents=True, exist_ok=True)
    _copy_tokenizer(base, finetuned, out)
    errors = [row["error"] for row in report.values() if "error" in row]
    mean_error = sum(errors) / len(errors) if errors else 0.0
    digest = write_delta(
        out / FILE_NAME,
        base_digest=base_digest,
        entries=entries,
        stored=stored,
        base={"name": base.resolve().name, "architecture": models.base.architecture},
        compressor={
            "version": "1",
            "settings": dataclasses.asdict(settings),
            "report": {
                "finetuned": finetuned.resolve().name,
                "finetuned_bytes": models.finetuned.files_bytes,
                "calibration_sequences": len(sequences),
                "calibration_tokens": num_tokens,
                "mean_error": round(mean_error, 6),
                "tensors": report,
            },
        },
    )
    workspace.remove()
    return Result(
        out / FILE_NAME,
        digest,
        (out / FILE_NAME).stat().st_size,
        models.finetuned.files_bytes,
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


def _check_disk(folder: Path, needed_bytes: int) -> None:
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


class _Models:
    """Base and fine-tune side by side, one tensor at a time."""

    def __init__(self, base: Checkpoint, finetuned: Checkpoint) -> None:
        self.base, self.finetuned = base, finetuned

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Base's and fine-tune's tensor, in their own dtypes, checked to be finite."""
        pair = (self.base.read(name), self.finetuned.read(name))
        for tensor, checkpoint in zip(pair, (self.base, self.finetuned), strict=True):
            if not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor '{name}' holds {bad} values that are NaN or "
                    "infinite"
                )
        return pair


class _Piece:
    """What is known of some tensors so far."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.stored: dict[str, Stored] = {}
        self.report: dict[str, Any] = {}

    def unchanged(self, name: str, tensor: Tensor) -> None:
        self.entries[name] = Entry(DeltaType.UNCHANGED, tuple(tensor.shape))

    def exact(self, name: str, base: Tensor, tuned: Tensor) -> None:
        if torch.equal(base.float(), tuned.float()):
            self.unchanged(name, base)
            return
        self.entries[name] = Entry(DeltaType.REPLACED, tuple(base.shape))
        self.stored[name] = Stored.of_tensor(tuned)

    def matrix(self, name: str, solved: Solved) -> None:
        matrix = solved.matrix
        self.entries[name] = Entry(matrix.type, matrix.shape, matrix.group_size)
        self.stored |= stored_of_matrix(name, matrix)
        self.report[name] = {
            "error": round(solved.error, 6),
            "weight_error": round(solved.weight_error, 6),
        }


class _Run:
    """One compression, from the embedding to the head."""

    def __init__(
        self,
        models: _Models,
        shape: LlamaShape,
        settings: Settings,
        workspace: Workspace,
        sequences: list[tuple[int, ...]],
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.models, self.shape, self.settings = models, shape, settings
        self.workspace, self.sequences, self.device = workspace, sequences, device
        self.progress = progress
        self.prefix = calibration.common_prefix(sequences)
        lengths = [len(ids) for ids in sequences]
        self.batches = make_batches(lengths, settings.batch_tokens, self.prefix)
        self.num_rows = self.batches[-1].end
        self.forward = LlamaForward(shape, max(len(ids) for ids in sequences), device)
        self.spec = Spec(FORMATS[settings.format], settings.group_size)

    def all_pieces(self, names: set[str]) -> None:
        """Makes every piece that the workspace lacks. `names`: all tensors of the base."""
        num_steps = self.shape.num_layers + 2
        if not self.workspace.has_piece("embedding"):
            self.progress("embedding", 0.0)
            self.embedding()
        for layer in range(self.shape.num_layers):
            if not self.workspace.has_piece(f"layer-{layer:03d}"):
                self.layer(layer, (layer + 1) / num_steps, 1 / num_steps)
        if not self.workspace.has_piece("head"):
            self.progress("final norm and head", (num_steps - 1) / num_steps)
            self.head(names)

    def hidden_file(self, which: int, *, keep: bool) -> ActivationFile:
        path = self.workspace.folder / f"hidden-{which}.f32"
        return ActivationFile(path, self.num_rows, self.shape.hidden, keep=keep)

    # The embedding.

    def embedding(self) -> None:
        piece = _Piece()
        base, tuned = self.models.read(llama.EMBEDDING)
        solved = self.round_embedding(piece, llama.EMBEDDING, base, tuned)
        used = torch.tensor(sorted({token for ids in self.sequences for token in ids}))
        rows = base[used].float()
        if solved is not None:
            columns = slice(0, rows.shape[1])
            matrix = dataclasses.replace(
                solved.matrix,
                values=solved.matrix.values[used.numpy()],
                scales=solved.matrix.scales[used.numpy()],
            )
            rows += torch.from_numpy(matrix.dequantize())[:, columns]
        else:
            rows = tuned[used].float()
        place = {int(token): row for row, token in enumerate(used)}
        file = self.hidden_file(0, keep=False)
        sequence = 0
        for batch in self.batches:
            chosen = self.sequences[sequence : sequence + len(batch.lengths)]
            sequence += len(batch.lengths)
            ids = [*chosen[0][: self.prefix], *(t for ids in chosen for t in ids[self.prefix :])]
            file.write(batch, rows[[place[token] for token in ids]])
        file.sync()
        file.close()
        self.workspace.save_piece("embedding", piece.entries, piece.stored, piece.report, hidden=0)

    def round_embedding(
        self, piece: _Piece, name: str, base: Tensor, tuned: Tensor
    ) -> Solved | None:
        """None if it is stored exactly or not at all."""
        type_ = EMBEDDING_FORMATS[self.settings.embedding_format]
        if not type_.is_matrix or torch.equal(base.float(), tuned.float()):
            piece.exact(name, base, tuned)
            return None
        deltas = (
            (tuned[at : at + _ROWS_AT_ONCE].float() - base[at : at + _ROWS_AT_ONCE].float())
            for at in range(0, base.shape[0], _ROWS_AT_ONCE)
        )
        solved = round_to_nearest(deltas, Spec(type_, self.settings.embedding_group_size))
        piece.matrix(name, solved)
        return solved

    # One decoder layer.

    def layer(self, layer: int, done: float, share: float) -> None:
        prefix, piece = llama.layer_prefix(layer), _Piece()
        base: dict[str, Tensor] = {}
        tuned: dict[str, Tensor] = {}
        running: dict[str, Tensor] = {}
        names = [n for n in self.shape.tensors() if n.startswith(prefix)]
        for name in names:
            short = name.removeprefix(prefix)
            base[short], tuned[short] = self.models.read(name)
            if short.removesuffix(".weight") not in llama.LINEARS:
                piece.exact(name, base[short], tuned[short])
                running[short] = tuned[short].float().to(self.device)

        def step(number: int, what: str) -> None:
            self.progress(
                f"layer {layer + 1}/{self.shape.num_layers}: {what}", done + share * number / 5
            )

        def settle(linears: Iterable[str], hessian: HessianSum) -> None:
            moved = [
                n for n in linears if not torch.equal(base[f"{n}.weight"], tuned[f"{n}.weight"])
            ]
            factor = Factor(hessian.value(), self.settings.damping) if moved else None
            for linear in linears:
                short = f"{linear}.weight"
                before = base.pop(short).float().to(self.device)
                delta = tuned.pop(short).float().to(self.device) - before
                if linear not in moved or factor is None:
                    piece.unchanged(prefix + short, before)
                    running[short] = before
                    continue
                try:
                    solved = solve(delta, factor, self.spec)
                except ValueError as error:
                    raise CompressError(f"tensor '{prefix}{short}': {error}") from error
                piece.matrix(prefix + short, solved)
                running[short] = before.add_(
                    torch.from_numpy(solved.matrix.dequantize()).to(self.device)
                )

        which = int(self.workspace.get("hidden", 0))
        hidden = self.hidden_file(which, keep=True)
        after = self.hidden_file(1 - which, keep=False)
        mixed_width = self.shape.num_heads * self.shape.head_dim
        mixed = ActivationFile(self.workspace.folder / "mixed.f32", self.num_rows, mixed_width)
        forward, device = self.forward, self.device

        step(0, "attention inputs")
        hessian = HessianSum(self.shape.hidden, device)
        for batch in self.batches:
            hessian.add(forward.norm(hidden.read(batch, device), running[llama.INPUT_NORM]), batch)
        settle(llama.ATTENTION_INPUTS, hessian)

        step(1, "attention output")
        hessian = HessianSum(mixed_width, device)
        for batch in self.batches:
            inputs = forward.norm(hidden.read(batch, device), running[llama.INPUT_NORM])
            out = forward.attention(inputs, running, batch.padded_index(device))
            hessian.add(out, batch)
            mixed.write(batch, out)
        settle((llama.ATTENTION_OUTPUT,), hessian)

        step(2, "MLP inputs")
        hessian = HessianSum(self.shape.hidden, device)
        for batch in self.batches:
            states = hidden.read(batch, device)
            states += forward.attention_output(mixed.read(batch, device), running)
            after.write(batch, states)
            hessian.add(forward.norm(states, running[llama.MLP_NORM]), batch)
        settle(llama.MLP_INPUTS, hessian)

        step(3, "MLP output")
        hessian = HessianSum(self.shape.intermediate, device)
        for batch in self.batches:
            hessian.add(self._mlp_inner(after.read(batch, device), running), batch)
        settle((llama.MLP_OUTPUT,), hessian)

        step(4, "running it compressed")
        for batch in self.batches:
            states = after.read(batch, device)
            states += forward.mlp_output(self._mlp_inner(states, running), running)
            after.write(batch, states)
        after.sync()
        for file in (hidden, after, mixed):
            file.close()
        self.workspace.save_piece(
            f"layer-{layer:03d}", piece.entries, piece.stored, piece.report, hidden=1 - which
        )

    def _mlp_inner(self, states: Tensor, running: dict[str, Tensor]) -> Tensor:
        return self.forward.mlp_inner(self.forward.norm(states, running[llama.MLP_NORM]), running)

    # Everything after the last layer, and tensors the model does not use.

    def head(self, names: set[str]) -> None:
        piece = _Piece()
        done = set(self.workspace.collect()[0])
        for name in sorted(names - done - {llama.HEAD}):
            piece.exact(name, *self.models.read(name))
        if llama.HEAD in names:
            base, tuned = self.models.read(llama.HEAD)
            self.round_embedding(piece, llama.HEAD, base, tuned)
        self.workspace.save_piece("head", piece.entries, piece.stored, piece.report)
