"""delta.safetensors: writer and reader of docs/delta_format.md, version 1.

Writing holds one tensor at a time: the caller names what is stored and how to load it, a first pass
hashes, a second writes. A file appears under its name only when it is whole and on the disk.
"""

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

from deltazip.compress import pack
from deltazip.compress.checkpoint import (
    WEIGHT_DTYPES,
    CheckpointError,
    TensorInfo,
    hash_bytes,
    read_bytes,
    read_header,
)
from deltazip.compress.pack import DeltaType, QuantizedMatrix

FILE_NAME = "delta.safetensors"
VERSION = 1
_ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
_NUMPY_DTYPES: dict[str, type[np.generic]] = {"U8": np.uint8, "F16": np.float16}
_COPY_BYTES = 1 << 22


class DeltaFileError(ValueError):
    """A delta file that cannot be used; the message names the file and the tensor."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one tensor of the base appears: a row of the manifest's `tensors`."""

    type: DeltaType
    shape: tuple[int, ...]
    group_size: int = 0

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"type": self.type.value, "shape": list(self.shape)}
        return out | ({"group_size": self.group_size} if self.type.is_matrix else {})

    def stored_names(self, name: str) -> dict[str, str]:
        """Suffix -> name of each stored tensor; the suffix of a replaced tensor is empty."""
        if self.type is DeltaType.UNCHANGED:
            return {}
        if self.type is DeltaType.REPLACED:
            return {"": name}
        shape = (self.shape[0], self.shape[1])
        return {s: f"{name}.{s}" for s in pack.stored_shapes(self.type, shape, self.group_size)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor to be written. `load` gives its bytes, row-major, and is called twice."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], bytes | bytearray | memoryview]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

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


def stored_of_matrix(name: str, matrix: QuantizedMatrix) -> dict[str, Stored]:
    """The tensors that `matrix` is stored as under the base tensor's name."""
    return {f"{name}.{s}": Stored.of_array(array) for s, array in pack.pack(matrix).items()}


def content_digest(
    base_digest: str, entries: Mapping[str, Entry], stored: Mapping[str, tuple[str, bytes]]
) -> str:
    """`content_digest` of docs/delta_format.md, hex.

    `stored` maps each stored tensor to its safetensors dtype and the SHA-256 of its bytes.
    """
    sha = hashlib.sha256(b"deltazip.delta.v1\0" + base_digest.encode() + b"\0")
    for name in sorted(entries, key=str.encode):
        entry = entries[name]
        shape = ",".join(str(n) for n in entry.shape)
        group_size = entry.group_size if entry.type.is_matrix else 0
        sha.update(f"{name}\0{entry.type.value}\0{shape}\0{group_size}\0".encode())
    for name in sorted(stored, key=str.encode):
        dtype, sha256 = stored[name]
        sha.update(f"{name}\0{dtype}\0".encode() + sha256)
    return sha.hexdigest()


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


def write_delta(
    path: Path,
    *,
    base_digest: str,
    entries: Mapping[str, Entry],
    stored: Mapping[str, Stored],
    base: Mapping[str, Any],
    compressor: Mapping[str, Any],
) -> str:
    """Writes one delta file and returns its content digest.

    Args:
        path: the file itself, by custom .../delta.safetensors.
        entries: every tensor of the base, by name.
        stored: exactly the tensors that `entries` call for, by stored name.
        base, compressor: for people and tools; serving ignores them.

    Raises:
        ValueError: `stored` is not what `entries` call for.
        OSError: the disk is full or not writable; no file is left then.
    """
    _check_stored(entries, stored)
    hashes = {}
    for name, tensor in stored.items():
        data = tensor.load()
        if len(data) != tensor.num_bytes:
            raise ValueError(f"'{name}' has {len(data)} bytes, expected {tensor.num_bytes}")
        hashes[name] = hashlib.sha256(data).digest()
    digest = content_digest(
        base_digest, entries, {name: (stored[name].dtype, hashes[name]) for name in hashes}
    )
    manifest = {
        "version": VERSION,
        "base_digest": base_digest,
        "content_digest": digest,
        "tensors": {name: entries[name].to_json() for name in sorted(entries)},
        "base": dict(base),
        "compressor": dict(compressor),
    }
    text = json.dumps(manifest, separators=(",", ":"), allow_nan=False)
    write_safetensors(path, stored, {"format": "deltazip", "manifest": text}, hashes)
    return digest


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
    order = sorted(stored, key=lambda n: (-_ITEM_BYTES[stored[n].dtype], n.encode()))
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


def _check_stored(entries: Mapping[str, Entry], stored: Mapping[str, Stored]) -> None:
    wanted: set[str] = set()
    for name, entry in entries.items():
        wanted |= set(entry.stored_names(name).values())
        got = stored.get(name)
        if (
            entry.type is DeltaType.REPLACED
            and got is not None
            and (got.shape != entry.shape or got.dtype not in WEIGHT_DTYPES)
        ):
            raise ValueError(
                f"replaced tensor '{name}' must be a float tensor {list(entry.shape)}, got "
                f"{got.dtype} {list(got.shape)}"
            )
        if not entry.type.is_matrix:
            continue
        shape = (entry.shape[0], entry.shape[1])
        for suffix, (dtype, want) in pack.stored_shapes(
            entry.type, shape, entry.group_size
        ).items():
            got = stored.get(f"{name}.{suffix}")
            if got is not None and (got.dtype, got.shape) != (dtype, want):
                raise ValueError(
                    f"'{name}.{suffix}' must be {dtype} {list(want)}, got {got.dtype} "
                    f"{list(got.shape)}"
                )
    if wanted != set(stored):
        odd = min(wanted ^ set(stored))
        state = "missing" if odd in wanted else "not called for by any entry"
        raise ValueError(f"stored tensor '{odd}' is {state}")


class DeltaFile:
    """A delta file opened for reading; tensors are read one at a time.

    Raises:
        DeltaFileError: anything in the file is not as docs/delta_format.md says.
    """

    def __init__(self, folder_or_file: Path | str) -> None:
        path = Path(folder_or_file)
        self.path = path / FILE_NAME if path.is_dir() else path
        if not self.path.is_file():
            raise DeltaFileError(f"{self.path}: no such file")
        try:
            self._infos, metadata = read_header(self.path)
        except CheckpointError as error:
            raise DeltaFileError(str(error)) from error
        if metadata.get("format") != "deltazip" or "manifest" not in metadata:
            raise DeltaFileError(
                f"{self.path}: not a delta file: metadata 'format' is "
                f"{metadata.get('format')!r}, expected 'deltazip'"
            )
        try:
            self.manifest: dict[str, Any] = json.loads(metadata["manifest"])
            version = self.manifest["version"]
            self.base_digest = str(self.manifest["base_digest"])
            self.content_digest = str(self.manifest["content_digest"])
            tensors: dict[str, Any] = self.manifest["tensors"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DeltaFileError(f"{self.path}: the manifest is malformed: {error!r}") from error
        if version != VERSION:
            raise DeltaFileError(f"{self.path}: version {version}, this reader knows {VERSION}")
        self.entries = {name: self._entry(name, row) for name, row in tensors.items()}
        try:
            _check_stored(
                self.entries,
                {n: Stored.of_file(i) for n, i in self._infos.items()},
            )
        except (ValueError, KeyError) as error:
            raise DeltaFileError(f"{self.path}: {error}") from error

    def _entry(self, name: str, row: Any) -> Entry:
        try:
            type_ = DeltaType(row["type"])
            shape = tuple(int(n) for n in row["shape"])
            group_size = int(row["group_size"]) if type_.is_matrix else 0
            if type_.is_matrix:
                pack.check_group_size(group_size)
                if len(shape) != 2:
                    raise ValueError(f"a matrix has two dimensions, got {list(shape)}")
        except (KeyError, TypeError, ValueError) as error:
            raise DeltaFileError(f"{self.path}: tensor '{name}': {error}") from error
        return Entry(type_, shape, group_size)

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def stored(self) -> dict[str, TensorInfo]:
        """Where each stored tensor lies."""
        return dict(self._infos)

    def stored_bytes(self, name: str) -> int:
        """Bytes that the base tensor `name` takes in this file, header not counted."""
        return sum(self._infos[s].num_bytes for s in self.entries[name].stored_names(name).values())

    def matrix(self, name: str) -> QuantizedMatrix:
        """The codes of one compressed matrix."""
        entry = self.entries[name]
        stored = {
            suffix: np.frombuffer(
                read_bytes(self._infos[full]), _NUMPY_DTYPES[self._infos[full].dtype]
            ).reshape(self._infos[full].shape)
            for suffix, full in entry.stored_names(name).items()
        }
        try:
            shape = (entry.shape[0], entry.shape[1])
            return pack.unpack(entry.type, shape, entry.group_size, stored)
        except ValueError as error:
            raise DeltaFileError(f"{self.path}: tensor '{name}': {error}") from error

    def apply(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The variant's tensor in float32: base + delta, or the replacement, or the base itself."""
        entry = self.entries.get(name)
        if entry is None:
            raise DeltaFileError(f"{self.path}: tensor '{name}' of the base is not in the delta")
        if entry.shape != tuple(base.shape):
            raise DeltaFileError(
                f"{self.path}: tensor '{name}' is {list(entry.shape)} in the delta, the base has "
                f"{list(base.shape)}"
            )
        if entry.type is DeltaType.UNCHANGED:
            return base.float()
        if entry.type is DeltaType.REPLACED:
            info = self._infos[name]
            data = torch.frombuffer(read_bytes(info), dtype=WEIGHT_DTYPES[info.dtype])
            return data.reshape(info.shape).float()
        return base.float() + torch.from_numpy(self.matrix(name).dequantize())

    def verify(self) -> None:
        """Reads every byte and compares the content digest.

        Raises:
            DeltaFileError: the bytes are not those the file was written with.
        """
        stored = {name: (info.dtype, hash_bytes(info)) for name, info in self._infos.items()}
        got = content_digest(self.base_digest, self.entries, stored)
        if got != self.content_digest:
            raise DeltaFileError(
                f"{self.path}: content digest is {got}, the manifest says {self.content_digest}"
            )
