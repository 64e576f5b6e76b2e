"""Packed delta files: the same revision in fewer bytes, damage found, both ways by command."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deltazip import _C
from deltazip.cli import make_app
from deltazip.compress import delta_file, pack, packed
from deltazip.compress.delta_file import FILE_NAME, DeltaFile, DeltaFileError, Entry, write_delta
from deltazip.compress.pack import DeltaType, QuantizedMatrix
from deltazip.compress.repack import repack
from deltazip.compress.stored import Stored
from typer.testing import CliRunner

BASE_DIGEST = hashlib.sha256(b"some base").hexdigest()
ROWS, COLUMNS = 900, 608  # a matrix of more than one chunk


def int2(rng: np.random.Generator) -> QuantizedMatrix:
    groups = COLUMNS // 4
    kept = rng.integers(0, 6, (ROWS, groups)).astype(np.uint8)
    places = np.array(pack.PAIRS)[kept]
    values = np.zeros((ROWS, groups, 4), np.int8)
    levels = rng.choice(np.array([-3, -1, 1, 3], np.int8), (ROWS, groups, 2))
    np.put_along_axis(values, places, levels, axis=2)
    scales = (0.01 * rng.lognormal(size=(ROWS, -(-COLUMNS // 64)))).astype(np.float16)
    return QuantizedMatrix(DeltaType.SPARSE24_INT2, values.reshape(ROWS, COLUMNS), scales, 64, kept)


def write(folder: Path, lossless: str) -> Path:
    rng = np.random.default_rng(0)
    matrix = int2(rng)
    dense = rng.integers(-1, 2, (400, 640)).astype(np.int8)
    scales = np.full((400, 10), 0.001, np.float16)
    quantized = QuantizedMatrix(DeltaType.DENSE_INT4, dense, scales, 64)
    entries = {
        "a.weight": Entry(DeltaType.SPARSE24_INT2, matrix.shape, 64),
        "b.weight": Entry(DeltaType.DENSE_INT4, (400, 640), 64),
        "norm16": Entry(DeltaType.REPLACED, (70,)),
        "norm32": Entry(DeltaType.REPLACED, (3,)),
        "same": Entry(DeltaType.UNCHANGED, (3, 4)),
    }
    stored = delta_file.stored_of_matrix("a.weight", matrix)
    stored |= delta_file.stored_of_matrix("b.weight", quantized)
    stored["norm16"] = Stored.of_tensor(torch.arange(70).bfloat16())
    stored["norm32"] = Stored.of_tensor(torch.tensor([1.0, -2.5, 3e-9]))
    folder.mkdir(parents=True, exist_ok=True)
    write_delta(
        folder / FILE_NAME, base_digest=BASE_DIGEST, entries=entries, stored=stored,
        base={"name": "base"}, compressor={"version": "0"}, lossless=lossless,
    )  # fmt: skip
    return folder


def test_packed_and_plain_are_one_revision(tmp_path: Path) -> None:
    plain = DeltaFile(write(tmp_path / "a", "none"))
    small = DeltaFile(write(tmp_path / "b", "zstd"))
    assert small.content_digest == plain.content_digest
    assert (plain.codec, small.codec) == ("none", "zstd")
    assert small.layout == plain.layout
    small.verify()
    for name in plain.layout:
        assert small.read(name) == plain.read(name)
    for name, entry in plain.entries.items():
        base = torch.randn(entry.shape)
        assert torch.equal(small.apply(name, base), plain.apply(name, base))
        assert small.decoded_bytes(name) == plain.stored_bytes(name)
    # Places of six kinds in four bits, three dense values of sixteen, scales all alike.
    assert small.stored_bytes("a.weight") < 0.88 * plain.stored_bytes("a.weight")
    assert small.stored_bytes("b.weight") < 0.45 * plain.stored_bytes("b.weight")


def test_both_ways_give_back_the_file(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", "none")
    (plain / "chat_template.jinja").write_text("x")
    repack(plain, tmp_path / "packed", "zstd")
    repack(tmp_path / "packed", tmp_path / "again", "none")
    assert (tmp_path / "again" / FILE_NAME).read_bytes() == (plain / FILE_NAME).read_bytes()
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "x"
    assert {p.name for p in (tmp_path / "packed").iterdir()} == {FILE_NAME, "chat_template.jinja"}
    with pytest.raises(ValueError, match="is there already"):
        repack(plain, tmp_path / "packed", "zstd")
    with pytest.raises(ValueError, match="one of zstd, none, got 'lzma'"):
        repack(plain, tmp_path / "other", "lzma")
    original = (plain / FILE_NAME).read_bytes()
    repack(plain, None, "zstd")
    assert len((plain / FILE_NAME).read_bytes()) < len(original)
    repack(plain, None, "none")
    assert (plain / FILE_NAME).read_bytes() == original


def test_a_damaged_delta_is_not_repacked(tmp_path: Path) -> None:
    for codec in ("none", "zstd"):
        path = write(tmp_path / codec, codec) / FILE_NAME
        data = bytearray(path.read_bytes())
        data[-200] ^= 0x10
        path.write_bytes(data)
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"content digest would be|zstd"):
            repack(path, None, "none" if codec == "zstd" else "zstd")
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [FILE_NAME]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", "none") / FILE_NAME
    before = path.read_bytes()

    def full(self: packed.Spool, data: bytes, item_bytes: int) -> tuple[int, int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed.Spool, "add", full)
    with pytest.raises(OSError, match="No space left"):
        repack(path, None, "zstd")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [FILE_NAME]


def edit_header(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Rewrites the safetensors header; `edit` gets it and the manifest in it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["manifest"])
    edit(header, manifest)
    header["__metadata__"]["manifest"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h, m: m.update(version=3), "version 3, this reader knows 1 and 2"),
        (lambda h, m: m.pop("lossless"), "lacks lossless.codec"),
        (lambda h, m: m["lossless"].update(codec="lzma"), "unknown codec 'lzma'"),
        (lambda h, m: m["tensors"]["norm16"].pop("dtype"), "dtype"),
        (lambda h, m: m["tensors"]["norm16"].update(dtype="I64"), "must be a float tensor"),
        (lambda h, m: m["tensors"].pop("b.weight"), "not called for by any entry"),
        (lambda h, m: m["tensors"].update(c={"type": "replaced", "shape": [3], "dtype": "F16"}),
         "'c' is missing"),
    ],
)  # fmt: skip
def test_a_wrong_manifest_is_refused(
    edit: Callable[[dict[str, Any], dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "zstd") / FILE_NAME
    edit_header(path, edit)
    with pytest.raises(DeltaFileError, match=message):
        DeltaFile(path)


def test_a_damaged_stream_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "zstd") / FILE_NAME
    info = DeltaFile(path).stored["a.weight.indices"]
    data = bytearray(path.read_bytes())
    data[info.offset] ^= 1  # of the table
    path.write_bytes(data)
    with pytest.raises(DeltaFileError, match=r"a\.weight\.indices.*its table makes them"):
        DeltaFile(path).verify()


def test_streams_are_those_of_the_document() -> None:
    """Read here by the page alone: table, chunks, planes. A frame that zstd stores raw ends so."""
    codec = _C.StreamCodec("zstd")
    chunk = 256 << 10
    data = np.random.default_rng(1).integers(0, 256, chunk + 1000, np.uint8).tobytes()
    stream = codec.encode(data, 2)
    sizes = struct.unpack("<4I", stream[:16])
    assert 16 + sum(sizes) == len(stream)
    planes = [data[0:chunk:2], data[1:chunk:2], data[chunk::2], data[chunk + 1 :: 2]]
    at = 16
    for size, plane in zip(sizes, planes, strict=True):
        frame = stream[at : at + size]
        assert frame[:4] == b"\x28\xb5\x2f\xfd"
        assert frame.endswith(plane[-400:])
        at += size
    assert codec.decode(stream, len(data), 2) == data
    for wrong in (len(data) - 2, len(data) + 2, 1 << 50):
        with pytest.raises(ValueError, match="here: "):
            codec.decode(stream, wrong, 2, "here: ")
    with pytest.raises(ValueError, match="1, 2 or 4 bytes, got 3"):
        codec.encode(data, 3)
    with pytest.raises(ValueError, match="unknown codec 'none'"):
        _C.StreamCodec("none")


def test_the_commands(tmp_path: Path) -> None:
    app = make_app(["pack", "unpack", "inspect"])
    folder = write(tmp_path / "d", "none")
    before = (folder / FILE_NAME).read_bytes()
    result = CliRunner().invoke(app, ["pack", str(folder)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    assert "MB -> " in result.stdout
    assert DeltaFile(folder).codec == "zstd"
    result = CliRunner().invoke(app, ["inspect", str(folder), "--verify"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    assert "unpacked" in result.stdout
    result = CliRunner().invoke(app, ["unpack", str(folder), "-o", str(tmp_path / "e")])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "e" / FILE_NAME).read_bytes() == before
    result = CliRunner().invoke(app, ["unpack", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "no such file" in result.stderr
