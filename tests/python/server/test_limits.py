"""Keys, floods, disconnects, draining, health: what keeps a server alive."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from deltazip.server.auth import ADMIN_PATHS, OPEN_PATHS, Auth
from deltazip.server.errors import ApiError
from fastapi.routing import APIRoute
from serving_support.fake_core import FakeEngine
from serving_support.live import Live, run_server, wait_until

LONG = {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_route_needs_a_key(fake: FakeEngine, tiny_base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "api_key": ["key-one", "key-two"],
        "admin_key": "key-admin",
        "allow_load_root": [tmp_path],
    }
    with run_server(fake, tiny_base, base_name="tiny", **options) as live:
        walked = set()
        for route in live.app.api.routes:
            path = getattr(route, "path", "").replace("{model_id}", "tiny")
            walked.add(path)
            for method in getattr(route, "methods", None) or {"GET"}:
                for headers in ({}, bearer("key-on"), {"Authorization": "key-one"}):
                    status = live.client.request(method, path, headers=headers).status_code
                    assert (status == 401) == (path not in OPEN_PATHS), (method, path, status)
                ordinary = live.client.request(method, path, headers=bearer("key-two"))
                assert (ordinary.status_code == 403) == (path in ADMIN_PATHS), (method, path)
                admin = live.client.request(method, path, headers=bearer("key-admin"))
                assert admin.status_code not in (401, 403), (method, path)
        assert {"/v1/chat/completions", "/metrics", "/openapi.json", "/tokenize"} <= walked
        for unknown in ("/nothing", "/v1/load_variant/", "/V1/models", "//v1/models", "/health/"):
            assert live.client.get(unknown).status_code == 401, unknown
        assert live.client.get("/v1/models").headers["www-authenticate"] == "Bearer"


def test_without_keys_only_the_admin_routes_are_closed(live: Live) -> None:
    assert live.client.get("/v1/models").status_code == 200
    for path in sorted(ADMIN_PATHS):
        response = live.post(path, {"name": "a", "path": "/tmp"})
        assert response.status_code == 403
        assert "off" in response.json()["error"]["message"]


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr("deltazip.server.auth.hmac.compare_digest", compare)
    auth = Auth(["aaaa", "bbbb"], "cccc")
    assert auth.check("/v1/models", b"Bearer aaaa").key_id
    # All keys, always, and digests rather than keys: neither order nor length shows.
    assert len(compared) == 3
    assert {len(right) for _, right in compared} == {32}
    with pytest.raises(ApiError):
        auth.check("/v1/models", b"Bearer zzzz")
    assert len(compared) == 6


def test_salt_per_key(fake: FakeEngine, tiny_base: Path) -> None:
    with run_server(
        fake, tiny_base, base_name="tiny", api_key=["one", "two"], salt_per_key=True
    ) as live:
        for key in ("one", "two", "one"):
            body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
            assert live.post("/v1/completions", body, headers=bearer(key)).status_code == 200
    salts = [entry["cache_salt"] for entry in fake.submitted]
    assert salts[0] == salts[2] != salts[1]
    assert "one" not in str(salts[0])


def test_too_many_requests_are_refused(fake: FakeEngine, tiny_base: Path) -> None:
    fake.step_s = 0.01
    with run_server(fake, tiny_base, base_name="tiny", max_concurrent_requests=2) as live:
        results: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: results.append(live.post("/v1/completions", LONG).status_code)
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: fake.num_running == 2)
        refused = live.post("/v1/completions", LONG)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        # Health and metrics must work just then.
        assert live.client.get("/health").status_code == 200
        assert live.client.head("/health").status_code == 200
        assert live.client.get("/metrics").status_code == 200
        for thread in threads:
            thread.join()
        assert results == [200, 200]


def test_a_full_queue_is_a_429(fake: FakeEngine, live: Live) -> None:
    fake.max_waiting = 0
    response = live.post("/v1/completions", LONG)
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "queue_full"
    assert response.headers["retry-after"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels(live: Live, fake: FakeEngine, stream: bool) -> None:
    fake.step_s = 0.005
    body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        assert wait_until(lambda: fake.num_running == 2)
        if stream:
            assert connection.recv(100)
    assert wait_until(lambda: fake.num_running == 0, 5)
    assert fake.num_cancelled == 2
    assert wait_until(lambda: live.app.state.engine.num_live == 0)
    assert wait_until(lambda: live.app.state.gate.num_active == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_a_time_limit(fake: FakeEngine, tiny_base: Path, stream: bool) -> None:
    fake.step_s = 0.01
    with run_server(fake, tiny_base, base_name="tiny", request_timeout_s=0.2) as live:
        response = live.post("/v1/completions", {**LONG, "stream": stream})
        assert "no answer within 0.2 seconds" in response.text
        assert response.status_code == (200 if stream else 503)
        assert wait_until(lambda: fake.num_running == 0)


def test_a_client_that_does_not_read_holds_nothing(fake: FakeEngine, tiny_base: Path) -> None:
    fake.tokens_per_step = 50
    body = json.dumps({**LONG, "n": 16, "logprobs": 5, "stream": True}).encode()
    with run_server(fake, tiny_base, base_name="tiny", request_timeout_s=0.5) as live:
        host, port = live.url.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
                % (len(body), body)
            )
            assert wait_until(lambda: fake.num_submitted == 1)
            assert wait_until(lambda: fake.num_running == 0)
            assert live.client.get("/health").status_code == 200
            assert wait_until(lambda: live.app.state.gate.num_active == 0, 10)


def test_idle_connections_are_closed(fake: FakeEngine, tiny_base: Path) -> None:
    with run_server(fake, tiny_base, head_timeout_s=0.2, body_timeout_s=0.2) as live:
        host, port = live.url.removeprefix("http://").split(":")
        for opening in (b"", b"GET / HTTP/1.1\r\nhost:"):
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(opening)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(
                b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
            )
            assert b"408" in connection.recv(100)


def test_connections_are_bounded(fake: FakeEngine, tiny_base: Path) -> None:
    with run_server(fake, tiny_base, max_connections=3) as live:
        host, port = live.url.removeprefix("http://").split(":")
        held = [socket.create_connection((host, int(port)), timeout=5) for _ in range(3)]
        time.sleep(0.1)
        held.append(socket.create_connection((host, int(port)), timeout=5))
        with contextlib.suppress(ConnectionResetError):
            assert held[-1].recv(10) == b""
        for connection in held:
            connection.close()
        assert wait_until(lambda: len(live.server.server_state.connections) == 0)
        assert live.client.get("/health").status_code == 200


def test_health_sees_a_dead_and_a_stuck_engine(fake: FakeEngine, tiny_base: Path) -> None:
    with run_server(fake, tiny_base, base_name="tiny", stall_timeout_s=1) as live:
        assert live.client.get("/health").json() == {"status": "ok"}
        fake.is_stuck = True
        with live.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}):
            assert wait_until(lambda: fake.num_running == 1)
            health = live.client.get("/health")
            assert health.status_code == 503
            assert "no step for" in health.json()["reason"]
            assert live.client.get("/health/live").status_code == 200
        fake.is_stuck = False
        assert wait_until(lambda: live.client.get("/health").status_code == 200)

        waiting: list[httpx.Response] = []
        fake.step_s = 0.02
        thread = threading.Thread(target=lambda: waiting.append(live.post("/v1/completions", LONG)))
        thread.start()
        assert wait_until(lambda: fake.num_running == 1)
        fake.die("a step threw")
        thread.join(10)
        assert waiting[0].status_code == 503
        assert waiting[0].json()["error"]["code"] == "engine_dead"
        assert "a step threw" in live.client.get("/health").json()["reason"]
        assert live.post("/v1/completions", LONG).status_code == 503
        assert live.client.get("/health/live").status_code == 200


def test_draining_refuses_and_lets_finish(fake: FakeEngine, tiny_base: Path) -> None:
    fake.step_s = 0.002
    with run_server(fake, tiny_base, base_name="tiny") as live:
        done: list[int] = []
        thread = threading.Thread(
            target=lambda: done.append(live.post("/v1/completions", LONG).status_code)
        )
        thread.start()
        assert wait_until(lambda: fake.num_running == 1)
        live.server.handle_exit(15, None)
        refused = live.post("/v1/completions", LONG)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert live.client.get("/health").status_code == 503
        thread.join(20)
        assert done == [200]
        assert wait_until(lambda: not live.thread.is_alive())


def test_draining_ends_by_cancelling(fake: FakeEngine, tiny_base: Path) -> None:
    fake.step_s = 0.05
    with run_server(fake, tiny_base, base_name="tiny", shutdown_timeout_s=0.2) as live:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(live.post("/v1/completions", LONG)))
        thread.start()
        assert wait_until(lambda: fake.num_running == 1)
        live.server.handle_exit(15, None)
        thread.join(10)
        assert answers[0].status_code == 503
        assert wait_until(lambda: not live.thread.is_alive())


def test_logs_have_no_prompts(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    live.post("/v1/completions", {"model": "tiny", "prompt": "sesame secret", "max_tokens": 2})
    live.post("/v1/completions", {"model": "tiny", "prompt": ["sesame secret", 1]})
    entries = [r.getMessage() for r in caplog.records if r.name == "deltazip.access"]
    entry = json.loads(entries[0])
    assert (entry["status"], entry["variant"], entry["output_tokens"]) == (200, "tiny", 2)
    assert "sesame" not in caplog.text


def test_metrics_have_bounded_series(fake: FakeEngine, tiny_base: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    for i in range(20):
        fake.add_variant(f"v{i}", "/nowhere")
    with run_server(fake, tiny_base, base_name="tiny", max_metric_variants=5) as live:
        live.post("/v1/completions", {"model": "tiny", "prompt": "a b c", "max_tokens": 3})
        for i in range(50):
            live.client.get(f"/made/up/{i}")
            live.client.get(f"/v1/models/made-up-{i}")
        text = live.client.get("/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        labels = {s.labels["variant"] for s in families["deltazip_variant_device_bytes"].samples}
        assert labels == {"tiny", "v0", "v1", "v2", "v3", "_other"}
        other = [
            s.value
            for s in families["deltazip_variant_device_bytes"].samples
            if s.labels["variant"] == "_other"
        ]
        assert other == [16 * 20]
        routes = {s.labels["route"] for s in families["deltazip_http_requests"].samples}
        assert routes <= {"/v1/completions", "/v1/models/{id}", "other", "/metrics"}
        first = families["deltazip_time_to_first_token_seconds"].samples
        assert [s.value for s in first if s.name.endswith("_count")] == [1]
        # Series of variants that are gone go too.
        for i in range(20):
            fake.remove_variant(f"v{i}")
        assert 'variant="v0"' not in live.client.get("/metrics").text


def test_a_slow_template_does_not_stop_the_loop(live: Live, fake: FakeEngine) -> None:
    from deltazip.chat_template import ChatTemplate

    slow = ChatTemplate(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        timeout_s=1.5,
    )
    text = live.app.state.registry.base.text
    object.__setattr__(text, "chat_template", slow)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    result: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: result.append(live.post("/v1/chat/completions", body)))
    thread.start()
    started = time.monotonic()
    num_answers = 0
    while thread.is_alive():
        assert live.client.get("/health/live").status_code == 200
        num_answers += 1
    assert num_answers / (time.monotonic() - started) > 5
    assert result[0].status_code == 400
    assert "took too long" in result[0].json()["error"]["message"]


def test_strict_servers_refuse_unknown_fields(fake: FakeEngine, tiny_base: Path) -> None:
    with run_server(fake, tiny_base, base_name="tiny", strict=True) as live:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        assert live.post("/v1/completions", body).status_code == 200
        response = live.post("/v1/completions", {**body, "frobnicate": 1})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "frobnicate"


def test_the_application_handles_what_is_not_http(live: Live) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(live.app.asgi({"type": "websocket"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1003}]


def test_app_routes_are_the_documented_ones(live: Live) -> None:
    paths = {route.path for route in live.app.api.routes if isinstance(route, APIRoute)}
    assert paths == {
        "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/tokenize",
        "/v1/detokenize", "/v1/models", "/v1/models/{model_id}", "/health", "/health/live",
        "/metrics", "/v1/load_variant", "/v1/unload_variant",
    }  # fmt: skip
