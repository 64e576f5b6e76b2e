"""delta.safetensors: writer and reader of docs/delta_format.md, plain (1) and packed (2).

Writing holds one tensor at a time: the caller names what is stored and how to load it, a first pass
hashes, a second writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltazip.compress import pack, packed
from deltazip.compress.checkpoint import (
    WEIGHT_DTYPES,
    CheckpointError,
    TensorInfo,
    read_bytes,
    read_header,
)
from deltazip.compress.pack import DeltaType, QuantizedMatrix
from deltazip.compress.stored import ITEM_BYTES, Stored, write_safetensors

FILE_NAME = "delta.safetensors"
PLAIN_VERSION, PACKED_VERSION = 1, 2
_NUMPY_DTYPES: dict[str, type[np.generic]] = {"U8": np.uint8, "F16": np.float16}


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


_PACKED_AT_ONCE = 1 << 20  # weights for which a thread is worth its start


def stored_of_matrix(name: str, matrix: QuantizedMatrix) -> dict[str, Stored]:
    """The tensors that `matrix` is stored as under the base tensor's name."""
    count = min(torch.get_num_threads(), -(-matrix.values.size // _PACKED_AT_ONCE))
    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(pack.pack, pack.split_rows(matrix, count)))
    arrays = {s: np.concatenate([part[s] for part in parts]) for s in parts[0]}
    return {f"{name}.{s}": Stored.of_array(array) for s, array in arrays.items()}


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


def write_delta(
    path: Path,
    *,
    base_digest: str,
    entries: Mapping[str, Entry],
    stored: Mapping[str, Stored],
    base: Mapping[str, Any],
    compressor: Mapping[str, Any],
    lossless: str = "none",
    expect: str | None = None,
) -> str:
    """Writes one delta file and returns its content digest.

    Args:
        path: the file itself, by custom .../delta.safetensors.
        entries: every tensor of the base, by name.
        stored: exactly the tensors that `entries` call for, by stored name.
        base, compressor: for people and tools; serving ignores them.
        lossless: the codec that packs the stored tensors, one of packed.CODECS.
        expect: the content digest that must come out.

    Raises:
        ValueError: `stored` is not what `entries` call for, or has another content.
        OSError: the disk is full or not writable; no file is left then.
    """
    packed.check_codec(lossless)
    _check_stored(entries, stored)
    with contextlib.ExitStack() as stack:
        spool = None
        if lossless != "none":
            spool = stack.enter_context(packed.Spool(lossless, path.parent))
        hashes: dict[str, bytes] = {}
        written: dict[str, Stored] = {}
        for name, tensor in stored.items():
            data = tensor.load()
            if len(data) != tensor.num_bytes:
                raise ValueError(f"'{name}' has {len(data)} bytes, expected {tensor.num_bytes}")
            hashes[name] = hashlib.sha256(data).digest()
            if spool is not None:
                place = spool.add(data, ITEM_BYTES[tensor.dtype])
                written[name] = Stored("U8", (place[1],), functools.partial(spool.read, place))
        digest = content_digest(
            base_digest, entries, {name: (stored[name].dtype, hashes[name]) for name in hashes}
        )
        if expect is not None and digest != expect:
            raise ValueError(f"{path}: content digest would be {digest}, expected {expect}")
        manifest: dict[str, Any] = {
            "version": PLAIN_VERSION if spool is None else PACKED_VERSION,
            "base_digest": base_digest,
            "content_digest": digest,
            "tensors": {name: entries[name].to_json() for name in sorted(entries)},
            "base": dict(base),
            "compressor": dict(compressor),
        }
        if spool is not None:
            manifest["lossless"] = {"codec": lossless}
            for name, entry in entries.items():
                if entry.type is DeltaType.REPLACED:
                    manifest["tensors"][name]["dtype"] = stored[name].dtype
        text = json.dumps(manifest, separators=(",", ":"), allow_nan=False)
        metadata = {"format": "deltazip", "manifest": text}
        if spool is None:
            write_safetensors(path, stored, metadata, hashes)
        else:
            write_safetensors(path, written, metadata)
    return digest


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
    """A delta file, plain or packed, opened for reading; tensors are read one at a time.

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
        if version not in (PLAIN_VERSION, PACKED_VERSION):
            raise DeltaFileError(
                f"{self.path}: version {version}, this reader knows {PLAIN_VERSION} and "
                f"{PACKED_VERSION}"
            )
        self.entries = {name: self._entry(name, row) for name, row in tensors.items()}
        self.codec = self._codec() if version == PACKED_VERSION else "none"
        try:
            self.layout = self._layout(tensors)
            held = {
                name: Stored(dtype, shape, bytes) for name, (dtype, shape) in self.layout.items()
            }
            _check_stored(self.entries, held)
        except (ValueError, KeyError) as error:
            raise DeltaFileError(f"{self.path}: {error}") from error

    def _codec(self) -> str:
        try:
            codec = str(self.manifest["lossless"]["codec"])
        except (KeyError, TypeError) as error:
            raise DeltaFileError(f"{self.path}: the manifest lacks lossless.codec") from error
        if codec not in packed.CODECS or codec == "none":
            raise DeltaFileError(f"{self.path}: unknown codec '{codec}', expected zstd")
        return codec

    def _layout(self, rows: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored name -> safetensors dtype and shape of what it holds, once decoded."""
        if self.codec == "none":
            return {name: (info.dtype, info.shape) for name, info in self._infos.items()}
        layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, entry in self.entries.items():
            if entry.type is DeltaType.REPLACED:
                layout[name] = (str(rows[name]["dtype"]), entry.shape)
            elif entry.type.is_matrix:
                shape = (entry.shape[0], entry.shape[1])
                for suffix, held in pack.stored_shapes(entry.type, shape, entry.group_size).items():
                    layout[f"{name}.{suffix}"] = held
        for name in layout.keys() ^ self._infos.keys():
            state = "missing" if name in layout else "not called for by any entry"
            raise ValueError(f"stored tensor '{name}' is {state}")
        return layout

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

    def decoded_bytes(self, name: str) -> int:
        """The same once decoded: what a plain file would hold."""
        total = 0
        for full in self.entries[name].stored_names(name).values():
            dtype, shape = self.layout[full]
            total += math.prod(shape) * ITEM_BYTES[dtype]
        return total

    def read(self, stored_name: str) -> bytearray:
        """The bytes of one stored tensor, decoded.

        Raises:
            DeltaFileError: its stream is damaged.
        """
        data = read_bytes(self._infos[stored_name])
        if self.codec == "none":
            return data
        dtype, shape = self.layout[stored_name]
        item_bytes = ITEM_BYTES[dtype]
        try:
            return packed.decode(self.codec, data, math.prod(shape) * item_bytes, item_bytes)
        except ValueError as error:
            raise DeltaFileError(f"{self.path}: tensor '{stored_name}': {error}") from error

    def matrix(self, name: str) -> QuantizedMatrix:
        """The codes of one compressed matrix."""
        entry = self.entries[name]
        stored = {}
        for suffix, full in entry.stored_names(name).items():
            dtype, held = self.layout[full]
            stored[suffix] = np.frombuffer(self.read(full), _NUMPY_DTYPES[dtype]).reshape(held)
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
            dtype, shape = self.layout[name]
            data = torch.frombuffer(self.read(name), dtype=WEIGHT_DTYPES[dtype])
            return data.reshape(shape).float()
        return base.float() + torch.from_numpy(self.matrix(name).dequantize())

    def verify(self) -> None:
        """Reads every byte and compares the content digest.

        Raises:
            DeltaFileError: the bytes are not those the file was written with.
        """
        stored = {
            name: (dtype, hashlib.sha256(self.read(name)).digest())
            for name, (dtype, _) in self.layout.items()
        }
        got = content_digest(self.base_digest, self.entries, stored)
        if got != self.content_digest:
            raise DeltaFileError(
                f"{self.path}: content digest is {got}, the manifest says {self.content_digest}"
            )
