"""The OpenAI endpoints, and tokenise and detokenise."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from deltazip import _C
from deltazip.chat_template import ChatTemplateError
from deltazip.sampling import SamplingParams
from deltazip.server.errors import ApiError, invalid
from deltazip.server.generation import Generation
from deltazip.server.guard import read_body
from deltazip.server.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    Message,
    TokenizeRequest,
    parse,
)
from deltazip.server.responses import ChatFormat, CompletionFormat, Format
from deltazip.server.streaming import EventStream, answer_whole
from deltazip.server.variants import Variant
from deltazip.text import VariantText

if TYPE_CHECKING:
    from deltazip.server.app import ServerState

__all__ = ["add_routes", "read"]

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions
_Arguments = dict[str, str | int | float | bool | None]


async def read(request: Request, model: type[Body], state: ServerState) -> Body:
    """The request's body, bounded and checked."""
    body = await read_body(request, state.settings)
    if len(body) > 65536:  # parsing a large body would hold up everybody's tokens
        return await state.off_loop(parse, model, body, state.settings.strict)
    return parse(model, body, state.settings.strict)


def _schema(model: type[Body]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def _encode_chat(
    text: VariantText,
    messages: list[Message],
    add_generation_prompt: bool,
    arguments: _Arguments | None,
) -> list[int]:
    try:
        return text.encode_chat(
            [message.plain() for message in messages],
            add_generation_prompt=add_generation_prompt,
            arguments=arguments,
        )
    except ChatTemplateError as error:
        raise invalid(str(error), "messages", "chat_template_error") from None


def _encode_texts(text: VariantText, prompts: list[str]) -> list[list[int]]:
    return [text.tokenizer.encode(prompt) for prompt in prompts]


class _Endpoints:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    def _room(self, prompt: list[int], wanted: int | None, default: int | None) -> int:
        """How many tokens may follow a prompt.

        Raises:
            ApiError: 400, the prompt and what is wanted do not fit the context.
        """
        context = self._state.max_model_len
        left = context - len(prompt)
        cap = self._state.settings.max_output_tokens or context
        if not prompt:
            raise invalid("prompt: expected at least one token, got none", "prompt")
        if wanted is not None and wanted > cap:
            raise invalid(f"max_tokens: expected at most {cap}, got {wanted}", "max_tokens")
        if left < max(wanted or 1, 1):
            extra = f" and {wanted} tokens of output" if wanted else ""
            raise invalid(
                f"this model's context is {context} tokens; the prompt has {len(prompt)}{extra}",
                "messages" if default is None else "prompt",
                "context_length_exceeded",
            )
        if wanted is not None:
            return wanted
        return min(left, cap if default is None else default)

    def _salt(self, request: Request, body: GenerationRequest) -> str:
        key_id = request.scope["deltazip.caller"].key_id
        if not self._state.settings.salt_per_key or not key_id:
            return body.cache_salt or ""
        return hashlib.sha256(f"{key_id}\0{body.cache_salt or ''}".encode()).hexdigest()

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        variant: Variant,
        prompts: list[tuple[list[int], int]],
        sampling: SamplingParams,
        form: Format,
        continues: bool,
    ) -> Response:
        state = self._state
        generation = Generation(
            state.engine,
            variant,
            prompts,
            sampling,
            state.metrics.times(variant.core_name),
            priority=body.priority,
            cache_salt=self._salt(request, body),
            continues=continues,
            started=request.scope["deltazip.started"],
        )
        timeout_s = state.settings.request_timeout_s
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(generation, form, include_usage, timeout_s)
        return await answer_whole(request, generation, form, timeout_s)

    async def _begin(
        self, request: Request, model: type[Body]
    ) -> tuple[Body, Variant, SamplingParams]:
        body = await read(request, model, self._state)
        assert isinstance(body, GenerationRequest)
        request.scope["deltazip.log"]["variant"] = body.model[:128]
        variant = self._state.registry.get(body.model)
        body.check(self._state.settings, self._state.vocab_size)
        try:
            return body, variant, body.sampling()
        except ValueError as error:
            raise invalid(str(error), str(error).partition(":")[0]) from None

    async def chat(self, request: Request) -> Response:
        body, variant, sampling = await self._begin(request, ChatRequest)
        prompt = await self._state.off_loop(
            _encode_chat,
            variant.text,
            body.messages,
            body.add_generation_prompt,
            body.chat_template_kwargs,
        )
        wanted = body.max_completion_tokens or body.max_tokens
        max_tokens = self._room(prompt, wanted, None)
        _check_min_tokens(sampling, max_tokens)
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        form = ChatFormat(body.model, variant.text.tokenizer, include_usage=include_usage)
        return await self._answer(
            request, body, variant, [(prompt, max_tokens)], sampling, form, continues=False
        )

    async def completions(self, request: Request) -> Response:
        body, variant, sampling = await self._begin(request, CompletionRequest)
        prompts = body.prompts()
        tokenizer = variant.text.tokenizer
        ids: list[list[int]]
        if isinstance(prompts[0], str):
            ids = await self._state.off_loop(_encode_texts, variant.text, prompts)
        else:
            ids = prompts
        rooms = [(one, self._room(one, body.max_tokens, _COMPLETION_MAX_TOKENS)) for one in ids]
        _check_min_tokens(sampling, min(room for _, room in rooms))
        echoes: list[tuple[str, list[int]]] = []
        if body.echo:
            texts = [text if isinstance(text, str) else tokenizer.decode(text) for text in prompts]
            n = sampling.n
            echoes = [pair for pair in zip(texts, ids, strict=True) for _ in range(n)]
            if body.logprobs is not None and sampling.prompt_logprobs is None:
                sampling = replace(sampling, prompt_logprobs=body.logprobs)
        form = CompletionFormat(
            body.model,
            tokenizer,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            echoes=echoes,
            has_logprobs=body.logprobs is not None,
        )
        return await self._answer(request, body, variant, rooms, sampling, form, continues=True)

    async def tokenize(self, request: Request) -> Response:
        body = await read(request, TokenizeRequest, self._state)
        text = self._state.registry.get(body.model).text
        if (body.prompt is None) == (body.messages is None):
            raise invalid("expected one of prompt and messages", "prompt")
        if body.messages is not None:
            ids = await self._state.off_loop(
                _encode_chat, text, body.messages, body.add_generation_prompt, None
            )
        else:
            ids = await self._state.off_loop(
                text.tokenizer.encode,
                body.prompt or "",
                add_special_tokens=body.add_special_tokens,
            )
        result: dict[str, Any] = {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": self._state.max_model_len,
        }
        if body.return_token_strs:
            result["token_strs"] = [text.tokenizer.token_text(token) for token in ids]
        return JSONResponse(result)

    async def detokenize(self, request: Request) -> Response:
        body = await read(request, DetokenizeRequest, self._state)
        tokenizer = self._state.registry.get(body.model).text.tokenizer
        largest = max(body.tokens, default=0)
        if largest >= max(self._state.vocab_size, tokenizer.vocab_size):
            raise invalid(f"tokens: expected ids of the vocabulary, got {largest}", "tokens")
        text = await self._state.off_loop(
            tokenizer.decode, body.tokens, skip_special_tokens=body.skip_special_tokens
        )
        return JSONResponse({"prompt": text})

    async def models(self) -> Response:
        pairs = self._state.registry.info(self._state.core)
        return JSONResponse({"object": "list", "data": [self._model(*pair) for pair in pairs]})

    async def model(self, model_id: str) -> Response:
        variant = self._state.registry.get(model_id)
        for candidate, info in self._state.registry.info(self._state.core):
            if candidate is variant:
                return JSONResponse(self._model(variant, info))
        raise ApiError(404, f"the model {model_id!r} does not exist", code="model_not_found")

    def _model(self, variant: Variant, info: _C.VariantInfo) -> dict[str, Any]:
        is_base = variant.core_name == ""
        return {
            "id": variant.name,
            "object": "model",
            "created": variant.created,
            "owned_by": "deltazip",
            "parent": None if is_base else self._state.registry.base.name,
            "revision": self._state.base_digest if is_base else info.content_digest,
            "max_model_len": self._state.max_model_len,
            "state": info.state,
            "file_bytes": info.file_bytes,
        }


def _check_min_tokens(sampling: SamplingParams, max_tokens: int) -> None:
    if sampling.min_tokens > max_tokens:
        raise invalid(
            f"min_tokens: expected at most max_tokens = {max_tokens}, got {sampling.min_tokens}",
            "min_tokens",
        )


def add_routes(api: FastAPI, state: ServerState) -> None:
    """Adds the endpoints that clients of OpenAI know, and tokenise and detokenise."""
    endpoints = _Endpoints(state)

    def post(path: str, handler: Any, model: type[Body]) -> None:
        api.add_api_route(
            path, handler, methods=["POST"], openapi_extra=_schema(model), response_model=None
        )

    post("/v1/chat/completions", endpoints.chat, ChatRequest)
    post("/v1/completions", endpoints.completions, CompletionRequest)
    for prefix in ("", "/v1"):
        post(f"{prefix}/tokenize", endpoints.tokenize, TokenizeRequest)
        post(f"{prefix}/detokenize", endpoints.detokenize, DetokenizeRequest)
    api.add_api_route("/v1/models", endpoints.models, response_model=None)
    api.add_api_route("/v1/models/{model_id}", endpoints.model, response_model=None)
