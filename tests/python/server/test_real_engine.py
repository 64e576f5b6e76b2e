"""The server over the compiled engine, with a tiny random base and two deltas of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import device
import httpx
import openai
import pytest
from deltazip import _C
from deltazip.server.run import _capacity_table
from deltazip.tokenizer import Tokenizer
from serving_support import tiny
from serving_support.live import Live, run_server, wait_until

ADMIN = {"Authorization": "Bearer key-admin"}
NAMES = ["tiny", "red", "blue"]


def make_core(base: Path, **options: Any) -> _C.Engine:
    small = {"num_threads": 1, "kv_cache_bytes": 8 << 20, "max_batch_sequences": 16}
    small |= device.OPTIONS
    return _C.Engine(_C.EngineConfig(base=str(base), **{**small, **options}))


@pytest.fixture(scope="module")
def served(
    tiny_base: Path, tiny_deltas: dict[str, Path], device_options: dict[str, object]
) -> Iterator[Live]:
    """Base and two variants, behind an API key and an admin key."""
    core = make_core(tiny_base)
    variants = [f"{name}={path}" for name, path in tiny_deltas.items()]
    with run_server(
        core,
        tiny_base,
        base_name="tiny",
        variant=variants,
        api_key=["key-user"],
        admin_key="key-admin",
        allow_load_root=[tiny_base.parent],
    ) as live:
        yield live


@pytest.fixture
def client(served: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="key-user", max_retries=0) as client:
        yield client


def greedy(client: openai.OpenAI, model: str, prompt: Any, count: int = 12, **more: Any) -> str:
    answer = client.completions.create(
        model=model, prompt=prompt, temperature=0, max_tokens=count, **more
    )
    return answer.choices[0].text


def test_the_capacity_table_names_each_variant(served: Live) -> None:
    core = served.app.state.core
    what, _, detail = (list(column.cells) for column in _capacity_table(core).columns)
    details = dict(zip(what, detail, strict=True))
    for info in core.variants()[1:]:
        assert info.content_digest[:12] in details[info.name]
    assert {"base weights", "KV cache", *NAMES[1:]} <= set(what)


def test_variants_answer_differently_and_together(client: openai.OpenAI) -> None:
    prompts = ["the quick brown", "many fine-tunes", "SELECT name"]
    alone = {(m, p): greedy(client, m, p) for m in NAMES for p in prompts}
    assert len({alone[model, prompts[0]] for model in NAMES}) == 3
    with ThreadPoolExecutor(9) as pool:
        together = {key: pool.submit(greedy, client, *key) for key in alone}
        assert device.mostly(future.result() == alone[key] for key, future in together.items())


def test_models_name_parent_and_revision(client: openai.OpenAI, served: Live) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert list(models) == NAMES
    assert models["tiny"]["parent"] is None
    assert models["tiny"]["revision"] == served.app.state.core.base_digest()
    assert models["red"]["parent"] == models["blue"]["parent"] == "tiny"
    assert len({models[name]["revision"] for name in NAMES}) == 3
    assert client.models.retrieve("red").id == "red"


@device.bitwise
def test_chat_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "the lazy dog 🚀"}]
    options: dict[str, Any] = {"model": "red", "messages": messages, "max_tokens": 24, "n": 2}
    options |= {"seed": 7, "temperature": 1.0, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**options)
    texts, finishes, logprobs = ["", ""], ["", ""], ([], [])  # type: ignore[var-annotated]
    usage = None
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            logprobs[choice.index].extend(choice.logprobs.content if choice.logprobs else [])
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    for choice, streamed in zip(whole.choices, logprobs, strict=True):
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [t.logprob for t in choice.logprobs.content] == [t.logprob for t in streamed]
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 3
            assert entry.logprob <= entry.top_logprobs[0].logprob <= 0


def test_stop_text_of_a_real_answer(client: openai.OpenAI) -> None:
    text = greedy(client, "blue", "the quick", 30, extra_body={"ignore_eos": True})
    stop = text[8:11]
    cut = greedy(client, "blue", "the quick", 30, stop=[stop], extra_body={"ignore_eos": True})
    assert cut == text[: text.index(stop)]


def test_prompt_logprobs_and_scoring(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompt = "the quick brown fox"
    ids = tokenizer.encode(prompt)
    scored = client.completions.create(
        model="red", prompt=prompt, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert scored.text == prompt
    assert scored.logprobs is not None and scored.logprobs.token_logprobs is not None
    assert scored.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in scored.logprobs.token_logprobs[1:])
    assert len(scored.logprobs.tokens or []) == len(ids)
    full = client.completions.create(
        model="red", prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": 1}
    ).choices[0]
    rows = full.model_dump()["prompt_logprobs"]
    assert rows[0] is None and len(rows) == len(ids)
    for token, row, value in zip(
        ids[1:], rows[1:], scored.logprobs.token_logprobs[1:], strict=True
    ):
        assert row[str(token)]["logprob"] == pytest.approx(value, abs=max(1e-4, device.GAP))


def test_errors_reach_the_official_client(client: openai.OpenAI, served: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        greedy(client, "nobody", "x")
    with pytest.raises(openai.BadRequestError, match="context is 512 tokens"):
        greedy(client, "red", [5] * 500, 100)
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        client.chat.completions.create(
            model="red",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    bad = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        bad.models.list()


def test_a_dropped_stream_gives_everything_back(client: openai.OpenAI, served: Live) -> None:
    core = served.app.state.core
    stream = client.completions.create(
        model="red", prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert wait_until(lambda: core.stats().num_running == 0, 5)
    assert wait_until(lambda: core.stats().num_free_blocks == core.stats().num_blocks, 5)
    core.check()


def test_load_use_unload(served: Live, tiny_base: Path, client: openai.OpenAI) -> None:
    folder = tiny.write_delta(tiny_base.parent / "green", tiny_base, seed=9)
    loaded = served.post("/v1/load_variant", {"name": "green", "path": str(folder)}, headers=ADMIN)
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["parent"] == "tiny" and len(loaded.json()["revision"]) == 64
    assert "green" in [model.id for model in client.models.list()]
    first = greedy(client, "green", "the quick")
    again = served.post("/v1/load_variant", {"name": "green", "path": str(folder)}, headers=ADMIN)
    assert again.status_code == 409

    # Unloading drains: what runs goes on, what is new gets 404.
    stream = client.completions.create(
        model="green", prompt="x", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = [next(stream)]
    gone = served.post("/v1/unload_variant", {"name": "green"}, headers=ADMIN)
    assert gone.status_code == 200
    with pytest.raises(openai.NotFoundError):
        greedy(client, "green", "x")
    chunks += stream  # on a busy machine the first one may hold all tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert wait_until(lambda: not served.app.state.core.is_draining("green"))
    assert served.post("/v1/unload_variant", {"name": "green"}, headers=ADMIN).status_code == 404

    # Another delta under the same name: nothing of the old one is left.
    tiny.write_delta(folder, tiny_base, seed=10)
    body = {"name": "green", "path": str(folder)}
    assert served.post("/v1/load_variant", body, headers=ADMIN).status_code == 200
    assert greedy(client, "green", "the quick") != first
    waiting = served.post("/v1/unload_variant", {"name": "green", "wait_s": 10}, headers=ADMIN)
    assert waiting.json()["status"] == "unloaded"


def test_bad_loads_change_nothing(
    served: Live, tiny_base: Path, tmp_path: Path, client: openai.OpenAI
) -> None:
    root = tiny_base.parent
    good = tiny.write_delta(root / "good", tiny_base, seed=3)
    outside = shutil.copytree(good, tmp_path / "outside")
    (root / "link").unlink(missing_ok=True)
    (root / "link").symlink_to(outside)
    linked = root / "linked-file"
    linked.mkdir(exist_ok=True)
    (linked / "delta.safetensors").unlink(missing_ok=True)
    (linked / "delta.safetensors").symlink_to(outside / "delta.safetensors")
    cut = shutil.copytree(good, root / "cut", dirs_exist_ok=True)
    data = (cut / "delta.safetensors").read_bytes()
    (cut / "delta.safetensors").write_bytes(data[: len(data) // 2])
    other_base = tiny.write_base(tmp_path / "other-base", seed=5)
    wrong = tiny.write_delta(root / "wrong-base", other_base)
    empty = root / "empty"
    empty.mkdir(exist_ok=True)
    torn = shutil.copytree(good, root / "torn", dirs_exist_ok=True)
    (torn / "tokenizer.json").write_text("{")
    before = [model.id for model in client.models.list()]
    cases: list[tuple[str, Any, int]] = [
        ("new", outside, 403),
        ("new", root / "link", 403),
        ("new", linked, 403),
        ("new", f"{root}/../{tmp_path.name}", 403),
        ("new", root / ".." / ".." / "etc", 403),
        ("new", "/etc", 403),
        ("new", "relative/path", 403),
        ("new", f"{good}\0x", 400),
        ("new", root / "nowhere", 400),
        ("new", cut, 400),
        ("new", wrong, 400),
        ("new", empty, 400),
        ("new", torn, 400),
        ("../new", good, 400),
        ("a/b", good, 400),
        ("", good, 400),
        ("x" * 129, good, 400),
        (".hidden", good, 400),
        ("new\n", good, 400),
        ("red", good, 409),
        ("tiny", good, 409),
    ]
    for name, path, status in cases:
        response = served.post("/v1/load_variant", {"name": name, "path": str(path)}, headers=ADMIN)
        assert response.status_code == status, (name, path, response.text)
        assert response.json()["error"]["message"]
    assert served.post("/v1/unload_variant", {"name": "tiny"}, headers=ADMIN).status_code == 400
    assert [model.id for model in client.models.list()] == before
    assert greedy(client, "red", "the quick")


def test_metrics_follow_the_engine(served: Live, client: openai.OpenAI) -> None:
    greedy(client, "red", "the quick", 5)
    text = served.client.get("/metrics", headers={"Authorization": "Bearer key-user"}).text
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    assert float(values['deltazip_variant_output_tokens_total{variant="red"}']) >= 5
    assert float(values['deltazip_variant_device_bytes{variant="red"}']) > 0
    assert float(values['deltazip_variant_state{state="resident",variant="red"}']) == 1
    assert float(values['deltazip_time_to_first_token_seconds_count{variant="red"}']) >= 1
    assert float(values["deltazip_engine_kv_blocks"]) > 0
    assert float(values["deltazip_engine_alive"]) == 1


def test_many_at_once_with_cancels(served: Live, client: openai.OpenAI) -> None:
    core = served.app.state.core

    def one(i: int) -> str:
        stream = client.completions.create(
            model=NAMES[i % 3],
            prompt=f"the quick {i}",
            max_tokens=40,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        if i % 3 == 1:
            next(iter(stream))
            stream.close()
            return "dropped"
        return [c.choices[0].finish_reason for c in stream if c.choices][-1] or ""

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(one, range(90)))
    assert results.count("length") == 60 and results.count("dropped") == 30
    assert wait_until(lambda: core.stats().num_running == 0)
    assert wait_until(lambda: core.stats().num_free_blocks == core.stats().num_blocks)
    core.check()


def start_process(base: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """The server as its users start it; returns it and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deltazip.server", "--base", str(base), "--port", "0"]
        + ["--threads", "1", "--kv-cache-gib", "0.01", *device.ARGUMENTS, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DELTAZIP_LOG_LEVEL": "info", "COLUMNS": "120"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if "ready at" not in line:
        process.kill()
        raise AssertionError(f"not ready: {line!r} {process.communicate()[1]}")
    return process, line.rsplit(" ", 1)[1].strip()


@pytest.mark.usefixtures("device_options")
def test_sigterm_finishes_what_runs(tiny_base: Path, tiny_deltas: dict[str, Path]) -> None:
    process, url = start_process(tiny_base, "--variant", f"red={tiny_deltas['red']}")
    body = {"model": "red", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    lines: list[str] = []

    def read() -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines.extend(line for line in response.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    assert wait_until(lambda: len(lines) > 2)
    process.send_signal(signal.SIGTERM)
    reader.join(60)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Capacity on" in errors and "KV cache" in errors
    assert "Traceback" not in errors


@pytest.mark.usefixtures("device_options")
def test_sigterm_with_an_idle_connection_is_quick(tiny_base: Path) -> None:
    process, url = start_process(tiny_base)
    with httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--base", "/nowhere"], "/nowhere"),
        (["--variant", "red"], "expected name=DIR"),
        (["--variant", "../x=/tmp"], "expected name=DIR"),
        (["--variant", "red=/nowhere"], "/nowhere"),
        (["--port", "70000"], "port"),
        (["--max-n", "0"], "max-n"),
        (["--allow-load-root", "/tmp"], "admin_key"),
    ],
)
def test_bad_command_lines_say_why(tiny_base: Path, options: list[str], words: str) -> None:
    base = [] if "--base" in options else ["--base", str(tiny_base)]
    result = subprocess.run(
        [sys.executable, "-m", "deltazip.server", "--port", "0", "--kv-cache-gib", "0.01"]
        + [*base, *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode in (1, 2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr
