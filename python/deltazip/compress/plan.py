"""What becomes what: settings, the checks of a base and its fine-tune, and sizes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from deltazip.compress import llama, pack
from deltazip.compress.checkpoint import WEIGHT_DTYPES, Checkpoint, CheckpointError
from deltazip.compress.llama import LlamaShape
from deltazip.compress.pack import DeltaType

FORMATS = {
    "int4": DeltaType.SPARSE24_INT4,
    "int2": DeltaType.SPARSE24_INT2,
    "ternary": DeltaType.SPARSE24_TERNARY,
    "sign": DeltaType.SPARSE14_SIGN,
    "dense4": DeltaType.DENSE_INT4,
    "dense8": DeltaType.DENSE_INT8,
}
EMBEDDING_FORMATS = {
    "int4": DeltaType.DENSE_INT4,
    "int8": DeltaType.DENSE_INT8,
    "exact": DeltaType.REPLACED,
}
# Of linears. Where codes take less than a bit a weight, scales are not to take a third as much.
GROUP_SIZES = {"sign": 256}
_GROUP_SIZE = 64
# A format that may share a budget of bits with a finer one, and the budget where none is given.
FINER = {"sign": "ternary"}
BITS = {"sign": 1.0}
# Which linears get the finer one first: those that lose most of their output, relative to its size.
_FINER_FIRST = (
    llama.MLP_OUTPUT, llama.ATTENTION_OUTPUT, "self_attn.v_proj", "self_attn.k_proj",
    "self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj",
)  # fmt: skip
# Two bits leave the embedding, which is not sparse, most of the file: longer groups save there.
EMBEDDING_GROUP_SIZES = {"int2": 192}
_EMBEDDING_GROUP_SIZE = 64
# What packing makes of rows that hardly moved; docs/compression.md has what each step costs.
EMBEDDING_STEPS = {"int2": 0.5, "ternary": 0.5, "sign": 0.5}
_EMBEDDING_STEP = 0.25
# Roughly what a stored tensor and a manifest row take in the header.
_HEADER_BYTES_PER_TENSOR = 120

_VOCABULARY_HINT = (
    ": an engine serves one vocabulary. Give the base as many rows (resize_token_embeddings) and "
    "make all its deltas from that"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The user's choices; see docs/compression.md for what each costs and buys.

    Attributes:
        format: of the linear layers: int4, int2 or ternary, 2:4 sparse; sign, 1:4 sparse; dense4 or
            dense8.
        group_size: input features that share a scale, a multiple of 32; 0 takes what suits the
            format.
        bits: with sign, bits of a linear layer's weight on average, scales counted: they pay for
            ternary in as many matrices as they can. 0 takes 1, or what sign takes if that is more.
        embedding_format: int4, int8 or exact: of embeddings and an untied lm_head, dense.
        embedding_group_size: as group_size, for those.
        embedding_step: no group of an embedding is rounded finer than this share of how far its
            elements moved (root mean square): little is spent on rows that hardly moved. 0: each as
            finely as it allows; -1 takes what suits the format.
        num_samples: calibration sequences at most.
        num_tokens: calibration tokens, roughly, at most.
        max_length: tokens of a calibration sequence at most.
        damping: share of the Hessian's mean diagonal that is added to it.
        correction: share of the error of what came before that a linear is asked to make up for.
        lengthening: share of what a compressed linear would lack in length that is added to it
            beforehand.
        batch_tokens: calibration tokens in memory at once.
    """

    format: str = "int4"
    group_size: int = 0
    bits: float = 0.0
    embedding_format: str = "int4"
    embedding_group_size: int = 0
    embedding_step: float = -1.0
    num_samples: int = 1024
    num_tokens: int = 40960
    max_length: int = 1024
    damping: float = 0.01
    correction: float = 1.0
    lengthening: float = 1.0
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got '{self.format}'")
        if self.embedding_format not in EMBEDDING_FORMATS:
            raise ValueError(
                f"embedding format must be one of {', '.join(EMBEDDING_FORMATS)}, got "
                f"'{self.embedding_format}'"
            )
        if self.bits != 0.0 and self.format not in FINER:
            raise ValueError(f"bits are for format {', '.join(FINER)}, got '{self.format}'")
        if not 0.0 <= self.bits <= 16.0:
            raise ValueError(f"bits must be from 0 to 16, got {self.bits}")
        if self.group_size == 0:
            size = GROUP_SIZES.get(self.format, _GROUP_SIZE)
            object.__setattr__(self, "group_size", size)
        if self.embedding_group_size == 0:
            size = EMBEDDING_GROUP_SIZES.get(self.format, _EMBEDDING_GROUP_SIZE)
            object.__setattr__(self, "embedding_group_size", size)
        pack.check_group_size(self.group_size)
        pack.check_group_size(self.embedding_group_size)
        for name in ("num_samples", "num_tokens", "max_length", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embedding_step == -1.0:
            step = EMBEDDING_STEPS.get(self.format, _EMBEDDING_STEP)
            if self.embedding_format != "int4":
                step = 0.0  # eight bits are asked for to be exact
            object.__setattr__(self, "embedding_step", step)
        if not 0.0 <= self.embedding_step <= 100.0:
            raise ValueError(f"embedding step must be from 0 to 100, got {self.embedding_step}")
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}")
        if not 0.0 <= self.correction <= 1.0:
            raise ValueError(f"correction must be in [0, 1], got {self.correction}")
        if not 0.0 <= self.lengthening <= 2.0:
            raise ValueError(f"lengthening must be in [0, 2], got {self.lengthening}")

    def digest(self, *more: str) -> str:
        """Identity of a run: two runs with equal digests give the same artifact."""
        text = json.dumps([dataclasses.asdict(self), *more], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the base and what it would become if it moved."""

    name: str
    shape: tuple[int, ...]
    type: DeltaType
    group_size: int
    num_bytes: int


def linear_types(shape: LlamaShape, settings: Settings) -> dict[str, DeltaType]:
    """What every linear layer's weight becomes, by name.

    Raises:
        ValueError: the settings' bits do not pay for the coarser format.
    """
    tensors = shape.tensors()
    names = [
        f"{llama.layer_prefix(layer)}{linear}.weight"
        for linear in _FINER_FIRST
        for layer in reversed(range(shape.num_layers))
    ]
    sizes = {name: (tensors[name][0], tensors[name][1]) for name in names}
    coarse = FORMATS[settings.format]
    types = dict.fromkeys(sizes, coarse)
    if settings.format not in FINER:
        return types
    fine, group_size = FORMATS[FINER[settings.format]], settings.group_size
    weights = sum(rows * columns for rows, columns in sizes.values())
    taken = 8 * sum(pack.stored_bytes(coarse, size, group_size) for size in sizes.values())
    if settings.bits and taken > settings.bits * weights:
        raise ValueError(
            f"{settings.bits} bits a weight are too few: {settings.format} with groups of "
            f"{group_size} takes {taken / weights:.4f}"
        )
    for name, size in sizes.items():
        more = pack.stored_bytes(fine, size, group_size) - pack.stored_bytes(
            coarse, size, group_size
        )
        if taken + 8 * more <= (settings.bits or BITS[settings.format]) * weights:
            types[name] = fine
            taken += 8 * more
    return types


def plan_tensors(base: Checkpoint, shape: LlamaShape, settings: Settings) -> list[PlannedTensor]:
    """Every tensor of the base in order of name, sized as if all of them had moved."""
    linears = linear_types(shape, settings)
    planned = []
    for name, info in sorted(base.tensors.items()):
        if shape.is_tied and name == llama.HEAD:
            continue
        type_, group_size = DeltaType.REPLACED, 0
        if name in linears:
            type_, group_size = linears[name], settings.group_size
        elif name in (llama.EMBEDDING, llama.HEAD):
            type_ = EMBEDDING_FORMATS[settings.embedding_format]
            group_size = settings.embedding_group_size if type_.is_matrix else 0
        num_bytes = info.num_bytes
        if type_.is_matrix:
            num_bytes = pack.stored_bytes(type_, (info.shape[0], info.shape[1]), group_size)
        planned.append(PlannedTensor(name, info.shape, type_, group_size, num_bytes))
    return planned


def estimate_file_bytes(planned: list[PlannedTensor]) -> int:
    """Size of the artifact if every tensor moved, header included (roughly)."""
    num_stored = sum(3 if p.type.is_sparse else 2 for p in planned)
    return sum(p.num_bytes for p in planned) + _HEADER_BYTES_PER_TENSOR * (
        num_stored + len(planned)
    )


def check_pair(base: Checkpoint, finetuned: Checkpoint) -> LlamaShape:
    """Checks that `finetuned` is a full fine-tune of a model like `base`.

    Raises:
        CheckpointError: naming the first thing that differs, what was expected and what came.
    """
    shape = LlamaShape(base)
    if finetuned.architecture != base.architecture:
        raise CheckpointError(
            f"{finetuned.folder}: architecture {finetuned.architecture}, the base has "
            f"{base.architecture}"
        )
    tuned_shape = LlamaShape(finetuned)
    for key, want in _config_facts(shape).items():
        got = _config_facts(tuned_shape)[key]
        if got != want:
            raise CheckpointError(
                f"{finetuned.folder}: config.json: {key} is {got}, the base has {want}"
                + (_VOCABULARY_HINT if key == "vocab_size" else "")
            )
    for name, wanted in shape.tensors().items():
        for checkpoint, who in ((base, "base"), (finetuned, "fine-tune")):
            info = checkpoint.tensors.get(name)
            if info is None:
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor '{name}' of the {who} is missing"
                )
            if info.shape != wanted:
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor '{name}' is {list(info.shape)}, config.json "
                    f"calls for {list(wanted)}"
                )
            if info.dtype not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor '{name}' is {info.dtype}, expected one of "
                    f"{', '.join(WEIGHT_DTYPES)} (is the checkpoint quantised?)"
                )
    known = set(base.tensors) | {llama.HEAD}
    extra = sorted(set(finetuned.tensors) - known)
    if extra:
        raise CheckpointError(
            f"{finetuned.folder}: tensor '{extra[0]}' is not in the base ({len(extra)} such)"
        )
    for name in sorted(set(base.tensors) - set(shape.tensors())):
        if name != llama.HEAD and name not in finetuned.tensors:
            raise CheckpointError(f"{finetuned.folder}: tensor '{name}' of the base is missing")
    return shape


def _config_facts(shape: LlamaShape) -> dict[str, Any]:
    """What must be equal: the delta file carries weights, not settings of the arithmetic."""
    config = shape.config
    facts = {
        key: getattr(config, key)
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "attention_bias",
            "mlp_bias", "rope_parameters",
        )
    }  # fmt: skip
    return facts | {"head_dim": shape.head_dim, "rms_norm_eps": float(config.rms_norm_eps)}
