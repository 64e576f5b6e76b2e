"""What answers look like, whole and streamed, over a scripted engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from deltazip.tokenizer import Tokenizer
from serving_support.fake_core import FakeEngine
from serving_support.live import Live

TEXT = "the quick 👩‍👩‍👧 fox, नमस्ते 🚀 jumps"


def complete(live: Live, **body: Any) -> dict[str, Any]:
    response = live.post("/v1/completions", {"model": "tiny", **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(live: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    with live.client.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_completion_repeats_the_prompt(live: Live, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    answer = complete(live, prompt=TEXT, max_tokens=len(ids))
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length"}
    ]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == usage["completion_tokens"] == len(ids)
    assert usage["total_tokens"] == 2 * len(ids)


def test_default_length_of_completions_is_16(live: Live) -> None:
    assert complete(live, prompt=TEXT)["usage"]["completion_tokens"] == 16


def test_chat_without_a_length_uses_the_rest_of_the_context(live: Live, fake: FakeEngine) -> None:
    fake.script = lambda prompt: [100]
    response = live.post("/v1/chat/completions", {"model": "tiny", "messages": say("hello")})
    answer = response.json()
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


def test_every_form_of_prompt(live: Live, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode("the fox"), tokenizer.encode("lazy dog 🚀")]
    for prompts in (["the fox", "lazy dog 🚀"], ids):
        answer = complete(live, prompt=prompts, max_tokens=min(map(len, ids)), n=2)
        texts = [choice["text"] for choice in answer["choices"]]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert texts[0] == texts[1] and texts[2] == texts[3] and texts[0] != texts[2]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert complete(live, prompt=ids[0], max_tokens=len(ids[0]))["choices"][0]["text"] == "the fox"


def test_chat_stream_is_the_whole_answer_in_pieces(
    live: Live, fake: FakeEngine, tokenizer: Tokenizer
) -> None:
    answer = tokenizer.encode(TEXT)
    fake.script = lambda prompt: [*answer, 2]
    fake.step_s = 0.005
    body = {"model": "tiny", "messages": say("hello"), "stream_options": {"include_usage": True}}
    chunks = events(live, "/v1/chat/completions", body)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    pieces = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-1] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(answer)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_stream_without_usage_has_no_usage(live: Live) -> None:
    chunks = events(live, "/v1/completions", {"model": "tiny", "prompt": TEXT, "max_tokens": 4})
    assert all("usage" not in chunk for chunk in chunks)


def test_stream_of_several_choices(live: Live, tokenizer: Tokenizer) -> None:
    size = len(tokenizer.encode(TEXT))
    body = {"model": "tiny", "prompt": [TEXT, "lazy dog"], "n": 2, "max_tokens": size}
    texts = ["", "", "", ""]
    for chunk in events(live, "/v1/completions", body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts[0] == texts[1] == TEXT
    assert texts[2] == texts[3] and texts[2].startswith("lazy dog")


def test_a_stopped_choice_is_not_computed_on(
    live: Live, fake: FakeEngine, tokenizer: Tokenizer
) -> None:
    fake.answers = {0: tokenizer.encode("one stop two"), 1: tokenizer.encode("one two")}
    fake.step_s = 0.01
    choices = complete(live, prompt=TEXT, n=2, max_tokens=40, stop="stop")["choices"]
    assert choices[0]["text"] == "one " and choices[0]["finish_reason"] == "stop"
    assert choices[1]["text"].startswith("one twoone two")
    assert choices[1]["finish_reason"] == "length"
    assert fake.num_cancelled == 1, "the first choice alone, while the second went on"


@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_the_answer_wherever_tokens_break(
    live: Live, fake: FakeEngine, tokenizer: Tokenizer, tokens_per_step: int, stream: bool
) -> None:
    text = "many fine-tunes of one base; stop here and go on 🚀 there"
    fake.script = lambda prompt: tokenizer.encode(text)
    fake.tokens_per_step = tokens_per_step
    for stop, expected in (
        ("stop here", "many fine-tunes of one base; "),
        (["zebra", "on 🚀 th"], "many fine-tunes of one base; stop here and go "),
        (["e", "one"], "many fin"),
        ("zebra", text),
    ):
        body = {
            "model": "tiny",
            "prompt": "x",
            "stop": stop,
            "max_tokens": len(tokenizer.encode(text)),
        }
        if stream:
            choices = [c["choices"][0] for c in events(live, "/v1/completions", body)]
            got = "".join(choice["text"] for choice in choices)
            finish = choices[-1]["finish_reason"]
        else:
            answer = complete(live, **body)
            got, finish = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
            if stop == "stop here":  # tokens after the stop are not counted, however they came
                used = answer["usage"]["completion_tokens"]
                assert tokenizer.decode(tokenizer.encode(text)[:used]).endswith("stop here")
        assert got == expected
        assert finish == ("length" if stop == "zebra" else "stop")
    assert fake.num_running == 0


def test_line_breaks_of_unicode_do_not_break_the_stream(
    live: Live, fake: FakeEngine, tokenizer: Tokenizer
) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh"
    answer = tokenizer.encode(text)
    fake.script = lambda prompt: answer
    body = {"model": "tiny", "prompt": "x", "max_tokens": len(answer)}
    # httpx cuts lines as str.splitlines() does, at each of these characters.
    chunks = events(live, "/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_include_stop_text(live: Live, fake: FakeEngine, tokenizer: Tokenizer) -> None:
    fake.script = lambda prompt: tokenizer.encode("go on; stop here and there")
    answer = complete(live, prompt="x", stop="stop", max_tokens=50, include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "go on; stop"


def test_stop_tokens_and_the_variants_own_end(
    live: Live, fake: FakeEngine, tokenizer: Tokenizer
) -> None:
    fox = tokenizer.encode("fox")
    fake.script = lambda prompt: [*fox, 2, *fox]
    answer = complete(live, prompt="x", max_tokens=50)
    assert answer["choices"][0] == {
        "index": 0,
        "text": "fox",
        "logprobs": None,
        "finish_reason": "stop",
    }
    ignoring = complete(live, prompt="x", max_tokens=2 * len(fox) + 1, ignore_eos=True)
    assert ignoring["choices"][0]["text"] == "foxfox"
    shown = complete(
        live, prompt="x", max_tokens=2 * len(fox) + 1, ignore_eos=True, skip_special_tokens=False
    )
    assert shown["choices"][0]["text"] == "fox<|im_end|>fox"
    stopped = complete(live, prompt="x", max_tokens=50, stop_token_ids=[fox[-1]])
    assert stopped["choices"][0]["text"] == tokenizer.decode(fox[:-1])


def test_logprobs_of_chat(live: Live, fake: FakeEngine, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🚀 go")
    fake.script = lambda prompt: ids
    body = {
        "model": "tiny",
        "messages": say("x"),
        "max_tokens": len(ids),
        "logprobs": True,
        "top_logprobs": 2,
    }
    content = live.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [-0.5] * len(ids)
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "🚀 go"
    # Minus infinity is not JSON.
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -9999.0]
    streamed = [
        entry
        for chunk in events(live, "/v1/chat/completions", body)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


def test_logprobs_and_echo_of_completions(live: Live, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox")
    choice = complete(live, prompt="the fox", max_tokens=len(ids), logprobs=2, echo=True)[
        "choices"
    ][0]
    assert choice["text"] == "the foxthe fox"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == "the foxthe fox"
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"][len(ids)] == len("the fox")
    assert logprobs["token_logprobs"][-1] == -0.5
    assert len(logprobs["top_logprobs"]) == 2 * len(ids)
    scored = complete(live, prompt="the fox", max_tokens=0, logprobs=1, echo=True)
    assert scored["choices"][0]["text"] == "the fox"
    assert scored["usage"]["completion_tokens"] == 0


def test_parameters_reach_the_engine(live: Live, fake: FakeEngine) -> None:
    complete(
        live,
        prompt="x",
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=-1,
        n=2,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.2,
        min_tokens=1,
        logit_bias={"5": -3.5},
        priority=-7,
        cache_salt="tenant",
        max_tokens=3,
    )
    last = fake.submitted[-1]
    sampling = last["sampling"]
    assert (last["priority"], last["cache_salt"], last["variant"]) == (-7, "tenant", "")
    assert sampling.n == 2 and sampling.max_tokens == 3 and sampling.min_tokens == 1
    assert sampling.temperature == pytest.approx(0.5) and sampling.top_k == 7
    assert sampling.top_p == pytest.approx(0.9) and sampling.min_p == pytest.approx(0.1)
    assert sampling.seed == 2**64 - 1
    assert sampling.repetition_penalty == pytest.approx(1.1)
    assert sampling.presence_penalty == pytest.approx(0.2)
    assert sampling.frequency_penalty == pytest.approx(-0.2)
    assert dict(sampling.logit_bias) == {5: -3.5}


def test_content_parts_are_joined_by_lines(
    live: Live, fake: FakeEngine, tokenizer: Tokenizer
) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    live.post(
        "/v1/chat/completions",
        {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": parts}]},
    )
    prompt = tokenizer.decode(fake.submitted[-1]["prompt"], skip_special_tokens=False)
    assert prompt == "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"


def test_tokenize_and_back(live: Live, tokenizer: Tokenizer) -> None:
    for prefix in ("", "/v1"):
        answer = live.post(f"{prefix}/tokenize", {"model": "tiny", "prompt": TEXT}).json()
        assert answer["tokens"] == tokenizer.encode(TEXT)
        assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 512
        back = live.post(f"{prefix}/detokenize", {"model": "tiny", "tokens": answer["tokens"]})
        assert back.json() == {"prompt": TEXT}
    chat = live.post("/tokenize", {"model": "tiny", "messages": say("hi")}).json()["tokens"]
    text = tokenizer.decode(chat, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\n")


def test_models_have_parent_and_revision(live: Live, fake: FakeEngine) -> None:
    answer = live.client.get("/v1/models").json()
    assert [model["id"] for model in answer["data"]] == ["tiny"]
    assert answer["data"][0]["revision"] == fake.base_digest()
    assert answer["data"][0]["parent"] is None
    assert live.client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_an_engine_error_is_a_500_and_ends_a_stream(live: Live, fake: FakeEngine) -> None:
    fake.fails_with = "the logits are not finite"
    response = live.post("/v1/completions", {"model": "tiny", "prompt": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "not finite" in response.json()["error"]["message"]
    last = events(live, "/v1/completions", {"model": "tiny", "prompt": "x"})[-1]
    assert last["error"]["code"] == "engine_error"
    fake.fails_with = ""
    assert complete(live, prompt="x", max_tokens=1)["choices"][0]["text"] == "x"
