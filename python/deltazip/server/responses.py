"""The JSON of answers. Stream chunks are put together from ready-made bytes: one per token."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from deltazip import _C
from deltazip.server.generation import Answer, Piece, Usage
from deltazip.tokenizer import Tokenizer

__all__ = ["ChatFormat", "CompletionFormat", "Format", "sse_error"]

# ASCII only: clients that cut a stream into lines may also cut at U+0085 and U+2028.
_dumps = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode
# JSON has no infinity; this is what OpenAI sends for a token that cannot be.
_LOWEST_LOGPROB = -9999.0


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST_LOGPROB


class Format(Protocol):
    """How one endpoint writes its answers."""

    def start(self, index: int) -> bytes: ...
    def piece(self, piece: Piece) -> bytes: ...
    def usage(self, usage: Usage) -> bytes: ...
    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]: ...


class _Format:
    """The frame around the choices.

    Args:
        kind: the 'object' of whole answers. chunk_kind: that of stream chunks.
        include_usage: a last chunk with usage, and 'usage': null in the others.
    """

    def __init__(
        self,
        prefix: str,
        kind: str,
        chunk_kind: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        include_usage: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        chunk_head = _dumps({**self._head, "object": chunk_kind})[:-1]
        self._before = f'data: {chunk_head},"choices":['.encode()
        self._after = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def _chunk(self, choice: str) -> bytes:
        return b"%b%b%b" % (self._before, choice.encode(), self._after)

    def usage(self, usage: Usage) -> bytes:
        return self._before + f'],"usage":{_dumps(usage.as_json())}}}\n\n'.encode()

    def prompt_logprobs(
        self, entries: Sequence[_C.TokenLogprobs | None]
    ) -> list[dict[str, Any] | None]:
        """Per prompt token: id -> logprob, rank and text, for it and its alternatives."""
        result: list[dict[str, Any] | None] = []
        for entry in entries:
            if entry is None:
                result.append(None)
                continue
            ranked = {token: (logprob, rank + 1) for rank, (token, logprob) in enumerate(entry.top)}
            ranked[entry.token] = (entry.logprob, entry.rank)
            result.append(
                {
                    str(token): {
                        "logprob": _finite(logprob),
                        "rank": rank,
                        "decoded_token": self._tokenizer.token_text(token),
                    }
                    for token, (logprob, rank) in ranked.items()
                }
            )
        return result


class ChatFormat(_Format):
    """chat.completion and chat.completion.chunk"""

    def __init__(self, model: str, tokenizer: Tokenizer, *, include_usage: bool = False) -> None:
        super().__init__(
            "chatcmpl",
            "chat.completion",
            "chat.completion.chunk",
            model,
            tokenizer,
            include_usage=include_usage,
        )

    def start(self, index: int) -> bytes:
        return self._chunk(
            f'{{"index":{index},"delta":{{"role":"assistant","content":""}},'
            f'"logprobs":null,"finish_reason":null}}'
        )

    def piece(self, piece: Piece) -> bytes:
        out = b""
        if piece.text or piece.logprobs:
            logprobs = _dumps(self._logprobs(piece.logprobs)) if piece.logprobs else "null"
            out = self._chunk(
                f'{{"index":{piece.index},"delta":{{"content":{_dumps(piece.text)}}},'
                f'"logprobs":{logprobs},"finish_reason":null}}'
            )
        if piece.finish is not None:
            out += self._chunk(
                f'{{"index":{piece.index},"delta":{{}},"logprobs":null,'
                f'"finish_reason":"{piece.finish}"}}'
            )
        return out

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.logprobs) if answer.logprobs else None,
                "finish_reason": answer.finish,
            }
            for answer in answers
        ]
        result = {**self._head, "choices": choices, "usage": usage.as_json()}
        if answers[0].prompt_logprobs:
            result["prompt_logprobs"] = self.prompt_logprobs(answers[0].prompt_logprobs)
        return result

    def _logprobs(self, entries: Sequence[_C.TokenLogprobs]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._token(entry.token, entry.logprob),
                    "top_logprobs": [self._token(token, value) for token, value in entry.top],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": _finite(logprob),
            "bytes": list(data),
        }


class CompletionFormat(_Format):
    """text_completion, whole and in chunks.

    Args:
        echoes: per choice, the prompt's text and ids when it is to be put before the answer.
        has_logprobs: whether logprobs were asked for.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        include_usage: bool = False,
        echoes: Sequence[tuple[str, list[int]]] = (),
        has_logprobs: bool = False,
    ) -> None:
        super().__init__(
            "cmpl",
            "text_completion",
            "text_completion",
            model,
            tokenizer,
            include_usage=include_usage,
        )
        self._echoes = echoes
        self._has_logprobs = has_logprobs
        self._offsets: dict[int, int] = {}

    def start(self, index: int) -> bytes:
        return b""

    def piece(self, piece: Piece) -> bytes:
        text, logprobs = piece.text, None
        is_first = piece.index not in self._offsets
        if is_first and self._echoes:
            text = self._echoes[piece.index][0] + text
        if self._has_logprobs:
            logprobs = self._logprobs(
                piece.index, piece.tokens, piece.logprobs, piece.prompt_logprobs, is_first
            )
        else:
            self._offsets[piece.index] = 0
        if not text and piece.finish is None and not (logprobs and logprobs["tokens"]):
            return b""
        finish = "null" if piece.finish is None else f'"{piece.finish}"'
        return self._chunk(
            f'{{"index":{piece.index},"text":{_dumps(text)},"logprobs":{_dumps(logprobs)},'
            f'"finish_reason":{finish}}}'
        )

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        choices = []
        for answer in answers:
            echo = self._echoes[answer.index][0] if self._echoes else ""
            choice: dict[str, Any] = {
                "index": answer.index,
                "text": echo + answer.text,
                "logprobs": None,
                "finish_reason": answer.finish,
            }
            if self._has_logprobs:
                choice["logprobs"] = self._logprobs(
                    answer.index, answer.tokens, answer.logprobs, answer.prompt_logprobs, True
                )
            if answer.prompt_logprobs:
                choice["prompt_logprobs"] = self.prompt_logprobs(answer.prompt_logprobs)
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": usage.as_json()}

    def _logprobs(
        self,
        index: int,
        tokens: Sequence[int],
        entries: Sequence[_C.TokenLogprobs],
        prompt_entries: Sequence[_C.TokenLogprobs | None],
        is_first: bool,
    ) -> dict[str, Any]:
        rows: list[tuple[int, _C.TokenLogprobs | None]] = []
        if is_first and self._echoes:
            prompt = self._echoes[index][1]
            known = [*prompt_entries, *[None] * (len(prompt) - len(prompt_entries))]
            rows += zip(prompt, known, strict=False)
        rows += zip(tokens, entries, strict=False)
        offset = self._offsets.get(index, 0)
        result: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, entry in rows:
            text = self._tokenizer.token_text(token)
            result["tokens"].append(text)
            result["text_offset"].append(offset)
            result["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
            result["top_logprobs"].append(None if entry is None else self._top(entry))
            offset += len(text)
        self._offsets[index] = offset
        return result

    def _top(self, entry: _C.TokenLogprobs) -> dict[str, float]:
        # Two tokens may look alike as text; the likelier one stays.
        top: dict[str, float] = {}
        for token, logprob in [*entry.top, (entry.token, entry.logprob)]:
            top.setdefault(self._tokenizer.token_text(token), _finite(logprob))
        return top


def sse_error(body: bytes) -> bytes:
    """An error in the middle of a stream; the stream ends after it."""
    return b"data: " + body + b"\n\n"
