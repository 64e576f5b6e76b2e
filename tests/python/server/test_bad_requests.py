"""Bad input: each a clear error in OpenAI's shape, at the door, with nothing else disturbed."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from serving_support.fake_core import FakeEngine
from serving_support.live import Live

COMPLETION = {"model": "tiny", "prompt": "x y z", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}

# field, value, status, what the message must say
BOTH: list[tuple[str, Any, int, str]] = [
    ("model", "nobody", 404, "does not exist"),
    ("model", "../tiny", 404, "does not exist"),
    ("model", "", 400, "at least 1"),
    ("model", 5, 400, "string"),
    ("n", 0, 400, "greater than or equal to 1"),
    ("n", 5, 400, "at most 4, got 5"),
    ("n", 10**9, 400, "128"),
    ("n", 2**70, 400, "n: "),
    ("n", "2", 400, "integer"),
    ("n", True, 400, "integer"),
    ("n", 1.5, 400, "integer"),
    ("temperature", -0.1, 400, "greater than or equal to 0"),
    ("temperature", 2.1, 400, "less than or equal to 2"),
    ("temperature", "hot", 400, "number"),
    ("top_p", 0, 400, "greater than 0"),
    ("top_p", 1.01, 400, "less than or equal to 1"),
    ("top_k", -2, 400, "-1"),
    ("min_p", 1.5, 400, "less than or equal to 1"),
    ("repetition_penalty", 0, 400, "greater than 0"),
    ("presence_penalty", 2.5, 400, "less than or equal to 2"),
    ("frequency_penalty", -2.5, 400, "-2"),
    ("seed", 2**63, 400, "seed"),
    ("max_tokens", -1, 400, "greater than or equal to 0"),
    ("max_tokens", 513, 400, "at most 512, got 513"),
    ("max_tokens", 511, 400, "context is 512 tokens"),
    ("min_tokens", 2, 400, "at most max_tokens = 1, got 2"),
    ("stop", ["a"] * 5, 400, "at most 4 entries, got 5"),
    ("stop", "a" * 33, 400, "at most 32 characters, got 33"),
    ("stop", "", 400, "none empty, got ''"),
    ("stop", ["a", ""], 400, "none empty, got ['a', '']"),
    ("stop", 7, 400, "a text or a list of texts"),
    ("stop_token_ids", [-1], 400, "greater than or equal to 0"),
    ("stop_token_ids", [10**6], 400, "at most"),
    ("stop_token_ids", list(range(5)), 400, "at most 4 entries"),
    ("logit_bias", {str(i): 1.0 for i in range(9)}, 400, "at most 8 entries, got 9"),
    ("logit_bias", {"1": 101}, 400, "-100 to 100, got 101"),
    ("logit_bias", {"-1": 1}, 400, "expected token ids"),
    ("logit_bias", {"x": 1}, 400, "expected token ids"),
    ("logit_bias", {"99999": 1}, 400, "at most"),
    ("logit_bias", {"9" * 40: 1}, 400, "expected token ids"),
    ("prompt_logprobs", 6, 400, "at most 5, got 6"),
    ("prompt_logprobs", -1, 400, "greater than or equal to 0"),
    ("stream", "yes", 400, "boolean"),
    ("stream_options", {"include_usage": True}, 400, "stream=true"),
    ("priority", 1001, 400, "1000"),
    ("priority", -(2**40), 400, "-1000"),
    ("cache_salt", "s" * 129, 400, "128"),
]
COMPLETIONS_ONLY: list[tuple[str, Any, int, str]] = [
    ("prompt", None, 400, "expected a text"),
    ("prompt", [], 400, "expected a text"),
    ("prompt", "", 400, "at least one token"),
    ("prompt", [[]], 400, "at least one token"),
    ("prompt", [1, "a"], 400, "expected a text"),
    ("prompt", [1.5], 400, "list of such lists, got [1.5]"),
    ("prompt", [[1], ["a"]], 400, "token ids"),
    ("prompt", [-1], 400, "ids of 0 to"),
    ("prompt", [10**6], 400, "ids of 0 to"),
    ("prompt", ["a"] * 5, 400, "at most 4 prompts, got 5"),
    ("prompt", [5] * 512, 400, "context is 512 tokens"),
    ("prompt", {"text": "a"}, 400, "expected a text"),
    ("logprobs", 6, 400, "at most 5, got 6"),
    ("best_of", 2, 400, "not supported"),
    ("suffix", "end", 400, "not supported"),
    ("max_tokens", 0, 400, "echo=true"),
]
CHAT_ONLY: list[tuple[str, Any, int, str]] = [
    ("messages", [], 400, "at least 1"),
    ("messages", "hello", 400, "valid array"),
    ("messages", [{"role": "user"}], 400, "content"),
    ("messages", [{"role": "tool", "content": "x"}], 400, "'system', 'developer', 'user'"),
    ("messages", [{"role": "user", "content": None}], 400, "text parts"),
    ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], 400, "image_url"),
    ("messages", [{"role": "user", "content": "x"}] * 17, 400, "at most 16 messages, got 17"),
    ("max_tokens", 0, 400, "at least 1"),
    ("max_completion_tokens", 0, 400, "greater than or equal to 1"),
    ("top_logprobs", 2, 400, "logprobs=true"),
    ("tools", [{"type": "function"}], 400, "tools: not supported"),
    ("functions", [{}], 400, "functions: not supported"),
    ("tool_choice", "required", 400, "tool_choice: not supported"),
    ("response_format", {"type": "json_object"}, 400, "response_format: not supported"),
    ("audio", {"voice": "x"}, 400, "audio: not supported"),
    ("modalities", ["audio"], 400, "modalities"),
    ("chat_template_kwargs", {"environment": 1}, 400, "expected arguments of []"),
    ("chat_template_kwargs", {"messages": "x"}, 400, "expected arguments of []"),
    ("chat_template_kwargs", {"x": "y" * 2000}, 400, "at most 16 short entries"),
]
CASES = [
    *[("/v1/completions", COMPLETION, *case) for case in BOTH + COMPLETIONS_ONLY],
    *[("/v1/chat/completions", CHAT, *case) for case in BOTH + CHAT_ONLY],
]


def check_error(response: Any, status: int, words: str, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"], error
    expected = {400: "invalid_request_error", 404: "invalid_request_error"}
    assert error["type"] == expected.get(status, error["type"])
    if param is not None:
        assert (error["param"] or "").split(".")[0] == param, error


def test_every_bad_field_is_named(live: Live, fake: FakeEngine) -> None:
    for path, good, field, value, status, words in CASES:
        response = live.post(path, {**good, field: value})
        where = None if field in ("max_tokens", "chat_template_kwargs") else field
        try:
            check_error(response, status, words, where)
        except AssertionError as problem:
            raise AssertionError(f"{path} {field}={str(value)[:60]}") from problem
    assert fake.num_submitted == 0
    # and the server is as good as before
    assert live.post("/v1/completions", COMPLETION).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"{'model': 1}", b'{"model":"tiny","prompt":"x"', b"\xff"]
    + [b"[" * 100_000, b'{"a":' * 50_000, b'{"model": NaN}'],
)
def test_malformed_json(live: Live, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        response = live.client.post(path, content=body)
        assert response.status_code == 400, (path, response.text)
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite(live: Live, number: str) -> None:
    body = b'{"model":"tiny","prompt":"x","temperature":%s}' % number.encode()
    assert live.client.post("/v1/completions", content=body).status_code == 400


def test_lone_surrogates_do_no_harm(live: Live) -> None:
    body = b'{"model":"tiny","prompt":"a\\ud800b","max_tokens":4}'
    assert live.client.post("/v1/completions", content=body).status_code in (200, 400)
    assert live.post("/v1/completions", COMPLETION).status_code == 200


def test_missing_fields(live: Live) -> None:
    check_error(live.post("/v1/completions", {"prompt": "x"}), 400, "required", "model")
    check_error(live.post("/v1/completions", {"model": "tiny"}), 400, "required", "prompt")
    check_error(live.post("/v1/chat/completions", {"model": "tiny"}), 400, "required", "messages")
    check_error(live.post("/tokenize", {"model": "tiny"}), 400, "one of prompt and messages")
    check_error(live.post("/detokenize", {"model": "tiny", "tokens": [10**6]}), 400, "vocabulary")
    check_error(live.post("/detokenize", {"model": "no", "tokens": [1]}), 404, "does not exist")


def test_unknown_routes_and_methods(live: Live) -> None:
    check_error(live.client.get("/v2/models"), 404, "Not Found")
    check_error(live.client.get("/v1/models/nobody"), 404, "does not exist")
    check_error(live.client.get("/v1/models/..%2f..%2fetc"), 404, "")
    assert live.client.get("/v1/completions").status_code == 405
    assert live.client.get("/v1/completions").json()["error"]["code"] == "method_not_allowed"
    for path in ("/kill", "/shutdown", "/docs", "/redoc", "/abort"):
        assert live.client.post(path).status_code == 404


def test_fields_that_change_nothing_are_accepted(live: Live) -> None:
    harmless = {"user": "me", "store": False, "metadata": {"a": "b"}, "suffix": "", "best_of": 1}
    assert live.post("/v1/completions", {**COMPLETION, **harmless}).status_code == 200
    plain = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
    }
    assert live.post("/v1/chat/completions", {**CHAT, **plain}).status_code == 200


def test_unknown_fields_are_logged_once(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert live.post("/v1/completions", {**COMPLETION, "frobnicate": 1}).status_code == 200
    assert sum("frobnicate" in record.getMessage() for record in caplog.records) == 1


def test_the_body_is_bounded(live: Live) -> None:
    big = b'{"model":"tiny","prompt":"' + b"x" * 300_000 + b'"}'
    check_error(live.client.post("/v1/completions", content=big), 413, "262144 bytes")

    def in_pieces() -> Any:
        for start in range(0, len(big), 10_000):
            yield big[start : start + 10_000]

    check_error(live.client.post("/v1/completions", content=in_pieces()), 413, "262144 bytes")


def test_the_head_is_bounded(live: Live) -> None:
    response = live.client.get("/v1/models", headers={"x-big": "y" * 10_000})
    assert response.status_code in (400, 431)
    assert live.client.get("/v1/models").status_code == 200


def test_a_head_that_never_ends_is_cut(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        received = b""
        try:
            for _ in range(400):
                connection.sendall(b"x-header: " + b"y" * 1000 + b"\r\n")
            received = connection.recv(1000)
        except OSError:
            return  # reset while we were still sending
        assert b"431" in received or b"400" in received or received == b""
