"""Codes of compressed delta matrices to bytes and back: the types of docs/delta_format.md.

Numpy only, vectorised over whole matrices. A matrix travels as `QuantizedMatrix`: integer values
and a scale for each group of columns, which is what the solver produces and readers get back.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]

COLUMN_ALIGNMENT = 32
"""Columns are padded to this, and group sizes are multiples of it."""

PAIRS: tuple[tuple[int, int], ...] = tuple(itertools.combinations(range(4), 2))
"""The two kept places of four, in the order the ternary states number them."""


class DeltaType(str, enum.Enum):
    UNCHANGED = "unchanged"
    REPLACED = "replaced"
    SPARSE24_INT4 = "sparse24_int4"
    SPARSE24_INT2 = "sparse24_int2"
    SPARSE24_TERNARY = "sparse24_ternary"
    SPARSE14_SIGN = "sparse14_sign"
    DENSE_INT4 = "dense_int4"
    DENSE_INT8 = "dense_int8"

    @property
    def is_matrix(self) -> bool:
        return self is not DeltaType.UNCHANGED and self is not DeltaType.REPLACED

    @property
    def is_sparse(self) -> bool:
        return self.value.startswith("sparse")

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes and places for one weight, scales not counted."""
        return _BITS_PER_WEIGHT[self]


_BITS_PER_WEIGHT = {
    DeltaType.SPARSE24_INT4: 3.0,
    DeltaType.SPARSE24_INT2: 2.0,
    DeltaType.SPARSE24_TERNARY: 1.25,
    DeltaType.SPARSE14_SIGN: 0.75,
    DeltaType.DENSE_INT4: 4.0,
    DeltaType.DENSE_INT8: 8.0,
}


def _make_ternary_states() -> I8:
    states = np.zeros((32, 4), np.int8)
    for code in range(8):
        states[code, code // 2] = 1 if code % 2 == 0 else -1
    for code in range(8, 32):
        pair, signs = divmod(code - 8, 4)
        first, second = PAIRS[pair]
        states[code, first] = -1 if signs & 1 else 1
        states[code, second] = -1 if signs & 2 else 1
    return states


TERNARY_STATES: I8 = _make_ternary_states()
"""[32, 4]: the values of a group of four for each code of sparse24_ternary."""
SIGN_STATES: I8 = TERNARY_STATES[:8]
"""[8, 4]: the same of sparse14_sign, whose codes are ternary's for a weight that is alone."""
_STATE_BITS = {DeltaType.SPARSE24_TERNARY: 5, DeltaType.SPARSE14_SIGN: 3}


def _make_ternary_codes() -> npt.NDArray[np.int16]:
    codes = np.full(81, -1, np.int16)
    codes[(TERNARY_STATES.astype(np.int64) + 1) @ np.array([1, 3, 9, 27])] = np.arange(32)
    return codes


_TERNARY_CODE_OF = _make_ternary_codes()  # base-3 number of a group's values -> code, -1: none


@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A delta matrix as integers: weight [n, k] is scales[n, k // group_size] * values[n, k].

    Attributes:
        values: [rows, columns], int8. For int8 codes the range is -128..127.
        kept: [rows, ceil(columns / 4)], uint8: which of PAIRS a group keeps. Only of 2:4 integer
            types, whose kept value may be zero; None otherwise.
        scales: [rows, ceil(columns / group_size)], float16.
    """

    type: DeltaType
    values: I8
    scales: F16
    group_size: int
    kept: U8 | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    def dequantize(self) -> F32:
        """The difference this matrix stands for: [rows, columns], float32."""
        columns = self.values.shape[1]
        scales = np.repeat(self.scales.astype(np.float32), self.group_size, axis=1)[:, :columns]
        return self.values.astype(np.float32) * scales


def padded_columns(columns: int) -> int:
    return -(-columns // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


def check_group_size(group_size: int) -> None:
    """Raises ValueError unless it is a positive multiple of 32."""
    if group_size <= 0 or group_size % COLUMN_ALIGNMENT:
        raise ValueError(f"group size must be a positive multiple of 32, got {group_size}")


def stored_shapes(
    type_: DeltaType, shape: tuple[int, int], group_size: int
) -> dict[str, tuple[str, tuple[int, int]]]:
    """What a matrix of this type stores: suffix -> (safetensors dtype, shape)."""
    check_group_size(group_size)
    rows, columns = shape
    padded = padded_columns(columns)
    scales = {"scales": ("F16", (rows, -(-columns // group_size)))}
    match type_:
        case DeltaType.SPARSE24_INT4:
            codes = {"values": padded // 4, "indices": padded // 8}
        case DeltaType.SPARSE24_INT2:
            codes = {"values": padded // 8, "indices": padded // 8}
        case DeltaType.SPARSE24_TERNARY:
            codes = {"codes": padded // 32 * 5}
        case DeltaType.SPARSE14_SIGN:
            codes = {"codes": padded // 32 * 3}
        case DeltaType.DENSE_INT4:
            codes = {"values": padded // 2}
        case DeltaType.DENSE_INT8:
            codes = {"values": padded}
        case _:
            raise ValueError(f"type {type_.value} has no codes")
    return {suffix: ("U8", (rows, width)) for suffix, width in codes.items()} | scales


def stored_bytes(type_: DeltaType, shape: tuple[int, int], group_size: int) -> int:
    total = 0
    for dtype, (rows, width) in stored_shapes(type_, shape, group_size).values():
        total += rows * width * (2 if dtype == "F16" else 1)
    return total


def _halves(nibbles: U8) -> U8:
    """[rows, 2n] of 4 bits -> [rows, n]: the even one in the low half."""
    packed: U8 = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
    return packed


def _nibbles(packed: U8) -> U8:
    out = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    out[:, 0::2] = packed & 15
    out[:, 1::2] = packed >> 4
    return out


def _pad(array: npt.NDArray[np.int8], columns: int, fill: int = 0) -> I8:
    missing = columns - array.shape[1]
    if missing == 0:
        return array
    return np.pad(array, ((0, 0), (0, missing)), constant_values=fill)


def pack(matrix: QuantizedMatrix) -> dict[str, npt.NDArray[np.generic]]:
    """The stored tensors of a matrix, by suffix, as in docs/delta_format.md.

    Raises:
        ValueError: a value has no code in this type, or the shapes do not agree.
    """
    rows, columns = matrix.shape
    want = (rows, -(-columns // matrix.group_size))
    if matrix.scales.shape != want:
        raise ValueError(f"scales must be {list(want)}, got {list(matrix.scales.shape)}")
    if not np.isfinite(matrix.scales).all():
        raise ValueError("scales must be finite")
    check_group_size(matrix.group_size)
    padded = padded_columns(columns)
    out: dict[str, npt.NDArray[np.generic]] = {}
    match matrix.type:
        case DeltaType.DENSE_INT8:
            out["values"] = (_pad(matrix.values, padded).astype(np.int16) + 128).astype(np.uint8)
        case DeltaType.DENSE_INT4:
            _check_range(matrix.values, -8, 7, matrix.type)
            out["values"] = _halves((_pad(matrix.values, padded) + 8).astype(np.uint8))
        case DeltaType.SPARSE24_TERNARY | DeltaType.SPARSE14_SIGN:
            out["codes"] = _pack_states(matrix.type, _pad(matrix.values, padded), columns)
        case DeltaType.SPARSE24_INT4 | DeltaType.SPARSE24_INT2:
            out |= _pack_sparse_integers(matrix, padded)
        case _:
            raise ValueError(f"type {matrix.type.value} has no codes")
    return out | {"scales": np.ascontiguousarray(matrix.scales)}


def split_rows(matrix: QuantizedMatrix, count: int) -> list[QuantizedMatrix]:
    """The matrix in `count` runs of rows, at least one; packing them in turn packs it."""
    ends = np.linspace(0, matrix.shape[0], max(count, 1) + 1).astype(np.int64)
    runs = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
    return [
        dataclasses.replace(
            matrix,
            values=matrix.values[run],
            scales=matrix.scales[run],
            kept=None if matrix.kept is None else matrix.kept[run],
        )
        for run in runs
    ]


def _check_range(values: I8, low: int, high: int, type_: DeltaType) -> None:
    if values.size and (values.min() < low or values.max() > high):
        raise ValueError(
            f"{type_.value} holds values {low}..{high}, got {values.min()}..{values.max()}"
        )


def _pack_states(type_: DeltaType, values: I8, columns: int) -> U8:
    bits = _STATE_BITS[type_]
    groups = values.reshape(values.shape[0], -1, 4)
    number = np.full(groups.shape[:2], 40, np.int64)  # 40 is four zeros
    for place, weight in enumerate((1, 3, 9, 27)):
        number += groups[:, :, place].astype(np.int64) * weight
    # Four zeros have no state. Past the last column any code does: +1 in place 3, a padded place.
    padding = number[:, columns // 4 :]
    padding[padding == 40] = 40 + 27
    codes = _TERNARY_CODE_OF[number.clip(0, 80)]
    if number.min() < 0 or number.max() > 80 or codes.min() < 0 or codes.max() >= 1 << bits:
        count = "one or two" if type_ is DeltaType.SPARSE24_TERNARY else "one"
        raise ValueError(f"{type_.value} keeps {count} of four values, each -1 or +1")
    words = np.zeros((values.shape[0], groups.shape[1] // 8), np.uint64)
    for group in range(8):
        words |= codes[:, group::8].astype(np.uint64) << np.uint64(bits * group)
    return np.stack(
        [(words >> np.uint64(8 * byte)).astype(np.uint8) for byte in range(bits)], axis=-1
    ).reshape(values.shape[0], -1)


def _pack_sparse_integers(matrix: QuantizedMatrix, padded: int) -> dict[str, U8]:
    rows = matrix.shape[0]
    if matrix.kept is None or matrix.kept.shape != (rows, -(-matrix.shape[1] // 4)):
        raise ValueError(f"{matrix.type.value} needs the kept pair of every group of four")
    groups = _pad(matrix.values, padded).reshape(rows, -1, 4)
    kept = _pad(matrix.kept.astype(np.int8), padded // 4)
    places = np.array(PAIRS, np.int64)[kept]  # [rows, groups, 2]
    values = np.take_along_axis(groups, places, axis=2)
    if np.count_nonzero(groups) != np.count_nonzero(values):
        raise ValueError(f"{matrix.type.value}: a value outside the kept pair is not zero")
    indices = _halves((places[:, :, 0] | places[:, :, 1] << 2).astype(np.uint8))
    if matrix.type is DeltaType.SPARSE24_INT4:
        _check_range(values.reshape(rows, -1), -8, 7, matrix.type)
        codes = (values + 8).astype(np.uint8)
        return {"values": codes[:, :, 0] | (codes[:, :, 1] << np.uint8(4)), "indices": indices}
    true_groups = matrix.shape[1] // 4
    if not np.isin(values[:, :true_groups], (-3, -1, 1, 3)).all():
        raise ValueError("sparse24_int2 holds values -3, -1, 1, 3")
    codes = ((values + 3) >> 1).astype(np.uint8) & np.uint8(3)
    return {"values": _halves(codes[:, :, 0] | (codes[:, :, 1] << np.uint8(2))), "indices": indices}


def unpack(
    type_: DeltaType,
    shape: tuple[int, int],
    group_size: int,
    stored: Mapping[str, npt.NDArray[np.generic]],
) -> QuantizedMatrix:
    """The reverse of pack. `stored` maps suffix to array.

    Raises:
        ValueError: a stored tensor is missing or has another shape, a scale is not finite, or kept
            places do not ascend.
    """
    columns = shape[1]
    for suffix, (_, want) in stored_shapes(type_, shape, group_size).items():
        if suffix not in stored:
            raise ValueError(f"{type_.value} needs a tensor '.{suffix}', it is missing")
        if stored[suffix].shape != want:
            raise ValueError(f"'.{suffix}' must be {list(want)}, got {list(stored[suffix].shape)}")
    scales: F16 = stored["scales"].astype(np.float16, copy=False)
    if not np.isfinite(scales).all():
        raise ValueError("'.scales' holds a value that is not finite")
    kept: U8 | None = None
    if type_ in _STATE_BITS:
        values = _unpack_states(type_, stored["codes"].astype(np.uint8, copy=False))
    else:
        raw: U8 = stored["values"].astype(np.uint8, copy=False)
        if type_ is DeltaType.DENSE_INT8:
            values = (raw.astype(np.int16) - 128).astype(np.int8)
        elif type_ is DeltaType.DENSE_INT4:
            values = _nibbles(raw).astype(np.int8) - np.int8(8)
        else:
            indices = _nibbles(stored["indices"].astype(np.uint8, copy=False))
            values, kept = _unpack_sparse_integers(type_, raw, indices)
            kept = kept[:, : -(-columns // 4)]
    return QuantizedMatrix(type_, values[:, :columns], scales, group_size, kept)


def _unpack_states(type_: DeltaType, codes: U8) -> I8:
    bits, rows = _STATE_BITS[type_], codes.shape[0]
    bytes_ = codes.reshape(rows, -1, bits).astype(np.uint64)
    words = np.zeros(bytes_.shape[:2], np.uint64)
    for byte in range(bits):
        words |= bytes_[:, :, byte] << np.uint64(8 * byte)
    groups = np.stack(
        [(words >> np.uint64(bits * group)).astype(np.uint8) for group in range(8)], axis=-1
    )
    groups &= np.uint8((1 << bits) - 1)
    values: I8 = TERNARY_STATES[groups.reshape(rows, -1)].reshape(rows, -1)
    return values


def _unpack_sparse_integers(type_: DeltaType, raw: U8, indices: U8) -> tuple[I8, U8]:
    first, second = indices & 3, indices >> 2
    if (first >= second).any():
        row, group = np.argwhere(first >= second)[0]
        raise ValueError(
            f"'.indices' row {row} group {group}: places {first[row, group]} and "
            f"{second[row, group]} must ascend"
        )
    pair_of = np.zeros((4, 4), np.uint8)
    for number, (i, j) in enumerate(PAIRS):
        pair_of[i, j] = number
    if type_ is DeltaType.SPARSE24_INT4:
        pair = np.stack([raw & 15, raw >> 4], axis=-1).astype(np.int8) - np.int8(8)
    else:
        nibbles = _nibbles(raw)
        pair = np.stack([nibbles & 3, nibbles >> 2], axis=-1).astype(np.int8) * 2 - np.int8(3)
    groups = np.zeros((*indices.shape, 4), np.int8)
    places = np.stack([first, second], axis=-1).astype(np.int64)
    np.put_along_axis(groups, places, pair.astype(np.int8), axis=2)
    return groups.reshape(indices.shape[0], -1), pair_of[first, second]
