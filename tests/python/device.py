"""Where the tests compute: DELTAZIP_TEST_DEVICE (cpu, cuda or cuda:N), in DELTAZIP_TEST_DTYPE.

The CPU computes in float32 and promises that an answer's bits do not depend on what else runs; a
GPU rounds every activation and promises what is above that rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

DEVICE = os.environ.get("DELTAZIP_TEST_DEVICE", "cpu")
DTYPE = os.environ.get("DELTAZIP_TEST_DTYPE", "float16")
IS_CPU = DEVICE == "cpu"

OPTIONS: dict[str, Any] = {} if IS_CPU else {"device": DEVICE, "dtype": DTYPE}  # of EngineConfig
ARGUMENTS = [] if IS_CPU else ["--device", DEVICE, "--dtype", DTYPE]  # of our programs
KV_BYTES = 4 if IS_CPU else 2  # of one number
HEAD_DIM = 16 if IS_CPU else 64  # of tiny models; a GPU's attention serves 64, 96, 128 and 256

LOGITS = 1e-4 if IS_CPU else {"float16": 1e-2, "bfloat16": 6e-2}[DTYPE]  # relative error
# A greedy choice counts if its top-2 gap is above this, in logits; the CPU's always count.
GAP = 0.0 if IS_CPU else {"float16": 0.1, "bfloat16": 0.8}[DTYPE]

bitwise = pytest.mark.skipif(
    not IS_CPU, reason="compares bits of an answer in two batches, which the CPU alone promises"
)


def mostly(same: Iterable[bool]) -> bool:
    """All; on a GPU three quarters: a near tie may be chosen otherwise beside other requests."""
    outcomes = list(same)
    return sum(outcomes) >= (len(outcomes) if IS_CPU else 0.75 * len(outcomes))
