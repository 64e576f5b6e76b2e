"""Tensors on their way to a safetensors file, which appears only when it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from deltazip.compress.checkpoint import WEIGHT_DTYPES, TensorInfo, read_bytes

ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor to be written. `load` gives its bytes, row-major, and is called twice."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], bytes | bytearray | memoryview]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @classmethod
    def of_array(cls, array: npt.NDArray[np.generic]) -> Stored:
        names = {"uint8": "U8", "float16": "F16", "float32": "F32"}
        contiguous = np.ascontiguousarray(array)
        return cls(names[array.dtype.name], array.shape, lambda: contiguous.tobytes())

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> Stored:
        return cls(dtype_name(tensor.dtype), tuple(tensor.shape), lambda: tensor_bytes(tensor))

    @classmethod
    def of_file(cls, info: TensorInfo) -> Stored:
        return cls(info.dtype, info.shape, lambda: read_bytes(info))


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a float dtype."""
    return next(name for name, ours in WEIGHT_DTYPES.items() if ours == dtype)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A float tensor's bytes, row-major; no copy if it lies so already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data: memoryview = flat.numpy().data
    return data


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name only once it is whole and synced; gone on any error."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_safetensors(
    path: Path,
    stored: Mapping[str, Stored],
    metadata: Mapping[str, str],
    hashes: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all, holding one tensor in memory.

    Raises:
        ValueError: a tensor's bytes are not those of `hashes` (SHA-256), where given.
        OSError: the disk is full or not writable; no file is left then.
    """
    order = sorted(stored, key=lambda n: (-ITEM_BYTES[stored[n].dtype], n.encode()))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        tensor = stored[name]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        at += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = stored[name].load()
            if hashes is not None and hashlib.sha256(data).digest() != hashes[name]:
                raise ValueError(f"'{name}' changed while it was being written")
            file.write(data)
