"""What is calibrated on: every shape of file, the chat template, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deltazip.compress import calibration
from deltazip.compress.calibration import CalibrationError, Sample


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_shape_of_line_is_the_same_conversation(tmp_path: Path) -> None:
    user = {"role": "user", "content": "one two"}
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "one two", "completion": "three"},
        {"question": "one two", "answer": "three"},
        {"instruction": "one two", "output": "three"},
        {"messages": [user, {"role": "assistant", "content": "three"}]},
    )
    assert calibration.load_samples(path) == [Sample((user,), "three")] * 4
    open_ended = write(tmp_path / "b.jsonl", {"messages": [user]})
    assert calibration.load_samples(open_ended) == [Sample((user,), "")]


def test_prompts_go_through_the_template_and_answers_follow(pair: tuple[Path, Path]) -> None:
    tokenizer = calibration.load_tokenizer(pair[1])
    sample = Sample(({"role": "user", "content": "one two"},), "three four")
    encoded = calibration.encode(tokenizer, sample)
    words = tokenizer.convert_ids_to_tokens(list(encoded.ids))  # type: ignore[attr-defined]
    # The template's own system message, and no end token: nothing is read after it.
    want = "<s> system be helpful </s> <s> user one two </s> <s> assistant three four"
    assert words == want.split()
    assert words[encoded.prompt_length :] == ["three", "four"]
    assert calibration.prompt_ids(tokenizer, sample) == list(encoded.ids[: encoded.prompt_length])


def test_text_is_cut_into_windows_and_conversations_are_cut_short(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    tokenizer = calibration.load_tokenizer(pair[1])
    text = tmp_path / "plain.txt"
    text.write_text("one two three four five " * 100)
    sequences = calibration.calibration_sequences(
        tokenizer, calibration.load_samples(text), num_samples=100, max_length=64, seed=0
    )
    assert sorted(map(len, sequences)) == [500 % 64, *[64] * 7]
    talk = [Sample(({"role": "user", "content": "one " * 50},), "two")] * 10
    sequences = calibration.calibration_sequences(
        tokenizer, talk, num_samples=9, max_length=40, seed=0
    )
    assert list(map(len, sequences)) == [40] * 9
    sequences = calibration.calibration_sequences(
        tokenizer, talk, num_samples=9, max_length=40, seed=0, max_tokens=281
    )
    assert list(map(len, sequences)) == [40] * 8


def test_the_seed_chooses(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    tokenizer = calibration.load_tokenizer(pair[1])
    loaded = calibration.load_samples(samples)
    chosen = [
        calibration.calibration_sequences(
            tokenizer, loaded, num_samples=30, max_length=99, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    everything = {calibration.encode(tokenizer, sample).ids for sample in loaded}
    assert set(chosen[2]) <= everything


def test_common_prefix() -> None:
    assert calibration.common_prefix([(1, 2, 3, 4), (1, 2, 5), (1, 2, 3)]) == 2
    assert calibration.common_prefix([(1, 2), (1, 2)]) == 1
    assert calibration.common_prefix([(1,), (2, 3)]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is nothing in it"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": ', r"bad\.jsonl:2: not JSON"),
        ("[1, 2]", "expected an object, got list"),
        ('{"input": "a"}', "expected keys .*; got input"),
        ('{"prompt": "a", "completion": 3}', "'prompt' and 'completion' must be text"),
        ('{"prompt": "a"}', "'prompt' and 'completion' must be text"),
        ('{"messages": [{"content": "a"}]}', "every message needs 'role' and 'content'"),
        ('{"messages": []}', "expected keys"),
    ],
)
def test_a_bad_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=message):
        calibration.load_samples(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.jsonl"):
        calibration.load_samples(tmp_path / "none.jsonl")
