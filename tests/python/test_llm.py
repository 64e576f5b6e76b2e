"""The offline API over the compiled engine, with a tiny random base."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import device
import pytest

sys.path.insert(0, str(Path(__file__).parent / "server"))

from deltazip import LLM, SamplingParams
from deltazip.tokenizer import Tokenizer, load_tokenizer
from serving_support import tiny

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("llm") / "base")


@pytest.fixture(scope="module")
def llm(base: Path, device_options: dict[str, object]) -> Iterator[LLM]:
    red = tiny.write_delta(base.parent / "red", base, seed=1)
    options = {"num_threads": 1, "kv_cache_bytes": 8 << 20} | device_options
    with LLM(base, {"red": red}, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return load_tokenizer(base)


def test_answers_come_in_order(llm: LLM) -> None:
    prompts = [f"the quick {i} fox" for i in range(40)]
    together = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in together] == prompts
    alone = [llm.generate(output.prompt or "", GREEDY)[0].text for output in together[::3]]
    assert device.mostly(a == b.text for a, b in zip(alone, together[::3], strict=True))
    assert all(len(output.outputs[0].token_ids) == 12 for output in together)
    assert {output.outputs[0].finish_reason for output in together} == {"length"}


def test_one_variant_for_each_prompt(llm: LLM) -> None:
    names = ["", "red", "", "red"]
    outputs = llm.generate(["the quick"] * 4, GREEDY, names)
    assert [output.variant for output in outputs] == names
    assert outputs[0].text == outputs[2].text != outputs[1].text == outputs[3].text


def test_text_and_ids_are_the_same_prompt(llm: LLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("lazy dog")
    by_ids, by_list, by_text = (
        llm.generate(prompt, GREEDY)[0] for prompt in (ids, [ids], "lazy dog")
    )
    assert by_ids.text == by_list.text == by_text.text
    assert by_ids.prompt is None and by_text.prompt_token_ids == ids
    assert tokenizer.decode(by_ids.outputs[0].token_ids) == by_ids.text


def test_chat_uses_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    one = llm.chat(conversation, GREEDY, "red")[0]
    assert one.prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    several = llm.chat([conversation, conversation], [GREEDY, GREEDY], ["", "red"])
    assert several[1].text == one.text != several[0].text


def test_several_seeded_answers(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, temperature=1.5, max_tokens=10, ignore_eos=True)
    first, again = (llm.generate("the fox", params)[0] for _ in range(2))
    texts = [completion.text for completion in first.outputs]
    assert texts == [completion.text for completion in again.outputs]
    assert len(set(texts)) == 3


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=1, ignore_eos=True
    )
    output = llm.generate("the quick brown", params)[0]
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None and len(logprobs) == 4
    for entry, token in zip(logprobs, output.outputs[0].token_ids, strict=True):
        assert entry.token == token and entry.rank == 1
        assert entry.top[token] == entry.logprob == max(entry.top.values())
        assert len(entry.top) == 3
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    plain = llm.generate("the quick brown", GREEDY)[0]
    assert plain.outputs[0].logprobs is None and plain.prompt_logprobs is None


def test_stop_texts(llm: LLM, tokenizer: Tokenizer) -> None:
    text = llm.generate("the quick", GREEDY)[0].text
    stop = text[3:5]
    for include in (False, True):
        params = SamplingParams(
            temperature=0,
            max_tokens=12,
            ignore_eos=True,
            stop=stop,  # type: ignore[arg-type]
            include_stop_str_in_output=include,
        )
        completion = llm.generate("the quick", params)[0].outputs[0]
        assert completion.text == text[: text.index(stop)] + (stop if include else "")
        assert completion.finish_reason == "stop"
        assert tokenizer.decode(completion.token_ids).startswith(completion.text)


@device.bitwise
def test_a_stopped_choice_is_not_computed_on(llm: LLM) -> None:
    def params(stop: list[str]) -> SamplingParams:
        return SamplingParams(
            n=2, seed=5, temperature=1.5, max_tokens=300, ignore_eos=True, stop=stop
        )

    def num_computed() -> int:
        return llm._engine.variants()[0].num_output_tokens

    before = num_computed()
    first, second = (c.text for c in llm.generate("the fox", params([]))[0].outputs)
    assert num_computed() - before == 600
    stop = next(first[i : i + 3] for i in range(len(first)) if first[i : i + 3] not in second)
    before = num_computed()
    cut, whole = llm.generate("the fox", params([stop]))[0].outputs
    assert cut.text == first[: first.index(stop)] and cut.finish_reason == "stop"
    assert whole.text == second and whole.finish_reason == "length"
    assert num_computed() - before < 600


def test_without_a_limit_the_context_is_the_limit(llm: LLM) -> None:
    output = llm.generate("x", SamplingParams(temperature=0, ignore_eos=True))[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 512


def test_more_prompts_than_the_queue_holds(base: Path, device_options: dict[str, object]) -> None:
    options = {"num_threads": 1, "kv_cache_bytes": 8 << 20, "max_waiting": 2} | device_options
    with LLM(base, **options) as small:
        outputs = small.generate([f"fox {i}" for i in range(20)], GREEDY, progress=True)
    assert len({output.text for output in outputs}) > 5


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda llm: llm.generate("x", GREEDY, "nobody"), KeyError, "nobody"),
        (lambda llm: llm.generate("", GREEDY), ValueError, "at least one token"),
        (lambda llm: llm.generate([[10**6]], GREEDY), ValueError, "vocabulary"),
        (lambda llm: llm.generate("x " * 600, GREEDY), ValueError, "context is 512"),
        (lambda llm: llm.generate(["x"], [GREEDY, GREEDY]), ValueError, "got 2"),
        (lambda llm: llm.chat([{"role": "user"}], GREEDY), ValueError, "'content'"),
        (lambda llm: SamplingParams(n=0), ValueError, "n: expected at least 1, got 0"),
        (lambda llm: SamplingParams(temperature=float("nan")), ValueError, "finite"),
        (lambda llm: SamplingParams(top_p=0.0), ValueError, "top_p"),
        (lambda llm: SamplingParams(max_tokens=2, min_tokens=3), ValueError, "min_tokens"),
        (lambda llm: SamplingParams(stop=[""]), ValueError, "stop"),
        (lambda llm: llm.add_variant("red", "/nowhere"), ValueError, "red"),
        (lambda llm: llm.add_variant("new", "/nowhere"), ValueError, "/nowhere"),
        (lambda llm: llm.remove_variant("nobody"), KeyError, "nobody"),
    ],
)
def test_errors_name_what_was_wrong(
    llm: LLM, call: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(llm)  # type: ignore[operator]
    assert llm.generate("the quick", GREEDY)[0].text


def test_variants_come_and_go(llm: LLM, base: Path) -> None:
    blue = tiny.write_delta(base.parent / "blue", base, seed=2)
    llm.add_variant("blue", blue)
    assert llm.variants == ["red", "blue"]
    assert llm.generate("the quick", GREEDY, "blue")[0].text
    llm.remove_variant("blue")
    with pytest.raises(KeyError, match="blue"):
        llm.generate("x", GREEDY, "blue")


def test_a_bad_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        LLM(tmp_path / "nowhere")
