"""Codes to bytes and back, against a slow reading of docs/delta_format.md written apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from deltazip.compress.pack import (
    PAIRS,
    SIGN_STATES,
    TERNARY_STATES,
    DeltaType,
    QuantizedMatrix,
    pack,
    stored_bytes,
    stored_shapes,
    unpack,
)

MATRIX_TYPES = [t for t in DeltaType if t.is_matrix]
SHAPES = [(1, 32), (3, 64), (5, 576), (7, 100), (4, 36), (2, 33), (3, 30), (1, 1)]


def random_matrix(
    rng: np.random.Generator, type_: DeltaType, shape: tuple[int, int], group_size: int
) -> QuantizedMatrix:
    rows, columns = shape
    scales = rng.normal(size=(rows, -(-columns // group_size))).astype(np.float16)
    groups = -(-columns // 4)
    if type_ is DeltaType.DENSE_INT8:
        values = rng.integers(-128, 128, shape)
        return QuantizedMatrix(type_, values.astype(np.int8), scales, group_size)
    if type_ is DeltaType.DENSE_INT4:
        values = rng.integers(-8, 8, shape)
        return QuantizedMatrix(type_, values.astype(np.int8), scales, group_size)
    if type_ in (DeltaType.SPARSE24_TERNARY, DeltaType.SPARSE14_SIGN):
        # A group that the last column cuts keeps its first place: it must not be all zero.
        count = 32 if type_ is DeltaType.SPARSE24_TERNARY else 8
        states = rng.integers(0, count, (rows, groups))
        if columns % 4:
            states[:, -1] = rng.integers(0, 2, rows)
        values = TERNARY_STATES[states].reshape(rows, -1)[:, :columns]
        return QuantizedMatrix(type_, values, scales, group_size)
    kept = rng.integers(0, 6, (rows, groups)).astype(np.uint8)
    levels = np.arange(-8, 8) if type_ is DeltaType.SPARSE24_INT4 else np.array([-3, -1, 1, 3])
    values = np.zeros((rows, groups, 4), np.int8)
    for row, group in itertools.product(range(rows), range(groups)):
        for place in PAIRS[kept[row, group]]:
            values[row, group, place] = rng.choice(levels)
    values = values.reshape(rows, -1)[:, :columns].copy()
    return QuantizedMatrix(type_, values, scales, group_size, kept)


def read_weight(
    type_: DeltaType, stored: dict[str, np.ndarray], group_size: int, n: int, k: int
) -> float:
    """One weight, by the words of the document, bit by bit."""
    scale = float(stored["scales"][n, k // group_size])
    group, place = divmod(k, 4)

    def half(name: str) -> int:
        byte = int(stored[name][n, group // 2])
        return byte & 15 if group % 2 == 0 else byte >> 4

    if type_ is DeltaType.DENSE_INT8:
        return scale * (int(stored["values"][n, k]) - 128)
    if type_ is DeltaType.DENSE_INT4:
        byte = int(stored["values"][n, k // 2])
        return scale * ((byte & 15 if k % 2 == 0 else byte >> 4) - 8)
    if type_ is DeltaType.SPARSE14_SIGN:
        number = int.from_bytes(bytes(stored["codes"][n, group // 8 * 3 :][:3]), "little")
        code = (number >> (3 * (group % 8))) & 7
        return scale * ((1 if code % 2 == 0 else -1) if code // 2 == place else 0)
    if type_ is DeltaType.SPARSE24_TERNARY:
        number = int.from_bytes(bytes(stored["codes"][n, group // 8 * 5 :][:5]), "little")
        code = (number >> (5 * (group % 8))) & 31
        if code < 8:
            return scale * ((1 if code % 2 == 0 else -1) if code // 2 == place else 0)
        d = code - 8
        pair = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)][d // 4]
        signs = (-1 if d & 1 else 1, -1 if d & 2 else 1)
        return scale * (signs[pair.index(place)] if place in pair else 0)
    index = half("indices")
    places = [index & 3, index >> 2]
    if place not in places:
        return 0.0
    which = places.index(place)
    if type_ is DeltaType.SPARSE24_INT4:
        byte = int(stored["values"][n, group])
        return scale * ((byte & 15 if which == 0 else byte >> 4) - 8)
    code = half("values")
    return scale * (2 * (code & 3 if which == 0 else code >> 2) - 3)


@pytest.mark.parametrize("type_", MATRIX_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_bytes_read_as_the_document_says(type_: DeltaType, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(hash((type_.value, shape)) % 2**32)
    group_size = int(rng.choice([32, 64, 96]))
    matrix = random_matrix(rng, type_, shape, group_size)
    stored = pack(matrix)
    for suffix, (dtype, want) in stored_shapes(type_, shape, group_size).items():
        assert stored[suffix].shape == want
        assert stored[suffix].dtype == (np.float16 if dtype == "F16" else np.uint8)
    assert sum(a.nbytes for a in stored.values()) == stored_bytes(type_, shape, group_size)
    dense = matrix.dequantize()
    for n, k in itertools.product(range(shape[0]), range(shape[1])):
        assert dense[n, k] == pytest.approx(read_weight(type_, stored, group_size, n, k), abs=0)


@pytest.mark.parametrize("type_", MATRIX_TYPES)
def test_round_trip_of_random_matrices(type_: DeltaType) -> None:
    rng = np.random.default_rng(7)
    for _ in range(60):
        shape = (int(rng.integers(1, 20)), int(rng.integers(1, 200)))
        group_size = 32 * int(rng.integers(1, 8))
        matrix = random_matrix(rng, type_, shape, group_size)
        back = unpack(type_, shape, group_size, pack(matrix))
        np.testing.assert_array_equal(back.values, matrix.values)
        np.testing.assert_array_equal(back.scales, matrix.scales)
        np.testing.assert_array_equal(pack(back)["scales"], matrix.scales)
        for suffix, array in pack(matrix).items():
            np.testing.assert_array_equal(pack(back)[suffix], array)


def test_every_pattern_of_bytes_of_a_full_row_survives() -> None:
    """Unpack then pack is the identity on codes: no two codes mean the same."""
    rng = np.random.default_rng(3)
    types = (
        DeltaType.SPARSE24_TERNARY, DeltaType.SPARSE14_SIGN, DeltaType.DENSE_INT4,
        DeltaType.DENSE_INT8,
    )  # fmt: skip
    for type_ in types:
        shapes = stored_shapes(type_, (50, 128), 32)
        stored = {
            suffix: rng.integers(0, 256, want).astype(np.uint8)
            if dtype == "U8"
            else rng.normal(size=want).astype(np.float16)
            for suffix, (dtype, want) in shapes.items()
        }
        again = pack(unpack(type_, (50, 128), 32, stored))
        for suffix, array in stored.items():
            np.testing.assert_array_equal(again[suffix], array)


def test_ternary_states_are_all_the_states_but_zero() -> None:
    assert len({tuple(state) for state in TERNARY_STATES.tolist()}) == 32
    kept = np.count_nonzero(TERNARY_STATES, axis=1)
    assert kept.min() == 1
    assert kept.max() == 2
    assert np.count_nonzero(SIGN_STATES, axis=1).tolist() == [1] * 8


def make(type_: DeltaType, values: list[int], **more: object) -> QuantizedMatrix:
    row = np.array([values], np.int8)
    return QuantizedMatrix(type_, row, np.ones((1, 1), np.float16), 32, **more)  # type: ignore[arg-type]


def test_values_without_a_code_are_refused() -> None:
    with pytest.raises(ValueError, match="one or two of four"):
        pack(make(DeltaType.SPARSE24_TERNARY, [1, 1, 1, 0]))
    with pytest.raises(ValueError, match="one or two of four"):
        pack(make(DeltaType.SPARSE24_TERNARY, [0, 0, 0, 0, 1, 0, 0, 0]))
    for values in ([1, -1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0, -128, 0, 0]):
        with pytest.raises(ValueError, match="sparse14_sign keeps one of four"):
            pack(make(DeltaType.SPARSE14_SIGN, values))
    with pytest.raises(ValueError, match=r"values -8\.\.7"):
        pack(make(DeltaType.DENSE_INT4, [0, 8, 0, 0]))
    kept = np.zeros((1, 1), np.uint8)
    with pytest.raises(ValueError, match="outside the kept pair"):
        pack(make(DeltaType.SPARSE24_INT4, [1, 1, 1, 0], kept=kept))
    with pytest.raises(ValueError, match="-3, -1, 1, 3"):
        pack(make(DeltaType.SPARSE24_INT2, [1, 2, 0, 0], kept=kept))
    with pytest.raises(ValueError, match="needs the kept pair"):
        pack(make(DeltaType.SPARSE24_INT2, [1, 1, 0, 0]))
    with pytest.raises(ValueError, match="finite"):
        pack(
            QuantizedMatrix(
                DeltaType.DENSE_INT8,
                np.zeros((1, 4), np.int8),
                np.full((1, 1), np.nan, np.float16),
                32,
            )
        )
    with pytest.raises(ValueError, match=r"scales must be \[1, 2\], got \[1, 1\]"):
        pack(make(DeltaType.DENSE_INT8, [0] * 33))


def test_stored_tensors_are_checked_when_read() -> None:
    good = pack(make(DeltaType.SPARSE24_INT4, [1, 2, 0, 0], kept=np.zeros((1, 1), np.uint8)))
    with pytest.raises(ValueError, match=r"'\.indices' must be \[1, 4\]"):
        unpack(DeltaType.SPARSE24_INT4, (1, 4), 32, good | {"indices": good["values"]})
    with pytest.raises(ValueError, match="missing"):
        unpack(DeltaType.SPARSE24_INT4, (1, 4), 32, {"scales": good["scales"]})
    sign = pack(make(DeltaType.SPARSE14_SIGN, [0, 0, -1, 0]))
    assert sign["codes"].tolist() == [[0b10110101, 0b01101101, 0b11011011]]  # 5, then padding's 6
    with pytest.raises(ValueError, match=r"'\.codes' must be \[1, 3\], got \[1, 2\]"):
        unpack(DeltaType.SPARSE14_SIGN, (1, 4), 32, sign | {"codes": sign["codes"][:, :2]})
    bad = good["indices"].copy()
    bad[0, 0] = 0b0001  # places 1 and 0
    with pytest.raises(ValueError, match="must ascend"):
        unpack(DeltaType.SPARSE24_INT4, (1, 4), 32, good | {"indices": bad})
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        unpack(DeltaType.SPARSE24_INT4, (1, 4), 48, good)
