"""The variants that requests may name, with their text side. Event loop only."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from deltazip import _C
from deltazip.engine import AsyncEngine
from deltazip.server.errors import ApiError, invalid, model_not_found, overloaded
from deltazip.server.settings import VARIANT_NAME
from deltazip.text import TEXT_FILES, VariantText

__all__ = ["Variant", "VariantRegistry", "load_at_start"]

_READ_FILES = ("delta.safetensors", *TEXT_FILES)


@dataclass(frozen=True, slots=True)
class Variant:
    """One name of /v1/models. `core_name` is what the engine calls it: "" is the base."""

    name: str
    core_name: str
    text: VariantText
    created: int = field(default_factory=lambda: int(time.time()))


def load_at_start(
    core: _C.Engine, base: Path, base_name: str, variants: dict[str, Path]
) -> list[Variant]:
    """Loads the base's text side and every variant of the command line, the base first.

    Raises:
        ValueError: a folder is not valid, or a variant has the base's name.
    """
    name = base_name or core.variants()[0].name
    loaded = [Variant(name, "", VariantText.load(base))]
    for variant, path in variants.items():
        if variant == name:
            raise ValueError(f"variant '{variant}': the base has this name; set --base-name")
        text = VariantText.load(path, loaded[0].text)
        core.add_variant(variant, str(path))
        loaded.append(Variant(variant, variant, text))
    return loaded


def _inside(path: Path, roots: list[Path]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots)


class VariantRegistry:
    """Names to variants; loads and unloads them at run time.

    Args:
        loaded: what load_at_start returned.
        roots: folders that may be loaded from.
        max_variants: how many may be known at once.
    """

    def __init__(self, loaded: list[Variant], roots: list[Path], max_variants: int) -> None:
        self.base = loaded[0]
        self._by_name = {variant.name: variant for variant in loaded}
        self._roots = roots
        self._max_variants = max_variants
        self._loading: set[str] = set()

    def get(self, name: str) -> Variant:
        """Raises ApiError 404 for a name that nobody knows."""
        variant = self._by_name.get(name)
        if variant is None:
            raise model_not_found(name)
        return variant

    def all(self) -> list[Variant]:
        return list(self._by_name.values())

    def info(self, core: _C.Engine) -> list[tuple[Variant, _C.VariantInfo]]:
        """Each variant that requests may name, with what the engine knows of it."""
        infos = core.variants()
        by_core_name = {info.name: info for info in infos[1:]}
        by_core_name[""] = infos[0]
        return [(v, by_core_name[v.core_name]) for v in self.all() if v.core_name in by_core_name]

    async def load(
        self, engine: AsyncEngine, name: str, path: str
    ) -> tuple[Variant, _C.VariantInfo]:
        """Validates and advertises one variant; nothing changes if that fails.

        Raises:
            ApiError: 400 for a bad name, path or file; 403 outside the allowed roots; 409 for a
                name in use; 429 while as many load as may.
        """
        if not VARIANT_NAME.match(name):
            raise invalid(
                f"name: expected 1 to 128 letters, digits, '.', '_' or '-', got {name[:200]!r}",
                "name",
            )
        if engine.core.is_draining(name):
            raise ApiError(409, f"variant '{name}' is still draining", code="variant_draining")
        if name in self._by_name or name in self._loading:
            raise ApiError(409, f"variant '{name}' is already loaded", code="variant_exists")
        if len(self._by_name) + len(self._loading) >= self._max_variants:
            raise invalid(
                f"expected at most {self._max_variants} variants", "name", "too_many_variants"
            )
        if len(self._loading) >= 16:
            raise overloaded("16 variants are being loaded; try again later")
        if "\0" in path:
            raise invalid("path: expected a folder, got a name with NUL", "path")
        self._loading.add(name)
        try:
            folder = await asyncio.to_thread(self._checked_folder, path)
            text = await asyncio.to_thread(VariantText.load, folder, self.base.text)
            info = await engine.add_variant(name, str(folder))
        except (_C.InvalidArgument, ValueError) as error:
            raise invalid(f"variant '{name}': {error}", "path", "invalid_variant") from None
        except _C.ResourceExhausted as error:
            raise ApiError(503, f"variant '{name}': {error}", code="out_of_memory") from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise invalid(f"variant '{name}': {reason}", "path", "invalid_variant") from None
        finally:
            self._loading.discard(name)
        variant = Variant(name, name, text)
        self._by_name[name] = variant
        return variant, info

    def _checked_folder(self, path: str) -> Path:
        """The real folder, inside an allowed root with all its files. Refusals do not tell
        whether something outside exists."""
        outside = ApiError(
            403,
            "path: expected a folder inside an allowed root",
            code="path_not_allowed",
            param="path",
        )
        if not self._roots or not _inside(Path(path), self._roots):
            raise outside
        folder = Path(os.path.realpath(path))
        if not folder.is_dir():
            raise invalid("path: expected a folder with delta.safetensors", "path")
        for name in _READ_FILES:
            if (folder / name).exists() and not _inside(folder / name, self._roots):
                raise outside
        return folder

    async def unload(self, engine: AsyncEngine, name: str, wait_s: float) -> bool:
        """Ends a variant: new requests get 404 at once, running ones finish.

        Returns:
            Whether it is gone; False while it drains longer than `wait_s`.
        """
        variant = self.get(name)
        if variant.core_name == "":
            raise invalid(f"'{name}' is the base, which cannot be unloaded", "name")
        del self._by_name[name]
        try:
            engine.core.remove_variant(variant.core_name)
        except _C.NotFound:
            raise model_not_found(name) from None
        deadline = time.monotonic() + wait_s
        while engine.core.is_draining(variant.core_name):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True
