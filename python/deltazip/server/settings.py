"""Every setting of the server, once: the command line and DELTAZIP_* are made from this model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

import typer
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["VARIANT_NAME", "Settings", "command_for"]

VARIANT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_GIB: Final = 1 << 30


class Settings(BaseModel):
    """What the server is told at its door; nothing else reads the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Path = Field(description="Folder of the base model.")
    base_name: str = Field("", description="Name the base answers to. Default: the folder's name.")
    variant: list[str] = Field([], description="name=DIR, a compressed fine-tune. Repeatable.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 is any free one.")

    api_key: list[str] = Field(
        [], description="Key that clients must send. Repeatable. None: no keys."
    )
    admin_key: str = Field("", description="Key for loading and unloading variants. None: off.")
    allow_load_root: list[Path] = Field(
        [], description="Folder that variants may be loaded from at run time. Repeatable."
    )
    salt_per_key: bool = Field(False, description="Share cached prefixes only under one key.")
    strict: bool = Field(False, description="Refuse unknown fields in requests.")

    device: str = Field("cpu", description="Where to compute.")
    threads: int = Field(0, ge=0, le=4096, description="CPU threads; 0 is all cores.")
    dtype: str = Field("auto", description="Type a GPU computes in; auto is the base's.")
    kv_dtype: str = Field("auto", description="Type of the KV cache.")
    kv_cache_gib: float = Field(0, ge=0, le=1 << 20, description="KV cache; 0 is what is left.")
    memory_gib: float = Field(0, ge=0, le=1 << 20, description="Memory budget; 0 is chosen.")
    delta_gib: float = Field(0, ge=0, le=1 << 20, description="Delta slots; 0 is chosen.")
    host_gib: float = Field(0, ge=0, le=1 << 20, description="Deltas in host memory; 0: chosen.")
    num_delta_slots: int = Field(0, ge=0, le=4096, description="Deltas on the device; 0: auto.")
    block_size: int = Field(16, ge=1, le=1024, description="Positions of one KV block.")
    max_batch_tokens: int = Field(0, ge=0, le=1 << 17, description="Tokens of one step; 0: auto.")
    max_batch_sequences: int = Field(0, ge=0, le=65536, description="Sequences of a step; 0: auto.")
    max_variants_per_batch: int = Field(0, ge=0, le=4096, description="Variants a step; 0: auto.")
    prefill_chunk_tokens: int = Field(
        0, ge=0, le=1 << 17, description="Prompt tokens of a step that also decodes; 0: no limit."
    )
    max_waiting: int = Field(4096, ge=1, le=1 << 20, description="Queue; one more is a 429.")
    max_model_len: int = Field(0, ge=0, le=1 << 24, description="Prompt + output; 0 the model's.")
    max_variant_wait_steps: int = Field(
        64, ge=1, le=1 << 20, description="Steps before a waiting variant goes first."
    )
    prefix_caching: bool = Field(True, description="Reuse the KV of equal prefixes.")
    warm_up: bool = Field(True, description="Let a device measure and record its steps at start.")

    max_body_mib: float = Field(8, gt=0, le=1024, description="Largest request body.")
    max_header_kib: float = Field(32, ge=1, le=1024, description="Largest request head.")
    max_connections: int = Field(2048, ge=1, le=1 << 20, description="Open connections.")
    max_concurrent_requests: int = Field(
        512, ge=1, le=65536, description="Requests being answered; one more is a 429."
    )
    max_variants: int = Field(1024, ge=1, le=65536, description="Variants known at once.")
    max_metric_variants: int = Field(
        128, ge=1, le=4096, description="Variants with series of their own in /metrics."
    )
    max_prompts: int = Field(64, ge=1, le=4096, description="Prompts of one completion request.")
    max_n: int = Field(16, ge=1, le=128, description="Answers to one prompt.")
    max_choices: int = Field(128, ge=1, le=4096, description="Prompts x n of one request.")
    max_output_tokens: int = Field(
        0, ge=0, le=1 << 24, description="Output of one answer; 0 is what the model allows."
    )
    max_logprobs: int = Field(20, ge=0, le=100, description="Alternatives per token.")
    max_stops: int = Field(16, ge=0, le=256, description="Stop texts, and stop token ids.")
    max_stop_chars: int = Field(256, ge=1, le=4096, description="Length of a stop text.")
    max_logit_bias: int = Field(1024, ge=0, le=65536, description="Entries of logit_bias.")
    max_messages: int = Field(2048, ge=1, le=65536, description="Messages of one conversation.")

    request_timeout_s: float = Field(600, gt=0, le=86400, description="Longest answer.")
    head_timeout_s: float = Field(10, gt=0, le=3600, description="Longest wait for a head.")
    body_timeout_s: float = Field(30, gt=0, le=3600, description="Longest wait for a body.")
    stall_timeout_s: float = Field(
        60, gt=0, le=86400, description="/health is 503 after so long with work and no step."
    )
    shutdown_timeout_s: float = Field(
        30, ge=0, le=3600, description="How long running requests may go on after SIGTERM."
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="Logging.")

    @field_validator("variant")
    @classmethod
    def _check_variants(cls, values: list[str]) -> list[str]:
        names = []
        for value in values:
            name, separator, path = value.partition("=")
            if not separator or not path or not VARIANT_NAME.match(name):
                raise ValueError(
                    f"expected name=DIR, name of letters, digits, '.', '_' and '-', got {value!r}"
                )
            names.append(name)
        if len(set(names)) != len(names):
            raise ValueError(f"expected each name once, got {names}")
        return values

    @field_validator("api_key")
    @classmethod
    def _check_keys(cls, values: list[str]) -> list[str]:
        if not all(values):
            raise ValueError("expected keys that are not empty")
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if self.base_name and not VARIANT_NAME.match(self.base_name):
            raise ValueError(f"base_name: expected a name like a variant's, got {self.base_name!r}")
        if self.admin_key and self.admin_key in self.api_key:
            raise ValueError("admin_key: expected another key than the api keys")
        if self.allow_load_root and not self.admin_key:
            raise ValueError("allow_load_root: expected admin_key with it")
        return self

    def variants(self) -> dict[str, Path]:
        """Name -> folder, in the order given."""
        pairs = (value.partition("=") for value in self.variant)
        return {name: Path(path) for name, _, path in pairs}

    def engine_options(self) -> dict[str, object]:
        """The arguments of _C.EngineConfig."""
        return {
            "base": str(self.base),
            "device": self.device,
            "num_threads": self.threads,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "kv_cache_bytes": int(self.kv_cache_gib * _GIB),
            "memory_budget_bytes": int(self.memory_gib * _GIB),
            "delta_budget_bytes": int(self.delta_gib * _GIB),
            "host_budget_bytes": int(self.host_gib * _GIB),
            "num_delta_slots": self.num_delta_slots,
            "block_size": self.block_size,
            "max_batch_tokens": self.max_batch_tokens,
            "max_batch_sequences": self.max_batch_sequences,
            "max_variants_per_batch": self.max_variants_per_batch,
            "prefill_chunk_tokens": self.prefill_chunk_tokens,
            "max_waiting": self.max_waiting,
            "max_model_len": self.max_model_len,
            "max_variant_wait_steps": self.max_variant_wait_steps,
            "prefix_caching": self.prefix_caching,
            "warm_up": self.warm_up,
        }


def command_for(run: Callable[[Settings], None]) -> Callable[..., None]:
    """A typer command with one option per setting, each also read from DELTAZIP_<NAME>."""
    hints = get_type_hints(Settings)
    parameters = []
    for name, setting in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if hints[name] is bool else flag,
            help=setting.description,
            envvar=f"DELTAZIP_{name.upper()}",
        )
        default = ... if setting.is_required() else setting.get_default(call_default_factory=True)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is ... else default,
                annotation=Annotated[hints[name], option],
            )
        )

    def command(**values: Any) -> None:
        """Serves a base model and its compressed fine-tunes over an OpenAI-compatible API."""
        try:
            settings = Settings(**values)
        except ValueError as error:
            raise typer.BadParameter(_first_problem(error)) from None
        run(settings)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _first_problem(error: ValueError) -> str:
    problems: list[Any] = getattr(error, "errors", list)()
    if not problems:
        return str(error)
    where = ".".join(str(part) for part in problems[0]["loc"])
    message = str(problems[0]["msg"]).removeprefix("Value error, ")
    return f"--{where.replace('_', '-')}: {message}" if where else message
