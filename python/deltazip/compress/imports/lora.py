"""A PEFT LoRA adapter, read as the checkpoint that it makes of its base."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from deltazip.compress import llama
from deltazip.compress.checkpoint import WEIGHT_DTYPES, CheckpointError, TensorInfo, read_header
from deltazip.compress.imports.derived import DerivedCheckpoint, read_tensor


class LoraCheckpoint(DerivedCheckpoint):
    """A PEFT LoRA adapter over its base: adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: a file is missing, the adapter is of another kind or for another base, or
            it holds something that a delta cannot.
    """

    def __init__(self, base: Path, adapter: Path) -> None:
        config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
        for path in (config, weights):
            if not path.is_file():
                raise CheckpointError(f"{adapter}: no {path.name}, is this a PEFT adapter?")
        super().__init__(base, adapter, [config, weights])
        try:
            self.adapter: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{config}: not JSON: {error}") from error
        self._check_config(config)
        self.factors: dict[str, dict[str, TensorInfo]] = {}
        self.whole: dict[str, TensorInfo] = {}
        for name, info in read_header(weights)[0].items():
            self._claim(name, info)
        for name, pair in self.factors.items():
            self._check_pair(name, pair)
        if not self.factors and not self.whole:
            raise CheckpointError(f"{weights}: no LoRA weights in it")

    def _check_config(self, path: Path) -> None:
        kind = str(self.adapter.get("peft_type", "")).upper()
        if kind != "LORA":
            raise CheckpointError(f"{path}: peft_type is {kind or 'missing'}, expected LORA")
        for key in ("use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "use_qalora"):
            if self.adapter.get(key):
                raise CheckpointError(f"{path}: {key} is set, which is not supported")
        for key in ("r", "lora_alpha"):
            if not isinstance(self.adapter.get(key), (int, float)):
                raise CheckpointError(f"{path}: '{key}' must be a number")

    def _claim(self, name: str, info: TensorInfo) -> None:
        at = f"{info.file}: tensor '{name}'"
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{at} is {info.dtype}, expected one of {', '.join(WEIGHT_DTYPES)}"
            )
        plain = name.removeprefix("base_model.model.")
        found = re.fullmatch(
            r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.default)?(?:\.weight)?",
            plain,
        )
        if found:
            target = f"{found[1]}.weight"
            self._check_target(at, target)
            self.factors.setdefault(target, {})[found[2]] = info
            return
        plain = plain.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
        self._check_target(at, plain)
        if info.shape != self.tensors[plain].shape:
            raise CheckpointError(
                f"{at} is {list(info.shape)}, the base's '{plain}' is "
                f"{list(self.tensors[plain].shape)}"
                + (": an engine serves one vocabulary" if info.shape[1:] else "")
            )
        self.whole[plain] = info

    def _check_target(self, at: str, target: str) -> None:
        if target == llama.HEAD and self.is_tied:
            raise CheckpointError(f"{at} is for lm_head, which this base ties to its embedding")
        if target not in self.tensors:
            raise CheckpointError(f"{at} is for '{target}', which the base does not have")

    def _check_pair(self, name: str, pair: dict[str, TensorInfo]) -> None:
        rows, columns = self.tensors[name].shape
        rank = self._setting(name, "rank_pattern", "r")
        first, second = (rank, columns), (rows, rank)
        names = ("lora_A", "lora_B")
        if set(pair) == {"lora_embedding_A", "lora_embedding_B"}:
            names, first, second = ("lora_embedding_A", "lora_embedding_B"), (rank, rows), (
                columns, rank,
            )  # fmt: skip
        elif set(pair) != {"lora_A", "lora_B"}:
            raise CheckpointError(
                f"{next(iter(pair.values())).file}: '{name}' has {', '.join(sorted(pair))}, "
                "expected lora_A and lora_B"
            )
        for which, want in zip(names, (first, second), strict=True):
            if pair[which].shape != want:
                raise CheckpointError(
                    f"{pair[which].file}: tensor '{pair[which].name}' is "
                    f"{list(pair[which].shape)}, expected {list(want)}"
                )

    def _setting(self, name: str, pattern: str, key: str) -> float:
        """A number of the adapter for one module: the pattern that its name ends with, or `key`."""
        module = name.removesuffix(".weight")
        for suffix, value in (self.adapter.get(pattern) or {}).items():
            if re.fullmatch(rf"(.*\.)?({suffix})", module):
                return float(value) if key != "r" else int(value)
        value = self.adapter[key]
        return float(value) if key != "r" else int(value)

    def scaling(self, name: str) -> float:
        rank = self._setting(name, "rank_pattern", "r")
        alpha = self._setting(name, "alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self.adapter.get("use_rslora") else rank)

    def read(self, name: str) -> torch.Tensor:
        if name in self.whole:
            return read_tensor(self.whole[name])
        before = super().read(name)
        if name not in self.factors:
            return before
        pair = {which: read_tensor(info).float() for which, info in self.factors[name].items()}
        if "lora_A" in pair:
            product = pair["lora_B"] @ pair["lora_A"]
        else:
            product = (pair["lora_embedding_B"] @ pair["lora_embedding_A"]).mT
        return before.float() + self.scaling(name) * product
