"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
def test_models() -> Path:
    """A folder with real models: base/, math/ and define/. Named by DELTAZIP_TEST_MODELS."""
    folder = os.environ.get("DELTAZIP_TEST_MODELS")
    if not folder:
        pytest.skip("DELTAZIP_TEST_MODELS is not set: needs a folder with base/, math/, define/")
    path = Path(folder)
    if not (path / "base" / "config.json").exists():
        pytest.fail(f"DELTAZIP_TEST_MODELS={path} has no base/config.json")
    return path
