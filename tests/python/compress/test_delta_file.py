"""The delta file: round trips, digests computed apart, damage found, nothing half written."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from deltazip.compress import delta_file, pack
from deltazip.compress.checkpoint import Checkpoint, CheckpointError
from deltazip.compress.delta_file import DeltaFile, DeltaFileError, Entry, write_delta
from deltazip.compress.pack import DeltaType, QuantizedMatrix
from deltazip.compress.stored import Stored
from safetensors import safe_open
from safetensors.torch import load_file, save_file

BASE_DIGEST = hashlib.sha256(b"some base").hexdigest()


def ternary(rng: np.random.Generator, rows: int, columns: int) -> QuantizedMatrix:
    codes = rng.integers(0, 32, (rows, columns // 4))
    values = pack.TERNARY_STATES[codes].reshape(rows, columns)
    scales = rng.normal(size=(rows, -(-columns // 64))).astype(np.float16)
    return QuantizedMatrix(DeltaType.SPARSE24_TERNARY, values, scales, 64)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, QuantizedMatrix, torch.Tensor, str]:
    matrix = ternary(np.random.default_rng(0), 6, 96)
    norm = torch.randn(5).bfloat16()
    entries = {
        "b.weight": Entry(DeltaType.SPARSE24_TERNARY, (6, 96), 64),
        "norm.weight": Entry(DeltaType.REPLACED, (5,)),
        "a.weight": Entry(DeltaType.UNCHANGED, (3, 4)),
    }
    stored = delta_file.stored_of_matrix("b.weight", matrix)
    stored["norm.weight"] = Stored.of_tensor(norm)
    digest = write_delta(
        tmp_path / delta_file.FILE_NAME,
        base_digest=BASE_DIGEST,
        entries=entries,
        stored=stored,
        base={"name": "base", "architecture": "LlamaForCausalLM"},
        compressor={"version": "0", "settings": {}, "report": {}},
    )
    return tmp_path, matrix, norm, digest


def test_what_is_written_is_read(
    written: tuple[Path, QuantizedMatrix, torch.Tensor, str],
) -> None:
    folder, matrix, norm, digest = written
    file = DeltaFile(folder)
    file.verify()
    assert file.content_digest == digest
    assert file.base_digest == BASE_DIGEST
    np.testing.assert_array_equal(file.matrix("b.weight").values, matrix.values)
    base = torch.randn(6, 96).bfloat16()
    want = base.float() + torch.from_numpy(matrix.dequantize())
    assert torch.equal(file.apply("b.weight", base), want)
    assert torch.equal(file.apply("norm.weight", torch.zeros(5)), norm.float())
    assert torch.equal(file.apply("a.weight", torch.ones(3, 4)), torch.ones(3, 4))
    with pytest.raises(DeltaFileError, match=r"is \[6, 96\] in the delta, the base has \[96, 6\]"):
        file.apply("b.weight", torch.zeros(96, 6))
    assert [p.name for p in folder.iterdir()] == [delta_file.FILE_NAME]


def test_the_safetensors_package_reads_it(
    written: tuple[Path, QuantizedMatrix, torch.Tensor, str],
) -> None:
    folder, _, norm, _ = written
    with safe_open(folder / delta_file.FILE_NAME, "pt") as file:
        assert file.metadata()["format"] == "deltazip"
        assert set(file.keys()) == {"b.weight.codes", "b.weight.scales", "norm.weight"}
        assert torch.equal(file.get_tensor("norm.weight"), norm)


def test_content_digest_is_the_document_s(
    written: tuple[Path, QuantizedMatrix, torch.Tensor, str],
) -> None:
    _, matrix, norm, digest = written
    packed = pack.pack(matrix)
    sha = hashlib.sha256()
    sha.update(b"deltazip.delta.v1\0" + BASE_DIGEST.encode() + b"\0")
    sha.update(b"a.weight\0unchanged\x003,4\x000\0")
    sha.update(b"b.weight\0sparse24_ternary\x006,96\x0064\0")
    sha.update(b"norm.weight\0replaced\x005\x000\0")
    for head, data in (
        (b"b.weight.codes\0U8\0", packed["codes"].tobytes()),
        (b"b.weight.scales\0F16\0", packed["scales"].tobytes()),
        (b"norm.weight\0BF16\0", norm.view(torch.int16).numpy().tobytes()),
    ):
        sha.update(head + hashlib.sha256(data).digest())
    assert sha.hexdigest() == digest


def test_equal_bytes_of_another_dtype_are_other_content(tmp_path: Path) -> None:
    values = torch.arange(1, 6, dtype=torch.bfloat16)
    digests = set()
    for dtype in (torch.bfloat16, torch.float16):
        digests.add(
            write_delta(
                tmp_path / delta_file.FILE_NAME,
                base_digest=BASE_DIGEST,
                entries={"norm.weight": Entry(DeltaType.REPLACED, (5,))},
                stored={"norm.weight": Stored.of_tensor(values.view(dtype))},
                base={},
                compressor={},
            )
        )
    assert len(digests) == 2


def test_a_flipped_bit_is_found(
    written: tuple[Path, QuantizedMatrix, torch.Tensor, str],
) -> None:
    path = written[0] / delta_file.FILE_NAME
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DeltaFileError, match="content digest is"):
        DeltaFile(path).verify()


@pytest.mark.parametrize("left", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(
    written: tuple[Path, QuantizedMatrix, torch.Tensor, str], left: int
) -> None:
    path = written[0] / delta_file.FILE_NAME
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DeltaFileError, match=r"delta\.safetensors"):
        DeltaFile(path)


def rewrite(path: Path, change: object) -> None:
    """Edits the manifest in place."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["manifest"])
    change(manifest, header)  # type: ignore[operator]
    header["__metadata__"]["manifest"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, h: m.update(version=3), "version 3, this reader knows 1 and 2"),
        (lambda m, h: m.pop("tensors"), "manifest is malformed"),
        (lambda m, h: m["tensors"]["b.weight"].update(type="sparse"), "'b.weight'.*sparse"),
        (lambda m, h: m["tensors"]["b.weight"].update(group_size=48), "multiple of 32, got 48"),
        (lambda m, h: m["tensors"]["b.weight"].update(shape=[7, 96]), r"must be U8 \[7, 15\]"),
        (lambda m, h: m["tensors"].pop("norm.weight"), "'norm.weight' is not called for"),
        (lambda m, h: m["tensors"].update({"z": {"type": "replaced", "shape": [1]}}), "missing"),
        (lambda m, h: h["__metadata__"].update(format="pt"), "expected 'deltazip'"),
    ],
)
def test_a_wrong_manifest_is_refused(
    written: tuple[Path, QuantizedMatrix, torch.Tensor, str], change: object, message: str
) -> None:
    path = written[0] / delta_file.FILE_NAME
    rewrite(path, change)
    with pytest.raises(DeltaFileError, match=message):
        DeltaFile(path)


def test_an_error_while_writing_leaves_the_old_file(
    written: tuple[Path, QuantizedMatrix, torch.Tensor, str],
) -> None:
    folder, _, _, digest = written
    calls = 0

    def load() -> bytes:
        nonlocal calls
        calls += 1
        if calls == 2:  # hashed well, the disk fails while it is written
            raise OSError(28, "No space left on device")
        return bytes(10)

    with pytest.raises(OSError, match="No space left"):
        write_delta(
            folder / delta_file.FILE_NAME,
            base_digest=BASE_DIGEST,
            entries={"n": Entry(DeltaType.REPLACED, (5,))},
            stored={"n": Stored("BF16", (5,), load)},
            base={},
            compressor={},
        )
    assert [p.name for p in folder.iterdir()] == [delta_file.FILE_NAME]
    assert DeltaFile(folder).content_digest == digest


def test_base_digest_is_the_document_s_and_ignores_sharding(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4).bfloat16(), "a": torch.randn(5), "c": torch.zeros(2).half()}
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    save_file(tensors, one / "model.safetensors")
    save_file({"a": tensors["a"], "c": tensors["c"]}, two / "x-1.safetensors")
    save_file({"b": tensors["b"]}, two / "x-2.safetensors")
    weight_map = {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-1.safetensors"}
    (two / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sha = hashlib.sha256()
    for name, dtype, shape in (("a", "F32", "5"), ("b", "BF16", "3,4"), ("c", "F16", "2")):
        raw = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        sha.update(f"{name}\0{dtype}\0{shape}\0".encode() + hashlib.sha256(raw).digest())
    assert Checkpoint(one).digest() == sha.hexdigest()
    assert Checkpoint(two).digest() == sha.hexdigest()
    assert torch.equal(Checkpoint(two).read("b"), tensors["b"])


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../up.safetensors"}}))
    with pytest.raises(CheckpointError, match="leaves the folder"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is missing"):
        Checkpoint(tmp_path)
    index.unlink()
    save_file({"a": torch.zeros(10)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "x"}})
    )
    with pytest.raises(CheckpointError, match="quantised"):
        Checkpoint(tmp_path)


def test_the_golden_file_reads_as_expected(test_data: Path) -> None:
    """Written by a program that shares no code with the package, from the document alone."""
    file = DeltaFile(test_data / "golden_delta.safetensors")
    file.verify()
    expected = load_file(test_data / "golden_expected.safetensors")
    seen = set()
    for name, entry in file.entries.items():
        seen.add(entry.type)
        got = file.apply(name, torch.zeros(entry.shape))
        want = expected.get(name, torch.zeros(entry.shape))
        torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=0.0)
    assert seen == set(DeltaType)
