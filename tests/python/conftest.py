"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import device
import pytest

sys.path.insert(0, str(Path(__file__).parent / "server"))

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The small files under tests/data."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def device_options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fields of EngineConfig that choose the device under test; skips if it is not there."""
    if not device.IS_CPU:
        from deltazip import _C
        from serving_support import tiny

        base = tiny.write_base(tmp_path_factory.mktemp("device") / "base")
        try:
            config = _C.EngineConfig(base=str(base), kv_cache_bytes=1 << 20, **device.OPTIONS)
            _C.Engine(config).shutdown()
        except ValueError as error:
            reason = f"DELTAZIP_TEST_DEVICE={device.DEVICE}: {error}"
            if os.environ.get("DELTAZIP_REQUIRE_GPU"):
                pytest.fail(reason)
            pytest.skip(reason)
    return device.OPTIONS


@pytest.fixture(scope="session")
def test_models() -> Path:
    """A folder with real models: base/, math/ and define/. Named by DELTAZIP_TEST_MODELS."""
    folder = os.environ.get("DELTAZIP_TEST_MODELS")
    if not folder:
        pytest.skip("DELTAZIP_TEST_MODELS is not set: needs a folder with base/, math/, define/")
    path = Path(folder)
    if not (path / "base" / "config.json").exists():
        pytest.fail(f"DELTAZIP_TEST_MODELS={path} has no base/config.json")
    return path
