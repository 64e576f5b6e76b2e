"""Hidden states of the calibration tokens, kept in a file: memory holds one batch of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some sequences that all begin alike: their common prefix once, then the rest of each.

    Attributes:
        begin: the batch's first row in the file.
        prefix: tokens that every sequence begins with; a chat template's system message.
        lengths: tokens of each sequence after the prefix.
    """

    begin: int
    prefix: int
    lengths: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.prefix + sum(self.lengths)

    @property
    def end(self) -> int:
        return self.begin + self.num_rows

    def padded_index(self, device: torch.device) -> Tensor:
        """[sequences, longest]: the row of each token, -1 where a sequence has ended."""
        index = torch.full(
            (len(self.lengths), self.prefix + max(self.lengths)), -1, dtype=torch.int64
        )
        index[:, : self.prefix] = torch.arange(self.prefix)
        at = self.prefix
        for row, length in enumerate(self.lengths):
            index[row, self.prefix : self.prefix + length] = torch.arange(at, at + length)
            at += length
        return index.to(device)


def make_batches(lengths: Sequence[int], max_tokens: int, prefix: int = 0) -> list[Batch]:
    """Neighbouring sequences of at most `max_tokens` padded tokens, at least one a batch.

    lengths: tokens of each sequence, the common `prefix` counted; each has more than that.
    """
    batches: list[Batch] = []
    begin, current = 0, list[int]()
    for length in lengths:
        if current and (max(*current, length - prefix) + prefix) * (len(current) + 1) > max_tokens:
            batches.append(Batch(begin, prefix, tuple(current)))
            begin, current = batches[-1].end, []
        current.append(length - prefix)
    if current:
        batches.append(Batch(begin, prefix, tuple(current)))
    return batches


class ActivationFile:
    """[rows, width] float32 on the disk, read and written by rows; not mapped, not resident."""

    def __init__(self, path: Path, num_rows: int, width: int, *, keep: bool = False) -> None:
        self.path, self.width = path, width
        if not keep:
            path.unlink(missing_ok=True)
        self._file = path.open("r+b" if keep else "w+b")
        self._file.truncate(num_rows * width * 4)

    def read(self, batch: Batch, device: torch.device) -> Tensor:
        data = np.empty((batch.num_rows, self.width), np.float32)
        self._file.seek(batch.begin * self.width * 4)
        if self._file.readinto(data.data) != data.nbytes:
            raise OSError(f"{self.path}: cut short")
        return torch.from_numpy(data).to(device)

    def write(self, batch: Batch, rows: Tensor) -> None:
        self._file.seek(batch.begin * self.width * 4)
        self._file.write(np.ascontiguousarray(rows.float().cpu().numpy()).data)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> ActivationFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Streams(Protocol):
    """The compressed model's hidden states and the fine-tune's own."""

    width: int

    def read(self, batch: Batch, device: torch.device, count: int = 2) -> list[Tensor]:
        """The compressed model's rows and, if `count` is 2, the fine-tune's; the caller's own."""
        ...

    def write(self, batch: Batch, rows: Sequence[Tensor]) -> None:
        """rows: as `read` gives them, one or two."""
        ...

    def sync(self) -> None: ...
    def __enter__(self) -> Streams: ...
    def __exit__(self, *error: object) -> None: ...


class MemoryStreams:
    """Streams [rows, width] in a device's memory."""

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        self.width = width
        self._rows = [torch.zeros((num_rows, width), device=device) for _ in range(2)]

    def read(self, batch: Batch, device: torch.device, count: int = 2) -> list[Tensor]:
        return [rows[batch.begin : batch.end].to(device, copy=True) for rows in self._rows[:count]]

    def write(self, batch: Batch, rows: Sequence[Tensor]) -> None:
        for ours, own in zip(self._rows, rows, strict=False):
            ours[batch.begin : batch.end] = own

    def sync(self) -> None:
        """There is nothing to wait for."""

    def __enter__(self) -> MemoryStreams:
        return self

    def __exit__(self, *error: object) -> None:
        """They stay for whoever holds them."""


class FileStreams:
    """Streams on the disk, a file of each."""

    def __init__(self, path: Path, num_rows: int, width: int, *, keep: bool = False) -> None:
        self.width = width
        self._files = [
            ActivationFile(path.with_name(f"{path.name}-{who}.f32"), num_rows, width, keep=keep)
            for who in ("compressed", "finetuned")
        ]

    def read(self, batch: Batch, device: torch.device, count: int = 2) -> list[Tensor]:
        return [file.read(batch, device) for file in self._files[:count]]

    def write(self, batch: Batch, rows: Sequence[Tensor]) -> None:
        for file, own in zip(self._files, rows, strict=False):
            file.write(batch, own)

    def sync(self) -> None:
        for file in self._files:
            file.sync()

    def __enter__(self) -> FileStreams:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.__exit__(*error)


class HessianSum:
    """Sums over the tokens of all sequences that a linear is solved with, float32.

    Of the inputs x that the compressed model gives a linear and x' that the fine-tune gives it:
    the Hessian 2/n * sum(x x^T), and the drift 2/n * sum((x' - x) x^T). For a linear whose output
    is added to the residual stream, with r and r' the stream before it, also 2/n * sum((r' - r)
    x^T).
    """

    def __init__(self, width: int, device: torch.device, residual_width: int = 0) -> None:
        self._sum = torch.zeros((width, width), device=device)
        self._drift = torch.zeros((width, width), device=device)
        self._residual = torch.zeros((residual_width, width), device=device)
        self._num_tokens = 0

    def add(self, batch: Batch, inputs: Sequence[Tensor], residuals: Sequence[Tensor] = ()) -> None:
        """The prefix counts once for each sequence.

        Args:
            inputs: x and, where the fine-tune's stream is known, x': [rows of the batch, width].
            residuals: r and r', in the same way: [rows of the batch, residual_width].
        """
        num_sequences = len(batch.lengths)
        weighted = inputs[0]
        if batch.prefix and num_sequences > 1:
            weighted = weighted.clone()
            weighted[: batch.prefix] *= num_sequences
        self._sum.addmm_(inputs[0].mT, weighted)
        for total, pair in ((self._drift, inputs), (self._residual, residuals)):
            if len(pair) == 2:
                total.addmm_((pair[1] - pair[0]).mT, weighted)
        self._num_tokens += weighted.shape[0] + batch.prefix * (num_sequences - 1)

    def value(self) -> Tensor:
        """The Hessian, [width, width]."""
        return self._sum * (2.0 / max(self._num_tokens, 1))

    def missing_output(self, weight: Tensor) -> Tensor:
        """2/n * sum(m x^T) [rows, width]: m is what the linear's output lacks at x.

        weight: [rows, width], the fine-tune's. m = weight (x' - x), and r' - r where there is one.
        """
        total = weight @ self._drift
        if self._residual.shape[0]:
            total += self._residual
        return total * (2.0 / max(self._num_tokens, 1))
