"""DeltaZip: one process serves a base model and many full fine-tunes, as compressed deltas."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltazip.llm import LLM as LLM
    from deltazip.sampling import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]

try:
    __version__ = version("deltazip")
except PackageNotFoundError:  # imported from a source tree
    __version__ = "0+unknown"

# Imported when first asked for: the compressor and the tools do not need the engine.
_HOMES = {"LLM": "deltazip.llm", "SamplingParams": "deltazip.sampling"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltazip' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
