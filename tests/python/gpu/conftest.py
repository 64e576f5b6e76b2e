"""Tests of this folder need a GPU and a build with DELTAZIP_CUDA; elsewhere they are skipped."""

from __future__ import annotations

import ctypes
import os

import pytest


def _count_gpus() -> int:
    """As the driver says; 0 without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    """The device to test on. DELTAZIP_REQUIRE_GPU=1 makes its absence a failure."""
    if _count_gpus() == 0:
        if os.environ.get("DELTAZIP_REQUIRE_GPU"):
            pytest.fail("DELTAZIP_REQUIRE_GPU is set, but the driver finds no GPU")
        pytest.skip("needs a GPU")
    return "cuda"
