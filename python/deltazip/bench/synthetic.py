"""Checkpoints and deltas of random content, made as fast as the disk takes them.

Each tensor is a stretch of one random tile, begun at a place of its own: its bits are as random as
real ones to a memory or a multiplier, and no generator has to make gigabytes. One thread writes
one file, front to back; a delta's digests are valid, so the engine takes it like any other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deltazip.bench.shapes import ITEM_BYTES, ModelShape

__all__ = ["DeltaOptions", "delta_bytes", "make_base", "make_deltas", "slot_bytes"]

_TILE_BYTES = 32 << 20
_SHARD_BYTES = 1 << 30
_FORMATS = {
    "int4": "sparse24_int4",
    "int2": "sparse24_int2",
    "ternary": "sparse24_ternary",
    "sign": "sparse14_sign",
}
_TABLE_FORMATS = ("unchanged", "int4", "int8")
_TILE_OF_KERNELS = (64, 128)
_SLOT_ALIGNMENT = 256
_MARKER = "synthetic.json"
# The six pairs of places of a 2:4 group, in both halves of a byte.
_PAIRS = [low | high << 4 for low in (4, 8, 12, 9, 13, 14) for high in (4, 8, 12, 9, 13, 14)]

Array = npt.NDArray[np.generic]
TensorMap = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class DeltaOptions:
    """What random deltas hold.

    Attributes:
        format: int4, int2, ternary or sign, of the layers' matrices.
        embedding_format: unchanged, int4 or int8, of the embedding and lm_head.
        num_distinct: files of different content; further variants are hard links to them.
    """

    format: str = "int2"
    group_size: int = 128
    embedding_format: str = "unchanged"
    num_distinct: int = 4


class _Tiles:
    """Random bytes of each kind that files hold, made when first asked for."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._tiles: dict[str, memoryview] = {}

    def get(self, kind: str) -> memoryview:
        if kind not in self._tiles:
            array: Array = np.ascontiguousarray(self._make(kind))
            self._tiles[kind] = memoryview(array.view(np.uint8).reshape(-1))  # type: ignore[arg-type]
        return self._tiles[kind]

    def _make(self, kind: str) -> Any:
        rng = self._rng
        role, _, dtype = kind.partition(":")
        if role == "codes":
            return rng.integers(0, 256, _TILE_BYTES, dtype=np.uint8)
        if role == "indices":
            return np.array(_PAIRS, np.uint8)[rng.integers(0, len(_PAIRS), _TILE_BYTES // 8)]
        if role == "scales":
            return (rng.random(_TILE_BYTES // 32, np.float32) * 1e-3 + 5e-4).astype(np.float16)
        mean, deviation, count = {
            "weights": (0.0, 0.02, _TILE_BYTES // 2),
            "gains": (1.0, 0.05, 1 << 16),
        }[role]
        values = rng.standard_normal(count, np.float32) * np.float32(deviation) + np.float32(mean)
        if dtype == "F16":
            return values.astype(np.float16)
        if dtype == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values

    def pieces(self, kind: str, num_bytes: int, place: float) -> Iterator[memoryview]:
        """`num_bytes` of the endless repetition of a tile, from `place` (0 to 1) of it on."""
        tile = self.get(kind)
        at = int(place * (len(tile) // 64)) * 64
        while num_bytes > 0:
            piece = tile[at : at + num_bytes]
            yield piece
            num_bytes -= len(piece)
            at = 0


@dataclass(frozen=True)
class _Planned:
    """One tensor of a file to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def _write_file(
    path: Path,
    tensors: list[_Planned],
    tiles: _Tiles,
    seed: str,
    metadata: Callable[[Mapping[str, bytes]], dict[str, str]],
) -> None:
    """One safetensors file. `metadata` makes a header of one length, whatever the hashes."""
    order = sorted(tensors, key=lambda t: (-ITEM_BYTES[t.dtype], t.name.encode()))
    places = random.Random(seed)

    def header(hashes: Mapping[str, bytes]) -> bytes:
        out: dict[str, Any] = {"__metadata__": metadata(hashes)}
        at = 0
        for tensor in order:
            end = at + tensor.num_bytes
            out[tensor.name] = {
                "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end],
            }  # fmt: skip
            at = end
        text = json.dumps(out, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    wants_hashes = bool(metadata({}))
    blank = header({})
    hashes: dict[str, bytes] = {}
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(blank))
        for tensor in order:
            sha = hashlib.sha256()
            for piece in tiles.pieces(tensor.kind, tensor.num_bytes, places.random()):
                _write_all(file.fileno(), piece)
                if wants_hashes:
                    sha.update(piece)
            hashes[tensor.name] = f"{tensor.dtype}\0".encode() + sha.digest()
        if wants_hashes:
            final = header(hashes)
            if len(final) != len(blank):
                raise RuntimeError(f"{path}: the header grew from {len(blank)} to {len(final)}")
            file.seek(0)
            _write_all(file.fileno(), memoryview(final))


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _is_made(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether an earlier run left in `folder` just what `settings` ask for."""
    try:
        return bool(json.loads((folder / _MARKER).read_text(encoding="utf-8")) == settings)
    except (OSError, ValueError):
        return False


def _mark(folder: Path, settings: Mapping[str, Any]) -> None:
    (folder / _MARKER).write_text(json.dumps(settings), encoding="utf-8")


def make_base(folder: Path, shape: ModelShape, num_threads: int, seed: int = 0) -> None:
    """Writes a checkpoint of random weights; nothing if it is there already."""
    settings = {"shape": shape.name, "seed": seed, "config": shape.config()}
    if _is_made(folder, settings):
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[_Planned]] = [[]]
    size = 0
    for name, dims in shape.tensors().items():
        kind = ("gains:" if len(dims) == 1 else "weights:") + shape.dtype
        tensor = _Planned(name, shape.dtype, dims, kind)
        if size + tensor.num_bytes > _SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    tiles = _Tiles(seed)
    for kind in (f"weights:{shape.dtype}", f"gains:{shape.dtype}"):
        tiles.get(kind)
    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [
            pool.submit(_write_file, folder / name, shard, tiles, f"{seed} {name}", lambda _: {})
            for name, shard in zip(names, shards, strict=True)
        ]
        for job in jobs:
            job.result()
    if len(shards) > 1:
        where = {t.name: n for n, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": shape.num_bytes()}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")
    _mark(folder, settings)


def _plan_delta(
    base: TensorMap, options: DeltaOptions
) -> tuple[dict[str, dict[str, Any]], list[_Planned]]:
    """The manifest's `tensors`, and what is stored."""
    if options.format not in _FORMATS or options.embedding_format not in _TABLE_FORMATS:
        raise ValueError(
            f"a delta's format is one of {', '.join(_FORMATS)} and its embedding's one of "
            f"{', '.join(_TABLE_FORMATS)}, got {options.format} and {options.embedding_format}"
        )
    if options.group_size < 32 or options.group_size % 32:
        raise ValueError(f"group_size must be a multiple of 32, got {options.group_size}")
    entries: dict[str, dict[str, Any]] = {}
    stored: list[_Planned] = []
    for name, (dtype, shape) in sorted(base.items(), key=lambda item: item[0].encode()):
        is_table = "embed_tokens" in name or "lm_head" in name
        format_ = options.embedding_format if is_table else _FORMATS[options.format]
        if len(shape) == 1 and "norm" in name:
            entries[name] = {"type": "replaced", "shape": list(shape)}
            stored.append(_Planned(name, dtype, shape, f"gains:{dtype}"))
            continue
        if len(shape) != 2 or format_ == "unchanged":
            entries[name] = {"type": "unchanged", "shape": list(shape)}
            continue
        type_ = f"dense_{format_}" if is_table else format_
        rows, padded = shape[0], -(-shape[1] // 32) * 32
        groups = -(-shape[1] // options.group_size)
        entries[name] = {"type": type_, "shape": list(shape), "group_size": options.group_size}
        codes = {
            "sparse24_int4": [("values", padded // 4), ("indices", padded // 8)],
            "sparse24_int2": [("values", padded // 8), ("indices", padded // 8)],
            "sparse24_ternary": [("codes", padded * 5 // 32)],
            "sparse14_sign": [("codes", padded * 3 // 32)],
            "dense_int4": [("values", padded // 2)],
            "dense_int8": [("values", padded)],
        }[type_]
        for suffix, columns in codes:
            kind = "indices" if suffix == "indices" else "codes"
            stored.append(_Planned(f"{name}.{suffix}", "U8", (rows, columns), kind))
        stored.append(_Planned(f"{name}.scales", "F16", (rows, groups), "scales"))
    return entries, stored


def delta_bytes(base: TensorMap, options: DeltaOptions) -> int:
    """Stored bytes of one delta, without its header."""
    return sum(tensor.num_bytes for tensor in _plan_delta(base, options)[1])


def slot_bytes(base: TensorMap, options: DeltaOptions) -> int:
    """What one delta takes in a slot at most: kernels read whole tiles, and floats of norms."""
    if options.format == "sign":  # a GPU holds it as ternary
        options = replace(options, format="ternary")
    rows, columns = _TILE_OF_KERNELS
    tiles = {
        name: (dtype, (-(-shape[0] // rows) * rows, -(-shape[1] // columns) * columns))
        if len(shape) == 2
        else ("F32", shape)
        for name, (dtype, shape) in base.items()
    }
    return delta_bytes(tiles, options) + _SLOT_ALIGNMENT * len(tiles)


def make_deltas(
    folder: Path,
    base: TensorMap,
    base_digest: str,
    options: DeltaOptions,
    count: int,
    num_threads: int,
    seed: int = 0,
) -> list[Path]:
    """Writes `count` random deltas of a base, those that are not there already; their folders."""
    entries, stored = _plan_delta(base, options)
    tiles = _Tiles(seed + 1)
    for kind in {tensor.kind for tensor in stored}:
        tiles.get(kind)

    def make(index: int) -> Path:
        out = folder / f"v{index:03}"
        settings = {"base": base_digest, "seed": seed, "index": index, **vars(options)}
        if _is_made(out, settings):
            return out
        out.mkdir(parents=True, exist_ok=True)
        path = out / "delta.safetensors"
        path.unlink(missing_ok=True)
        if index < options.num_distinct:
            _write_file(
                path, stored, tiles, f"{seed} {index}",
                lambda hashes: _delta_metadata(base_digest, entries, hashes),
            )  # fmt: skip
        else:
            path.hardlink_to(folder / f"v{index % options.num_distinct:03}" / path.name)
        _mark(out, settings)
        return out

    first = min(count, options.num_distinct)
    with ThreadPoolExecutor(num_threads) as pool:
        return [*pool.map(make, range(first)), *map(make, range(first, count))]


def _delta_metadata(
    base_digest: str, entries: Mapping[str, dict[str, Any]], hashes: Mapping[str, bytes]
) -> dict[str, str]:
    """docs/delta_format.md, "Digests"; `hashes` are dtype, NUL, SHA-256. Without them, a blank."""
    sha = hashlib.sha256(b"deltazip.delta.v1\0" + base_digest.encode() + b"\0")
    for name, entry in entries.items():
        shape = ",".join(map(str, entry["shape"]))
        sha.update(f"{name}\0{entry['type']}\0{shape}\0{entry.get('group_size', 0)}\0".encode())
    for name in sorted(hashes, key=str.encode):
        sha.update(name.encode() + b"\0" + hashes[name])
    manifest = {
        "version": 1,
        "base_digest": base_digest,
        "content_digest": sha.hexdigest(),
        "tensors": entries,
        "base": {"name": "synthetic"},
        "compressor": {"version": "random", "settings": {}, "report": {}},
    }
    return {"format": "deltazip", "manifest": json.dumps(manifest, separators=(",", ":"))}
