"""Requests as they come in. Every number is bounded here, before anything else sees it."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deltazip.sampling import SamplingParams
from deltazip.server.errors import from_validation, invalid
from deltazip.server.settings import Settings

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerationRequest",
    "LoadRequest",
    "TokenizeRequest",
    "UnloadRequest",
    "parse",
]

logger = logging.getLogger("deltazip.server")

_MAX_TOKEN_ID = 2**31 - 1
# Fields of the OpenAI API that change nothing here and are accepted in silence.
_HARMLESS = frozenset(
    {"user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier"}
    | {"prompt_cache_key", "verbosity", "reasoning_effort"}
)
# Fields that SamplingParams knows by the same name.
_PASSED_ON = """n temperature top_p top_k min_p repetition_penalty presence_penalty
    frequency_penalty seed min_tokens stop stop_token_ids prompt_logprobs"""
_logged_fields: set[str] = set()

TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
Argument = str | int | float | bool | None


class _Body(BaseModel):
    # Strict: "5" is not a number and true is not 1. NaN and infinities are not JSON.
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False


class GenerationRequest(_Body):
    """What completions and chat completions share."""

    model: ModelName
    n: int | None = Field(None, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_TOKEN_ID)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    max_tokens: int | None = Field(None, ge=0, le=1 << 24)
    min_tokens: int | None = Field(None, ge=0, le=1 << 24)
    prompt_logprobs: int | None = Field(None, ge=0, le=100)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int = Field(0, ge=-1000, le=1000)
    cache_salt: str | None = Field(None, max_length=128)

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        many = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(text, str) and text for text in many):
            raise ValueError("expected a text or a list of texts, none empty")
        return value

    def num_logprobs(self) -> int | None:
        """Alternatives per token; None is no logprobs."""
        raise NotImplementedError

    def check(self, settings: Settings, vocab_size: int) -> None:
        """The limits that are settings.

        Raises:
            ApiError: 400 naming the field.
        """
        self._at_most("n", self.n or 1, settings.max_n)
        self._at_most("prompt_logprobs", self.prompt_logprobs or 0, settings.max_logprobs)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        self._at_most("stop", len(stops), settings.max_stops, "entries")
        longest = max(map(len, stops), default=0)
        self._at_most("stop", longest, settings.max_stop_chars, "characters")
        self._at_most(
            "stop_token_ids", len(self.stop_token_ids or ()), settings.max_stops, "entries"
        )
        for token in self.stop_token_ids or ():
            self._at_most("stop_token_ids", token, vocab_size - 1)
        bias = self.logit_bias or {}
        self._at_most("logit_bias", len(bias), settings.max_logit_bias, "entries")
        for key, value in bias.items():
            if not (key.isascii() and key.isdecimal() and len(key) < 11):
                raise invalid(f"logit_bias: expected token ids, got {key[:40]!r}", "logit_bias")
            self._at_most("logit_bias", int(key), vocab_size - 1)
            if not -100 <= value <= 100:
                raise invalid(f"logit_bias: expected -100 to 100, got {value}", "logit_bias")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options: expected stream=true with it", "stream_options")

    def _at_most(self, field: str, value: int, limit: int, unit: str = "") -> None:
        if value > limit:
            unit = f" {unit}" if unit else ""
            raise invalid(f"{field}: expected at most {limit}{unit}, got {value}{unit}", field)

    def sampling(self) -> SamplingParams:
        """The same as the offline API would be told; max_tokens is decided apart."""
        given = {
            name: value for name in _PASSED_ON.split() if (value := getattr(self, name)) is not None
        }
        return SamplingParams(
            **given,
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs(),
        )


def _refuse(body: _Body, *fields: str) -> None:
    for field in fields:
        if getattr(body, field, None) not in (None, "", [], {}, False):
            raise invalid(f"{field}: not supported", field, "unsupported_parameter")


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=100)
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        kinds = {type(item) for item in value} if isinstance(value, list) else {type(value)}
        is_good = kinds == {str} or (isinstance(value, list) and kinds in ({int}, {list}))
        if not is_good or (isinstance(value, list) and not value):
            raise ValueError(
                "expected a text, a list of texts, a list of token ids or a list of such lists"
            )
        if kinds == {list} and not all(type(i) is int for ids in value for i in ids):
            raise ValueError("expected token ids in every list")
        return value

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def check(self, settings: Settings, vocab_size: int) -> None:
        super().check(settings, vocab_size)
        if self.best_of not in (None, 1):
            raise invalid("best_of: not supported; use n", "best_of", "unsupported_parameter")
        _refuse(self, "suffix")
        self._at_most("logprobs", self.logprobs or 0, settings.max_logprobs)
        prompts = self.prompts()
        self._at_most("prompt", len(prompts), settings.max_prompts, "prompts")
        self._at_most("n", len(prompts) * (self.n or 1), settings.max_choices, "prompts x n")
        for prompt in prompts:
            if not prompt:
                raise invalid("prompt: expected at least one token, got an empty prompt", "prompt")
            if isinstance(prompt, list) and not 0 <= min(prompt) <= max(prompt) < vocab_size:
                raise invalid(
                    f"prompt: expected token ids of 0 to {vocab_size - 1}, "
                    f"got {min(prompt)} to {max(prompt)}",
                    "prompt",
                )
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens: expected at least 1, or echo=true; got 0", "max_tokens")


class ContentPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = Field(None, max_length=256)

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, value: Any) -> Any:
        if isinstance(value, list):
            for part in value:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                if kind != "text":
                    raise ValueError(f"expected parts of type 'text', got {str(kind)[:40]!r}")
        elif not isinstance(value, str):
            raise ValueError(f"expected a text or text parts, got {type(value).__name__}")
        return value

    def plain(self) -> dict[str, Any]:
        """As chat templates expect it: content is one text."""
        text = (
            self.content
            if isinstance(self.content, str)
            else "\n".join(part.text for part in self.content)
        )
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 24)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=100)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Argument] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, settings: Settings, vocab_size: int) -> None:
        super().check(settings, vocab_size)
        _refuse(self, "tools", "functions", "audio")
        for field in ("tool_choice", "function_call"):
            if getattr(self, field) not in (None, "none", "auto"):
                raise invalid(f"{field}: not supported", field, "unsupported_parameter")
        kind = self.response_format
        if kind is not None and not (isinstance(kind, dict) and kind.get("type") == "text"):
            message = "response_format: not supported, other than {'type': 'text'}"
            raise invalid(message, "response_format", "unsupported_parameter")
        if self.modalities not in (None, ["text"]):
            raise invalid("modalities: expected ['text']", "modalities", "unsupported_parameter")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs: expected logprobs=true with it", "top_logprobs")
        self._at_most("top_logprobs", self.top_logprobs or 0, settings.max_logprobs)
        self._at_most("messages", len(self.messages), settings.max_messages, "messages")
        if self.max_tokens == 0:
            raise invalid("max_tokens: expected at least 1, got 0", "max_tokens")
        check_arguments(self.chat_template_kwargs)


def check_arguments(arguments: dict[str, Argument] | None) -> None:
    """Template arguments are few, short and flat."""
    if arguments and (
        len(arguments) > 16
        or any(len(k) > 64 or (isinstance(v, str) and len(v) > 1024) for k, v in arguments.items())
    ):
        raise invalid(
            "chat_template_kwargs: expected at most 16 short entries", "chat_template_kwargs"
        )


class TokenizeRequest(_Body):
    """POST /tokenize: a prompt, or messages."""

    model: ModelName
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(_Body):
    """POST /detokenize"""

    model: ModelName
    tokens: list[TokenId]
    skip_special_tokens: bool = False


class LoadRequest(_Body):
    """POST /v1/load_variant"""

    name: str
    path: str = Field(min_length=1, max_length=4096)


class UnloadRequest(_Body):
    """POST /v1/unload_variant"""

    name: str
    wait_s: float = Field(0, ge=0, le=600)


Body = TypeVar("Body", bound=_Body)


def parse(model: type[Body], body: bytes, is_strict: bool) -> Body:
    """One request body, checked.

    Args:
        model: what is expected.
        body: the bytes of a JSON object.
        is_strict: refuse unknown fields; otherwise each is logged once.

    Raises:
        ApiError: 400 naming the field, what was expected and what came.
    """
    try:
        parsed = model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None
    unknown = sorted(set(parsed.model_extra or ()) - _HARMLESS)
    if unknown and is_strict:
        raise invalid(f"{unknown[0][:80]}: unknown field", unknown[0][:80], "unknown_field")
    for field in unknown:
        if field not in _logged_fields and len(_logged_fields) < 256:
            _logged_fields.add(field)
            logger.warning("ignoring the unknown request field %r", field[:80])
    return parsed
