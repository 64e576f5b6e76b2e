"""Fine-tunes that are stored as a difference already, read as if they were whole checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from deltazip.compress.checkpoint import WEIGHT_DTYPES, Checkpoint, TensorInfo, read_bytes
from deltazip.compress.pack import QuantizedMatrix

_READ_BYTES = 1 << 22
_TOKENIZER_SIGNS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class DerivedCheckpoint(Checkpoint):
    """A base and what changes in it. Tensors that change are read in float32, where that is exact.

    Args:
        base: the base's folder.
        source: what was imported, a file or a folder; a folder's tokenizer is the fine-tune's.
        files: all that decides what the fine-tune is.
    """

    def __init__(self, base: Path, source: Path, files: list[Path]) -> None:
        super().__init__(base)
        self.source, self._files_read = source, files
        own = source if source.is_dir() else source.parent
        if any((own / name).is_file() for name in _TOKENIZER_SIGNS):
            self.folder = own

    @property
    def name(self) -> str:
        return self.source.resolve().name

    def digest(self) -> str:
        """Identity of this import: not that of a checkpoint with the same weights."""
        sha = hashlib.sha256(super().digest().encode())
        for path in self._files_read:
            with path.open("rb") as file:
                while piece := file.read(_READ_BYTES):
                    sha.update(piece)
        return sha.hexdigest()

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """The difference as it will be stored, where the source has it so; None: to be found."""
        return None


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """A float tensor of any safetensors file."""
    return torch.frombuffer(read_bytes(info), dtype=WEIGHT_DTYPES[info.dtype]).reshape(info.shape)
