"""Hidden states of the calibration tokens, kept in a file: memory holds one batch of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some sequences laid end to end: tokens begin..begin+sum(lengths) of all."""

    begin: int
    lengths: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.begin + sum(self.lengths)

    def padded_index(self, device: torch.device) -> Tensor:
        """[sequences, longest]: the row of each token, -1 where a sequence has ended."""
        longest = max(self.lengths)
        index = torch.full((len(self.lengths), longest), -1, dtype=torch.int64)
        at = 0
        for row, length in enumerate(self.lengths):
            index[row, :length] = torch.arange(at, at + length)
            at += length
        return index.to(device)


def make_batches(lengths: Sequence[int], max_tokens: int) -> list[Batch]:
    """Neighbouring sequences of at most `max_tokens` padded tokens, at least one a batch."""
    batches: list[Batch] = []
    begin, current = 0, list[int]()
    for length in lengths:
        if current and max([*current, length]) * (len(current) + 1) > max_tokens:
            batches.append(Batch(begin, tuple(current)))
            begin, current = batches[-1].end, []
        current.append(length)
    if current:
        batches.append(Batch(begin, tuple(current)))
    return batches


class ActivationFile:
    """[tokens, width] float32 on the disk, read and written by rows; not mapped, not resident."""

    def __init__(self, path: Path, num_tokens: int, width: int, *, keep: bool = False) -> None:
        self.path, self.num_tokens, self.width = path, num_tokens, width
        if not keep:
            path.unlink(missing_ok=True)
        self._file = path.open("r+b" if keep else "w+b")
        self._file.truncate(num_tokens * width * 4)

    def read(self, batch: Batch, device: torch.device) -> Tensor:
        data = np.empty((batch.end - batch.begin, self.width), np.float32)
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

    def close(self) -> None:
        self._file.close()


def iterate(
    batches: Sequence[Batch], file: ActivationFile, device: torch.device
) -> Iterator[tuple[Batch, Tensor]]:
    for batch in batches:
        yield batch, file.read(batch, device)


class HessianSum:
    """2/n * sum(x x^T) over tokens, [width, width] float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros((width, width), device=device)
        self._num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: [tokens, width]."""
        self._sum.addmm_(inputs.mT, inputs)
        self._num_tokens += inputs.shape[0]

    def value(self) -> Tensor:
        return self._sum * (2.0 / max(self._num_tokens, 1))
